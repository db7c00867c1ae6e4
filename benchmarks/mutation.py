"""Mutation testing: change a module in one place, run its own tests, and see whether they notice.

    pip install -e '.[dev]' mutmut
    python benchmarks/mutation.py                      # every module of TESTS, a sample of 40 mutants each
    python benchmarks/mutation.py quantization/lora    # some
    python benchmarks/mutation.py --survivors losses   # again those that survived last time

The mutants are those of mutmut's own operators, one change each. Left out are imports, annotations, decorators and
docstrings, error texts (`raise`), lines for the user (`say`, `warn`) and what `extra_repr` shows; Triton kernels are no
modules of TESTS. One process imports torch and the libraries around it, and each mutant is tested in a fork of it,
which has the mutated module in place of the file's. A mutant is killed where a test fails, crashes or takes several
times as long as without it. Results go to benchmarks/results/mutation/.
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
LIBRARIES = [
    "torch._dynamo",
    "transformers.models.dinov2.modeling_dinov2",
    "bitsandbytes",
    "peft",
    "accelerate",
    "pytest",
]
LIBRARIES += ["transformers.models.convnext.modeling_convnext", "torch.utils.tensorboard", "cv2", "av"]
SPOKEN = {"info", "warning", "print"}  # calls that take lines for people

# The tests of each module, the quickest and nearest first (`data/clips` stands for tests/data/test_clips.py).
TESTS = {
    "quantization/apply": "quantization/apply quantization/precision quantization/lora docs config",
    "quantization/int8": "quantization/int8 quantization/trainable_int8 quantization/apply quantization/int8_fused",
    "quantization/int8_cpu": "quantization/int8",
    "quantization/recomputed_dropout": "quantization/recomputed_dropout quantization/lora",
    "quantization/lora": "quantization/lora quantization/apply docs config",
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
    "training/losses": "training/losses docs config events",
    "training/optimizer": "training/optimizer docs config quantization/trainable_int8 training/loop",
    "tracking/heatmap": "tracking/heatmap",
    "tracking/metrics": "tracking/metrics",
    "tracking/trajectory": "tracking/trajectory",
    "data/transforms": "data/transforms data/clips",
    "data/clips": "data/clips data/transforms",
}
# Left out: tests of new processes, in which no mutant is, and those that take long and see nothing that others do not.
LEFT_OUT = (
    "kernels_compile",
    "runs_on_any_cpu",
    "really_runs_out",
    "learns_to_find",
    "at_some_operators",
    "guides_promise",
    "prints_draws",
)
NOT_THOSE = " and ".join(f"not {name}" for name in LEFT_OUT)
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
    NOT_THOSE,
]


class _Mutations(MutationVisitor):
    """mutmut's visitor, which also goes into functions with decorators and passes by what people read."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            return node.name.value == "extra_repr"
        if isinstance(node, cst.Call):
            name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
            if isinstance(name, cst.Name) and name.value in SPOKEN:
                return True
        left_out = (cst.Raise, cst.Import, cst.ImportFrom, cst.Assert)
        return isinstance(node, left_out) or super()._skip_node_and_children(node)


def mutants(source: str) -> list[str]:
    """Return every source that differs from this one by one mutation and compiles."""
    visitor = _Mutations(mutation_operators, IgnoredCode(set(), set(), set()))
    module = MetadataWrapper(cst.parse_module(source)).visit(visitor)
    found: dict[str, None] = {}
    for mutation in visitor.mutations:
        code = module.deep_replace(mutation.original_node, mutation.mutated_node).code
        try:
            compile(code, "mutant", "exec")
        except SyntaxError:
            continue
        found[code] = None
    found.pop(source, None)
    return list(found)


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a source of ours, all others as ever."""

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module) -> None:
        exec(compile(self.source, str(self.path), "exec"), vars(module))


def run_tests(name: str, path: Path, source: str, tests: list[str], timeout: float) -> int | None:
    """Run the tests in a fork that imports the module from this source; return pytest's code, ``None`` if it hung."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        sys.meta_path.insert(0, _Mutated(name, path, source))
        import pytest

        code = 1
        try:
            code = int(pytest.main([*tests, *PYTEST]))
        finally:
            os._exit(code)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def diff(before: str, after: str) -> str:
    """Say where and how two sources differ: ``12: -old +new``."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    line = lines[0].split()[1].lstrip("-").split(",")[0]
    return f"{line}: " + "  ".join(f"{part[0]}{part[1:].strip()}" for part in lines[1:] if not part.startswith("@@"))


def file_of_tests(name: str) -> Path:
    """Return the file that TESTS calls by this name."""
    return (ROOT / "tests" / name).with_name(f"test_{Path(name).name}.py")


def examine(key: str, sample: int, seed: int, survivors_only: bool) -> None:
    """Test a module's mutants and write down which survived."""
    path, name = ROOT / "tracknet" / f"{key}.py", f"tracknet.{key.replace('/', '.')}"
    source, written = path.read_text(), RESULTS / f"{key.replace('/', '.')}.json"
    tests = [str(file) for file in map(file_of_tests, TESTS[key].split()) if file.exists()]
    every = mutants(source)
    chosen = random.Random(seed).sample(every, min(sample, len(every)))
    tested = len(chosen)
    if survivors_only:
        before = json.loads(written.read_text())["survived"]
        chosen = [code for code in chosen if diff(source, code) in before]
    begun = time.monotonic()
    if run_tests(name, path, source, tests, 900) != 0:
        sys.exit(f"{key}: its tests fail without any mutation: pytest {' '.join(tests)}")
    took = time.monotonic() - begun
    print(f"{key}: {len(every)} mutants, {len(chosen)} to test; the tests take {took:.0f} s", flush=True)
    survived = []
    for code in chosen:
        if run_tests(name, path, code, tests, 20 + 3 * took) == 0:
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
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(result, indent=1) + "\n")
    print(f"  {killed} of {tested} killed: {killed / tested:.0%} ({time.monotonic() - begun:.0f} s)", flush=True)


def chosen_modules(wanted: list[str]) -> Iterator[str]:
    """Yield the modules whose name one of these ends; all where none is named."""
    for key in TESTS:
        if not wanted or any(key == w or key.endswith(f"/{w}") or key.startswith(f"{w}/") for w in wanted):
            yield key


def main() -> None:
    """Test the modules that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="such as quantization, quantization/lora or lora; all if none")
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="only those that survived last time")
    options = parser.parse_args()
    # Before torch and Triton are imported.
    os.environ.update(HF_HUB_OFFLINE="1", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for library in LIBRARIES:
        importlib.import_module(library)
    for key in chosen_modules(options.modules):
        examine(key, options.sample, options.seed, options.survivors)


if __name__ == "__main__":
    main()
