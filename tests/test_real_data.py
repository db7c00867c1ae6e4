"""Tests on real broadcast clips, skipped unless TRACKNET_REAL_DATA is a folder with tennis/gameN/ClipM."""

import numpy as np
import pytest
import torch

from tracknet.config import compose
from tracknet.data.clips import WindowDataset
from tracknet.data.splits import read_split
from tracknet.data.video import probe, read_video
from tracknet.models.backbone import BackboneConfig
from tracknet.models.pretrained import build_backbone

SPLIT = ["data.split.train_games=[1,3,5,6]", "data.split.val_games=[7]", "data.split.test_games=[9]"]


def test_every_tennis_clip_reads(real_data):
    config = compose("tracknet", "vit_tiny_heatmap", "default", [f"data.root={real_data / 'tennis'}", *SPLIT]).data
    clips = [c for split in ("train", "val", "test") for c in read_split(config, split)]
    assert len(clips) == 7 and sum(c.num_frames for c in clips) == 999
    assert all(c.size_wh == (1280, 720) for c in clips)


def test_every_frame_that_is_counted_is_decoded(real_data):
    """Some of these videos contain a frame that their edit list removes."""
    for path in sorted((real_data / "tennis").glob("*/*/clip.mp4")):
        assert sum(1 for _ in read_video(path)) == probe(path).num_frames, path


def test_the_ball_is_brighter_than_what_was_there_before(real_data, tmp_path):
    """Labels and frames are synchronous: pixels change at the labeled position, and rarely at a position next to it."""
    config = compose(
        "tracknet",
        "vit_tiny_heatmap",
        "default",
        [f"data.root={real_data / 'tennis'}", *SPLIT, f"data.cache_dir={tmp_path}", "data.augment.enabled=false"],
    ).data
    dataset = WindowDataset(read_split(config, "test"), config, training=False)
    at, beside = [], []
    for i in range(0, len(dataset), 2):
        item = dataset[i]
        frames = item["frames"].float()
        for t in (1, 2):
            if item["visible"][t]:
                x, y = (int(v) for v in item["xy"][t].round())
                moved = (frames[t] - frames[t - 1]).abs().amax(dim=0)
                if 20 < x < 490 and 20 < y < 270:
                    at.append(float(moved[y - 2 : y + 3, x - 2 : x + 3].max()))
                    beside.append(float(moved[y - 2 : y + 3, x + 10 : x + 15].max()))
    assert len(at) > 20 and np.median(at) > 2 * np.median(beside)


def test_the_real_dinov2_loads_and_quantizes_closely(real_data):
    from tracknet.quantization.apply import QuantizationConfig, _quantizer, quantize_backbone

    folder = real_data / "backbones" / "dinov2-small"
    if not folder.is_dir():
        pytest.skip("no backbones/dinov2-small in TRACKNET_REAL_DATA")
    x = torch.randint(0, 256, (1, 3, 140, 140), dtype=torch.uint8)
    full = build_backbone(BackboneConfig(str(folder)))
    with torch.no_grad():
        wanted = full(x)
        for config, bound in (
            (QuantizationConfig(load_in_8bit=True), 0.06),
            (QuantizationConfig(load_in_4bit=True), 0.3),
        ):
            model = build_backbone(BackboneConfig(str(folder)))
            quantize_backbone(model.hf, _quantizer(config, "auto", torch.device("cpu")), [])
            for a, b in zip(wanted, model(x)):
                assert 0 < (a - b).norm() / a.norm() < bound
