"""Accuracy of the training modes and of their controls.

Each mode starts from the same pretrained backbone and is trained on rendered rallies first, then on real tennis. It is
scored at 4 px of 1280x720 on games that are used neither for training nor for validation. The modes are trained in
parallel, because the speed of such small steps is limited by the host and not by the GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from on_gpu.session import Session

NONE = "training.memory_optimization.gradient_checkpointing=none"
ADAPTERS = ("training.optimizer.lr=2e-4", "training.optimizer.decoder_lr_scale=5", "training.lora.lora_dropout=0")
NORMS = ("training.optimizer.lr=3e-4", "training.optimizer.decoder_lr_scale=3.3")
# Training section and overrides of each mode.
MODES: dict[str, tuple[str, ...]] = {
    "default": ("default", "training.optimizer.lr=1e-3", "training.optimizer.backbone_lr_scale=0.05"),
    "frozen": ("frozen",),
    "lora": ("lora", *ADAPTERS),
    "qlora": ("qlora", *ADAPTERS, "training.train_last_blocks=null", NONE),
    "qlora-half": ("qlora", *ADAPTERS, NONE),
    "qlora-last-4": ("qlora", *ADAPTERS, "training.train_last_blocks=4", NONE),
    "int8": ("int8", *NORMS, "training.train_last_blocks=null", NONE),
    "int8-half": ("int8", *NORMS, NONE),
}
# First stage: FOLDER/rallies, rendered by `tracknet synthesize` with 40 games and seed 1.
RENDERED = (
    "data.synthetic.games=40",
    "data.synthetic.seed=1",
    f"data.split.train_games={list(range(1, 38))}",
    "data.split.val_games=[38]",
    "data.split.test_games=[39,40]",
    "data.augment.crop=[256,144]",
    "training.validate_every_epochs=100",
)
# Second stage: FOLDER/tennis, labeled clips of 768x432.
REAL = (
    "data.split.train_games=[1,3,5,6]",
    "data.split.val_games=[7]",
    "data.split.test_games=[9]",
    "data.preprocess.resize=[768,432]",
    "data.augment.crop=[280,168]",
    "training.loss.radius=2",
    "training.validate_every_epochs=6",
)
GAMES = (9, 8, 10)  # games that are scored
TOLERANCE = "evaluation.tolerance_px=2.4"  # in pixels of 768x432; 4 px at a width of 1280


def measure_accuracy(session: Session, steps: tuple[int, int] = (350, 600)) -> None:
    """Write one row per mode and game: strict F1 along the path and by the peak alone, and the training time.

    Args:
        session: session of the measurement; ``data`` must contain ``tennis/``, ``rallies/`` and ``dinov2-small/``.
        steps: optimizer steps on rendered rallies and on real tennis.
    """
    if session.data is None:
        session.put("skipped", item="accuracy", why="requires --data FOLDER with tennis/, rallies/ and dinov2-small/")
        return
    with TemporaryDirectory() as folder, ThreadPoolExecutor(len(MODES)) as pool:
        for rows in pool.map(lambda mode: _train_and_score(session, mode, steps, Path(folder)), MODES):
            for row in rows:
                session.put("accuracy", **row)


def _train_and_score(session: Session, mode: str, steps: tuple[int, int], folder: Path) -> list[dict]:
    """Train a mode in both stages; return one row per game, or a single row with the error of a failed stage."""
    training, *settings = MODES[mode]
    common = [
        "--model",
        "vit_heatmap",
        "--training",
        training,
        f"model.backbone.name={session.data / 'dinov2-small'}",
        "training.precision=bf16",
        "training.batch_size=16",
        "data.num_workers=2",
        "training.scheduler.warmup_epochs=0.3",
        f"data.cache_dir={folder / 'cache'}",
        f"training.device={session.device.type}",
        *settings,
    ]
    runs, seconds = [], []
    stages = (("synthetic", "rallies", RENDERED), ("tracknet", "tennis", REAL))
    for (data, name, changes), number in zip(stages, steps):
        begin = time.perf_counter()
        # The second stage starts from the weights of the first one.
        init = [f"training.init_from={runs[-1]}"] if runs else []
        paths = ["--data", data, "--output-dir", str(folder / mode / name), f"data.root={session.data / name}"]
        error = run_verb("train", *paths, *common, *changes, f"training.max_steps={number}", *init)
        if error:
            return [{"mode": mode, "stage": name, "error": error}]
        runs.append(next((folder / mode / name / "runs").iterdir()))
        seconds.append(time.perf_counter() - begin)
    return [_score(session, mode, runs[-1], game, seconds, folder) for game in GAMES]


def _score(session: Session, mode: str, run: Path, game: int, seconds: list[float], folder: Path) -> dict:
    """Return the row of a run and a game, with the F1 along the path and by the peak."""
    row: dict[str, object] = {"mode": mode, "game": game, "train_s": [round(s) for s in seconds]}
    for reading, trajectory in (("path", "true"), ("peak", "false")):
        report = folder / mode / f"{game}-{reading}.json"
        row[f"f1_{reading}"] = score_f1(
            run,
            report,
            f"data.root={session.data / 'tennis'}",
            "data.split.train_games=[]",
            "data.split.val_games=[]",
            f"data.split.test_games=[{game}]",
            TOLERANCE,
            f"data.cache_dir={folder / 'cache'}",
            f"training.device={session.device.type}",
            f"evaluation.trajectory={trajectory}",
        )
    return row


def score_f1(run: Path, report: Path, *settings: str) -> float | str:
    """Evaluate a run; return its strict F1, or the error message.

    Args:
        run: folder of the run.
        report: path for the JSON file with the scores.
        settings: ``section.key=value`` overrides.
    """
    error = run_verb("evaluate", "--run", str(run), "--json", str(report), *settings)
    return error or json.loads(report.read_text())["f1_strict"]


def run_verb(verb: str, *arguments: str) -> str | None:
    """Run a verb of ``tracknet`` in a new process; return ``None``, or the end of its output if it failed."""
    # Two threads per process, because several modes run in parallel; no process waits for the hub.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"tracknet.scripts.{verb}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return None if done.returncode == 0 else (done.stderr or done.stdout)[-300:]
