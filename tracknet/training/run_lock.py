"""One training a run: a lock that says who holds it, and that the system frees when its holder dies."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tracknet.errors import UserError
from tracknet.files import write_text


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold a run's folder for the training inside.

    Raises:
        UserError: another process trains it; names the process.
    """
    lock, holder = FileLock(run / ".lock"), run / ".lock.holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            who = holder.read_text(encoding="utf-8").strip()
        except OSError:
            who = "another process"
        raise UserError(
            f"{run} is being trained by {who}: two at once would damage each other's files. Wait for it, or end it."
        ) from None
    try:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
        (run / ".lock").unlink(missing_ok=True)
