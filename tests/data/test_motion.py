"""Labels lie on what moves: right ones pass, those of another clip, place or time do not; rest is no fault."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from tracknet.config import compose_data
from tracknet.data.labels import BallLabel, Clip, Visibility
from tracknet.data.motion import see_motion
from tracknet.data.motion_checks import AS_THEY_ARE, FEWEST, GUESSES, Score, check_motion, judge, score_labels
from tracknet.data.splits import open_dataset
from tracknet.data.synthetic import SyntheticConfig, write_clip
from tracknet.data.video import read_video

W, H, FRAMES = 480, 270, 60


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> list[Clip]:
    """Clips of three games as videos."""
    root = tmp_path_factory.mktemp("motion")
    for game in range(3):
        config = SyntheticConfig(games=3, frames_per_clip=FRAMES, size=(W, H), seed=5)
        write_clip(root / f"game{game + 1}" / "Clip1", config, game, 0)
    return read(root)


def read(root: Path) -> list[Clip]:
    dataset = open_dataset(compose_data("tracknet", [f"data.root={root}"]))
    return [clip for game in dataset.games for clip in dataset.read(game)]


def relabel(clip: Clip, labels: dict[int, BallLabel]) -> Clip:
    return dataclasses.replace(clip, labels={i: label for i, label in labels.items() if 0 <= i < clip.num_frames})


def move(clip: Clip, dx: float) -> Clip:
    """Shift labels across; those that would leave the picture go the other way."""

    def moved(label: BallLabel) -> BallLabel:
        if label.xy_image is None:
            return label
        x, y = label.xy_image
        return dataclasses.replace(label, xy_image=(x + dx if x + dx < clip.size_wh[0] - 1 else x - dx, y))

    return relabel(clip, {i: moved(label) for i, label in clip.labels.items()})


def delay(clip: Clip, by: int) -> Clip:
    return relabel(clip, {i + by: label for i, label in clip.labels.items()})


def keep(clip: Clip, number: int, skip: int = 0) -> Clip:
    """Keep a few labels of a ball."""
    seen = [i for i, label in sorted(clip.labels.items()) if label.xy_image is not None][skip:]
    return relabel(clip, {i: clip.labels[i] for i in seen[:number]})


def kinds(*clips: Clip) -> list[str]:
    return [f.kind for f in check_motion(clips)[0]]


def test_right_labels_pass_and_wrong_ones_are_named_with_the_number(rendered):
    for clip, other in zip(rendered, [*rendered[1:], rendered[0]]):
        assert kinds(clip) == []
        (finding,), _ = check_motion([relabel(clip, other.labels)])
        scores = score_labels(see_motion(relabel(clip, other.labels)))[AS_THEY_ARE]
        assert finding.kind == "not on the ball" and finding.is_error and "data.check_motion=false" in finding.message
        assert f"{scores.share:.0%} of the {scores.number} labels" in finding.message
        assert kinds(move(clip, 45)) == ["not on the ball"]


@pytest.mark.parametrize(("by", "words"), [(1, "one frame earlier"), (-1, "one frame later")])
def test_labels_one_frame_off_are_named_of_few_labels_too(rendered, by, words):
    for clip in (delay(rendered[0], by), delay(keep(rendered[0], 12, skip=30), by)):
        (finding,), _ = check_motion([clip])
        assert (
            finding.kind == "misaligned" and words in finding.message and "data.check_motion=false" in finding.message
        )


def test_every_real_clip_passes_and_with_the_labels_of_another_does_not(real_data):
    clips = read(real_data / "tennis")
    assert kinds(*clips) == []
    assert all(kinds(delay(clip, 1)) == ["misaligned"] for clip in clips)
    assert all(kinds(move(clip, 120)) == ["not on the ball"] for clip in clips)
    wrong = [relabel(clip, other.labels) for clip, other in zip(clips, [*clips[3:], *clips[:3]])]
    assert kinds(*wrong) == ["not on the ball"] * len(clips)


def test_nothing_is_asked_of_a_ball_at_rest(rendered):
    resting = BallLabel(Visibility.EASY, (100.0, 100.0))
    still = relabel(rendered[0], dict.fromkeys(range(FRAMES), resting))
    assert check_motion([still]) == ([], [still])


def test_nothing_is_asked_of_clips_without_neighbors(rendered):
    one = dataclasses.replace(rendered[0], num_frames=1)
    none = relabel(rendered[1], {})
    assert check_motion([relabel(one, one.labels), none]) == ([], [relabel(one, one.labels), none])


def test_clips_of_few_labels_are_judged_together_with_their_game(rendered):
    def parts(clip):
        return [dataclasses.replace(keep(clip, 4, skip), name=f"{clip.game}/{skip}") for skip in (5, 20, 35)]

    one = parts(rendered[0])[:1]
    assert check_motion(one) == ([], one)
    assert check_motion(parts(rendered[0])) == ([], [])
    wrong = [relabel(clip, {i: move(rendered[0], 45).labels[i] for i in clip.labels}) for clip in parts(rendered[0])]
    (finding,), untold = check_motion(wrong)
    assert finding.kind == "not on the ball" and "3 clips of few labels" in finding.where and untold == []


def test_repeated_frames_count_as_one(rendered, tmp_path):
    """As in a video brought from 25 to 30 frames a second: its labels are right, those of repeated frames too."""
    frames = [image for _, image in read_video(rendered[0].video)]
    rng, paths, labels = np.random.default_rng(0), [], {}
    for i in range(FRAMES):
        source = i - 1 if i % 6 == 5 else i
        noisy = np.clip(frames[source] + rng.integers(-2, 3, frames[0].shape), 0, 255).astype(
            np.uint8
        )  # of compression
        paths.append(tmp_path / f"{i:04d}.png")
        cv2.imwrite(str(paths[-1]), noisy[..., ::-1])
        if source in rendered[0].labels:
            labels[i] = rendered[0].labels[source]
    clip = dataclasses.replace(rendered[0], frames=tuple(paths), video=None, labels=labels)
    motion = see_motion(clip)
    assert any(i % 6 == 5 for i in motion.balls) and motion.changes.keys() >= motion.balls.keys()
    assert score_labels(motion)[AS_THEY_ARE].share > 0.9 and kinds(clip) == []


def test_labels_of_which_a_part_means_something_else_are_named():
    """Half of them with x and y swapped: enough lie on what moves, and the others would."""
    number = 24
    scores = {name: Score(number, 0, 0, 13) for name in GUESSES} | {AS_THEY_ARE: Score(number, 13)}
    assert judge(scores, "here") == []
    (finding,) = judge(scores | {"with x and y swapped": Score(number, 11, 11, 13)}, "here")
    assert finding.kind == "misaligned" and "13 of the 24 labels" in finding.message
    assert "11 others would be with x and y swapped" in finding.message


def test_rallies_that_are_rendered_small_and_short_pass(rallies):
    clips = read(rallies)
    findings, untold = check_motion(clips)
    assert findings == [] and len(untold) < len(clips)
    assert all(score_labels(see_motion(clip))[AS_THEY_ARE].number < FEWEST for clip in untold)
