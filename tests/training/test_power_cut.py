"""Power failures and kills at any moment leave a run that loads and resumes (``pytest -m slow``, takes minutes)."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tracknet.errors import UserError
from tracknet.runs.load import load_run

pytestmark = pytest.mark.slow

NUM_CUTS = 30
NUM_KILLS = 60
COMMAND = [sys.executable, "-m", "tracknet.scripts.train"]
CHOICE = ["--data", "synthetic", "--model", "vit_tiny_heatmap", "--training", "default"]
EVERY_STEP = [
    "training.checkpoint_every_steps=1",
    "training.epochs=100000",
    "training.limit_train_batches=4",
    "training.limit_val_batches=1",
]


def start(arguments, log):
    with log.open("a") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*COMMAND, *arguments], stdout=out, stderr=out, env=environment)


def run_in(folder):
    return next(iter(folder.glob("runs/*")), None)


def step_of(folder):
    """Return the last saved step, or 0 if there is none."""
    run = run_in(folder)
    for name in ("last", "last.old"):
        with contextlib.suppress(OSError, ValueError):
            if run is not None:
                return json.loads((run / name / "state.json").read_text())["progress"]["step"]
    return 0


@pytest.fixture
def disk(tmp_path):
    """Mount an empty ext4 file system from an image file, which contains only data that was synced to disk."""
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(96 * 2**20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mkfs.ext4 and the right to mount ({error})")
    yield image, place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_power_cut_at_any_moment_leaves_a_checkpoint_that_loads(tiny, disk, tmp_path):
    image, place = disk
    process = start(
        [*CHOICE, "--output-dir", str(place), *tiny("vit"), *EVERY_STEP, "training.max_steps=100000"], tmp_path / "log"
    )
    rng, copies = random.Random(0), []
    try:
        while not step_of(place):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        time.sleep(0.5)  # wait until the first save is complete: from now on a checkpoint can be lost
        for number in range(NUM_CUTS):
            time.sleep(rng.uniform(0.02, 0.4))
            process.send_signal(signal.SIGSTOP)  # stop writing, so that the copy shows a single moment
            copies.append(tmp_path / f"copy{number}.img")
            subprocess.run(["cp", "--sparse=always", str(image), str(copies[-1])], check=True)
            process.send_signal(signal.SIGCONT)
            assert process.poll() is None, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    lost, after = [], tmp_path / "after"
    after.mkdir()
    for copy in copies:
        subprocess.run(["mount", "-o", "loop", str(copy), str(after)], check=True)
        try:
            load_run(run_in(after) or after / "no run", "last")
        except (UserError, OSError) as error:
            lost.append(f"{copy.name}: {error}")
        finally:
            subprocess.run(["umount", str(after)], check=True)
            copy.unlink()
    assert not lost, f"{len(lost)} of {len(copies)} lost: {lost}"


def test_no_kill_loses_the_run_or_changes_its_result(tiny, tmp_path):
    # A constant schedule does not depend on the number of steps, which the kills determine.
    settings = [*tiny("vit"), *EVERY_STEP, "training.scheduler.name=constant", "training.scheduler.warmup_epochs=0"]
    folder, log, rng = tmp_path / "killed", tmp_path / "log", random.Random(1)
    arguments = [*CHOICE, "--output-dir", str(folder), *settings, "training.max_steps=1000000"]
    for _ in range(NUM_KILLS):
        before = step_of(folder)
        process = start(arguments, log)
        while step_of(folder) == before:
            assert process.poll() is None, log.read_text()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))  # a step and its save take about a tenth of a second
        process.kill()
        assert process.wait() == -signal.SIGKILL
        load_run(run_in(folder), "last")
        arguments = ["--resume", str(run_in(folder))]
    end = f"training.max_steps={step_of(folder) + 2}"
    assert start([*arguments, end], log).wait() == 0, log.read_text()
    whole = tmp_path / "whole"
    assert start([*CHOICE, "--output-dir", str(whole), *settings, end], log).wait() == 0, log.read_text()
    a, b = (load_file(run_in(f) / "last/model.safetensors") for f in (whole, folder))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(os.listdir(run_in(folder))) == sorted(os.listdir(run_in(whole)))  # no temporary files are left
