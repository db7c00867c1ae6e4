"""Distributed training: two processes give the result of one, and recover together when one runs out of memory."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tracknet.api.train import train_run
from tracknet.config import compose, save_config

# Program that trains with config.yaml. Process 1 can run out of memory once, in the backward pass of its second step.
CODE = """
import sys, json, os, torch
from pathlib import Path
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from tracknet.config import load_config
from tracknet.reporting.console import configure_logging
from tracknet.api.train import train_run
from tracknet.training import step
folder, fails, rank = Path(sys.argv[1]), sys.argv[2] == "fails", os.environ.get("RANK", "0")
real, calls, gradients = step.heatmap_loss, [], {}

def run_out(grad):
    raise torch.OutOfMemoryError("CUDA out of memory")

def loss(logits, *rest):
    calls.append(1)
    if fails and rank == "1" and len(calls) == 2:
        logits.register_hook(run_out)
    return real(logits, *rest)

step.heatmap_loss = loss
configure_logging()

def look(optimizer, *_):
    grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients.setdefault("first", torch.cat(grads))

register_optimizer_step_pre_hook(look)
result = train_run(load_config(folder / "config.yaml", []), folder / "runs" / "r")
save_file(gradients, folder / f"gradients-{rank}.safetensors")
print(json.dumps({"size": result["micro_batch_size"], "steps": result["steps"], "f1": result["val_f1_strict"]}))
"""


def launch(folder, config, count, fails=False):
    """Run ``CODE`` in ``count`` processes; return the JSON in the last line of each, and the whole output of each."""
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1"}
    if count > 1:
        shared |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(folder), "fails" if fails else ""],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=shared | ({"RANK": str(r), "LOCAL_RANK": str(r)} if count > 1 else {}),
        )
        for r in range(count)
    ]
    try:
        outputs = [p.communicate(timeout=240) for p in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs], [out for out, _ in outputs]


@pytest.fixture
def config(tiny):
    # Batches of five windows: uneven shards, and a smaller batch at the end of an epoch.
    return compose(
        "synthetic",
        "vit_tiny_heatmap",
        "qlora",
        [
            *tiny("vit"),
            "training.precision=fp32",
            "training.batch_size=5",
            "training.max_steps=4",
            "training.optimizer.lr=1e-3",
            # Without a budget, so that all start with the whole batch.
            "training.memory_optimization.gradient_checkpointing=true",
        ],
    )


def test_two_processes_take_the_step_of_one(config, tmp_path):
    """The gradients are equal, including dropout, which draws by a window's index in the batch of all processes."""
    results, said = launch(tmp_path / "two", config, 2)
    launch(tmp_path / "one", config, 1)
    one, first, second = (
        load_file(tmp_path / name)["first"]
        for name in ("one/gradients-0.safetensors", "two/gradients-0.safetensors", "two/gradients-1.safetensors")
    )
    assert (
        torch.equal(first, second) and (one - first).norm() < 1e-3 * one.norm()
    )  # the bound allows for bf16 inside NF4 layers
    assert results[0] == results[1] and results[0]["steps"] == 4
    assert "Best validation" in said[0] and len(said[1].splitlines()) == 1  # only one of them logs


def test_when_one_runs_out_of_memory_in_backward_both_go_on_with_the_same_size(config, tmp_path):
    results, said = launch(tmp_path / "two", config, 2, fails=True)
    assert [r["size"] for r in results] == [1, 1] and [r["steps"] for r in results] == [4, 4]
    assert "going on with 1: " in said[0] or "going on with 1." in said[0]


def test_a_batch_of_fewer_windows_than_processes(tiny, tmp_path):
    config = compose(
        "synthetic",
        "vit_tiny_heatmap",
        "default",
        [*tiny("vit"), "training.precision=fp32", "training.batch_size=1", "training.max_steps=2"],
    )
    results, _ = launch(tmp_path / "two", config, 2)
    assert [r["steps"] for r in results] == [2, 2]


def test_one_process_needs_no_launcher(tiny, tmp_path):
    result = train_run(compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit")), tmp_path / "runs/r")
    assert result["steps"] == 3


@pytest.mark.parametrize(("count", "said"), [(2, True), (1, False)])
def test_a_launcher_that_starts_one_process_instead_of_several_does_not_do_so_silently(tiny, tmp_path, count, said):
    """``accelerate launch --cpu`` requires MPI to start more than one process."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(count)]
    choice = [
        "--data",
        "synthetic",
        "--model",
        "vit_tiny_heatmap",
        "--training",
        "default",
        "--output-dir",
        str(tmp_path),
    ]
    command = [*launcher, "-m", "tracknet.scripts.train", *choice, *tiny("vit"), "training.max_steps=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert ("has started one process only" in result.stdout) == said
