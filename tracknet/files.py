"""Write files and folders whole or not at all: neither a kill nor a power cut leaves half of one. Needs no torch.

What is being written lies beside its place under a name that says which process writes it, is synced to the disk, and
is renamed. What a killed process left behind is removed by the next one that writes to the same place.
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

# What a disk says when something cannot be written, which the user can mend.
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
_COUNT = itertools.count()
MAX_NAME, MAX_PATH = 255, 4095  # bytes of a name and of a path, on Linux
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; it becomes ``path`` when all went well, and leaves nothing behind otherwise.

    Args:
        path: the file to make or to replace; its folder exists.

    Yields:
        A path in the same folder with the same suffix.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    work = _work_path(path)
    with naming_the_file(path):
        try:
            yield work
            sync(work)
            os.replace(work, path)
            sync(path.parent)
        finally:
            work.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Give a folder to fill; it becomes ``path`` when all went well, and leaves nothing behind otherwise.

    With ``replace``, what stood there before stands at ``path.old`` for the moment between two renames, and is removed
    only once the new folder is on the disk. So at every moment ``path`` or ``path.old`` is whole, also after several
    kills.

    Args:
        path: the folder to make.
        replace: whether it may exist already.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    made = [p for p in path.parents if not p.exists()]
    with naming_the_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work, old = _work_path(path), path.with_name(f"{path.name}.old")
        try:
            work.mkdir()
            yield work
            for inner in work.rglob("*"):
                sync(inner)
            sync(work)
            if replace and path.exists():
                shutil.rmtree(old, ignore_errors=True)  # left by a kill after the new one stood
                os.rename(path, old)
            os.rename(work, path)
            sync(path.parent)
            if replace:
                shutil.rmtree(old, ignore_errors=True)
        finally:
            if replace and old.exists() and not path.exists():  # interrupted between the two renames
                os.rename(old, path)
            shutil.rmtree(work, ignore_errors=True)
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let processes that want to make the same file wait for each other; the system frees the lock of one that dies."""
    lock = Path(f"{path}.lock")
    with naming_the_file(lock), FileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with new_file(path) as work:
        work.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, max_bytes: int) -> Any:
    """Read a JSON file of a bounded size; numbers are finite.

    Raises:
        UserError: it cannot be read, is too large, or is no JSON.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path}: damaged ({path.stat().st_size:,} bytes, at most {max_bytes:,} are expected).")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or missing ({error}).") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def hash_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_user(path: str | Path, key: str) -> Path:
    """Return a path with ``~`` written out.

    Raises:
        UserError: it names a user whom this machine does not know, or is longer than a path can be.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={path}: there is no such user on this machine.") from error
    text = str(path).encode("utf-8", "surrogatepass")
    if len(text) > MAX_PATH or max(map(len, text.split(b"/"))) > MAX_NAME:
        raise UserError(f"{key}={shorten(str(path), 200)}: longer than a path can be.")
    return path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems (FUSE, network) know no sync of folders; what they can do is done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def is_unwritable(error: BaseException) -> bool:
    """Whether an error says that the disk is full, read-only or forbidden."""
    return isinstance(error, OSError) and error.errno in UNWRITABLE


@contextlib.contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Let an error of the disk say which file it is about: writing to an open one does not, and safetensors has an
    error of its own."""
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
    """Return where to write beside ``path``, after removing what processes of this machine that are gone left there."""
    # Names end at 255 bytes: a long one is cut.
    stem, suffix = path.stem[:40], path.suffix[:10]
    for left in path.parent.glob(f".{_escape(stem)}.part-{_HOST}-*{_escape(suffix)}"):
        owner = left.name.removeprefix(f".{stem}.part-{_HOST}-").partition("-")[0].removesuffix(suffix)
        if owner.isdecimal() and int(owner) != os.getpid() and not _is_alive(int(owner)):
            _remove(left)
    # Counted over all threads, which may write the same file.
    return path.with_name(f".{stem}.part-{_HOST}-{os.getpid()}-{next(_COUNT)}{suffix}")


def _escape(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_writable(path: Path, flag: str) -> None:
    """Check early that a file or folder can be written, or made where it is not there yet."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if existing != path.absolute() and not existing.is_dir():
        raise UserError(f"{flag} {path}: {existing} is no folder; choose another place.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {path}: {existing} cannot be written; choose another place.")
