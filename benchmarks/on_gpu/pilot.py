"""Pilot study: full fine-tuning against a frozen backbone, starting from the pretrained backbone only.

Uses one seed and a short schedule, with all runs in parallel. A setting in which the two differ justifies the full grid
of modes and seeds. ``accuracy.py`` contains the schedule that starts with rendered rallies.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from on_gpu.accuracy import TOLERANCE, run_verb, score_f1
from on_gpu.session import Session

NO_DETAIL = "model.decoder.detail=false"
SAME_HALLS = "data.allow_leaks=true"  # cameras look alike in all matches, so the leak check would refuse the splits
# By setting: subfolder of FOLDER with clips of 768x432; games for training, validation and test; further overrides.
SETTINGS: dict[str, tuple[str, tuple[list[int], int, list[int]], tuple[str, ...]]] = {
    "badminton": ("badminton", (list(range(1, 12)), 12, [13, 14, 15]), (SAME_HALLS,)),
    "badminton, no detail branch": ("badminton", (list(range(1, 12)), 12, [13, 14, 15]), (NO_DETAIL, SAME_HALLS)),
    "tennis, no detail branch": ("tennis", ([1, 3, 5, 6], 7, [9]), (NO_DETAIL,)),
}
LEARNING = "training.optimizer.lr=1e-3"
# Overrides of `--training default` for each mode.
MODES: dict[str, tuple[str, ...]] = {
    "frozen": (LEARNING, "training.trainable=nothing"),
    "full": (LEARNING, "training.optimizer.backbone_lr_scale=0.05"),
    "full, backbone 4x faster": (LEARNING, "training.optimizer.backbone_lr_scale=0.2"),
}


def measure_pilot(session: Session, steps: int = 400) -> None:
    """Write one row per setting and mode: strict F1 at 4 px of 1280, by the peak and along the path.

    Args:
        session: session of the measurement; ``data`` must contain ``tennis/``, ``badminton/`` and ``dinov2-small/``.
        steps: optimizer steps per run.
    """
    if session.data is None:
        session.put("skipped", item="pilot", why="requires --data FOLDER with tennis/, badminton/ and dinov2-small/")
        return
    rows = [(setting, mode) for mode in MODES for setting in SETTINGS]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(len(rows)) as pool:
        list(pool.map(lambda row: _train_and_score(session, *row, steps, Path(folder)), rows))


def _train_and_score(session: Session, setting: str, mode: str, steps: int, folder: Path) -> None:
    """Train and evaluate one setting and mode, and write its row."""
    data, (train, val, test), changes = SETTINGS[setting]
    out = folder / f"{setting}-{mode}".replace(" ", "-").replace(",", "")
    common = [
        f"data.root={session.data / data}",
        f"data.cache_dir={folder / 'cache'}",
        f"training.device={session.device.type}",
    ]
    begin = time.monotonic()
    error = run_verb(
        "train",
        "--data",
        "tracknet",
        "--model",
        "vit_heatmap",
        "--training",
        "default",
        "--output-dir",
        str(out),
        *common,
        f"model.backbone.name={session.data / 'dinov2-small'}",
        "training.precision=bf16",
        "training.batch_size=16",
        "data.num_workers=2",
        "training.scheduler.warmup_epochs=0.3",
        "data.preprocess.resize=[768,432]",
        "data.augment.crop=[280,168]",
        "training.loss.radius=2",
        "training.validate_every_epochs=1000",
        f"data.split.train_games={train}",
        f"data.split.val_games=[{val}]",
        f"data.split.test_games={test}",
        f"training.max_steps={steps}",
        *changes,
        *MODES[mode],
    )
    row: dict[str, object] = {
        "setting": setting,
        "mode": mode,
        "steps": steps,
        "train_s": round(time.monotonic() - begin),
    }
    if error is None:
        run = next((out / "runs").iterdir())
        for reading, trajectory in (("peak", "false"), ("path", "true")):
            row[f"f1_{reading}"] = score_f1(
                run, out / f"{reading}.json", *common, TOLERANCE, f"evaluation.trajectory={trajectory}"
            )
    session.put("pilot", **row, error=error)
