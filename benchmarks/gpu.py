"""Measure everything that requires a GPU, in one process, with one line of JSON per result.

    python benchmarks/gpu.py                                     # all sections within ten minutes, by importance
    python benchmarks/gpu.py --only tests,steps:small,kernels --budget 240
    python benchmarks/gpu.py --only accuracy --data FOLDER         # real clips; see on_gpu/accuracy.py
    python benchmarks/gpu.py --list

Each result is appended to benchmarks/results/gpu/results.jsonl as soon as it is measured. Backbones have random
weights, on which neither memory nor speed depends, so that the hub is not required. With --device cpu, sections that
require no GPU are run as a rehearsal of the script.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from on_gpu.accuracy import measure_accuracy  # noqa: E402 - imported after its folder was added to sys.path
from on_gpu.grid import measure_grid  # noqa: E402
from on_gpu.inference import measure_inference  # noqa: E402
from on_gpu.kernels import measure_kernels  # noqa: E402
from on_gpu.memory import measure_small_cards  # noqa: E402
from on_gpu.parity import measure_parity  # noqa: E402
from on_gpu.session import Session  # noqa: E402
from on_gpu.steps import EVERY, OFFLOADED, ROWS, measure_steps  # noqa: E402

COMPILED = ("default", "int8 triton t0", "qlora none nodrop")  # rows of on_gpu.steps.ROWS timed with compiled blocks
HALF = ("default", "default fp16", "int8 triton none", "int8 triton fp16")  # rows that compare fp16 with bf16


def run_tests(session: Session) -> None:
    """Run the tests marked ``gpu`` and write a row with the failures and the end of pytest's output."""
    workers = str(max(1, (os.cpu_count() or 1) - 3))
    # The pytest-benchmark plugin, if installed, is disabled because it does not support xdist workers.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-n",
        workers,
        "--maxprocesses",
        workers,
        "-p",
        "no:benchmark",
        str(ROOT / "tests"),
    ]
    # In a process group of its own, and with its output in a file: workers that outlive pytest would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        pytest = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code: int | str = pytest.wait(max(10.0, session.left_s()))
        except subprocess.TimeoutExpired:
            code = "not finished in time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pytest.pid, signal.SIGKILL)
        output.seek(0)
        text = output.read()
    session.put("tests", code=code, failed=re.findall(r"^FAILED (.*)$", text, re.M), detail=text[-3000:])


# Sections by name, in the order of importance: a session that is cut short has measured the most important ones.
SECTIONS: dict[str, Callable[[Session], None]] = {
    "steps:small": partial(measure_steps, size="small", names=EVERY),
    "kernels": measure_kernels,
    "steps:large": partial(measure_steps, size="large", names=EVERY[:8]),
    "tests": run_tests,
    "parity": measure_parity,
    "oom": measure_small_cards,
    "infer": measure_inference,
    "offload": partial(measure_steps, size="small", names=OFFLOADED),
    "steps:base": partial(measure_steps, size="base", names=EVERY[:6]),
    "steps:convnext": partial(measure_steps, size="convnext-tiny-224", names=EVERY[:5]),
    "steps:batch64": partial(measure_steps, size="small", names=EVERY[:5], batch=64),
    "steps:fp16": partial(measure_steps, size="small", names=HALF),
    "compile": partial(measure_steps, size="small", names=COMPILED, compiled=True),
    "accuracy": measure_accuracy,
    "grid": measure_grid,
}
# Sections that are small enough for a CPU, under the names of the sections that they rehearse.
REHEARSALS: dict[str, Callable[[Session], None]] = {
    "steps": partial(measure_steps, size="tiny", names=("default", "qlora none"), batch=1),
    "infer": partial(measure_inference, models=(("tiny", 128, 72),), windows=1),
}


def main(argv: list[str] | None = None) -> int:
    """Run the script; return 1 if a section failed, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="A,B", help="sections to run, in this order (default: all)")
    parser.add_argument(
        "--budget",
        type=float,
        default=570,
        metavar="S",
        help="maximum duration of the session in seconds (default: 570)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks/results/gpu",
        metavar="DIR",
        help="folder for results.jsonl (default: benchmarks/results/gpu)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with tennis/, rallies/, badminton/ and dinov2-small/, for the sections accuracy and grid",
    )
    parser.add_argument(
        "--rows",
        metavar="A,B",
        help=f"rows of the sections steps, by name (default: those of the section): {', '.join(ROWS)}",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device; cpu runs the rehearsal (default: cuda)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the sections and exit")
    args = parser.parse_args(argv)
    sections = SECTIONS if args.device == "cuda" else REHEARSALS
    if args.list:
        print("\n".join(sections))
        return 0
    names = args.only.split(",") if args.only else list(sections)
    if unknown := [name for name in names if name not in sections]:
        parser.error(f"--only {unknown[0]}: the sections are {', '.join(sections)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; use --device cpu for a rehearsal")
    rows = tuple(args.rows.split(",")) if args.rows else None
    if rows and (unknown := [row for row in rows if row not in ROWS]):
        parser.error(f"--rows {unknown[0]}: the rows are {', '.join(ROWS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "results.jsonl").open("a", encoding="utf-8") as file:
        session = Session(torch.device(args.device), file, args.budget, args.data, rows)
        session.put("machine", **describe_machine(session.device))
        for name in names:
            if session.has_time(10, name):
                with session.guarded(name):
                    sections[name](session)
        session.put("end", failed=session.num_failed)
    return int(session.num_failed > 0)


def describe_machine(device: torch.device) -> dict:
    """Return the device, library versions, number of cores and date, on which results depend besides the code."""
    import bitsandbytes
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
