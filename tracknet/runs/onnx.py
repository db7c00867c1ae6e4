"""A trained model as an ONNX file: writing it, checking it against torch, and running it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tracknet.errors import UserError, first_line
from tracknet.files import hash_file, read_json
from tracknet.memory.micro_batch import is_out_of_memory
from tracknet.models.heatmap_model import HeatmapModel, check_frames
from tracknet.tracking.heatmap import HeatmapGrid, decode
from tracknet.training.checkpoint import find_checkpoint

FILE, SIDECAR = "model.onnx", "onnx.json"
MAX_BYTES = 1_000_000  # of the file beside the model
INSTALL = "pip install onnx onnxscript onnxruntime"
EXTERNAL_BYTES = 1_500_000_000  # a protobuf file ends at 2 GB; larger weights go into a file beside it


def write_onnx(model: HeatmapModel, input_wh: tuple[int, int], path: Path) -> None:
    """Export a merged fp32 model on the CPU: input ``frames`` uint8 ``[batch, frame, 3, h, w]``, output ``logits``.

    The batch is dynamic; frames per window and their size are those of training.

    Args:
        model: merged, in evaluation, fp32.
        input_wh: size of its frames.
        path: file to write.

    Raises:
        UserError: the packages that exporting needs are not installed.
    """
    _require("onnx", "onnxscript")
    example = torch.zeros(2, model.num_frames, 3, input_wh[1], input_wh[0], dtype=torch.uint8)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it misses torchvision, which is not used
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # The older exporter (dynamo=False) interpolates position embeddings otherwise: logits were off by 0.1.
            torch.onnx.export(
                model,
                (example,),
                str(path),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["frames"],
                output_names=["logits"],
                external_data=size > EXTERNAL_BYTES,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)


class OnnxModel(nn.Module):
    """An exported model with the interface of ``HeatmapModel``.

    Attributes:
        providers: what onnxruntime runs it on, best first.
        input_shape: ``(frame, 3, h, w)``.
    """

    has_events = False  # an ONNX file holds the heatmaps alone

    def __init__(self, path: Path, device: torch.device):
        super().__init__()
        _require("onnxruntime")
        import onnxruntime

        wanted = (
            ["CUDAExecutionProvider", "CPUExecutionProvider"] if device.type == "cuda" else ["CPUExecutionProvider"]
        )
        if device.type == "cuda" and wanted[0] not in onnxruntime.get_available_providers():
            raise UserError("--engine onnx on a GPU needs onnxruntime-gpu; install it, or set training.device=cpu.")
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=wanted)
        except _runtime_errors() as error:
            raise UserError(f"{path}: onnxruntime cannot load it ({first_line(error)}).") from error
        self.path = path
        self.providers = self._session.get_providers()
        inputs = [(value.name, value.type, len(value.shape)) for value in self._session.get_inputs()]
        outputs = [(value.name, value.type) for value in self._session.get_outputs()]
        if inputs != [("frames", "tensor(uint8)", 5)] or outputs != [("logits", "tensor(float)")]:
            raise UserError(
                f"{path}: is another model: expected one input, frames, uint8 [batch, frame, 3, h, w], and one output, "
                "logits, float32. Export the run again: tracknet export --format onnx."
            )
        self.input_shape = tuple(self._session.get_inputs()[0].shape[1:])

    def forward(self, frames: Tensor) -> Tensor:
        """Map uint8 frames ``[batch, frame, 3, h, w]`` to float32 logits ``[batch, frame, h / s, w / s]``.

        Raises:
            UserError: the frames are of another kind, or the file computes something else than heatmaps.
        """
        check_frames(frames, self.input_shape[0])
        try:
            (logits,) = self._session.run(["logits"], {"frames": frames.cpu().numpy()})
        except _runtime_errors() as error:
            if is_out_of_memory(error):  # the caller tries again with fewer windows
                raise
            raise UserError(f"{self.path}: onnxruntime cannot run it ({first_line(error)}).") from error
        sizes = zip(logits.shape[2:], frames.shape[3:])
        if logits.shape[:2] != frames.shape[:2] or logits.ndim != 4 or any(not o or i % o for o, i in sizes):
            raise UserError(
                f"{self.path}: makes {list(logits.shape)} of frames {list(frames.shape)}, and not a heatmap of each."
                " Export the run again: tracknet export --format onnx."
            )
        return torch.from_numpy(logits).to(frames.device)


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return onnxruntime's errors, which share no base class below Exception: all of its own, and no others."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))


def find_onnx(run: Path, checkpoint: str) -> Path:
    """Return the ONNX file of an exported folder, or of a run that holds one (``<run>/onnx``), made of this checkpoint.

    Raises:
        UserError: there is none, or it is of another state of the run.
    """
    folder = run if (run / FILE).is_file() else run / "onnx"
    export = f"tracknet export --run {run} --checkpoint {checkpoint} --format onnx --out {run / 'onnx'}"
    if not (folder / FILE).is_file():
        raise UserError(f"{run}: holds no {FILE} and no onnx/{FILE}; make it: {export}")
    try:
        source = read_json(folder / SIDECAR, MAX_BYTES)
        name, sha256 = source["checkpoint"], source["source_sha256"]
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SIDECAR}: damaged or missing; remove {folder} and export again.") from error
    if name != checkpoint:
        raise UserError(
            f"{folder / FILE} was exported from '{name}', not from '{checkpoint}': say --checkpoint {name}."
        )
    if folder != run and sha256 != hash_file(find_checkpoint(run, checkpoint) / "model.safetensors"):
        raise UserError(
            f"{folder / FILE} was exported from another state of the run than its '{checkpoint}' is now; remove "
            f"{folder} and make it again: {export}"
        )
    return folder / FILE


@dataclass(frozen=True)
class Parity:
    """How far two models are apart on the same frames.

    Attributes:
        max_heatmap_difference: largest difference of a cell, after the sigmoid.
        max_displacement_px: largest distance of a ball that both see, in pixels of the input.
        num_balls: balls that both see.
        num_one_sided: balls that one of them sees alone.
    """

    max_heatmap_difference: float
    max_displacement_px: float
    num_balls: int
    num_one_sided: int


@torch.no_grad()
def compare(a: nn.Module, b: nn.Module, windows: Tensor, threshold: float) -> Parity:
    """Run two models over windows, uint8 ``[n, frame, 3, h, w]``, and compare heatmaps and balls above the threshold.

    Raises:
        UserError: one of them puts out values that are not finite.
    """
    input_wh = (windows.shape[-1], windows.shape[-2])
    difference, moved, both, one = 0.0, [0.0], 0, 0
    for window in windows.split(4):
        logits = [model(window).float().cpu() for model in (a, b)]
        if not all(x.isfinite().all() for x in logits):
            raise UserError("A model puts out values that are not finite; there is nothing to compare.")
        difference = max(difference, (logits[0].sigmoid() - logits[1].sigmoid()).abs().max().item())
        peaks = [decode(x, HeatmapGrid(input_wh, tuple(x.shape[-2:]))) for x in logits]
        seen = [(p.confidence >= threshold).numpy() for p in peaks]
        distance = np.linalg.norm((peaks[0].xy_image - peaks[1].xy_image).numpy(), axis=-1)
        moved += distance[seen[0] & seen[1]].tolist()
        both += int((seen[0] & seen[1]).sum())
        one += int((seen[0] ^ seen[1]).sum())
    return Parity(difference, max(moved), both, one)


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"{package} is not installed; ONNX needs {INSTALL}.") from error
