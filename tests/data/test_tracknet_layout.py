"""Reading TrackNet's layout: what is there is read, what is wrong is named."""

import cv2
import numpy as np
import pytest

from tracknet.data.labels import Visibility
from tracknet.data.layouts.tracknet import read_game, read_labels
from tracknet.errors import UserError

HEADER = "file name,visibility,x-coordinate,y-coordinate,status\n"


@pytest.fixture
def game(tmp_path):
    """A clip of five 64x48 images, the last without a row."""
    folder = tmp_path / "game1" / "Clip1"
    folder.mkdir(parents=True)
    for i in range(5):
        cv2.imwrite(str(folder / f"{i:04d}.jpg"), np.full((48, 64, 3), 40 * i, np.uint8))
    (folder / "Label.csv").write_text(
        HEADER + "0000.jpg,1,10,20,0\n0001.jpg,0,,,\n0002.jpg,3,63,47,1\n0003.jpg,2,1.5,2.5,0\n"
    )
    return folder


def test_a_clip_is_read_in_source_pixels(game, tmp_path):
    (clip,) = read_game(tmp_path, "game1")
    assert (clip.name, clip.game, clip.num_frames, clip.size_wh) == ("game1/Clip1", "game1", 5, (64, 48))
    assert clip.labels[0].xy_image == (10, 20)
    assert clip.labels[1].visibility is Visibility.ABSENT and clip.labels[1].xy_image is None
    assert clip.labels[2].visibility is Visibility.OCCLUDED
    assert 4 not in clip.labels  # unlabeled, which is not absent


def test_a_game_may_be_named_by_folder(game, tmp_path):
    assert read_game(tmp_path, "game1")[0].name == "game1/Clip1"


def test_images_may_start_at_any_number(game, tmp_path):
    (game / "0000.jpg").unlink()
    (game / "Label.csv").write_text(HEADER + "0001.jpg,1,5,6,0\n")
    (clip,) = read_game(tmp_path, "game1")
    assert clip.num_frames == 4 and clip.labels[0].xy_image == (5, 6)


def test_a_byte_order_mark_and_spaces_do_no_harm(game, tmp_path):
    (game / "Label.csv").write_text(
        "\ufefffile name, visibility, x-coordinate, y-coordinate, status\n0000.jpg, 1, 3, 4, 0\n"
    )
    assert read_game(tmp_path, "game1")[0].labels[0].xy_image == (3, 4)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0000.jpg,7,1,1,0\n", ["line 2", "visibility", "'7'"]),
        ("0000.jpg,,1,1,0\n", ["line 2", "visibility", "''"]),
        ("0000.jpg,1,,,0\n", ["line 2", "position"]),
        ("0000.jpg,1,a,3,0\n", ["line 2", "('a', '3')"]),
        ("frame.jpg,1,1,1,0\n", ["line 2", "'frame.jpg'"]),
        ("0000.jpg,1,1,1,0\n0000.jpg,1,2,2,0\n", ["line 3", "labeled twice"]),
        ("0000.jpg,1,70,1,0\n", ["frame 0", "outside the 64x48"]),
        ("0009.jpg,1,1,1,0\n", ["frame 9", "only 5 frames"]),
    ],
)
def test_a_wrong_row_is_named(game, tmp_path, rows, words):
    (game / "Label.csv").write_text(HEADER + rows)
    with pytest.raises(UserError) as error:
        read_game(tmp_path, "game1")
    for word in ["Label.csv", *words]:
        assert word in str(error.value)


def test_a_file_of_another_encoding_is_named(game, tmp_path):
    (game / "Label.csv").write_bytes(HEADER.encode() + b"0000.jpg,1,1,1,\xff\xfe\n")
    with pytest.raises(UserError, match="Label.csv: is not UTF-8"):
        read_game(tmp_path, "game1")


def test_a_wrong_column_is_named_with_the_nearest(tmp_path):
    (tmp_path / "Label.csv").write_text("file name,visible,x-coordinate,y-coordinate\n")
    with pytest.raises(UserError, match="column 'visibility' not found.*did you mean 'visible'"):
        read_labels(tmp_path / "Label.csv")


def test_a_missing_image_is_named(game, tmp_path):
    (game / "0002.jpg").unlink()
    with pytest.raises(UserError, match="images 2 are missing"):
        read_game(tmp_path, "game1")


def test_a_clip_without_labels_is_not_skipped_in_silence(game, tmp_path):
    other = game.parent / "Clip2"
    other.mkdir()
    (other / "0000.jpg").write_bytes((game / "0000.jpg").read_bytes())
    with pytest.raises(UserError, match=r"Clip2: has frames but no Label\.csv"):
        read_game(tmp_path, "game1")


def test_two_images_of_one_number_are_refused(game, tmp_path):
    (game / "1.jpg").write_bytes((game / "0001.jpg").read_bytes())
    with pytest.raises(UserError, match="the same frame number"):
        read_game(tmp_path, "game1")


def test_images_and_video_together_are_refused(game, tmp_path):
    (game / "clip.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match="keep one"):
        read_game(tmp_path, "game1")
