"""Atomic writing of files and folders, and other file helpers. Does not import torch.

Neither a killed process nor a power failure leaves a partially written file or folder: content is written next to its
destination under a temporary name that contains the machine and the process ID, synced to disk, and renamed. Temporary
files of a killed process are removed by the next process that writes to the same destination.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from tracknet.errors import UserError, shorten

# Error numbers of failed writes with a cause that the user can fix: permissions, disk space, quota, path, hardware.
UNWRITABLE = frozenset(
    getattr(errno, name)
    for name in [
        "EACCES",
        "EPERM",
        "EROFS",
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "ENOTDIR",
        "EISDIR",
        "EEXIST",
        "ENAMETOOLONG",
        "ELOOP",
        "EIO",
    ]
)
_COUNT = itertools.count()  # numbers the temporary names of this process
MAX_NAME, MAX_PATH = 255, 4095  # maximum length of a file name and of a path on Linux, in bytes
# Identifies this machine in temporary names: on a shared disk, a process ID of another machine means nothing here.
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: the file at the yielded path replaces ``path`` if the context exits without an error.

    After an error the temporary file is removed and ``path`` is unchanged.

    Args:
        path: file to create or replace, in an existing folder.

    Yields:
        Temporary path to write to, in the same folder and with the same suffix.

    Raises:
        OSError: if the file cannot be written; the error names the file.
    """
    work = _work_path(path)
    with naming_the_file(path):
        try:
            yield work
            # The content must be on disk before the rename is, and the rename is on disk when the folder is synced.
            sync(work)
            os.replace(work, path)
            sync(path.parent)
        finally:
            work.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Write a folder atomically: the yielded folder becomes ``path`` if the context exits without an error.

    After an error the temporary folder and the parents created for it are removed. With ``replace``, the previous
    folder is at ``path.old`` between two renames and is removed only when the new folder is on disk. Therefore ``path``
    or ``path.old`` is complete at every moment, even after several kills.

    Args:
        path: folder to create; missing parents are created, too.
        replace: whether ``path`` may exist already.

    Yields:
        Temporary folder to fill, next to ``path``.

    Raises:
        OSError: if the folder cannot be written; the error names the file or folder.
    """
    created_parents = [p for p in path.parents if not p.exists()]
    with naming_the_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work, old = _work_path(path), path.with_name(f"{path.name}.old")
        try:
            work.mkdir()
            yield work
            # All content must be on disk before the first rename.
            for inner in work.rglob("*"):
                sync(inner)
            sync(work)
            # A rename cannot replace a folder that is not empty, so the previous folder is moved away first.
            if replace and path.exists():
                shutil.rmtree(old, ignore_errors=True)  # left by a process killed after its new folder was in place
                os.rename(path, old)
            os.rename(work, path)
            sync(path.parent)  # the new folder is on disk; only now may the previous one be removed
            if replace:
                shutil.rmtree(old, ignore_errors=True)
        finally:
            # Restore the previous folder after an interruption between the two renames.
            if replace and old.exists() and not path.exists():
                os.rename(old, path)
            shutil.rmtree(work, ignore_errors=True)
            for parent in created_parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lock a path, so that only one process at a time creates the file.

    Other processes wait in the context manager. The operating system releases the lock of a process that dies.

    Args:
        path: file to create; the lock is the file ``path.lock`` beside it, removed on exit.
    """
    lock = Path(f"{path}.lock")
    with naming_the_file(lock), FileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with new_file(path) as work:
        work.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, max_bytes: int) -> Any:
    """Read a JSON file of bounded size, without NaN and infinity.

    Args:
        path: file to read.
        max_bytes: maximum size in bytes.

    Returns:
        Decoded content.

    Raises:
        UserError: if the file cannot be read, is too large, or is not valid JSON.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path}: damaged ({path.stat().st_size:,} bytes, expected at most {max_bytes:,}).")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except UserError:
        raise  # a UserError is a ValueError, which the next clause would catch
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or missing ({error}).") from error


def _refuse_constant(text: str) -> None:
    """Raise an error for ``NaN``, ``Infinity`` and ``-Infinity``, which Python's JSON parser accepts by default."""
    raise ValueError(f"{text} is not a finite number")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_user(path: str | Path, key: str) -> Path:
    """Expand ``~`` in a path and check the length of the path.

    Args:
        path: path from the configuration or the command line.
        key: configuration key or flag, for error messages.

    Raises:
        UserError: if the path refers to a user that does not exist on this machine, or if the path or one of its names
            is too long.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={path}: no such user on this machine; use a path without ~.") from error
    # The limits are in bytes, not characters. A name that is not valid UTF-8 contains surrogates.
    text = str(path).encode("utf-8", "surrogatepass")
    if len(text) > MAX_PATH or max(map(len, text.split(b"/"))) > MAX_NAME:
        raise UserError(f"{key}={shorten(str(path), 200)}: the path or a name in it is longer than the system allows.")
    return path


def sync(path: Path) -> None:
    """Flush the content of a file, or the directory entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems (FUSE, network) do not support syncing a folder, and there is no alternative.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def is_unwritable(error: BaseException) -> bool:
    """Return whether an error is a failed write that the user can fix, such as a full or read-only disk."""
    return isinstance(error, OSError) and error.errno in UNWRITABLE


@contextlib.contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Add ``path`` to errors of the file system that do not contain a file name.

    Writing to an open file raises such errors. safetensors raises ``SafetensorError`` instead of ``OSError``; it is
    converted if its message contains an error number.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _work_path(path: Path) -> Path:
    """Return a new temporary path next to ``path``, and remove the ones left by dead processes of this machine."""
    # Truncate long names: the temporary name must not exceed 255 bytes either.
    stem, suffix = path.stem[:40], path.suffix[:10]
    for leftover in path.parent.glob(f".{_escape(stem)}.part-{_HOST}-*{_escape(suffix)}"):
        pid = leftover.name.removeprefix(f".{stem}.part-{_HOST}-").partition("-")[0].removesuffix(suffix)
        if pid.isdecimal() and int(pid) != os.getpid() and not _is_alive(int(pid)):
            _remove(leftover)
    # The counter is shared by all threads, which may write the same file at the same time.
    return path.with_name(f".{stem}.part-{_HOST}-{os.getpid()}-{next(_COUNT)}{suffix}")


def _escape(text: str) -> str:
    """Escape the wildcards of a glob pattern."""
    return re.sub(r"([*?[])", r"[\1]", text)


def _is_alive(pid: int) -> bool:
    """Return whether a process of this machine exists; ``True`` in case of doubt."""
    try:
        os.kill(pid, 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or folder if possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_writable(path: Path, flag: str) -> None:
    """Check that a file or folder can be written or created, before work whose result would be lost.

    Args:
        path: file or folder, which need not exist.
        flag: command-line flag, for error messages.

    Raises:
        UserError: if the path, or its closest existing parent, is not writable, or if this parent is not a folder.
    """
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if existing != path.absolute() and not existing.is_dir():
        raise UserError(f"{flag} {path}: {existing} is not a folder; choose another path.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {path}: {existing} is not writable; choose another path.")
