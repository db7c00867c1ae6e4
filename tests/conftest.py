"""Shared fixtures: small rendered rallies, small random backbones, and real data if it is available."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported, so that no test waits for a network
# Set before torch is imported: parallel workers, and the processes that they start, share the cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) - 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (workers + 1))))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported: kernels run in Python

from accelerate.state import AcceleratorState
from transformers import AutoModel, ConvNextConfig, Dinov2Config

from tracknet.data.synthetic import SyntheticConfig, ensure_rallies
from tracknet.files import hash_file

SIZE = (128, 72)
TINY_DATA = [
    "data.synthetic.games=4",
    "data.synthetic.frames_per_clip=14",
    f"data.synthetic.size=[{SIZE[0]},{SIZE[1]}]",
    f"data.preprocess.resize=[{SIZE[0]},{SIZE[1]}]",
    "data.split.train_games=[1,2]",
    "data.split.val_games=[3]",
    "data.split.test_games=[4]",
]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Collect the package's log messages in a list."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("tracknet").addHandler(handler)
    yield lines
    logging.getLogger("tracknet").removeHandler(handler)


@pytest.fixture(scope="session")
def rallies(tmp_path_factory) -> Path:
    """Render four games of 14 small frames each; return their folder."""
    root = tmp_path_factory.mktemp("data") / "rallies"
    ensure_rallies(root, SyntheticConfig(games=4, frames_per_clip=14, size=SIZE))
    return root


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> dict[str, Path]:
    """Save small backbones with random weights in the format of pretrained ones; return their folders by kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbones")
    configs = {
        "vit": Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56),
        "convnext": ConvNextConfig(
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 2, 1],
            layer_scale_init_value=1.0,  # the default of 1e-6 would hide the effect of the blocks
        ),
    }
    for kind, config in configs.items():
        AutoModel.from_config(config).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in configs}


@pytest.fixture
def tiny(rallies, backbones, tmp_path):
    """Return a function that gives the overrides of a small configuration: ``tiny("vit")``."""

    def overrides(kind: str) -> list[str]:
        return [
            *TINY_DATA,
            f"data.root={rallies}",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"model.backbone.name={backbones[kind]}",
            "model.decoder.channels=32",
            "training.batch_size=4",
            "training.max_steps=3",
            "training.device=cpu",
        ]

    return overrides


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Reset accelerate's global state, which keeps the mixed precision, after each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def set_hash(checkpoint: Path, name: str) -> None:
    """Set the hash of a file in a checkpoint's state.json to that of its current content, as an attacker would."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    state["sha256"][name] = hash_file(checkpoint / name)
    path.write_text(json.dumps(state))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real labeled clips given by TRACKNET_REAL_DATA, or skip the test."""
    folder = os.environ.get("TRACKNET_REAL_DATA", "")
    if not Path(folder, "tennis").is_dir():
        pytest.skip("TRACKNET_REAL_DATA is not set to a folder with tennis/gameN/ClipM")
    return Path(folder)
