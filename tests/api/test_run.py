"""The Python API: a run is loaded, finds balls in frames, follows videos, is scored, and is trained."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tracknet
from tests.conftest import TINY_DATA
from tracknet.api.run import check_images
from tracknet.data.splits import read_split
from tracknet.data.video import read_video
from tracknet.errors import UserError
from tracknet.files import hash_file
from tracknet.scripts import cli

EMBEDDED = "embedded/vit_tiny_heatmap"


@pytest.fixture(scope="module")
def run():
    return tracknet.load(EMBEDDED, device="cpu")


@pytest.fixture(scope="module")
def video(rallies) -> Path:
    return rallies / "game1/Clip1/clip.mp4"


def test_a_video_is_followed_as_the_command_follows_it(run, video, tmp_path):
    assert (
        cli.main(["predict", "--run", EMBEDDED, str(video), "--out", str(tmp_path / "a"), "training.device=cpu"]) == 0
    )
    track = run.track(video)
    balls = list(track)
    assert [ball.frame for ball in balls] == list(range(14)) and balls[3].time_s == pytest.approx(3 / 30)
    track.to_csv(tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == (tmp_path / "a/ball.csv").read_text()
    track.save_overlay(tmp_path / "b.mp4")  # frames are read again, the model is not run again
    pictures = [list(read_video(path)) for path in (tmp_path / "a/overlay.mp4", tmp_path / "b.mp4")]
    assert len(pictures[0]) == 14 and all(np.array_equal(a, b) for (_, a), (_, b) in zip(*pictures, strict=True))


def test_the_model_is_run_once_however_often_a_track_is_read(run, video, monkeypatch):
    calls = []
    real = tracknet.api.run.Predictor.run
    monkeypatch.setattr(
        tracknet.api.run.Predictor, "run", lambda self, x, *args: calls.append(len(x)) or real(self, x, *args)
    )
    track = run.track(video)
    first = next(iter(track))
    found = list(track)
    assert found[0] is first and len(track) == 14 and sum(calls) == 5  # windows of three, the last moved back
    assert list(track) == found and sum(calls) == 5


def test_an_overlay_of_a_track_that_was_begun_has_all_frames(run, video, tmp_path):
    track = run.track(video)
    for ball in track:
        if ball.frame == 4:
            break
    track.save_overlay(tmp_path / "o.mp4")
    assert len(list(read_video(tmp_path / "o.mp4"))) == 14


def test_a_data_frame_has_the_columns_of_the_table(run, video, tmp_path):
    pytest.importorskip("pandas")
    track = run.track(video)
    table = track.to_dataframe()
    with track.to_csv(tmp_path / "b.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert list(table.columns) == rows[0] and len(table) == len(rows) - 1 == 14
    assert [f"{c:.4f}" for c in table["confidence"]] == [row[5] for row in rows[1:]]


def test_balls_are_found_in_frames_in_memory(run, video):
    frames = np.stack([image for _, image in read_video(video)])
    found = run.detect(frames)
    for a, b in zip(found, run.track(video), strict=True):
        assert a.frame == b.frame and a.time_s is None
        assert a.xy_image == b.xy_image and a.confidence == b.confidence


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((3, 90, 160, 3), np.float32), r"got dtype float32: pass \(frames \* 255\)"),
        (np.zeros((3, 3, 90, 160), np.uint8), r"channels must be last: use frames\.transpose\(0, 2, 3, 1\)"),
        (np.zeros((90, 160, 3), np.uint8), r"got a single image \[90, 160, 3\]"),
        (np.zeros((3, 90, 160), np.uint8), r"got shape \[3, 90, 160\]"),
        (np.zeros((3, 90, 160, 4), np.uint8), r"got shape \[3, 90, 160, 4\]"),
        (np.zeros((0, 90, 160, 3), np.uint8), r"got shape \[0, 90, 160, 3\]"),
        (torch.zeros(3, 90, 160, 3, dtype=torch.uint8), "as a numpy array, but got a Tensor"),
    ],
)
def test_frames_that_would_be_other_pictures_are_refused(frames, message):
    with pytest.raises(UserError, match=message):
        check_images(frames)


def test_a_run_is_a_model_too(run):
    frames = torch.zeros(1, 3, 3, 72, 128, dtype=torch.uint8)
    assert torch.equal(run(frames), run.model(frames)) and run(frames).shape[:2] == (1, 3)
    assert EMBEDDED.split("/")[1] in repr(run) and not run.model.training


def test_a_run_is_trained_and_scored(tiny, tmp_path, said):
    config = tracknet.compose("synthetic", "vit_tiny_heatmap", "qlora", [*tiny("vit"), "training.max_steps=2"])
    assert tracknet.plan(config, "cpu").peak_bytes(1) > 0
    run = tracknet.train(config, tmp_path / "out", "mine")
    assert run.path.parent == tmp_path / "out/runs" and run.path.name.endswith("-mine")
    scores = run.evaluate("test")
    assert scores["split"] == "test" and (run.path / "report/run_test_scores.json").is_file()
    assert any("F1" in line for line in said)
    elsewhere = run.evaluate("val", out=tmp_path / "elsewhere")
    assert elsewhere["split"] == "val" and (tmp_path / "elsewhere/report/run_val_scores.json").is_file()
    with pytest.raises(UserError, match="name it with data="):
        run.evaluate(overrides=["data.root=x"])


def test_own_clips_are_trained_on_and_scored_without_a_layout(tiny, tmp_path, monkeypatch):
    config = tracknet.compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit"))
    clips = {}
    for split in ("train", "val", "test"):
        clips[split] = [
            tracknet.make_clip(
                clip.video,
                {
                    i: label if label.visibility is tracknet.Visibility.OCCLUDED else label.xy_image
                    for i, label in clip.labels.items()
                },
                clip.name,
            )
            for clip in read_split(config.data, split)
        ]
        for made, read in zip(clips[split], read_split(config.data, split)):
            assert [label.xy_image for label in made.labels.values()] == [
                label.xy_image for label in read.labels.values()
            ]
    wanted = tracknet.train(config, tmp_path / "a")
    config.data.root = str(tmp_path / "gone")  # nothing of it is read
    run = tracknet.train(config, tmp_path / "b", clips=clips)
    assert hash_file(run.path / "best/model.safetensors") == hash_file(wanted.path / "best/model.safetensors")
    scores = run.evaluate("test", clips=clips["test"])
    assert scores["num_frames"] == sum(len(clip.labels) for clip in clips["test"]) and (run.path / "report").is_dir()
    with pytest.raises(UserError, match="no clips for 'val'"):
        tracknet.train(config, tmp_path / "c", clips={"train": clips["train"]})
    with pytest.raises(UserError, match="outside"):
        tracknet.make_clip(clips["test"][0].video, {0: (1e4, 3.0)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        tracknet.make_clip(tmp_path / "empty", {})


def test_reports_of_an_embedded_run_stay_out_of_the_package(rallies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tracknet.load("embedded/vit_tiny_heatmap", device="cpu")
    run.evaluate("test", "synthetic", [*TINY_DATA, f"data.root={rallies}", f"data.cache_dir={tmp_path}"])
    assert not (run.path / "report").exists()
    assert (tmp_path / "outputs/hub/embedded/vit_tiny_heatmap/report/synthetic_test_scores.json").is_file()


def test_the_package_is_light_and_lists_what_it_offers():
    code = "import sys, tracknet; assert 'torch' not in sys.modules; print(*tracknet.__all__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert {"load", "train", "compose", "plan", "Run"} <= set(names) <= set(dir(tracknet))
    assert all(getattr(tracknet, name) is not None for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = tracknet.nope


def test_the_old_name_of_swapping_works_and_warns():
    with pytest.warns(FutureWarning, match=r"tracknet\.switch is now tracknet\.swap_adapter"):
        assert tracknet.switch is tracknet.swap_adapter
