"""Labels and pictures of strangers: what they might mean is asked, what they cannot mean is refused, and nothing else
is raised."""

import io
import json
import os
import random
import shutil
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.test_layouts import FORMATS, FRAMES, H, W, csv, write_images, write_video
from tests.fuzzing import damaged
from tracknet.config import compose_data
from tracknet.data.cache import ensure_cached
from tracknet.data.checks import check_labels, read_skipping_errors
from tracknet.data.images import FORMATS as FORMATS_OF_PICTURES
from tracknet.data.images import natural_key, read_image
from tracknet.data.labels import Visibility
from tracknet.data.layouts.cvat import CvatConfig, read_cvat
from tracknet.data.layouts.reading import numbered_images, open_images, read_number, read_table
from tracknet.data.layouts.tracknetv2 import published_splits
from tracknet.data.splits import open_dataset, read_split
from tracknet.data.synthetic import SyntheticConfig, ensure_rallies
from tracknet.errors import UserError


def read(layout, root, game, *overrides):
    return open_dataset(compose_data(layout, [f"data.root={root}", *overrides])).read(game)


# Images and their numbers


def test_a_stray_number_is_counted_and_not_listed(tmp_path):
    write_images(tmp_path / "clip", "{}.jpg")
    shutil.copy(tmp_path / "clip/0.jpg", tmp_path / "clip/20231105123000.jpg")
    with pytest.raises(
        UserError, match=r"images 6, 7, 8, 9, 10, … \(20231105122994 in all\) are missing between 0.jpg and 2023"
    ) as error:
        open_images(numbered_images(tmp_path / "clip"), tmp_path / "clip")
    assert "move it to another folder" in str(error.value)


def test_gaps_are_named(tmp_path):
    write_images(tmp_path / "clip", "{:04d}.jpg", first=7)
    for missing in (8, 11):
        (tmp_path / f"clip/{missing:04d}.jpg").unlink()
    with pytest.raises(UserError, match=r"images 8, 11 are missing between 0007.jpg and 0012.jpg"):
        open_images(numbered_images(tmp_path / "clip"), tmp_path / "clip")


@pytest.mark.parametrize("digits", ["²", "١٢", "1²", "９", "9" * 30])
def test_digits_are_those_of_ascii(tmp_path, digits):
    write_images(tmp_path / "clip", "{}.jpg")
    shutil.copy(tmp_path / "clip/0.jpg", tmp_path / f"clip/{digits}.jpg")
    assert len(numbered_images(tmp_path / "clip")) == FRAMES
    with pytest.raises(UserError, match="expected a number such as"):
        read_number(digits, "frame", "here")


def test_one_natural_order():
    names = [
        "frame_12.png",
        "frame_2.png",
        "frame_0.png",
        "frame_10.png",
        "frame_1.png",
        "frame_²3.png",
        "b1c2",
        "b01c1",
        "10",
        "9",
        "007",
    ]
    assert sorted(names, key=natural_key) == [
        "007",
        "9",
        "10",
        "b01c1",
        "b1c2",
        "frame_0.png",
        "frame_1.png",
        "frame_2.png",
        "frame_10.png",
        "frame_12.png",
        "frame_²3.png",
    ]


def test_matches_are_numbered_in_ascii(tmp_path):
    games = [f"Professional/match{n}" for n in ("1", "2", "٣", "²")]
    assert published_splits(tmp_path, games)["official"] == {"train": games[:1], "val": games[1:2], "test": []}


def test_games_are_listed_in_that_order(tmp_path):
    for name in ("match2", "match10", "match1"):
        write_video(tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.csv").write_text("frame,x,y\n0,1,1\n")
    dataset = open_dataset(compose_data("csv", [f"data.root={tmp_path}"]))
    assert dataset.games == ["match1", "match2", "match10"]


# CVAT


def cvat_file(tmp_path, *tracks):
    path = tmp_path / "a.xml"
    path.write_text(f"<annotations>{''.join(tracks)}</annotations>")
    return path


def box(frame, left, top, right, bottom, outside=0, keyframe=1):
    corners = f'xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"'
    return f'<box frame="{frame}" outside="{outside}" occluded="0" keyframe="{keyframe}" {corners}></box>'


BOXES = (
    box(0, 10, 20, 14, 24)
    + box(1, 11, 21, 15, 25, keyframe=0)
    + box(2, 12, 22, 16, 26)
    + box(3, 12, 22, 16, 26, outside=1)
)


def test_the_middle_of_a_box_is_the_ball_and_only_key_frames_are_labels(tmp_path):
    path = cvat_file(tmp_path, f'<track id="0" label="ball">{BOXES}</track>')
    labels = read_cvat(path, 6, CvatConfig())
    assert {i: label.xy_image for i, label in labels.items()} == {0: (11.5, 21.5), 2: (13.5, 23.5), 3: None}
    assert labels[3].visibility is Visibility.ABSENT
    everything = read_cvat(path, 6, CvatConfig(keyframes_only=False, unmarked="absent"))
    assert {i: label.xy_image for i, label in everything.items()} == {
        0: (11.5, 21.5),
        1: (12.5, 22.5),
        2: (13.5, 23.5),
        3: None,
        4: None,
        5: None,
    }


def test_a_second_label_is_asked_about_and_chosen_by_name(tmp_path):
    racket = f'<track id="1" label="racket">{box(0, 1, 1, 3, 3)}</track>'
    path = cvat_file(tmp_path, f'<track id="0" label="ball">{BOXES}</track>', racket)
    with pytest.raises(UserError, match=r"2 labels \(ball, racket\)\. Set the label of the ball: data\.cvat\.label"):
        read_cvat(path, 6, CvatConfig())
    with pytest.raises(UserError, match="did you mean 'ball'"):
        read_cvat(path, 6, CvatConfig(label="bal"))
    assert read_cvat(path, 6, CvatConfig(label="ball"))[0].xy_image == (11.5, 21.5)
    assert read_cvat(path, 6, CvatConfig(label="racket"))[0].xy_image == (1.5, 1.5)


def test_where_one_track_ends_another_may_have_the_ball(tmp_path):
    second = f'<track id="1" label="ball">{box(3, 0, 0, 4, 4)}</track>'
    path = cvat_file(tmp_path, f'<track id="0" label="ball">{BOXES}</track>', second)
    assert read_cvat(path, 6, CvatConfig())[3].xy_image == (1.5, 1.5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (box(0, 5, 5, 5, 9), "has no area"),
        (box("²", 1, 1, 2, 2), "expected a number"),
        (box(0, "nan", 1, 2, 2), "two numbers"),
        (box(0, "9" * 5000, 1, 2, 2), "two numbers"),
        (box(0, 1, 1, 2, 2, outside=2), "expected 0 or 1"),
        ("<polygon/>", "points or boxes"),
        ("<!DOCTYPE x>", "entities"),
        ("<points", "damaged XML"),
    ],
)
def test_what_is_wrong_in_a_track_is_named(tmp_path, content, words):
    path = tmp_path / "a.xml"
    track = f'<annotations><track id="0" label="ball">{content}</track></annotations>'
    path.write_text(content + "<annotations/>" if "DOCTYPE" in content else track)
    with pytest.raises(UserError, match=words) as error:
        read_cvat(path, 6, CvatConfig())
    assert "a.xml" in str(error.value) and len(str(error.value)) < 1000


def test_what_cvat_filled_in_is_unlabeled_and_not_absent(tmp_path):
    """A ball is there, though no person put it where it is."""
    path = cvat_file(tmp_path, f'<track id="0" label="ball">{BOXES}</track>')
    labels = read_cvat(path, 6, CvatConfig(unmarked="absent"))
    assert sorted(i for i, label in labels.items() if label.visibility is Visibility.EASY) == [0, 2]
    assert sorted(i for i, label in labels.items() if label.visibility is Visibility.ABSENT) == [3, 4, 5]
    moving = f'<track id="1" label="ball">{box(3, 0, 0, 4, 4, keyframe=0)}</track>'
    path = cvat_file(tmp_path, f'<track id="0" label="ball">{BOXES}</track>', moving)
    assert sorted(read_cvat(path, 6, CvatConfig())) == [0, 2]


def test_cvat_for_images_is_told_apart(tmp_path):
    path = cvat_file(tmp_path, '<image id="0" name="a.jpg"><box label="ball" xtl="1" ytl="1" xbr="2" ybr="2"/></image>')
    with pytest.raises(UserError, match="export the task as 'CVAT for video'"):
        read_cvat(path, 6, CvatConfig())


def test_the_options_reach_the_layouts(tmp_path):
    FORMATS["wasb_soccer"](tmp_path, 1)
    (clip,) = read("wasb_soccer", tmp_path, "ID-1", "data.cvat.unmarked=unlabeled")
    assert sorted(clip.labels) == [0, 1, 2, 3, 5]
    (clip,) = read("wasb_soccer", tmp_path, "ID-1")
    assert sorted(clip.labels) == [0, 1, 2, 3, 4, 5]


# Stills


def test_single_pictures_are_refused_where_the_model_looks_at_several(tmp_path):
    (tmp_path / "images/g").mkdir(parents=True)
    images = [{"id": i, "file_name": f"g/p{10 * i}.jpg"} for i in range(3)]
    for image in images:
        cv2.imwrite(str(tmp_path / "images" / image["file_name"]), np.full((H, W, 3), 9, np.uint8))
    notes = [{"image_id": i, "category_id": 1, "bbox": [3, 3, 4, 4]} for i in range(3)]
    content = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "ball"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    settings = [f"data.root={tmp_path}", "data.split.train_games=[g]"]
    with pytest.raises(
        UserError, match=r"3 of 3 clips have one frame .*3 consecutive frames.*data.layout=csv.*frame, x, y"
    ):
        read_split(compose_data("coco", settings), "train")
    assert len(read_split(compose_data("coco", [*settings, "data.sequence.length=1"]), "train")) == 3

    _, (finding,) = read_skipping_errors(open_dataset(compose_data("coco", settings)), {"train": ["g"]}, 3)
    assert finding.kind == "stills" and finding.is_error and "3 of 3 clips have one frame" in finding.message


# Tables


def table(root, *rows, header="frame,x,y"):
    csv(root, 1)
    (root / "game1.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.mark.parametrize("place", ["-1,-1", "0,0"])
def test_a_position_that_means_no_ball_is_asked_about(tmp_path, place):
    table(tmp_path, "0,10,20", f"1,{place}", f"2,{place}", "3,11,21")
    with pytest.raises(UserError, match=rf"2 of 4 rows have a ball at \[{place}\].*data\.csv\.absent_xy=\[{place}\]"):
        read("csv", tmp_path, "game1")
    (clip,) = read("csv", tmp_path, "game1", f"data.csv.absent_xy=[{place}]")
    assert [clip.labels[i].visibility for i in range(4)] == [
        Visibility.EASY,
        Visibility.ABSENT,
        Visibility.ABSENT,
        Visibility.EASY,
    ]


def test_absent_rows_that_carry_a_position_are_counted_and_said(tmp_path):
    table(tmp_path, "0,10,20,1", "1,33,40,0", "2,0,0,0", "3,-1,-1,0", "4,,,0", "5,12,13,0", header="frame,x,y,v")
    clips = read("csv", tmp_path, "game1", "data.csv.visibility=v")
    (finding,) = [f for f in check_labels(clips) if f.kind == "absent with a position"]
    assert "2 frames" in finding.message and "(1, 5)" in finding.message and "data.csv.visibility" in finding.message


def test_the_first_frame_counts_for_images_too(tmp_path):
    write_images(tmp_path / "game1", "{:04d}.jpg", first=1)
    (tmp_path / "game1.csv").write_text("frame,x,y\n0,1,2\n5,3,4\n")
    with pytest.raises(UserError, match="labels frame 0, but the first image is '0001.jpg'"):
        read("csv", tmp_path, "game1")
    (clip,) = read("csv", tmp_path, "game1", "data.csv.first_frame=0")
    assert {i: label.xy_image for i, label in clip.labels.items()} == {0: (1, 2), 5: (3, 4)}
    (tmp_path / "game1.csv").write_text("frame,x,y\n1,1,2\n6,3,4\n")
    (clip,) = read("csv", tmp_path, "game1")
    assert sorted(clip.labels) == [0, 5]
    with pytest.raises(UserError, match="frame 1 comes before data.csv.first_frame=2"):
        read("csv", tmp_path, "game1", "data.csv.first_frame=2")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('1,"2,3', "is not valid CSV"),
        ("1," + "9" * 200_000 + ",3", "is not valid CSV"),
        ("1," + "9" * 5000 + ",3", "two numbers"),
        ("1,nan,3", "two numbers"),
        ("1,1_0,3", "two numbers"),
        ("1,１,3", "two numbers"),
        ("9" * 5000 + ",1,1", "expected a number"),
        ("1,2,3,4", "more values"),
        ("1,1e400,2", "two numbers"),
        ("1,\x002,2", "two numbers|is not valid CSV"),
    ],
    ids=lambda v: v[:12],
)
def test_a_row_that_is_none_is_named_with_its_line(tmp_path, row, words):
    path = tmp_path / "t.csv"
    path.write_text(f"frame,x,y\n0,1,2\n{row}\n")
    table(tmp_path, "0,1,2", row)
    with pytest.raises(UserError, match=words) as error:
        read("csv", tmp_path, "game1")
    assert "game1.csv, line 3:" in str(error.value) and len(str(error.value)) < 1000


def test_an_open_quote_takes_no_rows_away(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('frame,x,y\n0,1,2\n1,"3,4\n2,5,6\n3,7,8\n')
    with pytest.raises(UserError, match=r"t\.csv, line 3: is not valid CSV"):
        list(read_table(path, ("frame", "x", "y")))
    path.write_text('frame,"x,y\n0,1,2\n')
    with pytest.raises(UserError, match=r"t\.csv, line 1: is not valid CSV"):
        list(read_table(path, ("frame", "x", "y")))
    path.write_text("frame,x,y\n\n\n0,1,2,3\n")
    with pytest.raises(UserError, match=r"t\.csv, line 4: has more values"):
        list(read_table(path, ("frame", "x", "y")))


@pytest.mark.parametrize("rows", ['0,1,2,"a\n1,3,4,b\n2,5,6,c"\n3,7,8,d', '0,1,2,a\n1,3,4,"b\r2,5,6,c"'])
def test_a_quote_that_another_one_closes_takes_no_rows_away(tmp_path, rows):
    path = tmp_path / "t.csv"
    path.write_bytes(f"frame,x,y,note\n{rows}\n".encode())
    with pytest.raises(UserError, match=r"t\.csv, line [0-9]: a cell contains several lines\. Check for an unclosed"):
        list(read_table(path, ("frame", "x", "y")))


@pytest.mark.parametrize("row", ["1", "1,33"])
def test_a_row_that_is_cut_off_is_no_frame_without_a_ball(tmp_path, row):
    table(tmp_path, "0,1,2", row)
    with pytest.raises(UserError, match="line 3: ends before column '[xy]'"):
        read("csv", tmp_path, "game1")
    table(tmp_path, "0,1,2", "1,,", "2,3,4,x", "3,5,6", header="frame,x,y,note")
    (clip,) = read("csv", tmp_path, "game1")
    assert sorted(clip.labels) == [0, 1, 2, 3] and clip.labels[1].visibility is Visibility.ABSENT


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.csv.absent_xy=[nan,0]", "two finite numbers"),
        ("data.csv.first_frame=-1", "must be 0 or greater"),
        ("data.csv.x=frame", "data.csv.frame and data.csv.x are both 'frame'"),
        ("data.csv.visibility=y", "data.csv.y and data.csv.visibility"),
    ],
)
def test_settings_of_tables_that_mean_nothing_are_refused(setting, words):
    with pytest.raises(UserError, match=words):
        compose_data("csv", [setting])


@pytest.mark.parametrize("kind", ["folder", "link to itself", "link to nothing"])
def test_a_table_that_cannot_be_read_is_no_game_without_clips(tmp_path, kind):
    csv(tmp_path, 1)
    path = tmp_path / "game1.csv"
    path.unlink()
    path.mkdir() if kind == "folder" else path.symlink_to("game1.csv" if kind == "link to itself" else "none.csv")
    with pytest.raises(UserError, match=r"game1\.csv: cannot be read"):
        read("csv", tmp_path, "game1")


def test_images_of_other_names_are_named(tmp_path):
    write_images(tmp_path / "game1", "frame_{:03d}.jpg")
    (tmp_path / "game1.csv").write_text("frame,x,y\n0,1,2\n")
    with pytest.raises(UserError, match=r"no frames; .* 'frame_000\.jpg' is ignored: images must be named by number"):
        read("csv", tmp_path, "game1")


def test_a_visible_ball_at_minus_one_is_no_other_resolution(tmp_path):
    path, _ = FORMATS["tracknet"](tmp_path, 1)
    path.write_text(path.read_text().replace("10.0,20.0", "-1,-1"))
    with pytest.raises(
        UserError, match=r"\(-1, -1\) is outside .* If this position means .*, set the visibility .* to 0"
    ):
        read("tracknet", tmp_path, "game1")


@pytest.mark.parametrize(
    ("name", "game", "copy"),
    [
        ("tracknetv2", "Professional/match1", "1_01_00.csv"),
        ("wasb_basketball", "1", "other_7.xml"),
        ("blurball", "20", "more/20_csv_001.csv"),
    ],
)
def test_two_label_files_of_one_clip_are_refused(tmp_path, name, game, copy):
    path, _ = FORMATS[name](tmp_path, 1)
    (path.parent / copy).parent.mkdir(exist_ok=True)
    shutil.copy(path, path.parent / copy)
    with pytest.raises(UserError, match="also labels '.*'; keep one of the two") as error:
        read(name, tmp_path, game)
    assert path.name in str(error.value) and copy in str(error.value)


def test_categories_of_one_name_are_one(tmp_path):
    """Tools that merge files write a name once for each: the balls of all of them are balls."""
    path, _ = FORMATS["coco"](tmp_path, 1)
    (before,) = read("coco", tmp_path, "game1")
    content = json.loads(path.read_text())
    content["categories"].append({"id": 8, "name": "ball"})
    content["annotations"][0]["category_id"] = 8
    path.write_text(json.dumps(content))
    (clip,) = read("coco", tmp_path, "game1")
    assert clip.labels == before.labels and sum(x.xy_image is not None for x in clip.labels.values()) == 4
    with pytest.raises(UserError, match=r"data\.coco\.category= is not among"):
        read("coco", tmp_path, "game1", "data.coco.category=''")


@pytest.mark.parametrize("text", ["{}", "null", '["ab"]', "[[[], 1]]", '[["a"]]', "[" * 100_000, "9" * 5000])
def test_a_published_list_of_another_kind_is_one_message(tmp_path, text):
    for game in (1, 2, 3):
        FORMATS["racketvision"](tmp_path, game)
    (tmp_path / "tennis/info/train.json").write_text(text)
    with pytest.raises(UserError, match=r'train\.json: .*expected a list of \["match", "rally"\]'):
        read_split(compose_data("racketvision", [f"data.root={tmp_path}"]), "train")


@pytest.mark.parametrize("where", ["d", "d/game2", "d/game1/Clip2"])
def test_a_folder_that_the_system_refuses_is_one_message(tmp_path, where):
    """Here by a link that no path can be as long as; a folder that is forbidden is refused likewise."""
    FORMATS["tracknet"](tmp_path / "whole", 1)
    if where != "d":
        shutil.copytree(tmp_path / "whole", tmp_path / "d")
    (tmp_path / where).symlink_to("x" * 300)
    with pytest.raises(UserError, match=rf"{where}: cannot be read \(File name too long\)"):
        read("tracknet", tmp_path / "d", "game1")


def test_names_in_another_encoding_are_read_and_cached(tmp_path):
    """Archives from Japan have names in Shift-JIS."""
    csv(tmp_path / "d", 1)
    folder = os.fsencode(tmp_path / "d")
    for suffix in (b".mp4", b".csv"):
        os.rename(folder + b"/game1" + suffix, folder + b"/\x83\x8b" + suffix)
    dataset = open_dataset(compose_data("csv", [f"data.root={tmp_path / 'd'}"]))
    (clip,) = dataset.read(dataset.games[0])
    (path,) = ensure_cached([clip], (W, H), tmp_path / "cache")
    assert path.stat().st_size == FRAMES * 3 * W * H


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"seed": NaN}', b"null", b"{}"])
def test_a_damaged_note_of_what_was_rendered_is_one_message(tmp_path, content):
    (tmp_path / "synthetic.json").write_bytes(content)
    remedy = r"(synthetic\.json: damaged|data\.root: ).*Delete the folder.* or choose another data\.root"
    with pytest.raises(UserError, match=remedy):
        ensure_rallies(tmp_path, SyntheticConfig(games=1))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["images"][0].update(file_name=5),
        lambda c: c["images"][0].update(id=[1]),
        lambda c: c["images"][1].update(id=0),
        lambda c: c["annotations"][0].update(image_id={}),
        lambda c: c["annotations"][0].update(category_id=[]),
        lambda c: c["categories"][0].update(name=None),
        lambda c: c["annotations"][0].update(keypoints=["1", 2, 3]),
        lambda c: c["annotations"][0].update(keypoints=[1e400, 2, 2]),
        lambda c: c["annotations"][0].update(keypoints=[1, 2, True]),
        lambda c: c["annotations"][0].update(keypoints=[10**400, 2, 2]),
        lambda c: c.update(images={}),
        lambda c: c.update(images=[[]]),
        lambda c: c["images"][0].update(file_name="x" * 5000 + "1.jpg"),
        lambda c: c["images"][0].update(file_name="game1/\x001.jpg"),
    ],
)
def test_json_of_other_kinds_is_one_message(tmp_path, change):
    path, _ = FORMATS["coco"](tmp_path, 1)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read("coco", tmp_path, "game1")
    assert len(str(error.value)) < 4500


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"images": ' + "9" * 5000 + "}"])
def test_json_that_is_too_deep_or_too_long_is_one_message(tmp_path, text):
    path, _ = FORMATS["coco"](tmp_path, 1)
    path.write_text(text)
    with pytest.raises(UserError, match="damaged JSON|expected COCO"):
        read("coco", tmp_path, "game1")


# Pictures


def png_header(width, height):
    """A PNG of a few bytes that says it is this large."""
    content = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", content) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (32000, 32000), (10000, 9000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_says_it_is_huge_is_refused_by_its_header(tmp_path, width, height):
    (tmp_path / "0.png").write_bytes(png_header(width, height))
    with pytest.raises(UserError, match=r"0\.png.*(more than 89 million pixels|cannot be decoded)"):
        read_image(tmp_path / "0.png")


def jpeg(quality=90, **options):
    buffer = io.BytesIO()
    picture = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def test_bytes_after_the_end_and_other_formats_by_content_are_read(tmp_path):
    whole = jpeg()
    path = tmp_path / "0.jpg"
    path.write_bytes(whole)
    wanted = read_image(path)
    for content in (whole + bytes(5000), whole + whole):
        path.write_bytes(content)
        assert np.array_equal(read_image(path), wanted)
    # Phones store a second picture behind the first, and say so in its header.
    Image.fromarray(wanted).save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (W, H))])
    assert np.abs(read_image(path).astype(int) - wanted).mean() < 20
    cv2.imwrite(str(tmp_path / "1.png"), wanted[..., ::-1])
    (tmp_path / "1.png").rename(path)
    assert np.array_equal(read_image(path), wanted)
    path.write_bytes(whole)
    path.rename(tmp_path / "2.png")
    assert np.array_equal(read_image(tmp_path / "2.png"), wanted)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_picture_is_an_error_even_with_a_thumbnail_or_zeros_in_it(tmp_path, share):
    path, whole = tmp_path / "0.jpg", jpeg(exif=b"Exif\x00\x00" + jpeg(20))  # its end marker stands in the header
    for content in (whole[: int(len(whole) * share)], whole[: int(len(whole) * share)] + bytes(3000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"0\.jpg: cannot be decoded"):
            read_image(path)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_picture_that_another_one_cuts_off_is_not_whole(tmp_path, progressive):
    """Its end marker is that of the other."""
    path, whole = tmp_path / "0.jpg", jpeg(progressive=progressive)
    scan = whole.index(b"\xff\xda")
    for end in (scan + 40, (scan + len(whole)) // 2, len(whole) - 3):
        path.write_bytes(whole[:end] + whole)
        with pytest.raises(UserError, match=r"0\.jpg: cannot be decoded"):
            read_image(path)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_which_formats_are_read_is_settled(tmp_path, kind):
    Image.fromarray(np.full((H, W, 3), 90, np.uint8)).save(tmp_path / "0.jpg", kind)
    if kind in FORMATS_OF_PICTURES:
        assert read_image(tmp_path / "0.jpg").shape == (H, W, 3)
    else:
        with pytest.raises(UserError, match="none of JPEG, PNG, WEBP, BMP"):
            read_image(tmp_path / "0.jpg")


# Whatever else


@pytest.mark.parametrize("number", [pytest.param(500, marks=pytest.mark.slow), 15], ids=["all", "some"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_label_file_raises_anything_else(tmp_path, name, number):
    rng = random.Random(zlib.crc32(name.encode()))
    path, _ = FORMATS[name](tmp_path, 1)
    whole, layout = path.read_bytes(), "tracknetv2" if name == "tracknetv3" else name
    refused = 0
    for _ in range(number):
        path.write_bytes(damaged(rng, whole))
        try:
            dataset = open_dataset(compose_data(layout, [f"data.root={tmp_path}"]))
            for game in dataset.games:
                dataset.read(game)
        except UserError as error:
            refused += 1
            assert 0 < len(str(error)) < 4500
    assert refused


@pytest.mark.parametrize("number", [pytest.param(500, marks=pytest.mark.slow), 30], ids=["all", "some"])
@pytest.mark.parametrize("kind", FORMATS_OF_PICTURES)
def test_no_picture_raises_anything_else(tmp_path, kind, number):
    rng, path = random.Random(7), tmp_path / "0.jpg"
    path.write_bytes(jpeg())
    picture = read_image(path)
    Image.fromarray(picture).save(path, kind)
    whole = path.read_bytes()
    assert read_image(path).shape == picture.shape
    for _ in range(number):
        path.write_bytes(damaged(rng, whole))
        try:
            assert read_image(path).dtype == np.uint8
        except UserError as error:
            assert "0.jpg" in str(error)
