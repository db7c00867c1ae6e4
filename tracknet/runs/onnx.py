"""Export of a trained model to an ONNX file, comparison of that file with torch, and inference with onnxruntime."""

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
MAX_BYTES = 1_000_000  # largest size of the sidecar in bytes
INSTALL = "pip install onnx onnxscript onnxruntime"
EXTERNAL_BYTES = 1_500_000_000  # bytes of weights above which they go into a second file; protobuf allows 2 GB


def write_onnx(model: HeatmapModel, input_wh: tuple[int, int], path: Path) -> None:
    """Export a model to ONNX, with input ``frames``, uint8 ``[batch, frame, 3, h, w]``, and output ``logits``.

    The batch size is dynamic. The number of frames per window and their size are those of training.

    Args:
        model: merged fp32 model in evaluation mode, on the CPU.
        input_wh: width and height of the frames in pixels.
        path: file to write.

    Raises:
        UserError: if onnx or onnxscript is not installed.
    """
    _require("onnx", "onnxscript")
    example = torch.zeros(2, model.num_frames, 3, input_wh[1], input_wh[0], dtype=torch.uint8)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    exporter_logger = logging.getLogger("torch.onnx")
    level = exporter_logger.level
    exporter_logger.setLevel(logging.ERROR)  # it warns about torchvision, which is not used
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # Not the older exporter (dynamo=False): it interpolates position embeddings differently, and logits were
            # off by 0.1.
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
        exporter_logger.setLevel(level)


class OnnxModel(nn.Module):
    """Exported model with the interface of ``HeatmapModel``.

    Args:
        path: ONNX file.
        device: device to run on; ``cuda`` requires onnxruntime-gpu.

    Attributes:
        path: ONNX file.
        providers: execution providers of onnxruntime in use, the preferred one first.
        input_shape: shape of a window, ``(frame, 3, h, w)``.

    Raises:
        UserError: if onnxruntime is not installed or cannot load the file, or the file is not an export of a run.
    """

    has_events = False  # an ONNX file contains only the heatmaps

    def __init__(self, path: Path, device: torch.device):
        super().__init__()
        _require("onnxruntime")
        import onnxruntime

        providers = (
            ["CUDAExecutionProvider", "CPUExecutionProvider"] if device.type == "cuda" else ["CPUExecutionProvider"]
        )
        # Without this check onnxruntime would fall back to the CPU.
        if device.type == "cuda" and providers[0] not in onnxruntime.get_available_providers():
            raise UserError("--engine onnx on a GPU requires onnxruntime-gpu: install it, or set training.device=cpu.")
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=providers)
        except _runtime_errors() as error:
            raise UserError(f"{path}: onnxruntime cannot load it ({first_line(error)}).") from error
        self.path = path
        self.providers = self._session.get_providers()
        # Check the signature now, so that a foreign file is refused here and not in the middle of a video.
        inputs = [(value.name, value.type, len(value.shape)) for value in self._session.get_inputs()]
        outputs = [(value.name, value.type) for value in self._session.get_outputs()]
        if inputs != [("frames", "tensor(uint8)", 5)] or outputs != [("logits", "tensor(float)")]:
            raise UserError(
                f"{path}: is not a model exported by TrackNet: expected one input, frames, uint8 [batch, frame, 3, h, "
                "w], and one output, logits, float32. Export the run again: tracknet export --format onnx."
            )
        self.input_shape = tuple(self._session.get_inputs()[0].shape[1:])

    def forward(self, frames: Tensor) -> Tensor:
        """Map uint8 frames ``[batch, frame, 3, h, w]`` to float32 logits ``[batch, frame, h / s, w / s]``.

        ``s`` is the stride of the heatmaps.

        Raises:
            UserError: if the frames have another dtype or shape, or the file does not compute heatmaps.
        """
        check_frames(frames, self.input_shape[0])
        try:
            (logits,) = self._session.run(["logits"], {"frames": frames.cpu().numpy()})
        except _runtime_errors() as error:
            if is_out_of_memory(error):  # the caller tries again with fewer windows
                raise
            raise UserError(f"{self.path}: onnxruntime cannot run it ({first_line(error)}).") from error
        # One heatmap per frame, whose size divides that of the frames.
        sizes = zip(logits.shape[2:], frames.shape[3:])
        if logits.shape[:2] != frames.shape[:2] or logits.ndim != 4 or any(not o or i % o for o, i in sizes):
            raise UserError(
                f"{self.path}: returns shape {list(logits.shape)} for frames of shape {list(frames.shape)}, which is"
                " not a heatmap of each frame. Export the run again: tracknet export --format onnx."
            )
        return torch.from_numpy(logits).to(frames.device)


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return all exception classes of onnxruntime; they have no common base class below ``Exception``."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))


def find_onnx(run: Path, checkpoint: str) -> Path:
    """Return the ONNX file that was exported from a checkpoint.

    Args:
        run: folder of the export, or of a run with the export in ``<run>/onnx``.
        checkpoint: ``best`` or ``last``.

    Raises:
        UserError: if the file does not exist, or was exported from another state of the run.
    """
    folder = run if (run / FILE).is_file() else run / "onnx"
    export = f"tracknet export --run {run} --checkpoint {checkpoint} --format onnx --out {run / 'onnx'}"
    if not (folder / FILE).is_file():
        raise UserError(f"{run}: contains no {FILE} and no onnx/{FILE}; create it: {export}")
    # The sidecar names the checkpoint, and the hash of its weights at the time of the export.
    try:
        source = read_json(folder / SIDECAR, MAX_BYTES)
        name, sha256 = source["checkpoint"], source["source_sha256"]
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SIDECAR}: damaged or missing; remove {folder} and export again.") from error
    if name != checkpoint:
        raise UserError(
            f"{folder / FILE} was exported from '{name}', not from '{checkpoint}': use --checkpoint {name}."
        )
    # Without the run beside it, a folder of an export has no weights to compare with.
    if folder != run and sha256 != hash_file(find_checkpoint(run, checkpoint) / "model.safetensors"):
        raise UserError(
            f"{folder / FILE} was exported from another state of the run than the current '{checkpoint}': remove "
            f"{folder} and export again: {export}"
        )
    return folder / FILE


@dataclass(frozen=True)
class Parity:
    """Differences between two models on the same frames.

    Attributes:
        max_heatmap_difference: largest difference of a heatmap cell, after the sigmoid.
        max_displacement_px: largest distance between the positions of a ball that both models find, in input pixels.
        num_balls: balls that both models find.
        num_one_sided: balls that only one of the models finds.
    """

    max_heatmap_difference: float
    max_displacement_px: float
    num_balls: int
    num_one_sided: int


@torch.no_grad()
def compare(a: nn.Module, b: nn.Module, windows: Tensor, threshold: float) -> Parity:
    """Compare the heatmaps and the balls of two models on the same windows.

    Args:
        a: first model.
        b: second model.
        windows: uint8 frames ``[n, frame, 3, h, w]``.
        threshold: smallest confidence of a ball, in ``[0, 1]``.

    Raises:
        UserError: if a model returns values that are not finite.
    """
    input_wh = (windows.shape[-1], windows.shape[-2])
    difference, displacements, both, one = 0.0, [0.0], 0, 0
    for window in windows.split(4):  # a few at a time, to limit the memory
        logits = [model(window).float().cpu() for model in (a, b)]
        if not all(x.isfinite().all() for x in logits):
            raise UserError("A model returns values that are not finite, so the models cannot be compared.")
        difference = max(difference, (logits[0].sigmoid() - logits[1].sigmoid()).abs().max().item())
        # A ball is the peak of a heatmap, if it reaches the threshold.
        peaks = [decode(x, HeatmapGrid(input_wh, tuple(x.shape[-2:]))) for x in logits]
        seen = [(p.confidence >= threshold).numpy() for p in peaks]
        distance = np.linalg.norm((peaks[0].xy_image - peaks[1].xy_image).numpy(), axis=-1)
        displacements += distance[seen[0] & seen[1]].tolist()
        both += int((seen[0] & seen[1]).sum())
        one += int((seen[0] ^ seen[1]).sum())
    return Parity(difference, max(displacements), both, one)


def _require(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        UserError: if a package cannot be imported.
    """
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise UserError(f"{package} is not installed, and ONNX requires it: {INSTALL}.") from error
