"""Measure the windows per second that one core loads, with TrackNet and other loaders on the same files.

    python benchmarks/loading.py --root <folder of gameN/ClipM with images> --json loading.json
    python benchmarks/loading.py \\
        --wasb <checkout of nttcom/WASB-SBDT> --tracknetv2 <checkout of ChgygLin/TrackNetV2-pytorch>

The loaders run in alternating rounds. Without --root, a clip is rendered at 1280x720. ``plain`` decodes the frames of
every window at full size with OpenCV, resizes them and stacks floats. The two public projects run their own dataset
classes without augmentation; both require torchvision, the second one also albumentations. The limits are the work that
cannot be avoided: decoding each required frame at the smallest sufficient fraction of its size, and copying the bytes
of a window. Prints a Markdown table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tracknet.config import compose_data
from tracknet.data.clips import WindowDataset
from tracknet.data.labels import Clip
from tracknet.data.splits import open_dataset
from tracknet.data.synthetic import SyntheticConfig, write_clip
from tracknet.data.video import VideoWriter, read_video

WH, LENGTH, BATCH = (512, 288), 3, 8  # width and height in pixels, frames per window, windows per batch


class Plain(Dataset):
    """Straightforward dataset, in which every window decodes its frames at full size.

    Args:
        clip: clip with images.
    """

    def __init__(self, clip: Clip):
        self.clip = clip

    def __len__(self) -> int:
        return self.clip.num_frames - LENGTH + 1

    def __getitem__(self, item: int) -> torch.Tensor:
        frames = []
        for path in self.clip.frames[item : item + LENGTH]:
            image = cv2.cvtColor(cv2.resize(cv2.imread(str(path)), WH), cv2.COLOR_BGR2RGB)
            frames.append(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
        return torch.stack(frames)


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Import modules from a checkout inside the context.

    The projects use the same generic module names, so these are removed from ``sys.modules`` afterwards.

    Args:
        folder: folder that is searched first.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("utils", "dataloaders", "datasets"):
                del sys.modules[name]


def build_wasb(clip: Clip, checkout: Path) -> Dataset:
    """Return the ``ImageDataset`` of WASB-SBDT on the same files, without augmentation.

    Args:
        clip: clip with images.
        checkout: checkout of nttcom/WASB-SBDT.
    """
    from torchvision import transforms as T

    with importing_from(checkout / "src"):
        from dataloaders.dataset_loader import ImageDataset
        from utils.dataclasses import Center

    # The smallest configuration that the class accepts, with all color jitter switched off.
    jitter = {"color_jitter": {"p": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}}
    config = {
        "dataloader": {"heatmap": {"name": "binary_fixed_size", "sigmas": [2.5], "mags": [1.0], "min_value": 0.6}},
        "transform": {"train": jitter, "test": jitter},
        "model": {"rgb_diff": False, "frames_in": LENGTH, "out_scales": [0]},
    }
    items = []
    for i in range(clip.num_frames - LENGTH + 1):
        paths = [str(p) for p in clip.frames[i : i + LENGTH]]
        annotations = []
        for j, path in enumerate(paths, start=i):
            xy = clip.labels[j].xy_image if j in clip.labels else None
            annotations.append(
                {
                    "center": Center(is_visible=xy is not None, x=xy[0] if xy else -1.0, y=xy[1] if xy else -1.0),
                    "frame_path": path,
                }
            )
        items.append({"frames": paths, "annos": annotations, "match": "m", "clip": "c"})
    normalize = T.Compose([T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    return ImageDataset(config, items, WH, WH, transform=normalize, seq_transform=None, is_train=True)


def build_tracknetv2(clip: Clip, checkout: Path, scratch: Path) -> Dataset:
    """Return the ``LoadImagesAndLabels`` of TrackNetV2-pytorch, without augmentation.

    Args:
        clip: clip with images.
        checkout: checkout of ChgygLin/TrackNetV2-pytorch.
        scratch: folder for links to the same files in the layout of that project.
    """
    with importing_from(checkout):
        from utils.dataloaders import LoadImagesAndLabels

    folder = scratch / "match1" / "images" / "rally"
    folder.mkdir(parents=True)
    rows = ["frame_num,visible,x,y"]
    for i, path in enumerate(clip.frames):
        (folder / f"{i}.jpg").symlink_to(path.resolve())
        xy = clip.labels[i].xy_image if i in clip.labels and clip.labels[i].xy_image else None
        rows.append(
            f"{i},{int(xy is not None)},{xy[0] / clip.size_wh[0] if xy else 0},{xy[1] / clip.size_wh[1] if xy else 0}"
        )
    (scratch / "match1" / "labels").mkdir()
    (scratch / "match1" / "labels" / "rally.csv").write_text("\n".join(rows) + "\n")
    return LoadImagesAndLabels(str(folder), imgsz=[WH[1], WH[0]], batch_size=BATCH, sq=LENGTH, augment=False)


def build_tracknet(clip: Clip, scratch: Path, cache: str, training: bool = True) -> WindowDataset:
    """Return the windows of TrackNet, without augmentation.

    The clip is repeated eight times, so that frames kept in memory are only a part of the dataset.

    Args:
        clip: clip with images or a video.
        scratch: folder for the cache.
        cache: value of ``data.cache``: ``none`` or ``disk``.
        training: whether windows are drawn at random as in training, or read in order.
    """
    config = compose_data(
        "tracknet", [f"data.cache={cache}", f"data.cache_dir={scratch / 'cache'}", "data.augment.enabled=false"]
    )
    return WindowDataset([clip] * 8, config, training=training)


def passes(dataset: Dataset) -> Iterator[None]:
    """Load the windows of a dataset endlessly, shuffled in each epoch, and yield after each batch.

    ``WindowDataset`` is read in its own training order, or in order if it is not for training.
    """
    epoch = 0
    while True:
        if isinstance(dataset, WindowDataset):
            order = dataset.epoch_order(epoch) if dataset.training else list(range(len(dataset)))
        else:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(epoch)).tolist()
        batches = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
        for _ in DataLoader(dataset, batch_sampler=batches):
            yield
        epoch += 1


def measure(loaders: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time the loaders in alternating rounds.

    Args:
        loaders: function of each loader that loads one batch, by name.
        rounds: number of rounds.
        seconds: duration of each loader's turn in seconds.

    Returns:
        Windows per second of each round, by loader.
    """
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, step in loaders.items():
            step()  # warm-up batch, not timed
            started, number = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                step()
                number += BATCH
            rates[name].append(number / (time.perf_counter() - started))
    return rates


def measure_limits(clip: Clip) -> dict[str, float]:
    """Return the windows per second of the unavoidable work alone.

    Returns:
        ``decode``: decoding each required frame once, at the smallest sufficient fraction of its size; ``copy``:
        copying the bytes of a window.
    """
    # OpenCV decodes JPEG at half the size in less time; it suffices if the frame is at least twice as large.
    encoded = [np.fromfile(p, np.uint8) for p in clip.frames[:64]]
    flag = cv2.IMREAD_REDUCED_COLOR_2 if clip.size_wh[0] >= 2 * WH[0] else cv2.IMREAD_COLOR
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for data in encoded:
            cv2.imdecode(data, flag)
        times.append((time.perf_counter() - started) / len(encoded))
    source = np.ones((64, LENGTH, WH[1], WH[0], 3), np.uint8)
    target = np.empty_like(source)
    copies = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        copies.append((time.perf_counter() - started) / len(source))
    # Eight neighboring windows of three frames share frames and require ten in total.
    return {"decode": 1 / (statistics.median(times) * 10 / 8), "copy": 1 / statistics.median(copies)}


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of gameN/ClipM with JPEGs (default: render a clip)")
    parser.add_argument("--wasb", type=Path, help="checkout of nttcom/WASB-SBDT")
    parser.add_argument("--tracknetv2", type=Path, help="checkout of ChgygLin/TrackNetV2-pytorch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per loader and round (default: 2)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        root = args.root or scratch / "rendered"
        if args.root is None:
            write_clip(root / "game1" / "Clip1", SyntheticConfig(frames_per_clip=120, size=(1280, 720)), 0, 0)
            for i, (_, image) in enumerate(read_video(root / "game1" / "Clip1" / "clip.mp4")):
                cv2.imwrite(str(root / "game1" / "Clip1" / f"{i:04d}.jpg"), image[..., ::-1])
            (root / "game1" / "Clip1" / "clip.mp4").unlink()
        # The same clip as images and as a video.
        dataset = open_dataset(compose_data("tracknet", [f"data.root={root}"]))
        clip = next(c for game in dataset.games for c in dataset.read(game) if c.frames)
        video_path = scratch / "clip.mp4"
        with VideoWriter(video_path, clip.size_wh, Fraction(30)) as writer:
            for path in clip.frames:
                writer.write(cv2.imread(str(path))[..., ::-1])
        video = Clip(clip.name, clip.game, (), video_path, clip.num_frames, clip.size_wh, clip.labels)
        datasets: dict[str, Dataset] = {"plain (OpenCV, full size)": Plain(clip)}
        if args.wasb:
            datasets["WASB-SBDT"] = build_wasb(clip, args.wasb)
        if args.tracknetv2:
            datasets["TrackNetV2-pytorch"] = build_tracknetv2(clip, args.tracknetv2, scratch / "v2")
        baselines = list(datasets)
        datasets |= {
            "ours, JPEG": build_tracknet(clip, scratch, "none"),
            "ours, video (at random)": build_tracknet(video, scratch, "none"),
            "ours, video (in order)": build_tracknet(video, scratch, "none", training=False),
            "ours, cache": build_tracknet(clip, scratch, "disk"),
        }
        loaders = {name: passes(d).__next__ for name, d in datasets.items()}
        rates = measure(loaders, args.rounds, args.seconds)
        limit = measure_limits(clip)
    median = {name: statistics.median(values) for name, values in rates.items()}
    best = max(median[name] for name in baselines)
    limits = {"ours, JPEG": limit["decode"], "ours, cache": limit["copy"]}
    print(
        f"{clip.num_frames} frames of {clip.size_wh[0]}x{clip.size_wh[1]}, windows of {LENGTH} at {WH[0]}x{WH[1]}, one"
        " core\n"
    )
    print("| loader | windows/s (range) | relative to the best other | share of the limit |\n|---|---|---|---|")
    for name, values in rates.items():
        share = f"{median[name] / limits[name]:.0%}" if name in limits else ""
        print(
            f"| {name} | {median[name]:,.0f} ({min(values):,.0f} to {max(values):,.0f}) | {median[name] / best:.1f}x |"
            f" {share} |"
        )
    result = {"windows_per_s": median, "rounds": rates, "limits": limit, "best_other": best}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["windows_per_s"]))


if __name__ == "__main__":
    main()
