"""From a run's folder back to exactly the model that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tracknet.config import Config, load_config
from tracknet.errors import UserError
from tracknet.models.heatmap_model import HeatmapModel, build_model
from tracknet.quantization.apply import apply_mode
from tracknet.training.checkpoint import find_checkpoint, load_state, load_weights


def resolve_device(name: str) -> torch.device:
    """Return the device that ``training.device`` means here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device=cuda, but torch sees no CUDA device: set training.device=cpu, or check the driver "
                        "and that the CUDA build of torch is installed.")  # fmt: skip
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_run(
    run: Path, checkpoint: str = "best", overrides: Sequence[str] = ()
) -> tuple[Config, HeatmapModel, torch.device, list[str]]:
    """Load a run: its configuration, its model with the same quantisation and adapters, ready to predict.

    Args:
        run: folder of the run.
        checkpoint: ``best`` or ``last``.
        overrides: ``section.key=value`` on top of the saved configuration.

    Returns:
        Configuration, model, its device, and lines for the user.

    Raises:
        UserError: no such run or checkpoint, or its files do not fit together.
    """
    folder = find_checkpoint(run, checkpoint)
    config = load_config(run / "config.yaml", overrides)
    device = resolve_device(config.training.device)
    model = build_model(
        config.model, config.data.sequence.length, config.data.preprocess.resize, load_state(folder)["backbone"]
    )
    notes = apply_mode(model, config.training.precision, config.training.quantization, config.training.lora, device)
    load_weights(folder, model)
    return config, model.eval(), device, notes
