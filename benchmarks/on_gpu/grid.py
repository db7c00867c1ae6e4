"""Where training the backbone pays: modes, learning rates and seeds on badminton, all trained in parallel.

Every run starts from the same pretrained backbone and a new decoder, without rendered rallies. The outcome of each
frame is written, so that intervals can be paired over frames and seeds. As a script, this file scores one run in a
process of its own:

    PYTHONPATH=benchmarks python -m on_gpu.grid RUN OUTCOMES.json [section.key=value...]
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tracknet.config import compose_data
from tracknet.data.clips import WindowDataset
from tracknet.data.splits import read_split

if TYPE_CHECKING:
    from on_gpu.session import Session

TOLERANCE_PX = 2.4  # in pixels of 768x432; 4 px at a width of 1280
WORKERS = 16  # runs at a time; the host limits such small steps, not the GPU
ADAPTERS = ("training.optimizer.lr=2e-4", "training.optimizer.decoder_lr_scale=5")
ALL = "training.train_last_blocks=null"
# Training section and overrides of each mode. Rates are 1e-3 for the new decoder.
MODES: dict[str, tuple[str, ...]] = {
    "default": ("default", "training.optimizer.lr=1e-3", "training.optimizer.backbone_lr_scale=0.05"),
    "frozen": ("frozen", "training.optimizer.lr=1e-3"),
    "lora": ("lora", *ADAPTERS),
    "int8": ("int8", "training.optimizer.lr=3e-4", "training.optimizer.decoder_lr_scale=3.3", ALL),
    "int8_full": ("int8_full", "training.optimizer.lr=1e-3", "training.optimizer.backbone_lr_scale=0.05"),
    "qlora": ("qlora", *ADAPTERS, ALL),
}
DATA = (
    "data.allow_leaks=true",  # cameras look alike in all matches, so the leak check would refuse the split
    "data.preprocess.resize=[768,432]",
    "data.augment.crop=[280,168]",
    "data.split.train_games=[1,2,3,4,5,6,7,8,9,10,11]",
    "data.split.val_games=[12]",
    "data.split.test_games=[13,14,15]",
)
DETAIL = {"detail": (), "no detail": ("model.decoder.detail=false",)}  # overrides by name of the decoder's variant


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        decoder: name in ``DETAIL``.
        mode: name in ``MODES``.
        seed: seed of the run.
        lr_scale: factor of the mode's learning rate.
    """

    decoder: str
    mode: str
    seed: int = 0
    lr_scale: float = 1.0


# In the order of importance, at most WORKERS at a time.
JOBS = (
    *(Job("no detail", mode, lr_scale=x) for mode in ("default", "frozen") for x in (1.0, 2.5, 5.0)),
    *(Job("no detail", mode) for mode in ("lora", "int8", "int8_full", "qlora")),
    *(Job("detail", mode, seed) for mode in ("default", "frozen") for seed in (0, 1, 2)),
)


def measure_grid(session: Session, jobs: tuple[Job, ...] = JOBS, steps: int = 400) -> None:
    """Write one row per run: the outcomes of all test frames by the highest peak and along the path.

    Args:
        session: session of the measurement; ``data`` must contain ``badminton/`` and ``dinov2-small/``.
        jobs: runs to train.
        steps: optimizer steps per run.
    """
    if session.data is None:
        session.put("skipped", item="grid", why="requires --data FOLDER with badminton/ and dinov2-small/")
        return
    data = session.data
    with TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        # Decode all clips once: as many decoders as runs, each with its own threads, exceed the limit of a machine.
        for split in ("train", "val", "test"):
            settings = [f"data.root={data / 'badminton'}", f"data.cache_dir={Path(folder) / 'cache'}", *DATA]
            config = compose_data("tracknet", settings)
            WindowDataset(read_split(config, split), config, training=False, stride=1)
        for row in pool.map(lambda job: _train_and_score(job, data, session.device.type, steps, Path(folder)), jobs):
            session.put("grid", steps=steps, **row)


def _train_and_score(job: Job, data: Path, device: str, steps: int, folder: Path) -> dict:
    """Train and score one run; return its row, with ``error`` if it failed."""
    name = f"{job.decoder}-{job.mode}-{job.lr_scale:g}-{job.seed}".replace(" ", "-")
    training, *settings = MODES[job.mode]
    rate = float(settings[0].split("=")[1]) * job.lr_scale
    common = [f"data.root={data / 'badminton'}", f"data.cache_dir={folder / 'cache'}", f"training.device={device}"]
    begin = time.monotonic()
    train = ["-m", "tracknet.scripts.train", "--data", "tracknet", "--model", "vit_heatmap", "--training", training]
    error = _run(
        *train,
        "--seed",
        str(job.seed),
        "--output-dir",
        str(folder / name),
        *common,
        f"model.backbone.name={data / 'dinov2-small'}",
        "training.precision=bf16",
        "training.batch_size=16",
        "training.memory_optimization.gradient_checkpointing=none",
        "data.num_workers=1",
        *DATA,
        "training.loss.radius=2",
        "training.scheduler.warmup_epochs=0.3",
        "training.validate_every_epochs=1000",
        f"training.max_steps={steps}",
        *DETAIL[job.decoder],
        *settings,
        f"training.optimizer.lr={rate!r}",
    )
    row: dict[str, object] = {**dataclasses.asdict(job), "lr": rate, "train_s": round(time.monotonic() - begin)}
    if error is None:
        run = next((folder / name / "runs").iterdir())
        outcomes = folder / f"{name}.json"
        error = _run("-m", "on_gpu.grid", str(run), str(outcomes), *common, f"evaluation.tolerance_px={TOLERANCE_PX}")
        if error is None:
            return {**row, **json.loads(outcomes.read_text())}
    return {**row, "error": error}


def _run(*arguments: str) -> str | None:
    """Run Python in a new process; return ``None``, or the end of its output if it failed."""
    # One thread per process, because several runs train in parallel; no process waits for the hub.
    benchmarks = Path(__file__).parent.parent
    path = os.pathsep.join([str(benchmarks.parent), str(benchmarks), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    return None if done.returncode == 0 else (done.stderr or done.stdout)[-300:]


def score(run: Path, outcomes: Path, overrides: list[str]) -> None:
    """Score a run on its test clips; write F1 and outcomes by reading (``peak``, ``path``) to a JSON file.

    ``detail`` contains one string per reading and clip, with one character per frame: T (TP), 1 (FP1), 2 (FP2), N (FN)
    or - (TN).
    """
    from tracknet.runs.load import load_run
    from tracknet.tracking.metrics import score as score_results
    from tracknet.tracking.predictor import Predictor, score_windows

    letters = {"TP": "T", "FP1": "1", "FP2": "2", "FN": "N", "TN": "-"}
    config, model, device = load_run(run, "best", overrides)
    settings = config.evaluation
    dataset = WindowDataset(read_split(config.data, "test"), config.data, training=False, stride=settings.stride)
    predictor = Predictor(model, device, config.training.micro_batching(settings.batch_size))
    row: dict = {"detail": {}}
    for reading, trajectory in (("peak", False), ("path", True)):
        results = score_windows(predictor, dataset, dataclasses.replace(settings, trajectory=trajectory), 1)
        row[f"f1_{reading}"] = score_results(results, settings.tolerance_px, settings.threshold)["f1_strict"]
        by_clip: dict[str, str] = {}
        for r in results:
            letter = letters[r.outcome(settings.tolerance_px, settings.threshold)]
            by_clip[r.clip] = by_clip.get(r.clip, "") + letter
        row["detail"][reading] = by_clip
    outcomes.write_text(json.dumps(row))


if __name__ == "__main__":
    score(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
