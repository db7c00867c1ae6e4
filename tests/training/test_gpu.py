"""Training, resuming and loading on a CUDA device (``pytest -m gpu``)."""

import pytest
import torch

from tests.scripts.test_every_mode import MODES
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.quantization.merge import merge_
from tracknet.runs.load import load_run

pytestmark = pytest.mark.gpu
ON_GPU = {**MODES, "int8_triton": ("int8", ["training.int8_kernel=triton"])}


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("storage", ON_GPU)
def test_a_mode_trains_resumes_and_loads_equal(tiny, tmp_path, kind, storage, precision):
    mode, more = ON_GPU[storage]
    base = [*tiny(kind), "training.device=cuda", f"training.precision={precision}", "data.num_workers=2", *more]
    model = f"{kind}_tiny_heatmap"
    train_run(compose("synthetic", model, mode, [*base, "training.max_steps=3"]), tmp_path / "runs/r")
    result = train_run(
        compose("synthetic", model, mode, [*base, "training.max_steps=6"]), tmp_path / "runs/r", resume=True
    )
    assert result["steps"] == 6 and result["peak_gb"] > 0
    frames = torch.randint(0, 256, (2, 3, 3, 72, 128), dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        one, two = (load_run(tmp_path / "runs/r", "last")[1](frames) for _ in range(2))
    assert one.is_cuda and torch.isfinite(one).all() and torch.equal(one, two)
    model = load_run(tmp_path / "runs/r", "last")[1]
    with torch.no_grad():
        merged = merge_(model)(frames)
    assert (merged.sigmoid() - one.sigmoid()).abs().max() < 0.03


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_bitsandbytes_optimizers_resume(tiny, tmp_path, name):
    base = [*tiny("vit"), "training.device=cuda", f"training.optimizer.name={name}"]
    train_run(compose("synthetic", "vit_tiny_heatmap", "default", [*base, "training.max_steps=3"]), tmp_path / "runs/r")
    config = compose("synthetic", "vit_tiny_heatmap", "default", [*base, "training.max_steps=6"])
    assert train_run(config, tmp_path / "runs/r", resume=True)["steps"] == 6
