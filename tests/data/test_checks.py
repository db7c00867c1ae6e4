"""Sound data pass; each planted fault is found, named, and decides the exit code."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tracknet.config import compose_data
from tracknet.data.checks import (
    SAME_SCENE_BITS,
    ClipHashes,
    find_jumps,
    find_leaks,
    hash_frame,
    hash_frames,
    same_scene_bits,
)
from tracknet.data.frames import open_frames
from tracknet.data.labels import Clip
from tracknet.data.motion_checks import FEWEST
from tracknet.data.splits import open_dataset
from tracknet.data.synthetic import SyntheticConfig, write_clip
from tracknet.data.video import read_video
from tracknet.scripts import cli

W, H, FRAMES = 480, 270, 60


def write_rendered(clip: Path, game: int) -> None:
    write_clip(clip, SyntheticConfig(games=3, frames_per_clip=FRAMES, size=(W, H), seed=5), game, 0)
    for i, (_, image) in enumerate(read_video(clip / "clip.mp4")):
        cv2.imwrite(str(clip / f"{i:04d}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    (clip / "clip.mp4").unlink()


def write_real(clip: Path, game: int, tennis: Path) -> None:
    """The beginning of a broadcast clip, smaller, with its labels."""
    dataset = open_dataset(compose_data("tracknet", [f"data.root={tennis}"]))
    source = dataset.read(("game1", "game3", "game5")[game])[0]
    frames = open_frames(source, (W, H))
    clip.mkdir(parents=True)
    lines = [["file name", "visibility", "x-coordinate", "y-coordinate", "status"]]
    for i in range(FRAMES):
        cv2.imwrite(str(clip / f"{i:04d}.jpg"), frames[i].transpose(1, 2, 0)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        if label := source.labels.get(i):
            xy = (
                ["", ""]
                if label.xy_image is None
                else [f"{(v + 0.5) * W / source.size_wh[0] - 0.5:.2f}" for v in label.xy_image]
            )
            lines.append([f"{i:04d}.jpg", str(int(label.visibility)), *xy, ""])
    write(clip / "Label.csv", lines)


@pytest.fixture(scope="module", params=["rendered", "real"])
def sound(request, tmp_path_factory) -> Path:
    """Three games as images with tables: rendered, and of broadcasts where there are some."""
    root = tmp_path_factory.mktemp("sound") / "data"
    tennis = request.getfixturevalue("real_data") / "tennis" if request.param == "real" else None
    for game in range(3):
        clip = root / f"game{game + 1}" / "Clip1"
        write_real(clip, game, tennis) if tennis else write_rendered(clip, game)
    return root


@pytest.fixture
def data(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "data")
    return tmp_path / "data"


def check(root: Path, *more: str) -> tuple[int, list[dict]]:
    report = root.parent / "check.json"
    report.unlink(missing_ok=True)
    code = cli.main(
        [
            "check_data",
            "--data",
            "tracknet",
            f"data.root={root}",
            "data.split.train_games=[1]",
            "data.split.val_games=[2]",
            "data.split.test_games=[3]",
            "--out",
            str(root.parent / "sheet.png"),
            "--json",
            str(report),
            *more,
        ]
    )
    return code, json.loads(report.read_text())["findings"]


def rows(root: Path, game: int = 1) -> tuple[Path, list[list[str]]]:
    path = root / f"game{game}" / "Clip1" / "Label.csv"
    return path, [line.split(",") for line in path.read_text().splitlines()]


def write(path: Path, lines: list[list[str]]) -> None:
    path.write_text("\n".join(",".join(line) for line in lines) + "\n")


def change(root: Path, edit) -> None:
    """Edit the position of every visible row: ``edit(x, y)`` gives the new one."""
    path, lines = rows(root)
    for line in lines[1:]:
        if line[2]:
            line[2:4] = [f"{v:.2f}" for v in edit(float(line[2]), float(line[3]))]
    write(path, lines)


def no_labels(root: Path) -> None:
    other = root / "game1" / "Clip2"
    shutil.copytree(root / "game1" / "Clip1", other)
    (other / "Label.csv").unlink()


def no_frames(root: Path) -> None:
    (root / "game1" / "Clip1" / f"{FRAMES - 1:04d}.jpg").unlink()


def outside(root: Path) -> None:
    change(root, lambda x, y: (x + W, y))


def swapped(root: Path) -> None:
    change(root, lambda x, y: (y, x))


def swapped_inside(root: Path) -> None:
    """Where both fit, nothing is outside: only the pictures tell."""
    path, lines = rows(root)
    for line in lines[1:]:
        if line[2]:
            line[2:4] = [line[3], line[2]] if float(line[2]) < H - 1 else line[2:4]
    write(path, [line for line in lines if not line[2].replace(".", "").isdigit() or float(line[3]) < H - 1])


def counted_from_one(root: Path) -> None:
    path, lines = rows(root)
    for i, line in enumerate(lines[1:-1], start=1):
        line[0] = f"{i:04d}.jpg"
    write(path, lines[:-1])


def of_smaller_frames(root: Path) -> None:
    change(root, lambda x, y: (x / 2, y / 2))


def repeated_frames(root: Path) -> None:
    clip = root / "game1" / "Clip1"
    for i in range(11, FRAMES, 5):
        shutil.copy(clip / f"{i - 1:04d}.jpg", clip / f"{i:04d}.jpg")


def jump(root: Path) -> None:
    path, lines = rows(root)
    visible = [i for i in range(2, len(lines) - 1) if all(lines[j][2] for j in (i - 1, i, i + 1))]
    line = lines[visible[len(visible) // 2]]
    line[2] = str((float(line[2]) + W / 2) % W)
    write(path, lines)


def same_game(root: Path) -> None:
    shutil.rmtree(root / "game3")
    shutil.copytree(root / "game1", root / "game3")


def same_court(root: Path) -> None:
    """The same frames, smaller and compressed anew, with labels of their own."""
    source, target = (root / f"game{g}" / "Clip1" for g in (1, 3))
    for path in source.glob("*.jpg"):
        small = cv2.resize(cv2.imread(str(path)), (W // 2, H // 2), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(target / path.name), small, [cv2.IMWRITE_JPEG_QUALITY, 60])
    path, lines = rows(root, 3)
    write(path, lines[:1])


def corner(root: Path) -> None:
    path, lines = rows(root)
    for line in lines[5:9]:
        line[1:4] = ["1", "0", "0"]
    write(path, lines)


def damaged(root: Path) -> None:
    path = root / "game1" / "Clip1" / "0020.jpg"
    path.write_bytes(path.read_bytes()[:500])


def nothing_labeled(root: Path) -> None:
    path, lines = rows(root)
    write(path, lines[:1])


def other_size(root: Path) -> None:
    for path in (root / "game3" / "Clip1").glob("*.jpg"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (2 * W, 2 * H)))
    path, lines = rows(root, 3)
    write(
        path,
        [
            [*line[:2], *(f"{2 * float(v) + 0.5:.2f}" for v in line[2:4]), *line[4:]] if i and line[2] else line
            for i, line in enumerate(lines)
        ],
    )


def of_another_clip(root: Path) -> None:
    path, lines = rows(root)
    _, others = rows(root, 2)
    write(path, [lines[0], *([a[0], *b[1:]] for a, b in zip(lines[1:], others[1:]))])


def shifted(root: Path) -> None:
    """By 120 of 1280 pixels."""
    change(root, lambda x, y: (x + 45 if x + 45 < W - 1 else x - 45, y))


def few(root: Path, shift: int = 0, first: int = 40, number: int = 12) -> None:
    """Leave a few labels, late in the clip, perhaps of another frame than they say."""
    path, lines = rows(root)
    kept = [line for line in lines[1 + first :] if line[2]][:number]
    for line in kept:
        line[0] = f"{int(line[0].partition('.')[0]) + shift:04d}.jpg"
    write(path, [lines[0], *kept])


def few_of_another_clip(root: Path) -> None:
    of_another_clip(root)
    few(root)


def few_one_late(root: Path) -> None:
    few(root, shift=1)


FAULTS = [
    (of_another_clip, "not on the ball", 2),
    (shifted, "not on the ball", 2),
    (few_of_another_clip, "not on the ball", 2),
    (few_one_late, "misaligned", 2),
    (no_labels, "unreadable", 2),
    (no_frames, "unreadable", 2),
    (outside, "unreadable", 2),
    (swapped, "unreadable", 2),
    (swapped_inside, "misaligned", 2),
    (counted_from_one, "misaligned", 2),
    (of_smaller_frames, "another resolution", None),
    (repeated_frames, "duplicate frames", 0),
    (jump, "jump", 0),
    (same_game, "leak", 2),
    (same_court, "leak", 2),
    (corner, "ball in the corner", 0),
    (damaged, "unreadable", 2),
    (nothing_labeled, "unlabeled", 0),
    (other_size, "sizes", 0),
]


def test_sound_data_pass_and_are_drawn(sound, capsys):
    code, findings = check(sound)
    assert (code, findings) == (0, [])
    sheet = cv2.imread(str(sound.parent / "sheet.png"))
    assert sheet.shape[0] == 9 * (288 + 16) and sheet.shape[1] == 3 * 512
    assert "Nothing found" in capsys.readouterr().out


@pytest.mark.parametrize(("plant", "kind", "code"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_planted_fault_is_found(data, plant, kind, code):
    plant(data)
    found_code, findings = check(data)
    assert kind in {f["kind"] for f in findings}, findings
    assert code is None or found_code == code


def test_a_few_right_labels_are_enough_and_too_few_say_nothing(data):
    few(data)
    assert check(data)[1] == []
    of_another_clip(data)
    few(data, number=4)
    assert "not on the ball" not in {f["kind"] for f in check(data)[1]}


def test_a_camera_that_pans_is_taken_out(data):
    """Everything moves, and the labels are right all the same; those of another clip are still found out."""
    for game in (1, 2, 3):
        clip = data / f"game{game}" / "Clip1"
        path, lines = rows(data, game)
        for i, name in enumerate(sorted(clip.glob("*.jpg"))):
            image = cv2.copyMakeBorder(cv2.imread(str(name)), 0, 0, 0, 3 * FRAMES, cv2.BORDER_REFLECT)
            cv2.imwrite(str(name), image[:, 3 * i : 3 * i + W], [cv2.IMWRITE_JPEG_QUALITY, 95])
        for line in lines[1:]:
            i = int(line[0].partition(".")[0])
            if line[2] and float(line[2]) - 3 * i >= 0:
                line[2] = f"{float(line[2]) - 3 * i:.2f}"
            elif line[2]:
                line[1:4] = ["0", "", ""]
        write(path, lines)
    kinds = {f["kind"] for f in check(data)[1]}
    assert not kinds & {"not on the ball", "misaligned"}
    of_another_clip(data)
    assert "not on the ball" in {f["kind"] for f in check(data)[1]}


def test_training_refuses_labels_of_another_clip_unless_told(data, tmp_path, backbones, capsys):
    of_another_clip(data)
    arguments = [
        "train",
        "--data",
        "tracknet",
        "--model",
        "vit_tiny_heatmap",
        "--training",
        "default",
        f"data.root={data}",
        "data.split.train_games=[1]",
        "data.split.val_games=[2]",
        "data.split.test_games=[3]",
        "data.preprocess.resize=[128,72]",
        f"data.cache_dir={tmp_path / 'c'}",
        "data.augment.crop=[64,40]",
        f"model.backbone.name={backbones['vit']}",
        "training.batch_size=2",
        "training.max_steps=1",
        "training.limit_val_batches=1",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert cli.main([*arguments, "data.allow_leaks=true"]) == 2
    message = capsys.readouterr().err
    assert (
        "not on the ball" in message
        and re.search(r"\d+% of the \d+ labels", message)
        and "data.check_motion=false" in message
    )
    # Positions of another clip, number for number, are suspicious in themselves.
    assert cli.main([*arguments, "data.allow_leaks=true", "data.check_motion=false"]) == 0
    assert "not on the ball" not in {f["kind"] for f in check(data, "data.check_motion=false")[1]}


def test_the_fast_part_finds_what_needs_few_frames(data):
    same_court(data)
    code, findings = check(data, "--fast")
    assert code == 2 and "leak" in {f["kind"] for f in findings}


def test_the_fast_part_looks_at_motion_as_training_does(data):
    of_another_clip(data)
    code, findings = check(data, "--fast")
    assert code == 2 and "not on the ball" in {f["kind"] for f in findings}
    assert "not on the ball" not in {f["kind"] for f in check(data, "--fast", "data.check_motion=false")[1]}


def test_balls_that_are_all_in_the_corner_are_not_of_another_resolution(data):
    change(data, lambda x, y: (0, 0))
    (finding,) = check(data, "--fast")[1]
    assert finding["kind"] == "ball in the corner"
    assert "visibility to 0" in finding["message"] and "data.csv.absent_xy=[0,0]" in finding["message"]


def test_clips_of_which_nothing_can_be_told_are_named(data):
    few(data, number=FEWEST - 1)
    code, (finding,) = check(data)
    assert code == 0 and finding["kind"] == "too few labels" and finding["where"] == "game1/Clip1"


def test_names_are_printed_as_they_are_and_findings_fit_a_screen(tmp_path, capsys):
    """Names of folders are a stranger's: neither colors, nor pictures, nor what a terminal obeys."""
    names = [f"[red]:smile:\x1b[31m{i}" for i in range(45)]
    for i, name in enumerate(names):
        clip = tmp_path / "data" / name / "Clip1"
        clip.mkdir(parents=True)
        for number in range(4):
            cv2.imwrite(str(clip / f"{number:04d}.jpg"), np.full((64, 64, 3), 100 + i, np.uint8))
        lines = ["file name,visibility,x-coordinate,y-coordinate,status", *(f"{n:04d}.jpg,1,0,0,0" for n in range(4))]
        (clip / "Label.csv").write_text("\n".join(lines))
    arguments = ["check_data", "--data", "tracknet", "--fast", "--out", str(tmp_path / "sheet.png")]
    arguments += [f"data.root={tmp_path / 'data'}", "data.split.val_games=[]", "data.split.test_games=[]"]
    chosen = json.dumps(names[:2])
    assert cli.main([*arguments, f"data.split.train_games={chosen}"]) == 0
    out = capsys.readouterr().out
    assert out.count("[red]:smile:\\x1b[31m0") >= 2 and "\x1b[31m" not in out  # in the table and in a finding
    assert cli.main([*arguments, f"data.split.train_games={json.dumps(names)}"]) == 0
    out = capsys.readouterr().out
    assert (
        "… and 5 more, 0 of them errors: --json FILE writes all of them." in out
        and max(map(len, out.splitlines())) < 700
    )


def test_training_refuses_a_leak_unless_told(data, tmp_path, backbones, capsys):
    same_court(data)
    arguments = [
        "train",
        "--data",
        "tracknet",
        "--model",
        "vit_tiny_heatmap",
        "--training",
        "default",
        f"data.root={data}",
        "data.split.train_games=[1]",
        "data.split.val_games=[2]",
        "data.split.test_games=[3]",
        "data.preprocess.resize=[128,72]",
        f"data.cache_dir={tmp_path / 'c'}",
        "data.augment.crop=[64,40]",
        f"model.backbone.name={backbones['vit']}",
        "training.batch_size=2",
        "training.max_steps=1",
        "training.limit_val_batches=1",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert "the same court and camera" in message or "the same frames" in message
    assert "game1/Clip1 (train) and game3/Clip1 (test)" in message and not (tmp_path / "out").exists()
    assert cli.main([*arguments, "data.allow_leaks=true"]) == 0
    assert "leak: train and test" in capsys.readouterr().out


def test_a_fast_ball_is_no_jump():
    straight = {i: (80.0 * i, 100.0) for i in range(8)}
    assert find_jumps(straight, 1280) == []
    assert find_jumps({**straight, 4: (900.0, 700.0)}, 1280) == [4]
    hit = {0: (100.0, 100.0), 1: (250.0, 100.0), 2: (120.0, 100.0)}  # there and back by a seventh of the width at most
    assert find_jumps(hit, 1280) == []


def test_frames_that_show_nothing_are_no_leak():
    dark = np.full((3, 72, 128), 4, np.uint8)
    assert hash_frame(dark) is None and len(hash_frames([dark, dark])) == 0
    hashes_by_clip = [
        ClipHashes(split, Clip(f"{split}/c", split, (), None, 1, (128, 72), {}), hash_frames([dark]))
        for split in ("train", "test")
    ]
    assert find_leaks(hashes_by_clip, SAME_SCENE_BITS) == []


@pytest.mark.parametrize(
    "name, different, leak", [("tracknet", 9, True), ("synthetic", 9, False), ("synthetic", 0, True)]
)
def test_rendered_games_that_look_alike_are_games_of_their_own(name, different, leak):
    """Among hundreds, two courts come out alike; the same frames in two splits are a leak there too."""
    bits = np.random.default_rng(0).random(256) < 0.5
    other = bits.copy()
    other[:different] ^= True
    hashes_by_clip = [
        ClipHashes(split, Clip(f"{split}/c", split, (), None, 1, (128, 72), {}), hashes[None])
        for split, hashes in (("train", bits), ("test", other))
    ]
    assert bool(find_leaks(hashes_by_clip, same_scene_bits(compose_data(name, [])))) == leak


def test_splits_that_name_no_game_are_no_clean_bill(data, capsys):
    """Labels with x and y swapped would pass unseen."""
    nobody = [
        "data.split.name=null",
        "data.split.train_games=[]",
        "data.split.val_games=[]",
        "data.split.test_games=[]",
    ]
    assert cli.main(["check_data", "--data", "tracknet", f"data.root={data}", *nobody]) == 2
    message = capsys.readouterr().err
    assert "nothing would be checked" in message and "game1, game2, game3" in message


def test_where_nothing_can_be_read_it_says_why(tmp_path, capsys):
    (tmp_path / "club").mkdir()
    (tmp_path / "club/rally.csv").write_text("frame,x,y\n0,1,2\n")
    assert cli.main(["check_data", "--data", "csv", f"data.root={tmp_path}", "data.split.train_games=[club]"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "No clip of the dataset can be read" in message and "rally.csv: found labels but no frames" in message
