"""Lock of a run folder, so that only one process trains a run at a time."""

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
    """Hold the lock of a run folder in this context.

    The operating system releases the lock when the process dies, so a killed training leaves no stale lock.

    Args:
        run: folder of the run.

    Raises:
        UserError: if another process trains the run; the message names the process.
        OSError: if the folder cannot be written.
    """
    lock, holder = FileLock(run / ".lock"), run / ".lock.holder"
    try:
        with naming_the_file(run / ".lock"):
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run} is being trained by {_read(holder)}: two trainings of one run would overwrite each other's files."
            " Wait until it ends, or stop it."
        ) from None
    except NotImplementedError:  # raised on some network file systems
        logger.warning(
            f"{run}: this file system does not support locks, so a second training of this run cannot be prevented."
        )
        yield
        return
    try:
        # The lock file itself has no content; a second file names the holder for the message above.
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
        yield
    finally:
        # Remove both files before releasing the lock. Afterwards they could belong to another process.
        holder.unlink(missing_ok=True)
        (run / ".lock").unlink(missing_ok=True)
        lock.release()


def _read(holder: Path) -> str:
    """Return the description of the process that holds the lock, or "another process" if it is not known."""
    try:
        return holder.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
