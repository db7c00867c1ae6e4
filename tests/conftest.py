"""What the tests share: tiny rallies, tiny random backbones, and the way to real data where there is some."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test waits for a network
# Before torch is imported: workers beside each other share the cores, and so do the processes that they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) - 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (workers + 1))))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels are run by Python

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
    """The package's log messages, as they come."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("tracknet").addHandler(handler)
    yield lines
    logging.getLogger("tracknet").removeHandler(handler)


@pytest.fixture(scope="session")
def rallies(tmp_path_factory) -> Path:
    """A folder of four rendered games of 14 small frames each."""
    root = tmp_path_factory.mktemp("data") / "rallies"
    ensure_rallies(root, SyntheticConfig(games=4, frames_per_clip=14, size=SIZE))
    return root


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> dict[str, Path]:
    """Random pretrained-looking backbones on disk, by kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbones")
    configs = {
        "vit": Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56),
        "convnext": ConvNextConfig(
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 2, 1],
            layer_scale_init_value=1.0,  # 1e-6 would hide what blocks do
        ),
    }
    for kind, config in configs.items():
        AutoModel.from_config(config).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in configs}


@pytest.fixture
def tiny(rallies, backbones, tmp_path):
    """Overrides that make a configuration small: ``tiny("vit")``."""

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
    """accelerate keeps its mixed precision in a global; each test starts without one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def set_hash(checkpoint: Path, name: str) -> None:
    """Let a checkpoint's state.json vouch for a file as it is now, as somebody who changes the file would."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    state["sha256"][name] = hash_file(checkpoint / name)
    path.write_text(json.dumps(state))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real labeled clips that TRACKNET_REAL_DATA names."""
    folder = os.environ.get("TRACKNET_REAL_DATA", "")
    if not Path(folder, "tennis").is_dir():
        pytest.skip("TRACKNET_REAL_DATA names no folder with tennis/gameN/ClipM")
    return Path(folder)
