"""Inference speed of the models in frames per second, without decoding and drawing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from on_gpu.session import Session
from on_gpu.steps import subject
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode

EVERY = (("tiny", 768, 432), ("small", 512, 288), ("small", 768, 432), ("large", 512, 288))  # size, width, height


def measure_inference(session: Session, models: Sequence[tuple[str, int, int]] = EVERY, windows: int = 16) -> None:
    """Write one row per model.

    Args:
        session: session of the measurement.
        models: size of the backbone, and width and height of the frames in pixels.
        windows: windows per batch.
    """
    for size, width, height in models:
        item = f"infer {size} {width}x{height}"
        if not session.has_time(10, item):
            continue
        with session.guarded(item), torch.no_grad():
            session.clean()
            config = subject(size, windows).compose("default")
            model = build_model(config.model, config.data.sequence.length)
            apply_mode(model, config.training.mode, session.device, False)
            model.eval()
            frames = torch.randint(0, 256, (windows, config.data.sequence.length, 3, height, width), dtype=torch.uint8)
            frames = frames.to(session.device)
            ms = session.time_ms(lambda model=model, frames=frames: model(frames), 10)
            per_s = windows / ms * 1e3
            session.put(
                "infer", size=size, wh=f"{width}x{height}", windows_per_s=per_s, frames_per_s=per_s * frames.shape[1]
            )
