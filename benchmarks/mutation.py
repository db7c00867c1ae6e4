"""Mutation testing: change a module in one place, run its tests, and check whether they fail.

    pip install -e '.[dev]' mutmut
    python benchmarks/mutation.py                      # every module of TESTS, a sample of 40 mutants each
    python benchmarks/mutation.py quantization/nf4    # selected modules
    python benchmarks/mutation.py --survivors losses   # only the mutants that survived last time

Mutants are created by the operators of mutmut, with one change each. Imports, annotations, decorators, docstrings,
assertions, error messages (`raise`), output for the user (`info`, `warning`, `print`) and `extra_repr` are not mutated,
and Triton kernels are not modules of TESTS.

One process imports torch and the other large libraries. Each mutant is tested in a fork of it, which imports the
mutated source instead of the file, so that a test run does not have to import the libraries again. A mutant is killed
if a test fails, crashes or takes several times as long as without the mutation. Results are written to
benchmarks/results/mutation/.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/mutation"
# Libraries that are imported once, before the forks.
LIBRARIES = [
    "torch._dynamo",
    "transformers.models.dinov2.modeling_dinov2",
    "bitsandbytes",
    "peft",
    "accelerate",
    "pytest",
]
LIBRARIES += ["transformers.models.convnext.modeling_convnext", "torch.utils.tensorboard", "cv2", "av"]
OUTPUT_CALLS = {"info", "warning", "print"}  # functions whose calls print to the user and are not mutated

# Tests of each module, the fastest and most specific first (`data/clips` is tests/data/test_clips.py).
TESTS = {
    "quantization/apply": "quantization/apply quantization/precision quantization/lora docs config",
    "quantization/int8": "quantization/int8 quantization/trainable_int8 quantization/apply quantization/int8_fused",
    "quantization/int8_cpu": "quantization/int8",
    "quantization/recomputed_dropout": "quantization/recomputed_dropout quantization/lora",
    **{
        f"quantization/adapters/{name}": "quantization/lora quantization/apply extensions/extensions docs config"
        for name in ("__init__", "base", "lora", "targets")
    },
    "quantization/merge": "quantization/merge quantization/lora",
    "quantization/nf4": "quantization/nf4 quantization/apply quantization/lora",
    "quantization/parts": "quantization/parts quantization/apply",
    "quantization/precision": "quantization/precision docs quantization/apply",
    "quantization/storage": "quantization/storage",
    "quantization/trainable_int8": "quantization/trainable_int8",
    "planning/planner": "planning/planner",
    "memory/checkpointing": "memory/checkpointing memory/saving",
    "memory/mmap": "memory/mmap memory/saving",
    "memory/meter": "memory/meter memory/step_meter",
    "memory/micro_batch": "memory/micro_batch",
    "memory/offload": "memory/offload memory/saving",
    "planning/estimate": "planning/estimate planning/footprint",
    "memory/resumable": "memory/resumable training/optimizer",
    "memory/step_meter": "memory/step_meter",
    "memory/streaming": "memory/streaming memory/saving",
    "training/step": "training/step training/loop",
    **{
        f"training/losses/{name}": "training/losses extensions/extensions docs config events"
        for name in ("base", "cells", "events")
    },
    "training/optimizer": "training/optimizer docs config quantization/trainable_int8 training/loop",
    "tracking/heatmap": "tracking/heatmap",
    "tracking/metrics": "tracking/metrics",
    "tracking/trajectory": "tracking/trajectory",
    "data/transforms": "data/transforms data/clips",
    "data/clips": "data/clips data/transforms",
}
# Names of tests to exclude: those that start new processes, which do not import the mutant, and long ones that detect
# nothing that other tests do not detect.
EXCLUDED_TESTS = (
    "kernels_compile",
    "runs_on_any_cpu",
    "really_runs_out",
    "learns_to_find",
    "at_some_operators",
    "memory_targets",
    "prints_draws",
)
SELECTION = " and ".join(f"not {name}" for name in EXCLUDED_TESTS)
PYTEST = [
    "-x",
    "-q",
    "-n",
    "0",
    "-p",
    "no:cacheprovider",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
    "-k",
    SELECTION,
]


class _Mutations(MutationVisitor):
    """Visitor of mutmut that also mutates decorated functions and skips output for the user."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        """Return whether a node and its children are not mutated."""
        # Functions never reach the base method, which skips every decorated one.
        if isinstance(node, cst.FunctionDef):
            return node.name.value == "extra_repr"
        if isinstance(node, cst.Call):
            name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
            if isinstance(name, cst.Name) and name.value in OUTPUT_CALLS:
                return True
        skipped = (cst.Raise, cst.Import, cst.ImportFrom, cst.Assert)
        return isinstance(node, skipped) or super()._skip_node_and_children(node)


def mutants(source: str) -> list[str]:
    """Return all mutants of a source that compile, without duplicates."""
    visitor = _Mutations(mutation_operators, IgnoredCode(set(), set(), set()))
    module = MetadataWrapper(cst.parse_module(source)).visit(visitor)
    unique: dict[str, None] = {}  # ordered set
    for mutation in visitor.mutations:
        code = module.deep_replace(mutation.original_node, mutation.mutated_node).code
        try:
            compile(code, "mutant", "exec")
        except SyntaxError:
            continue
        unique[code] = None
    unique.pop(source, None)
    return list(unique)


class _MutantImporter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importer that replaces the source of one module; all other modules are imported normally.

    Args:
        name: name of the module.
        path: path of its file, for tracebacks.
        source: source code to execute.
    """

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, path=None, target=None):
        """Return a spec with this loader for the replaced module, ``None`` for all others."""
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module) -> None:
        """Execute the replacement source in the namespace of the module."""
        exec(compile(self.source, str(self.path), "exec"), vars(module))


def run_tests(name: str, path: Path, source: str, tests: list[str], timeout: float) -> int | None:
    """Run tests in a fork that imports a module from the given source.

    Args:
        name: name of the module.
        path: path of its file.
        source: source code of the module.
        tests: paths of the test files.
        timeout: maximum duration in seconds.

    Returns:
        The exit code of pytest; ``None`` if the tests exceeded the timeout.
    """
    child = os.fork()
    if child == 0:
        # A session of its own, so that a timeout can kill processes that the tests started as well.
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.meta_path.insert(0, _MutantImporter(name, path, source))
        import pytest

        # os._exit skips the exit handlers that the fork inherited from its parent.
        code = 1
        try:
            code = int(pytest.main([*tests, *PYTEST]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def diff(before: str, after: str) -> str:
    """Return the line and the change between two sources, such as ``12: -old  +new``."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    line = lines[0].split()[1].lstrip("-").split(",")[0]
    return f"{line}: " + "  ".join(f"{part[0]}{part[1:].strip()}" for part in lines[1:] if not part.startswith("@@"))


def file_of_tests(name: str) -> Path:
    """Return the test file of a name in TESTS."""
    return (ROOT / "tests" / name).with_name(f"test_{Path(name).name}.py")


def examine(key: str, sample: int, seed: int, survivors_only: bool) -> None:
    """Test mutants of a module and write the survivors to its result file.

    Args:
        key: name of the module in TESTS.
        sample: maximum number of mutants to test, drawn at random.
        seed: seed of the draw.
        survivors_only: whether to test only the mutants of the draw that survived last time.
    """
    path, name = ROOT / "tracknet" / f"{key}.py", f"tracknet.{key.replace('/', '.')}"
    source, result_path = path.read_text(), RESULTS / f"{key.replace('/', '.')}.json"
    tests = [str(file) for file in map(file_of_tests, TESTS[key].split()) if file.exists()]
    every = mutants(source)
    chosen = random.Random(seed).sample(every, min(sample, len(every)))
    tested = len(chosen)
    if survivors_only:
        previous = json.loads(result_path.read_text())["survived"]
        chosen = [code for code in chosen if diff(source, code) in previous]
    start = time.monotonic()
    if run_tests(name, path, source, tests, 900) != 0:
        sys.exit(f"{key}: the tests fail without any mutation. Run: pytest {' '.join(tests)}")
    duration = time.monotonic() - start
    print(f"{key}: {len(every)} mutants, {len(chosen)} to test; the tests take {duration:.0f} s", flush=True)
    survived = []
    for code in chosen:
        if run_tests(name, path, code, tests, 20 + 3 * duration) == 0:
            survived.append(diff(source, code))
            print(f"  survived {survived[-1]}", flush=True)
    killed = tested - len(survived)
    result = {
        "module": key,
        "mutants": len(every),
        "seed": seed,
        "tested": tested,
        "killed": killed,
        "survived": survived,
    }
    result_path.parent.mkdir(parents=True, exist_ok=True)
    result_path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"  {killed} of {tested} killed: {killed / tested:.0%} ({time.monotonic() - start:.0f} s)", flush=True)


def chosen_modules(wanted: list[str]) -> Iterator[str]:
    """Yield the modules of TESTS that are selected by full name, last part or folder; all if none is given."""
    for key in TESTS:
        if not wanted or any(key == w or key.endswith(f"/{w}") or key.startswith(f"{w}/") for w in wanted):
            yield key


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "modules", nargs="*", help="modules, such as quantization, quantization/nf4 or nf4 (default: all)"
    )
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="test only the mutants that survived last time")
    options = parser.parse_args()
    # Set before torch and Triton are imported, which read them at import.
    os.environ.update(HF_HUB_OFFLINE="1", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for library in LIBRARIES:
        importlib.import_module(library)
    for key in chosen_modules(options.modules):
        examine(key, options.sample, options.seed, options.survivors)


if __name__ == "__main__":
    main()
