"""Each layout in its exact format: what is written comes back, what is wrong is named."""

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from tracknet.config import compose_data
from tracknet.data.config import SPLITS
from tracknet.data.labels import Event, Visibility
from tracknet.data.layouts import LAYOUTS
from tracknet.data.splits import open_dataset, read_mix, read_split, resolve_splits
from tracknet.data.video import VideoWriter
from tracknet.errors import UserError

W, H, FRAMES = 64, 48, 6
ABSENT, EASY, HARD, OCCLUDED = Visibility
# What every fixture holds, by frame: where the ball is, or None; frame 4 is without a row where the layout can say so.
BALLS = {0: (10.0, 20.0), 1: (11.5, 21.0), 2: None, 3: (60.0, 40.0), 5: (1.0, 2.0)}


def write_images(folder: Path, pattern: str, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(FRAMES):
        cv2.imwrite(str(folder / pattern.format(first + i)), np.full((H, W, 3), 20 * i, np.uint8))


def write_video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, (W, H), Fraction(30)) as video:
        for i in range(FRAMES):
            video.write(np.full((H, W, 3), 20 * i, np.uint8))


def write_rows(path: Path, header: str, row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(row(i, ball) for i, ball in BALLS.items())]) + "\n")


def ball_row(order: str):
    """Rows of Frame, Visibility, X, Y in some order; absent is 0, 0, 0."""

    def row(i: int, ball: tuple | None) -> str:
        x, y = ball or (0, 0)
        values = {"Frame": i, "Visibility": int(ball is not None), "X": x, "Y": y, "l": 2.5, "theta": -12}
        return ",".join(str(values[name]) for name in order.split(","))

    return row


def tracknet(root: Path, game: int) -> tuple[Path, Path]:
    clip = root / f"game{game}" / "Clip1"
    write_images(clip, "{:04d}.jpg")
    write_rows(
        clip / "Label.csv",
        "file name,visibility,x-coordinate,y-coordinate,status",
        lambda i, b: f"{i:04d}.jpg,1,{b[0]},{b[1]},{i % 3}" if b else f"{i:04d}.jpg,0,,,",
    )
    return clip / "Label.csv", clip / "0003.jpg"


def tracknetv2(root: Path, game: int) -> tuple[Path, Path]:
    match = root / ("Test" if game == 3 else "Professional") / f"match{game}"
    write_video(match / "video" / "1_01_00.mp4")
    write_rows(match / "csv" / "1_01_00_ball.csv", "Frame,Visibility,X,Y", ball_row("Frame,Visibility,X,Y"))
    return match / "csv" / "1_01_00_ball.csv", match / "video" / "1_01_00.mp4"


def tracknetv3(root: Path, game: int) -> tuple[Path, Path]:
    match = root / ("test" if game == 3 else "train") / f"match{game}"
    write_images(match / "frame" / "1_01_00", "{}.png")
    folder = "corrected_csv" if game == 3 else "csv"
    write_rows(match / folder / "1_01_00_ball.csv", "Frame,Visibility,X,Y", ball_row("Frame,Visibility,X,Y"))
    return match / folder / "1_01_00_ball.csv", match / "frame" / "1_01_00" / "3.png"


def blurball(root: Path, game: int) -> tuple[Path, Path]:
    write_video(root / f"{19 + game}" / "rallies_videos" / "001.mp4")
    table = root / "all_csv_annotations" / f"{19 + game}_csv_001.csv"
    write_rows(table, "Frame,X,Y,Visibility,theta,l", ball_row("Frame,X,Y,Visibility,theta,l"))
    return table, root / f"{19 + game}" / "rallies_videos" / "001.mp4"


def racketvision(root: Path, game: int) -> tuple[Path, Path]:
    video = root / "tennis" / "videos" / f"match{game}_000.mp4"
    write_video(video)
    table = root / "tennis" / "all" / f"match{game}" / "csv" / "000_ball.csv"
    write_rows(table, "Frame,X,Y,Visibility", ball_row("Frame,X,Y,Visibility"))
    info = root / "tennis" / "info"
    info.mkdir(exist_ok=True)
    for i, split in enumerate(SPLITS, start=1):
        (info / f"{split}.json").write_text(json.dumps([[f"match{i}", "000"]]))
    return table, video


def csv(root: Path, game: int) -> tuple[Path, Path]:
    write_video(root / f"game{game}.mp4")
    write_rows(root / f"game{game}.csv", "frame,x,y", lambda i, b: f"{i},{b[0]},{b[1]}" if b else f"{i},,")
    return root / f"game{game}.csv", root / f"game{game}.mp4"


def cvat(path: Path, extra: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    points = "".join(
        f'<points frame="{i}" outside="0" occluded="0" keyframe="1" points="{b[0]},{b[1]}">{extra}</points>'
        for i, b in BALLS.items()
        if b
    )
    gone = f'<points frame="2" outside="1" occluded="0" keyframe="1" points="5,5">{extra}</points>'
    path.write_text(f'<annotations><track id="0" label="ball">{points}{gone}</track></annotations>')


def wasb_soccer(root: Path, game: int) -> tuple[Path, Path]:
    camera = f"ID-{ {1: 1, 2: 4, 3: 5}[game] }"
    write_images(root / "frames" / camera, "{:05d}.png")
    cvat(root / "annos" / f"{camera}.xml", '<attribute name="used_in_game">1</attribute>')
    return root / "annos" / f"{camera}.xml", root / "frames" / camera / "00003.png"


def wasb_basketball(root: Path, game: int) -> tuple[Path, Path]:
    name = {1: "1", 2: "2", 3: "21800974"}[game]
    write_images(root / "videos" / name / "7", "{:06d}.jpg")
    cvat(root / "ball-annos" / name / "task_7.xml")
    return root / "ball-annos" / name / "task_7.xml", root / "videos" / name / "7" / "000003.jpg"


def wasb_volleyball(root: Path, game: int) -> tuple[Path, Path]:
    name = {1: "1", 2: "0", 3: "4"}[game]
    write_images(root / "videos" / name / "51725", "{}.jpg", first=51705)
    text = root / "volleyball_ball_annotation" / name / "51725.txt"
    text.parent.mkdir(parents=True)
    balls = [BALLS.get(i) for i in range(FRAMES)]
    text.write_text("".join(f"{b[0]:g} {b[1]:g}\n" if b else "0 0\n" for b in balls))
    return text, root / "videos" / name / "51725" / "51708.jpg"


def coco(root: Path, game: int) -> tuple[Path, Path]:
    write_images(root / "images" / f"game{game}", "f{:03d}.jpg")
    path = root / "annotations" / f"game{game}.json"
    path.parent.mkdir(exist_ok=True)
    images = [{"id": i, "file_name": f"game{game}/f{i:03d}.jpg", "width": W, "height": H} for i in range(FRAMES)]
    notes = []
    for i, b in BALLS.items():
        if b:
            box = {"bbox": [b[0] + 0.5 - 2, b[1] + 0.5 - 1, 4, 2]} if i % 2 else {"keypoints": [*b, 2]}
            notes.append({"id": i, "image_id": i, "category_id": 7, **box})
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": [{"id": 7, "name": "ball"}]}))
    return path, root / "images" / f"game{game}" / "f003.jpg"


FORMATS = {
    "tracknet": tracknet,
    "tracknetv2": tracknetv2,
    "tracknetv3": tracknetv3,
    "blurball": blurball,
    "racketvision": racketvision,
    "csv": csv,
    "wasb_soccer": wasb_soccer,
    "wasb_basketball": wasb_basketball,
    "wasb_volleyball": wasb_volleyball,
    "coco": coco,
}
COMPLETE = (
    "wasb_soccer",
    "wasb_basketball",
    "wasb_volleyball",
    "coco",
)  # every frame is labeled: what has no ball is absent
GAMES = {
    "tracknet": ["game1", "game2", "game3"],
    "tracknetv2": ["Professional/match1", "Professional/match2", "Test/match3"],
    "tracknetv3": ["test/match3", "train/match1", "train/match2"],
    "blurball": ["20", "21", "22"],
    "racketvision": ["tennis/match1", "tennis/match2", "tennis/match3"],
    "csv": ["game1", "game2", "game3"],
    "wasb_soccer": ["ID-1", "ID-4", "ID-5"],
    "wasb_basketball": ["1", "2", "21800974"],
    "wasb_volleyball": ["0", "1", "4"],
    "coco": ["game1", "game2", "game3"],
}


@pytest.fixture
def dataset(request, tmp_path):
    """A dataset of three games in a format, its configuration, and the label and frame file of the first."""
    name = request.param
    files = [FORMATS[name](tmp_path / "d", game) for game in (1, 2, 3)]
    config = compose_data(name.replace("tracknetv3", "tracknetv2"), [f"data.root={tmp_path / 'd'}"])
    return name, config, *files[0]


def first_game(name: str) -> str:
    return {"tracknetv3": "train/match1", "wasb_volleyball": "1"}.get(name, GAMES[name][0])


def test_every_layout_is_tested():
    assert set(FORMATS) - {"tracknetv3"} == set(LAYOUTS)


@pytest.mark.parametrize("dataset", FORMATS, indirect=True)
def test_what_is_written_comes_back(dataset):
    name, config, labels, _ = dataset
    found = open_dataset(config)
    assert found.games == GAMES[name]
    (clip,) = found.read(first_game(name))
    assert (clip.num_frames, clip.size_wh, clip.game) == (FRAMES, (W, H), first_game(name))
    assert clip.labels_path == labels
    for i in range(FRAMES):
        ball = BALLS.get(i)
        if i == 4 and name not in COMPLETE:
            assert i not in clip.labels
        elif ball is None:
            assert clip.labels[i].visibility is ABSENT and clip.labels[i].xy_image is None
        else:
            assert clip.labels[i].visibility is EASY and clip.labels[i].xy_image == pytest.approx(ball)
    assert (clip.video is None) == (len(clip.frames) == FRAMES)
    if name == "tracknet":
        assert [clip.labels[i].event for i in (0, 1, 2, 5)] == [Event.FLYING, Event.HIT, None, Event.BOUNCE]


@pytest.mark.parametrize(
    "dataset",
    [n for n in FORMATS if n not in ("tracknet", "coco", "csv", "blurball", "wasb_volleyball")],
    indirect=True,
)
def test_published_splits_are_there(dataset):
    """Where three games are enough to have them; the longer lists name games that are not in the fixture."""
    name, config, _, _ = dataset
    if name == "wasb_soccer":
        with pytest.raises(UserError, match="game 'ID-2' is not in"):
            resolve_splits(config, open_dataset(config))
        return
    if name == "wasb_basketball":
        known = LAYOUTS[name].published_splits(Path(config.root), GAMES[name])["wasb"]
        assert (known["train"], known["val"], len(known["test"])) == (["1"], ["2"], 30)
        return
    games = resolve_splits(config, open_dataset(config))
    assert all(len(games[split]) == 1 for split in SPLITS)
    assert len({clip.name for split in SPLITS for clip in read_split(config, split)}) == 3


def test_published_splits_divide_the_games():
    tennis = LAYOUTS["tracknet"].published_splits(Path(), [])
    for split in tennis.values():
        assert sorted(g for s in SPLITS for g in split[s]) == sorted(f"game{i}" for i in range(1, 11))
    volleyball = LAYOUTS["wasb_volleyball"].published_splits(Path(), [])["wasb"]
    assert sorted(int(g) for s in SPLITS for g in volleyball[s]) == list(range(55))
    assert [len(volleyball[s]) for s in SPLITS] == [24, 15, 16]


ALL_TABLES = ("tracknet", "tracknetv2", "tracknetv3", "blurball", "racketvision", "csv")
COLUMN = {"tracknet": "x-coordinate", "csv": "x"}
# Each takes the label file's text and gives a wrong one, with the words that the message must have.
TABLE_FAULTS = {
    "no column": (lambda t, n: t.replace(COLUMN.get(n, "X"), "ball_x", 1), ["column", "not found"]),
    "text for a number": (lambda t, n: t.replace("10.0", "ten"), ["ten", "line 2"]),
    "not a finite number": (lambda t, n: t.replace("10.0", "nan"), ["nan", "line 2"]),
    "labeled twice": (lambda t, n: t + t.splitlines()[1] + "\n", ["labeled twice", "line 7"]),
    "outside": (lambda t, n: t.replace("60.0", "640.0"), ["outside the 64x48"]),
    "swapped": (lambda t, n: t.replace("60.0", "SWAP").replace("40.0", "60.0").replace("SWAP", "40.0"), ["swapped"]),
    "beyond the end": (lambda t, n: re.sub(r"\n0*5(?=[.,])", "\n99", t), ["frame 99", "only 6 frames"]),
    "no number of a frame": (lambda t, n: re.sub(r"\n0*5(\.jpg)?,", "\nfive,", t), ["five", "line 6"]),
    "a longer row": (lambda t, n: t.replace("10.0", "10.0,1,1,1"), ["more values", "line 2"]),
    "not UTF-8": (lambda t, n: (t + "é").encode("latin-1"), ["not UTF-8"]),
    "half a point": (lambda t, n: t.replace("20.0", ""), ["line 2", "position"]),
}
VISIBILITY_FAULTS = {
    "unknown visibility": (
        lambda t, n: re.sub(r"^(.*60\.0.*)$", lambda m: _visibility(m[0], n, "7"), t, flags=re.M),
        ["'7'", "line 5"],
    ),
    "blank visibility": (
        lambda t, n: re.sub(r"^(.*60\.0.*)$", lambda m: _visibility(m[0], n, ""), t, flags=re.M),
        ["''", "line 5"],
    ),
}


def _visibility(row: str, name: str, value: str) -> str:
    cells = row.split(",")
    cells[{"blurball": 3, "racketvision": 3}.get(name, 1)] = value
    return ",".join(cells)


XML_FAULTS = {
    "cut off": (lambda t, n: t[:-20], ["damaged XML"]),
    "no track": (lambda t, n: "<annotations></annotations>", ["no <track>"]),
    "no number of a frame": (lambda t, n: t.replace('frame="1"', 'frame="one"'), ["frame is 'one'"]),
    "unknown outside": (lambda t, n: t.replace('outside="0"', 'outside="no"', 1), ["outside is 'no'"]),
    "no occluded": (lambda t, n: t.replace('occluded="0"', "", 1), ["occluded is 'None'"]),
    "text for a number": (lambda t, n: t.replace("11.5,21.0", "a,b"), ["('a', 'b')", "frame 1"]),
    "half a point": (lambda t, n: t.replace("11.5,21.0", "11.5"), ["('11.5', '')", "frame 1"]),
    "outside the picture": (lambda t, n: t.replace("60.0,40.0", "640,40"), ["outside the 64x48"]),
    "swapped": (lambda t, n: t.replace("60.0,40.0", "40,60"), ["swapped"]),
    "two balls": (lambda t, n: t.replace('frame="1"', 'frame="0"'), ["labeled twice", "frame 0"]),
    "beyond the end": (lambda t, n: t.replace('frame="5"', 'frame="99"'), ["frame 99", "only 6 frames"]),
    "not UTF-8": (lambda t, n: (t + "é").encode("latin-1"), ["not UTF-8"]),
}
TEXT_FAULTS = {
    "one value": (lambda t, n: t.replace("10 20", "10"), ["line 1", "expected 'x y'"]),
    "three values": (lambda t, n: t.replace("10 20", "10 20 1"), ["line 1", "expected 'x y'"]),
    "commas": (lambda t, n: t.replace("10 20", "10,20"), ["line 1"]),
    "text for a number": (lambda t, n: t.replace("10 20", "a b"), ["line 1", "('a', 'b')"]),
    "not a finite number": (lambda t, n: t.replace("10 20", "inf 2"), ["line 1", "inf"]),
    "an empty line": (lambda t, n: t.replace("0 0\n", "\n", 1), ["line 3"]),
    "a line too many": (lambda t, n: t + "3 3\n", ["only 6 frames"]),
    "outside": (lambda t, n: t.replace("60 40", "640 40"), ["outside the 64x48"]),
    "swapped": (lambda t, n: t.replace("60 40", "40 60"), ["swapped"]),
    "not UTF-8": (lambda t, n: (t + "é").encode("latin-1"), ["not UTF-8"]),
}


def _edit(change):
    def fault(text: str, name: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return fault


JSON_FAULTS = {
    "cut off": (lambda t, n: t[:-5], ["damaged JSON"]),
    "no categories": (_edit(lambda c: c.pop("categories")), ["'categories'"]),
    "an image without a name": (_edit(lambda c: c["images"][0].pop("file_name")), ["'images'", "file_name"]),
    "two categories": (
        _edit(lambda c: c["categories"].append({"id": 8, "name": "racket"})),
        ["2 categories", "data.coco.category"],
    ),
    "a missing file": (_edit(lambda c: c["images"][1].update(file_name="game1/none7.jpg")), ["file not found"]),
    "out of the root": (_edit(lambda c: c["images"][1].update(file_name="game1/../../../up1.jpg")), ["leads out"]),
    "no number": (_edit(lambda c: c["images"][1].update(file_name="game1/x.jpg")), ["must end with a number"]),
    "two balls": (_edit(lambda c: c["annotations"].append(c["annotations"][0])), ["2 balls", "f000.jpg"]),
    "an unknown image": (_edit(lambda c: c["annotations"][0].update(image_id=99)), ["image 99"]),
    "a box without area": (_edit(lambda c: c["annotations"][1].update(bbox=[1, 1, 0, 3])), ["no area"]),
    "half a box": (_edit(lambda c: c["annotations"][1].update(bbox=[1, 1])), ["expected bbox"]),
    "unknown visibility": (_edit(lambda c: c["annotations"][0].update(keypoints=[1, 1, 9])), ["is 9"]),
    "outside": (_edit(lambda c: c["annotations"][0].update(keypoints=[640, 1, 2])), ["outside the 64x48"]),
    "swapped": (_edit(lambda c: c["annotations"][0].update(keypoints=[40, 60, 2])), ["swapped"]),
}


def _no_frames(labels: Path, frame: Path) -> None:
    for other in [frame] if frame.suffix == ".mp4" else sorted(frame.parent.glob(f"*{frame.suffix}")):
        other.unlink()


def _damage(labels: Path, frame: Path) -> None:
    frame.write_bytes(frame.read_bytes()[:40])


FILE_FAULTS = {
    "labels without frames": _no_frames,
    "frames without labels": lambda labels, frame: labels.unlink(),
    "damaged frames": _damage,
}
NO_FRAMES = {"tracknet": "neither numbered images nor a video", "wasb_basketball": "contains no numbered images"}
# Elsewhere the label file is what makes a game of it.
NO_LABELS = {
    "tracknetv2": "contains no",
    "tracknetv3": "contains no",
    "racketvision": "contains no",
    "blurball": "has frames but no table",
}
CASES = [
    (name, fault)
    for names, faults in (
        (ALL_TABLES, TABLE_FAULTS),
        ([n for n in ALL_TABLES if n != "csv"], VISIBILITY_FAULTS),
        (["wasb_soccer", "wasb_basketball"], XML_FAULTS),
        (["wasb_volleyball"], TEXT_FAULTS),
        (["coco"], JSON_FAULTS),
        ([n for n in FORMATS if n != "coco"], FILE_FAULTS),
    )
    for name in names
    for fault in faults
]


def test_at_least_ten_faults_of_each_layout():
    assert all(sum(n == name for n, _ in CASES) >= 10 for name in FORMATS)


@pytest.mark.parametrize(("dataset", "fault"), CASES, indirect=["dataset"])
def test_what_is_wrong_is_named(dataset, fault, tmp_path):
    name, config, labels, frame = dataset
    if fault in FILE_FAULTS:
        if fault == "damaged frames" and frame.suffix != ".mp4":
            frame = min(
                frame.parent.glob(f"*{frame.suffix}")
            )  # only the first is opened here; others when they are read
        FILE_FAULTS[fault](labels, frame)
        words = {
            "labels without frames": [NO_FRAMES.get(name, "no frames")],
            "frames without labels": [NO_LABELS.get(name, f"game '{first_game(name)}' is not in")],
            "damaged frames": [frame.name, "damaged"],
        }[fault]
    else:
        change, words = next(f[fault] for f in _faults(name) if fault in f)
        text = change(labels.read_text(), name)
        labels.write_bytes(text if isinstance(text, bytes) else text.encode())
        words = [labels.name, *words]
    with pytest.raises(UserError) as error:
        open_dataset(config).read(first_game(name))
    for word in words:
        assert word in str(error.value)


def _faults(name: str) -> list[dict]:
    kinds = {
        "wasb_soccer": XML_FAULTS,
        "wasb_basketball": XML_FAULTS,
        "wasb_volleyball": TEXT_FAULTS,
        "coco": JSON_FAULTS,
    }
    return [kinds[name]] if name in kinds else [TABLE_FAULTS, VISIBILITY_FAULTS]


def test_soccer_leaves_spare_balls_out_and_knows_occluded(tmp_path):
    labels, _ = wasb_soccer(tmp_path / "d", 1)
    text = labels.read_text().replace('frame="3" outside="0" occluded="0"', 'frame="3" outside="0" occluded="1"')
    spare = (
        '<track id="1"><points frame="0" outside="0" occluded="0" points="1,1"><attribute'
        ' name="used_in_game">0</attribute></points></track>'
    )
    labels.write_text(text.replace("</annotations>", spare + "</annotations>"))
    config = compose_data("wasb_soccer", [f"data.root={tmp_path / 'd'}"])
    (clip,) = open_dataset(config).read("ID-1")
    assert clip.labels[0].xy_image == (10, 20) and clip.labels[3].visibility is OCCLUDED


def test_csv_columns_are_mapped(tmp_path):
    write_video(tmp_path / "a" / "clip.mp4")
    (tmp_path / "a" / "clip.csv").write_text("n,cx,cy,v\n1,0.5,0.5,1\n2,,,0\n3,0.25,1,2\n")
    settings = [
        "data.csv.frame=n",
        "data.csv.x=cx",
        "data.csv.y=cy",
        "data.csv.visibility=v",
        "data.csv.first_frame=1",
        "data.csv.normalized=true",
    ]
    (clip,) = open_dataset(compose_data("csv", [f"data.root={tmp_path}", *settings])).read("a")
    assert clip.name == "a/clip" and clip.labels[0].xy_image == (31.5, 23.5)
    assert (
        clip.labels[1].visibility is ABSENT
        and clip.labels[2].visibility is HARD
        and clip.labels[2].xy_image == (15.5, 47.5)
    )
    with pytest.raises(UserError, match="comes before"):
        (tmp_path / "a" / "clip.csv").write_text("n,cx,cy,v\n0,0.5,0.5,1\n")
        open_dataset(compose_data("csv", [f"data.root={tmp_path}", *settings])).read("a")
    with pytest.raises(UserError, match="not fractions"):
        (tmp_path / "a" / "clip.csv").write_text("n,cx,cy,v\n1,30,0.5,1\n")
        open_dataset(compose_data("csv", [f"data.root={tmp_path}", *settings])).read("a")


def test_a_gap_in_coco_images_begins_another_clip(tmp_path):
    path, _frame = coco(tmp_path, 1)
    content = json.loads(path.read_text())
    content["images"] = [i for i in content["images"] if i["id"] != 3]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    path.write_text(json.dumps(content))
    clips = open_dataset(compose_data("coco", [f"data.root={tmp_path}"])).read("game1")
    assert [(c.name, c.num_frames) for c in clips] == [("game1/0", 3), ("game1/4", 2)]


def test_a_wrong_layout_is_recognized(tmp_path):
    tracknetv2(tmp_path, 1)
    with pytest.raises(UserError, match=r"no game of layout tracknet.*looks like data\.layout=tracknetv2"):
        open_dataset(compose_data("tracknet", [f"data.root={tmp_path}"]))
    with pytest.raises(UserError, match=r"data\.root: folder .* not found"):
        open_dataset(compose_data("tracknet", [f"data.root={tmp_path / 'none'}"]))


def split(root, *overrides):
    config = compose_data("tracknet", [f"data.root={root}", *overrides])
    return resolve_splits(config, open_dataset(config))


def test_splits_name_games_and_clips_and_refuse_to_share(tmp_path):
    for game in (1, 2, 3):
        tracknet(tmp_path, game)
    lists = ["data.split.train_games=[1]", "data.split.val_games=[game2]", "data.split.test_games=[game3/Clip1]"]
    assert split(tmp_path, *lists) == {"train": ["game1"], "val": ["game2"], "test": ["game3/Clip1"]}
    with pytest.raises(UserError, match="game 'game7' is not in .*game1, game2, game3"):
        split(tmp_path, "data.split.train_games=[1]")  # the others are those of the published split
    with pytest.raises(UserError, match="game '12' is not in"):
        split(tmp_path, *lists[:2], "data.split.test_games=[12]")
    shared = [*lists[:2], "data.split.test_games=[game1/Clip1]"]
    with pytest.raises(UserError, match="train and test splits share game1"):
        split(tmp_path, *shared)
    assert split(tmp_path, *shared, "data.allow_leaks=true")["test"] == ["game1/Clip1"]
    with pytest.raises(UserError, match="published splits wasb, tracknetv4.*did you mean 'wasb'"):
        split(tmp_path, "data.split.name=wasp")
    with pytest.raises(UserError, match="train_games contains 'game1/Clip1' twice"):
        split(tmp_path, "data.split.train_games=[1,game1/Clip1]", *lists[1:])
    config = compose_data("tracknet", [f"data.root={tmp_path}", *lists[:2], "data.split.test_games=[game3/Clip9]"])
    with pytest.raises(UserError, match="'game3/Clip9' is not a clip of game3"):
        read_split(config, "test")


def test_datasets_are_mixed(tmp_path):
    from tracknet.data.clips import WindowDataset

    for game in (1, 2, 3):
        tracknet(tmp_path / "t", game)
        csv(tmp_path / "c", game)
    mix = f"data.mix=[{{layout: csv, root: {tmp_path / 'c'}, games: [game1, game2], weight: 0.5}}]"
    config = compose_data(
        "tracknet",
        [
            f"data.root={tmp_path / 't'}",
            f"data.cache_dir={tmp_path / 'cache'}",
            mix,
            "data.split.train_games=[1]",
            "data.split.val_games=[2]",
            "data.split.test_games=[3]",
        ],
    )
    windows = WindowDataset(read_split(config, "train"), config, training=True, mix=read_mix(config))
    own = sum(c == 0 for c, _ in windows.windows)
    assert (own, len(windows)) == (4, 12) and windows.windows_per_epoch == 6
    orders = [windows.epoch_order(seed) for seed in (0, 1)]
    for order in orders:
        assert len(order) == 6 and set(range(own)) <= set(order)
    assert orders[0] != orders[1]
    assert windows[own]["frames"].shape == windows[0]["frames"].shape
    with pytest.raises(UserError, match="above 0"):
        compose_data("tracknet", [mix.replace("0.5", "0")])
    with pytest.raises(UserError, match=r"data\.mix\[0\]\.games contains 'game2' twice"):
        read_mix(compose_data("tracknet", [mix.replace("game1,", "game2,")]))


@pytest.mark.parametrize("dataset", FORMATS, indirect=True)
def test_files_that_other_systems_leave_do_no_harm(dataset):
    name, config, labels, frame = dataset
    for path in (labels, frame):
        (path.parent / f"._{path.name}").write_bytes(b"left by another system")
    (labels.parent / ".DS_Store").write_bytes(b"x")
    assert open_dataset(config).games == GAMES[name]
    assert len(open_dataset(config).read(first_game(name))) == 1


def test_coco_images_may_lie_behind_a_link(tmp_path):
    coco(tmp_path / "real", 1)
    (tmp_path / "d").mkdir()
    shutil.copytree(tmp_path / "real" / "annotations", tmp_path / "d" / "annotations")
    (tmp_path / "d" / "images").symlink_to(tmp_path / "real" / "images")
    assert len(open_dataset(compose_data("coco", [f"data.root={tmp_path / 'd'}"])).read("game1")) == 1


def test_an_unrelated_file_is_no_coco(tmp_path):
    (tmp_path / "annotations.json").write_text("{}")
    with pytest.raises(UserError, match="contains no game of layout tracknet"):
        open_dataset(compose_data("tracknet", [f"data.root={tmp_path}"]))


def test_a_game_is_read_once_for_all_its_clips(tmp_path, monkeypatch):
    tracknet(tmp_path, 1)
    found = open_dataset(compose_data("tracknet", [f"data.root={tmp_path}"]))
    real, calls = LAYOUTS["tracknet"].read_game, []
    monkeypatch.setattr(LAYOUTS["tracknet"], "read_game", lambda *a: calls.append(1) or real(*a))
    found.read("game1/Clip1"), found.read("game1"), found.read(1)
    assert len(calls) == 1
