"""Detection of hits and bounces with the optional second head: labels, loss, scores, and the table of a video."""

import csv
import json

import pytest
import torch

from tests.conftest import SIZE
from tracknet.config import compose
from tracknet.data.clips import WindowDataset
from tracknet.data.labels import Visibility
from tracknet.data.splits import read_split
from tracknet.errors import UserError
from tracknet.models.decoder import _read_at_peaks
from tracknet.runs.load import load_run
from tracknet.scripts import cli
from tracknet.tracking.metrics import FrameResult, find_events, score_events
from tracknet.tracking.records import Detection
from tracknet.training.losses import event_loss


def result(frame: int, true: int | None, hit: float = 0.0, bounce: float = 0.0, clip: str = "a") -> FrameResult:
    return FrameResult(clip, Detection(frame, (1.0, 1.0), 0.9, (hit, bounce)), 1, (1.0, 1.0), true)


def test_an_event_is_the_most_confident_frame_around():
    assert find_events({0: 0.6, 1: 0.9, 2: 0.8, 3: 0.2, 6: 0.7}, 0.5) == [1, 6]
    assert find_events({0: 0.4, 9: 0.45}, 0.5) == []


def test_events_are_scored_within_two_frames_and_once():
    frames = [
        result(i, {10: 1, 30: 1, 50: 2}.get(i, 0), hit={12: 0.9, 40: 0.8}.get(i, 0.1), bounce={50: 0.7}.get(i, 0.0))
        for i in range(60)
    ]
    scores = score_events(frames)
    assert scores["hit"] == {"tp": 1, "fp": 1, "fn": 1, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert scores["bounce"]["f1"] == 1.0
    close = [result(i, int(i in (11, 14)), hit=0.9 if i in (9, 12) else 0.0) for i in range(20)]
    assert score_events(close)["hit"]["tp"] == 2
    # Frame numbers of different clips are not compared. An unknown event is not the same as a flying ball.
    assert score_events([result(0, 1, clip="b"), result(1, 0, hit=0.9, clip="c")])["hit"]["tp"] == 0
    assert score_events([result(0, None, hit=0.9)]) is None


def test_the_loss_is_about_known_frames_and_rewards_the_right_kind():
    event = torch.tensor([[1, 2, 0, -1]])
    right = torch.tensor([[[6.0, -6], [-6, 6], [-6, -6], [6, 6]]])
    assert event_loss(right, event) < 0.1
    assert event_loss(right[..., [1, 0]], event) > 50
    grad = torch.autograd.grad(event_loss(x := right.clone().requires_grad_(), event), x)[0]
    assert (grad[0, 3] == 0).all() and (grad[0, :3] != 0).all()


def test_events_are_read_where_the_ball_is():
    maps = torch.zeros(1, 2, 2, 4, 6)
    maps[0, 0, 0, 1, 2], maps[0, 1, 1, 3, 5] = 9.0, 7.0
    logits = torch.full((1, 2, 16, 24), -9.0)
    logits[0, 0, 5, 9] = logits[0, 1, 15, 23] = 9.0
    read = _read_at_peaks(maps, logits)
    assert read[0, 0].tolist() == pytest.approx([9, 0], abs=0.1) and read[0, 1].tolist() == pytest.approx(
        [0, 7], abs=0.1
    )


@pytest.mark.parametrize(("kind", "mode"), [("vit", "default"), ("convnext", "qlora")])
def test_the_whole_way(tiny, rallies, tmp_path, kind, mode):
    out = tmp_path / "o"
    model = {"vit": "vit_tiny_heatmap", "convnext": "convnext_tiny_heatmap"}[kind]
    assert (
        cli.main(
            [
                "train",
                "--data",
                "synthetic",
                "--model",
                model,
                "--training",
                mode,
                "--output-dir",
                str(out),
                *tiny(kind),
                "model.events=true",
            ]
        )
        == 0
    )
    (run,) = (out / "runs").iterdir()
    loaded = load_run(run)[1]
    frames = torch.randint(0, 256, (2, 3, 3, SIZE[1], SIZE[0]), dtype=torch.uint8)
    with torch.no_grad():
        logits, events = loaded(frames, events=True)
        assert events.shape == (2, 3, 2) and torch.equal(loaded(frames), logits)
    assert cli.main(["evaluate", "--run", str(run), "--json", str(tmp_path / "s.json")]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())["events"]
    assert set(scores) == {"hit", "bounce"} and {"precision", "recall"} <= set(scores["hit"])
    assert (
        cli.main(
            [
                "predict",
                "--run",
                str(run),
                str(rallies / "game4" / "Clip1" / "clip.mp4"),
                "--out",
                str(tmp_path / "p"),
                "--no-overlay",
            ]
        )
        == 0
    )
    rows = list(csv.DictReader((tmp_path / "p" / "ball.csv").read_text().splitlines()))
    assert len(rows) == 14 and all(0 <= float(r["hit"]) <= 1 and 0 <= float(r["bounce"]) <= 1 for r in rows)


def test_labels_say_events(rallies, tiny):
    data = compose("synthetic", "vit_tiny_heatmap", "default", tiny("vit")).data
    clips = read_split(data, "train")
    windows = WindowDataset(clips, data, training=False)
    for item in (windows[i] for i in range(len(windows))):
        for event, i in zip(item["event"].tolist(), item["index"].tolist()):
            label = clips[item["clip"]].labels[i]
            unknown = label.event is None or label.visibility is Visibility.OCCLUDED  # occluded frames are ignored
            assert event == (-1 if unknown else label.event)
    assert any((windows[i]["event"] > 0).any() for i in range(len(windows)))


def test_a_baseline_has_no_events():
    with pytest.raises(UserError, match=r"model\.events=true requires a model with a backbone"):
        compose("tracknet", "tracknet_v2", "default", ["model.events=true"])
