"""Interruptions of a training: SIGTERM, a full disk, a second training, and a killed loading process."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.memory.mmap import to_mmap
from tracknet.runs.load import load_run
from tracknet.scripts import cli
from tracknet.training.interruption import EXIT_CODE, Terminated, Termination
from tracknet.training.monitor import Monitor
from tracknet.training.run_lock import lock_run

TRAIN = [sys.executable, "-m", "tracknet.scripts.train"]
CHOICE = ["--data", "synthetic", "--model", "vit_tiny_heatmap", "--training", "default"]


def start(folder, settings, **options):
    """Start a training in a separate process, with its output in ``folder/log``."""
    arguments = [*CHOICE, "--output-dir", str(folder), *settings]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "500"}
        return subprocess.Popen([*TRAIN, *arguments], stdout=log, stderr=log, env=environment, **options)


def wait_for_step(folder, number, process):
    """Wait until a training has saved a step; return the folder of its run."""
    for _ in range(1200):
        for state in folder.glob("runs/*/last/state.json"):
            if json.loads(state.read_text())["progress"]["step"] >= number:
                return state.parent.parent
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    raise AssertionError((folder / "log").read_text())


def step_of(run):
    return json.loads((run / "last/state.json").read_text())["progress"]["step"]


def test_sigterm_saves_the_step_that_was_under_way_and_has_its_own_exit_code(tiny, tmp_path):
    """Regular saves show the test that training has started; after the signal, the current step is saved as well."""
    settings = [*tiny("vit"), "training.max_steps=100000", "training.epochs=100000", "data.num_workers=1"]
    every = ["training.checkpoint_every_steps=3", "training.validate_every_epochs=1000"]
    process = start(tmp_path, [*settings, *every], start_new_session=True)
    run = wait_for_step(tmp_path, 3, process)
    os.killpg(process.pid, signal.SIGTERM)  # like schedulers, signal the loading processes, too
    assert process.wait(60) == EXIT_CODE == 143
    said = (tmp_path / "log").read_text()
    assert "ended by SIGTERM" in said and f"Continue from last/: tracknet train --resume {run}" in said
    assert "Traceback" not in said
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    load_run(run, "last")
    stopped = step_of(run)
    assert cli.main(["train", "--resume", str(run), f"training.max_steps={stopped + 1}", "data.num_workers=0"]) == 0
    assert step_of(run) == stopped + 1


def test_an_epoch_is_saved_before_it_is_validated_and_validated_when_the_run_goes_on(tiny, tmp_path, monkeypatch):
    settings = [*tiny("vit"), "training.max_steps=2", "training.limit_train_batches=1", "training.epochs=2"]
    config = compose("synthetic", "vit_tiny_heatmap", "default", settings)
    run = tmp_path / "runs/r"

    def end(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("tracknet.training.trainer.score_windows", end)
        with pytest.raises(Terminated):
            train_run(config, run)
    assert step_of(run) == 1 and not (run / "best").exists()
    train_run(config, run, resume=True)
    undisturbed = tmp_path / "b/runs/r"
    train_run(config, undisturbed)
    a, b = (json.loads((r / "metrics.json").read_text()) for r in (run, undisturbed))
    assert {k: v for k, v in a.items() if k.startswith(("val_", "best"))} == {
        k: v for k, v in b.items() if k.startswith(("val_", "best"))
    }
    one, other = (load_run(r, "last")[1].state_dict() for r in (run, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_signal_waits_for_what_must_not_be_cut():
    termination, done = Termination(), []
    with pytest.raises(Terminated), termination.handled():
        with termination.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append("held")
        done.append("never")
    assert done == ["held"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_training_in_a_thread_leaves_signals_alone():
    seen = []

    def run():
        with Termination().handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_run_that_is_training_is_not_resumed_and_names_who_trains_it(tiny, tmp_path, capsys):
    settings = [
        *tiny("vit"),
        "training.max_steps=100000",
        "training.epochs=100000",
        "training.checkpoint_every_steps=1",
    ]
    process = start(tmp_path, settings)
    run = wait_for_step(tmp_path, 1, process)
    try:
        assert cli.main(["train", "--resume", str(run)]) == 2
        said = capsys.readouterr().err
        assert f"process {process.pid} on " in said and "is being trained by" in said
    finally:
        process.kill()
        process.wait()
    assert (
        cli.main(["train", "--resume", str(run), f"training.max_steps={step_of(run) + 1}"]) == 0
    )  # the lock was released when the process died
    assert not list(run.glob(".lock*"))


def test_a_lock_is_released_and_leaves_nothing(tmp_path):
    for _ in range(2):
        refused = pytest.raises(UserError, match=f"process {os.getpid()} on")
        with lock_run(tmp_path), refused, lock_run(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []


def limit_files_to(size):
    """Return a function that limits the file size of a process, so that larger writes fail as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_is_full_ends_a_training_with_one_message_and_its_last_good_state(tiny, tmp_path):
    settings = [*tiny("vit"), "training.max_steps=2", "training.checkpoint_every_steps=1"]
    assert start(tmp_path, settings).wait(120) == 0
    run = next(tmp_path.glob("runs/*"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    size = (run / "last/model.safetensors").stat().st_size // 2
    more = ["--resume", str(run), "training.max_steps=4"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.run([*TRAIN, *more], stdout=log, stderr=log, preexec_fn=limit_files_to(size), check=False)
    said = (tmp_path / "log").read_text()
    assert process.returncode == 2 and "Traceback" not in said, said
    assert f"{run}/last: File too large" in said.replace("\n", "") and "Continue from last/" in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "config.yaml"} == {
        p: content for p, content in before.items() if p.name != "config.yaml"
    }


@pytest.mark.parametrize("writes", ["cache", "offload"])
def test_a_disk_that_is_full_elsewhere_is_one_message_too(tiny, tmp_path, writes):
    settings = [*tiny("vit"), "training.max_steps=1"]
    if writes == "offload":
        settings += ["training.memory_optimization.use_disk_offload=true"]
        settings += ["training.memory_optimization.gradient_checkpointing=true", "data.cache=none"]
    process = start(tmp_path, settings, preexec_fn=limit_files_to(3000))
    said_code = process.wait(120)
    said = (tmp_path / "log").read_text()
    assert said_code == 2 and "Traceback" not in said and "File too large" in said, said
    assert "Choose another path, or make this one writable" in said
    assert not [
        p for name in ("cache", "runs", "offload") for p in (tmp_path / name).glob("*") if p.name != "CACHEDIR.TAG"
    ]


def test_an_error_of_an_offload_names_its_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught:
            to_mmap(torch.zeros(1000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path) and list(tmp_path.iterdir()) == []


def test_curves_that_cannot_be_written_end_and_the_training_goes_on(tmp_path, capfd, said):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Monitor(tmp_path / "logs/r", 100, 0) as monitor:
        monitor.scalars(0, {"a": 1.0})
        monitor.board.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        try:
            for step in range(100):
                monitor.scalars(step, {"a": 1.0})
                monitor.step("")
                if monitor.board is not None:
                    time.sleep(0.005)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sum("training continues without them" in line for line in said) == 1
    assert "Traceback" not in capfd.readouterr().err
    assert monitor.board is None


def test_a_loading_process_that_is_killed_is_one_message(tiny, tmp_path):
    settings = [
        *tiny("vit"),
        "training.max_steps=100000",
        "training.epochs=100000",
        "training.checkpoint_every_steps=1",
    ]
    process = start(tmp_path, [*settings, "data.num_workers=1"])
    wait_for_step(tmp_path, 1, process)
    for _ in range(2000):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            command = Path(f"/proc/{child}/cmdline")
            if command.exists() and b"train" in command.read_bytes():
                os.kill(int(child), signal.SIGKILL)
        if process.poll() is not None:
            break
        time.sleep(0.02)
    assert process.wait(60) == 2
    said = (tmp_path / "log").read_text()
    assert "A data loading process ended" in said and "data.num_workers" in said and "Continue from last/" in said
