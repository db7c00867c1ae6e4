"""Overlapping windows encode each frame once, and their heatmaps are those of windows that do not share."""

import csv

import pytest
import torch

import tracknet
from tracknet.config import compose
from tracknet.data.clips import WindowDataset
from tracknet.data.splits import read_split
from tracknet.memory.micro_batch import MicroBatchConfig
from tracknet.models.heatmap_model import build_model
from tracknet.quantization.apply import apply_mode
from tracknet.tracking import predictor as predictor_module
from tracknet.tracking import stream
from tracknet.tracking.frame_features import FrameFeatures, reuse_features
from tracknet.tracking.predictor import Predictor, score_windows

CPU = torch.device("cpu")


def build(tiny, kind="vit", mode="default"):
    torch.manual_seed(0)
    name = "vit_tiny_heatmap" if kind == "vit" else "convnext_tiny_heatmap"
    config = compose("synthetic", name, mode, [*tiny(kind), "training.precision=fp32", "evaluation.stride=1"])
    model = build_model(config.model, 3)
    apply_mode(model, config.training.mode, CPU)
    return config, model.eval()


def windows(num_frames=11):
    torch.manual_seed(1)
    video = torch.randint(0, 256, (num_frames, 3, 72, 128), dtype=torch.uint8)
    keys = [[i, i + 1, i + 2] for i in range(num_frames - 2)]
    return torch.stack([video[k] for k in keys]), keys


def count_encoded(model, monkeypatch):
    counts = []
    real = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda x: counts.append(len(x)) or real(x))
    return counts


@pytest.mark.parametrize("mode", ["default", "int8", "qlora"])
@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_heatmaps_are_those_of_windows_that_do_not_share(tiny, kind, mode):
    _, model = build(tiny, kind, mode)
    frames, keys = windows()
    features = FrameFeatures(model)
    with torch.no_grad():
        for rows in (slice(0, 4), slice(4, 9)):
            shared = model(frames[rows], features=features.encode(frames[rows], keys[rows])).sigmoid()
            assert (shared - model(frames[rows]).sigmoid()).abs().max() < 1e-5


def test_each_frame_is_encoded_once_over_batches_and_repetitions(tiny, monkeypatch):
    _, model = build(tiny)
    counts, features = count_encoded(model, monkeypatch), FrameFeatures(model)
    frames, keys = windows()
    with torch.no_grad():
        maps = features.encode(frames[:4], keys[:4])
        features.encode(frames[4:9], keys[4:9])
        features.encode(frames[8:9], keys[8:9])  # nothing is new
        features.encode(frames[:1], [[7, 7, 7]])  # gone with the call before; equal keys are one frame
    assert counts == [6, 5, 1] and [len(m) for m in maps] == [12, 12]
    assert torch.equal(maps[0][1], maps[0][3])  # frame 1, in the first window and in the second


def test_nothing_is_shared_where_windows_do_not_overlap_or_there_is_no_backbone(tiny):
    _, model = build(tiny)
    assert reuse_features(model, 3, None) is None and reuse_features(model, 3, 3) is None
    assert reuse_features(model, 3, 2) is not None
    assert reuse_features(object(), 3, 1) is None  # another engine
    config = compose("synthetic", "tracknet_v2", "default", [])
    assert reuse_features(build_model(config.model, 3), 3, 1) is None


def test_scores_and_tables_are_equal_and_the_backbone_runs_a_third_as_often(tiny, tmp_path, monkeypatch):
    config, model = build(tiny)
    clips = read_split(config.data, "test")
    dataset = WindowDataset(clips, config.data, training=False, stride=1)
    predictor = Predictor(model, CPU, config.training.micro_batching(4))
    counts = count_encoded(model, monkeypatch)
    shared = score_windows(predictor, dataset, config.evaluation)
    assert sum(counts) == sum(clip.num_frames for clip in clips) == 14
    counts.clear()
    monkeypatch.setattr(predictor_module, "reuse_features", lambda *_: None)
    apart = score_windows(predictor, dataset, config.evaluation)
    assert sum(counts) == 3 * 12
    for a, b in zip(shared, apart):
        assert a.detection.frame == b.detection.frame
        assert a.detection.xy_image == pytest.approx(b.detection.xy_image, abs=1e-3)
        assert a.detection.confidence == pytest.approx(b.detection.confidence, abs=1e-5)


def test_the_table_of_a_video_is_equal_as_printed(rallies, tmp_path, monkeypatch):
    video = rallies / "game1/Clip1/clip.mp4"
    overrides = ["training.precision=fp32", "evaluation.stride=1"]
    run = tracknet.load("embedded/vit_tiny_heatmap", device="cpu", overrides=overrides)
    run.track(video).to_csv(tmp_path / "shared.csv")
    monkeypatch.setattr(stream, "reuse_features", lambda *_: None)
    run.track(video).to_csv(tmp_path / "apart.csv")
    shared, apart = (list(csv.reader((tmp_path / f"{n}.csv").read_text().splitlines())) for n in ("shared", "apart"))
    assert shared == apart and len(shared) == 15


def test_running_out_of_memory_releases_the_features(tiny, monkeypatch):
    _, model = build(tiny)
    frames, keys = windows()
    features, sizes = FrameFeatures(model), []
    real = type(model).forward

    def forward(self, x, *args, **kwargs):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    cleared = []
    clear = features.clear
    monkeypatch.setattr(features, "clear", lambda: cleared.append(1) or clear())
    predictor = Predictor(model, CPU, MicroBatchConfig(8, True, None, 1, 2, 5))
    logits, _ = predictor.run(frames[:8], features, keys[:8])
    assert sizes == [8, 4, 2, 2, 2, 2] and len(cleared) == 2
    monkeypatch.undo()
    with torch.no_grad():
        assert (logits.sigmoid() - model(frames[:8]).sigmoid()).abs().max() < 1e-5
