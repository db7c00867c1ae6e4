"""One training a run: a lock that says who holds it, and that the system frees when its holder dies."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tracknet.errors import UserError
from tracknet.files import naming_the_file, write_text

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold a run's folder for the training inside.

    Args:
        run: folder of the run.

    Raises:
        UserError: another process trains it; names the process.
        OSError: the folder cannot be written.
    """
    lock, holder = FileLock(run / ".lock"), run / ".lock.holder"
    try:
        with naming_the_file(run / ".lock"):
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run} is being trained by {_read(holder)}: two at once would damage each other's files. Wait for it, or"
            " end it."
        ) from None
    except NotImplementedError:  # some network file systems
        logger.warning(f"{run}: this file system knows no locks: nothing keeps a second training away from it.")
        yield
        return
    try:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
        yield
    finally:
        # Both while the lock is held, so that nobody else's are removed.
        holder.unlink(missing_ok=True)
        (run / ".lock").unlink(missing_ok=True)
        lock.release()


def _read(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
