"""Atomic writing of files and folders, with the writer killed or interrupted at any moment."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tracknet.files import naming_the_file, new_file, new_folder, one_at_a_time, write_json, write_text


def write(target, content, kill_at=1000):
    """Write a folder of two files in a child process that is killed before its n-th file operation.

    Return whether the process completed.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    calls = itertools.count()

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, names in ((os, ("rename", "replace", "fsync", "mkdir")), (shutil, ("rmtree",))):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    with new_folder(target, replace=True) as work:
        for name in "ab":
            (work / name).write_text(content)
    os._exit(0)


def read(target):
    """Return the content of a folder or, as when reading checkpoints, of its ``.old`` copy."""
    for folder in (target, target.with_name(f"{target.name}.old")):
        if folder.exists():
            return "".join((folder / name).read_text() for name in "ab")
    return None


def test_two_kills_anywhere_leave_a_whole_folder(tmp_path):
    ends, number = [], 0
    while True:
        lived = []
        for second in range(14):
            target = tmp_path / f"{number}-{second}/last"
            assert write(target, "1")
            lived.append(write(target, "2", number))
            assert read(target) in ("11", "22")
            write(target, "3", second)
            assert read(target) in ("11", "22", "33")
            ends.append(read(target))
            assert write(target, "4") and read(target) == "44"
            assert os.listdir(target.parent) == ["last"]  # nothing is left by the killed processes
        if all(lived):
            break
        number += 1
    assert number > 8 and set(ends) == {"11", "22", "33"}


def test_a_file_is_on_the_disk_before_its_name_is_and_the_old_one_goes_after(tmp_path, monkeypatch):
    """With this order of calls, a power failure at any moment leaves the old or the new content."""
    calls = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def call(*args, _name=name, _real=real):
            where = os.readlink(f"/proc/self/fd/{args[0]}") if _name == "fsync" else str(args[1])
            calls.append((_name, Path(where).name.partition(".part-")[0] or where))
            return _real(*args)

        monkeypatch.setattr(os, name, call)
    real_rmtree = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **k: (calls.append(("rmtree", Path(path).name)), real_rmtree(path, **k))
    )
    with new_folder(tmp_path / "last", replace=True) as work:
        (work / "a").write_text("1")
    calls.clear()
    with new_folder(tmp_path / "last", replace=True) as work:
        (work / "a").write_text("2")
    steps = [c for c in calls if c != ("rmtree", "last.old")]
    assert steps[:5] == [
        ("fsync", "a"),
        ("fsync", ".last"),
        ("rename", "last.old"),
        ("rename", "last"),
        ("fsync", tmp_path.name),
    ]
    assert calls.index(("rmtree", "last.old"), calls.index(("rename", "last"))) > calls.index(("fsync", tmp_path.name))
    calls.clear()
    write_text(tmp_path / "config.yaml", "x")
    assert calls == [("fsync", ".config"), ("replace", "config.yaml"), ("fsync", tmp_path.name)]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "a.json") as work:
        work.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new/deep/folder") as work:
        (work / "x").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "[\n  1\n]\n"


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with new_file(tmp_path / "a.txt") as mine:
        left = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{int(dead.stdout)}-")
        living = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
        left.write_text("")
        living.write_text("")
        elsewhere = (
            tmp_path / f".a.part-00000000-{int(dead.stdout)}-0.txt"
        )  # of another machine, where the process may be alive
        elsewhere.write_text("")
        write_text(tmp_path / "a.txt", "other")
        assert mine.name != left.name and not left.exists() and living.exists() and elsewhere.exists()
        mine.write_text("mine")
    assert (tmp_path / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("number", range(12))
def test_an_interrupt_anywhere_leaves_the_folder_at_its_place(tmp_path, monkeypatch, number):
    """This includes the moment between the two renames, in which a signal handler may raise."""
    write(tmp_path / "last", "1")
    calls = itertools.count()
    for name in ("rename", "fsync"):
        real = getattr(os, name)

        def call(*args, _real=real):
            if next(calls) == number:
                raise KeyboardInterrupt
            return _real(*args)

        monkeypatch.setattr(os, name, call)
    with contextlib.suppress(KeyboardInterrupt), new_folder(tmp_path / "last", replace=True) as work:
        for name in "ab":
            (work / name).write_text("2")
    monkeypatch.undo()
    assert (tmp_path / "last").is_dir() and read(tmp_path / "last") in ("11", "22")


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    """Each thread writes to a separate temporary file, and the last rename wins."""
    texts = [str(i) * 1000 for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "a.txt", text), texts))
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() in texts


def test_long_names_and_patterns_in_names_are_names(tmp_path):
    for name in ("x" * 251 + ".csv", "a[1]*?.csv", ".hidden", "ü" * 100):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert len(os.listdir(tmp_path)) == 4


def test_errors_of_a_disk_name_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, naming_the_file(tmp_path / "a"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(SafetensorError), naming_the_file(tmp_path / "a"):
        raise SafetensorError("header too large")
    with pytest.raises(OSError) as caught, naming_the_file(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as caught, naming_the_file(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert caught.value.filename == str(tmp_path / "b")


def test_a_lock_leaves_nothing_even_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), one_at_a_time(tmp_path / "a"):
        assert os.listdir(tmp_path) == ["a.lock"]
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
