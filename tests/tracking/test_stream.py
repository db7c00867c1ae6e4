"""Every frame gets its row, and a stream gives what a clip gives."""

import csv
import json
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch

from tests.quantization.test_apply import INT8, build
from tracknet.config import compose
from tracknet.data.clips import WindowDataset, window_indices
from tracknet.data.images import resize
from tracknet.data.splits import read_split
from tracknet.data.video import VideoWriter, probe, read_video
from tracknet.errors import UserError
from tracknet.memory.micro_batch import MicroBatchConfig
from tracknet.reporting.overlay import Trail
from tracknet.scripts import cli
from tracknet.tracking.heatmap import HeatmapGrid, find_peaks
from tracknet.tracking.predictor import EvaluationConfig, Predictor, score_windows
from tracknet.tracking.stream import follow, open_source
from tracknet.tracking.trajectory import PEAKS, Trajectory

WH = (128, 72)


def predictor(model, batch=2):
    return Predictor(model, torch.device("cpu"), MicroBatchConfig(batch, True, None, 1, 2, 3))


def frames_folder(path, n, wh=(160, 90)):
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        cv2.imwrite(str(path / f"{i}.png"), rng.integers(0, 255, (wh[1], wh[0], 3), dtype=np.uint8))
    return path


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 11, 40])
@pytest.mark.parametrize("stride, trajectory", [(None, False), (1, False), (2, True)])
def test_each_frame_once_in_order_and_equal_to_the_windows_of_a_clip(backbones, tmp_path, n, stride, trajectory):
    model = build(backbones, "vit", INT8)
    source = open_source(frames_folder(tmp_path / "f", n), 25)
    settings = EvaluationConfig(batch_size=2, stride=stride, trajectory=trajectory)
    found = [detection for detection, _ in follow(source, predictor(model), 3, WH, settings)]
    assert [d.frame for d in found] == list(range(n))
    assert [d.time_s for d in found] == pytest.approx([i / 25 for i in range(n)])
    images = [resize(image, WH) for _, image in source]
    heat: dict[int, list[torch.Tensor]] = {}
    for window in window_indices(n, 3, stride or 3):
        batch = torch.from_numpy(np.stack([images[i] for i in window]).transpose(0, 3, 1, 2)[None].copy())
        for t, i in enumerate(window):
            heat.setdefault(i, []).append(predictor(model).run(batch)[0][0, t].sigmoid())
    mean = torch.stack([torch.stack(heat[i]).mean(dim=0) for i in range(n)])
    peaks = find_peaks(mean, HeatmapGrid(source.size_wh, tuple(mean.shape[-2:])), PEAKS)
    path = Trajectory(source.size_wh)
    choices = [c for xy, height in zip(*peaks) for c in path.add(xy.numpy(), height.numpy())] + path.finish()
    for d in found:
        peak, confidence = choices[d.frame] if trajectory else (0, float(peaks.confidence[d.frame, 0]))
        assert np.allclose(d.xy_image, peaks.xy_image[d.frame, peak], atol=1e-3)
        assert d.confidence == pytest.approx(confidence, abs=1e-5)


@pytest.mark.parametrize("stride", [None, 1])
def test_clips_that_share_a_batch_are_followed_apart(backbones, rallies, tiny, stride):
    data = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit")).data
    clips = read_split(data, "train")
    model = build(backbones, "vit")

    def results(clips, size):
        windows = WindowDataset(clips, data, training=False, stride=stride)
        return score_windows(predictor(model, size), windows, EvaluationConfig(batch_size=size, trajectory=True))

    together, apart = results(clips, 4), [r for clip in clips for r in results([clip], 1)]
    assert len(clips) > 1 and [(r.clip, r.detection.frame) for r in together] == [
        (r.clip, r.detection.frame) for r in apart
    ]
    assert np.allclose([r.detection.xy_image for r in together], [r.detection.xy_image for r in apart], atol=1e-2)
    assert np.allclose([r.detection.confidence for r in together], [r.detection.confidence for r in apart], atol=1e-3)


def test_numbered_images_are_taken_by_number(tmp_path):
    source = open_source(frames_folder(tmp_path / "f", 12), 30)
    assert [p.stem for p in source.images] == [str(i) for i in range(12)]


def test_memory_running_out_while_predicting_only_changes_the_split(backbones, tmp_path, monkeypatch):
    model = build(backbones, "vit")
    batch = torch.randint(0, 256, (4, 3, 3, 72, 128), dtype=torch.uint8)
    whole = predictor(model, 4).run(batch)[0]
    real = type(model).forward

    def tight(self, frames):
        if len(frames) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, frames)

    monkeypatch.setattr(type(model), "forward", tight)
    assert torch.allclose(predictor(model, 4).run(batch)[0], whole, atol=1e-5)


def test_what_is_no_video_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such video"):
        open_source(tmp_path / "gone.mp4", 30)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        open_source(tmp_path / "empty", 30)


def test_a_trail_shows_only_what_was_detected():
    trail = Trail(5)
    dark = np.zeros((90, 160, 3), np.uint8)
    assert trail.draw(dark, None).sum() == 0
    assert trail.draw(dark, (20.0, 20.0)).sum() > 0
    assert trail.draw(dark, None).sum() == 0
    far = trail.draw(dark, (120.0, 60.0))
    assert far[40, 70].sum() == 0  # no line across the gap
    assert dark.sum() == 0


def test_predict_writes_every_frame_of_a_video(tiny, tmp_path):
    from tracknet.api.predict import predict
    from tracknet.api.train import train_run

    train_run(compose("synthetic", "vit_tiny_heatmap", "qlora", tiny("vit")), tmp_path / "runs/r")
    video = tmp_path / "rally.mp4"
    with VideoWriter(video, (160, 90), Fraction(30)) as writer:
        for i in range(17):
            writer.write(np.full((90, 160, 3), 10 * i, np.uint8))
    result = predict(tmp_path / "runs/r", video, tmp_path / "out", overrides=["evaluation.threshold=0.0"])
    rows = list(csv.DictReader((tmp_path / "out/ball.csv").read_text().splitlines()))
    assert list(rows[0]) == ["frame", "time_s", "visibility", "x", "y", "confidence"]
    assert [int(r["frame"]) for r in rows] == list(range(17)) and result["num_frames"] == 17
    assert all(-0.5 <= float(r["x"]) <= 159.5 and -0.5 <= float(r["y"]) <= 89.5 for r in rows)
    assert probe(tmp_path / "out/overlay.mp4").num_frames == 17
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ball.csv", "overlay.mp4"]
    # The overlay is in step with the video: frame i is as bright as it was.
    for i, (_, image) in enumerate(read_video(tmp_path / "out/overlay.mp4")):
        assert abs(float(np.median(image)) - 10 * i) < 6
    nothing = predict(
        tmp_path / "runs/r", video, tmp_path / "none", overlay=False, overrides=["evaluation.threshold=1.0"]
    )
    assert nothing["num_detected"] == 0
    assert all(
        r["visibility"] == "0" and r["x"] == ""
        for r in csv.DictReader((tmp_path / "none/ball.csv").read_text().splitlines())
    )


def test_a_damaged_video_leaves_no_half_written_result(tiny, tmp_path):
    from tracknet.api.predict import predict
    from tracknet.api.train import train_run

    train_run(compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit")), tmp_path / "runs/r")
    folder = frames_folder(tmp_path / "f", 9)
    (folder / "7.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"7\.png"):
        predict(tmp_path / "runs/r", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_video_gives_what_can_be_decoded_and_says_so(tmp_path, capsys):
    video = tmp_path / "rally.mkv"
    with VideoWriter(video, (160, 90), Fraction(30)) as writer:
        for i in range(60):
            writer.write(np.random.default_rng(i).integers(0, 255, (90, 160, 3), dtype=np.uint8))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    command = ["predict", "--run", "embedded/vit_tiny_heatmap", str(video), "training.device=cpu", "--out"]
    assert cli.main([*command, str(tmp_path / "no"), "--strict"]) == 2
    assert "rally.mkv" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert cli.main([*command, str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out/ball.csv").read_text().splitlines()))
    assert 5 < len(rows) == result["num_frames"] < 60 and "rally.mkv" in result["damage"]
    assert probe(tmp_path / "out/overlay.mp4").num_frames == len(rows)
    assert "--strict" in capsys.readouterr().out


def test_the_table_of_a_folder_names_its_files(tmp_path):
    folder = frames_folder(tmp_path / "f", 3)
    for i in range(3):
        (folder / f"{i}.png").rename(folder / f"shot_{9 * i}.png")
    (folder / "shot_²5.png").write_bytes((folder / "shot_0.png").read_bytes())  # no number, and no error
    command = ["predict", "--run", "embedded/vit_tiny_heatmap", str(folder), "training.device=cpu", "--no-overlay"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out/ball.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == ["shot_0.png", "shot_9.png", "shot_18.png", "shot_²5.png"]


def test_coordinates_and_overlay_of_a_phone_video_are_upright(tmp_path):
    """The same pictures stored lying, with the matrix that turns them, give the same ball in the same place."""
    rng = np.random.default_rng(0)
    pictures = [np.clip(rng.normal(90, 6, (160, 96, 3)), 0, 255).astype(np.uint8) for _ in range(8)]
    for i, picture in enumerate(pictures):
        cv2.circle(picture, (30 + 4 * i, 100 - 6 * i), 3, (230, 255, 60), -1)
    tables = []
    for name, turned in (("upright", False), ("phone", True)):
        path = tmp_path / f"{name}.mp4"
        with VideoWriter(path, (160, 96) if turned else (96, 160), Fraction(25), crf=1) as writer:
            for picture in pictures:
                writer.write(np.ascontiguousarray(np.rot90(picture)) if turned else picture)
        if turned:
            data = bytearray(path.read_bytes())
            at = data.index(b"tkhd") + 44
            numbers = (0, 65536, 0, -65536 % 2**32, 0, 0, 0, 0, 0x40000000)
            data[at : at + 36] = b"".join(n.to_bytes(4, "big") for n in numbers)
            path.write_bytes(data)
        command = ["predict", "--run", "embedded/vit_tiny_heatmap", str(path), "training.device=cpu", "--out"]
        assert cli.main([*command, str(tmp_path / name), "evaluation.threshold=0.0"]) == 0
        assert probe(tmp_path / name / "overlay.mp4").size_wh == (96, 160)
        tables.append(list(csv.DictReader((tmp_path / name / "ball.csv").read_text().splitlines())))
    distances = [float(np.hypot(float(a["x"]) - float(b["x"]), float(a["y"]) - float(b["y"]))) for a, b in zip(*tables)]
    assert len(distances) == 8 and np.median(distances) < 2
