"""Reports as tables, plots and images: scores, worst frames, labels and memory estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

# Figure renders to files without a display; pyplot would select a backend for the whole process, a notebook's too.
from matplotlib.figure import Figure
from rich.table import Table

from tracknet.data.clips import WindowDataset
from tracknet.data.config import DataConfig, Split
from tracknet.data.frames import Frames, open_frames
from tracknet.data.labels import Clip
from tracknet.errors import UserError, printable
from tracknet.files import new_file
from tracknet.reporting.overlay import TRUTH_RGB, draw_frame
from tracknet.tracking.metrics import EVENT_REACH, SWEEP_PX, FrameResult


def build_table(scores: dict, title: str) -> Table:
    """Build the table that ``evaluate`` prints.

    Args:
        scores: result of ``tracking.metrics.score``.
        title: title of the table.
    """
    table = Table(title=printable(title), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name in ("f1_strict", "f1", "precision", "recall_strict", "recall", "accuracy", "ap"):
        table.add_row(name, f"{scores[name]:.4f}")
    for name in ("median_error_px", "mean_error_px"):
        table.add_row(name, "-" if scores[name] is None else f"{scores[name]:.2f}")
    table.add_section()
    for name in ("num_frames", "tp", "fp1", "fp2", "fn", "tn"):
        table.add_row(name, str(scores[name]))
    table.add_section()
    for visibility, counts in scores["per_visibility"].items():
        table.add_row(f"visibility {visibility}", "  ".join(f"{k} {v}" for k, v in counts.items() if v))
    for name, event in (scores["events"] or {}).items():
        rates = "  ".join(f"{k} {event[k]:.2f}" for k in ("f1", "precision", "recall"))
        table.add_row(f"{name}s, within {EVENT_REACH} frames", rates)
    return table


def plot_scores(scores: dict, results: Sequence[FrameResult], path: Path) -> None:
    """Plot rates over the tolerance, a histogram of errors, and precision and recall over the confidence threshold.

    Args:
        scores: result of ``tracking.metrics.score``.
        results: detections that were scored.
        path: PNG file to write.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    (left, middle, right) = figure.subplots(1, 3)

    # Left: rates of the sweep over tolerances.
    for name in ("f1_strict", "precision", "recall_strict"):
        left.plot(SWEEP_PX, [row[name] for row in scores["sweep"]], label=name)
    left.axvline(scores["tolerance_px"], color="gray", lw=0.8, ls=":")
    left.set(xlabel="tolerance (source-image pixels)", ylim=(0, 1), title="score over tolerance")
    left.legend()

    # Middle: errors of detected balls (TP and FP1), with all errors of 20 pixels or more in the last bin.
    errors = [r.error_px for r in results if r.xy_true is not None and r.detection.confidence >= scores["threshold"]]
    middle.hist(np.clip(errors, 0, 20), bins=40, range=(0, 20))
    middle.set(xlabel="error of detections (pixels, 20 = 20 or more)", ylabel="frames", title="localization")

    # Right: precision and strict recall at each threshold.
    thresholds = np.linspace(0.02, 0.98, 49)
    confidence = np.array([r.detection.confidence for r in results])
    within_tolerance = np.array([r.error_px <= scores["tolerance_px"] for r in results])
    num_balls = sum(r.xy_true is not None for r in results)
    num_correct = np.array([(within_tolerance & (confidence >= t)).sum() for t in thresholds])
    num_found = np.array([(confidence >= t).sum() for t in thresholds])
    right.plot(thresholds, num_correct / np.maximum(num_found, 1), label="precision")
    right.plot(thresholds, num_correct / max(num_balls, 1), label="recall_strict")
    right.axvline(scores["threshold"], color="gray", lw=0.8, ls=":")
    right.set(xlabel="confidence threshold", ylim=(0, 1), title=f"within {scores['tolerance_px']:g} px")
    right.legend()

    with new_file(path) as work:
        figure.savefig(work, dpi=110)


def _scale_xy(xy: tuple[float, float] | None, scale: np.ndarray) -> tuple[float, float] | None:
    """Map a position to a resized image, with pixel centers at integer coordinates."""
    return None if xy is None else ((xy[0] + 0.5) * scale[0] - 0.5, (xy[1] + 0.5) * scale[1] - 0.5)


def draw_worst(
    results: Sequence[FrameResult],
    dataset: WindowDataset,
    tolerance_px: float,
    threshold: float,
    path: Path,
    number: int = 12,
) -> None:
    """Draw the frames with the worst errors on one sheet.

    False positives come first, in descending order of confidence, followed by missed balls in ascending order of
    confidence. Frames are shown at the model's input size; errors in the captions are in source-image pixels.

    Args:
        results: detections and labels of the scored frames.
        dataset: dataset that the frames belong to.
        tolerance_px: largest error of a true positive, in source-image pixels.
        threshold: minimum confidence of a detection.
        path: PNG file to write.
        number: maximum number of frames to draw.
    """
    by_name = {clip.name: i for i, clip in enumerate(dataset.clips)}
    wrong = [r for r in results if r.outcome(tolerance_px, threshold) not in ("TP", "TN")]
    wrong.sort(
        key=lambda r: (
            r.detection.confidence < threshold,
            -r.detection.confidence if r.detection.confidence >= threshold else r.detection.confidence,
        )
    )
    shown = wrong[:number] or list(results[:number])  # without errors, the first frames
    tiles = []
    for r in shown:
        clip = dataset.clips[by_name[r.clip]]
        image = np.ascontiguousarray(dataset.frames[by_name[r.clip]][r.detection.frame].transpose(1, 2, 0))
        scale = np.array([image.shape[1], image.shape[0]]) / np.array(clip.size_wh)
        ball = r.detection
        is_seen = ball.confidence >= threshold
        truth = _scale_xy(r.xy_true, scale)
        detected = _scale_xy(ball.xy_image if is_seen else None, scale)
        error = f"  {r.error_px:.0f} px off" if np.isfinite(r.error_px) and is_seen else ""
        outcome = r.outcome(tolerance_px, threshold)
        caption = f"{outcome}  {r.clip} frame {ball.frame}  confidence {ball.confidence:.2f}{error}"
        tiles.append(draw_frame(image, truth, detected, caption))
    # Fill the last row with blank tiles and join all tiles into one image.
    columns = min(3, len(tiles))
    while len(tiles) % columns:
        tiles.append(np.zeros_like(tiles[0]))
    sheet = np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])
    _write_png(sheet, path)


def draw_contact_sheet(clips: Mapping[Split, list[Clip]], config: DataConfig, path: Path, per_split: int = 9) -> None:
    """Draw labeled frames of each split, resized as for training, on one sheet.

    Frames are spread evenly over the labels of the split, or over its frames if it has no labeled ball. An inset shows
    the 33 x 33 pixels around the ball, enlarged four times, to check that the label is on the ball.

    Args:
        clips: clips by split.
        config: data section of the configuration.
        path: PNG file to write; its folder is created.
        per_split: maximum number of frames per split.
    """
    rows = []
    for split, split_clips in clips.items():
        labeled = [(c, i) for c in split_clips for i, label in sorted(c.labels.items()) if label.xy_image is not None]
        labeled = labeled or [(c, i) for c in split_clips for i in range(c.num_frames)]
        samples = [labeled[i * len(labeled) // per_split] for i in range(min(per_split, len(labeled)))]
        # Open each clip once: a video reader continues decoding from the previous frame.
        sources = {clip.name: open_frames(clip, config.preprocess.resize) for clip, _ in samples}
        tiles = [_draw_label(clip, i, split, sources[clip.name], config) for clip, i in samples]
        while tiles and len(tiles) % 3:
            tiles.append(np.zeros_like(tiles[0]))
        rows += [np.hstack(tiles[i : i + 3]) for i in range(0, len(tiles), 3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_png(np.vstack(rows), path)


def _draw_label(clip: Clip, index: int, split: str, source: Frames, config: DataConfig) -> np.ndarray:
    """Return the tile of one labeled frame: the frame with its label and caption, and an enlarged inset of the ball."""
    size_wh = tuple(config.preprocess.resize)
    try:
        image = np.ascontiguousarray(source[index].transpose(1, 2, 0))
    except UserError:
        # The data check reports the frame as a finding; the sheet shows the other frames.
        blank = np.zeros((size_wh[1], size_wh[0], 3), np.uint8)
        return draw_frame(blank, None, None, f"{split}  {clip.name} frame {index}  cannot be decoded")
    label = clip.labels.get(index)
    if label is None or label.xy_image is None:
        return draw_frame(image, None, None, f"{split}  {clip.name} frame {index}  no ball")
    xy = (np.array(label.xy_image) + 0.5) * size_wh / np.array(clip.size_wh) - 0.5
    x, y = np.round(xy).astype(int)
    # Padding by 16 shifts coordinates by 16, so the crop that starts at (x, y) is centered on the ball.
    patch = cv2.copyMakeBorder(image, 16, 16, 16, 16, cv2.BORDER_REPLICATE)[y : y + 33, x : x + 33]
    inset = cv2.resize(patch, (132, 132), interpolation=cv2.INTER_NEAREST)
    cv2.drawMarker(inset, (66, 66), TRUTH_RGB, cv2.MARKER_CROSS, 40, 1)
    tile = draw_frame(image, tuple(xy), None, f"{split}  {clip.name} frame {index}  visibility {int(label.visibility)}")
    # Put the inset into the bottom corner that is farther from the ball.
    left = 0 if x > size_wh[0] // 2 else size_wh[0] - 132
    if size_wh[0] >= 264 and size_wh[1] >= 132:
        tile[-132:, left : left + 132] = inset
    return tile


def _write_png(image: np.ndarray, path: Path) -> None:
    """Write an RGB image ``[h, w, 3]``, uint8, as PNG."""
    # OpenCV expects BGR.
    is_encoded, png = cv2.imencode(".png", image[..., ::-1])
    assert is_encoded, "a sheet of uint8 RGB is always encodable"
    with new_file(path) as work:
        work.write_bytes(png.tobytes())


def plot_estimates(rows: dict[str, dict[str, int]], limit_bytes: int | None, path: Path) -> None:
    """Plot the peak memory of a training step as one stacked bar per mode.

    Args:
        rows: bytes of each kind of memory, by mode.
        limit_bytes: GPU memory, drawn as a vertical line, or ``None``.
        path: PNG file to write.
    """
    figure = Figure(figsize=(9, 0.7 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(rows, 0.0)  # end of each mode's bar so far, in GB
    for kind in next(iter(rows.values())):
        sizes = [kinds[kind] / 1e9 for kinds in rows.values()]
        axes.barh(list(rows), sizes, left=list(left.values()), label=kind.replace("_", " "))
        left = {name: left[name] + size for name, size in zip(rows, sizes)}
    if limit_bytes is not None:
        axes.axvline(limit_bytes / 1e9, color="black", linestyle="--", label="GPU")
    axes.invert_yaxis()
    axes.set_xlabel("peak memory of a step (GB)")
    axes.legend(loc="lower right", fontsize=8)
    with new_file(path) as work:
        figure.savefig(work, dpi=110)
