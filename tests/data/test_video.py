"""Frames come back as they went in, and damage is said."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from tracknet.data.images import read_image
from tracknet.data.video import VideoWriter, probe, read_video
from tracknet.errors import UserError


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, (64, 48), Fraction(25), crf=10) as writer:
        for i in range(20):
            writer.write(np.full((48, 64, 3), 12 * i, np.uint8))
    return path


def test_a_video_comes_back_in_order(video):
    assert probe(video).num_frames == 20 and probe(video).size_wh == (64, 48) and probe(video).fps == 25
    frames = list(read_video(video))
    assert [round(t, 2) for t, _ in frames] == [round(i / 25, 2) for i in range(20)]
    assert all(abs(float(f.mean()) - 12 * i) < 4 for i, (_, f) in enumerate(frames))


def test_odd_sizes_are_written(tmp_path):
    with VideoWriter(tmp_path / "odd.mp4", (63, 47), Fraction(30)) as writer:
        writer.write(np.zeros((47, 63, 3), np.uint8))
    assert probe(tmp_path / "odd.mp4").num_frames == 1


def test_a_failed_writer_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "v.mp4", (64, 48), Fraction(30)) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_video_is_an_error_not_a_short_video(video):
    data = video.read_bytes()
    video.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=r"clip\.mp4"):
        list(read_video(video))


def test_a_video_that_begins_well_but_is_cut_off_is_an_error(video, tmp_path):
    """With the index at the front a player shows the frames that are left, and says nothing."""
    front = tmp_path / "front.mp4"
    with av.open(str(video)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert probe(front).num_frames == 20
    front.write_bytes(front.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"front\.mp4"):
        list(read_video(front))


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("avi", "mpeg4")])
def test_what_its_header_promises_must_be_there(tmp_path, suffix, codec):
    """Nothing else says that such a file was cut off."""
    path, rng = tmp_path / f"clip.{suffix}", np.random.default_rng(0)
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(60):
            picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(stream.encode(None))
    assert probe(path).num_frames == 60
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"of 2\.0 seconds; the video is truncated"):
        probe(path)


def test_no_video_is_an_error(tmp_path):
    (tmp_path / "x.mp4").write_text("hello")
    with pytest.raises(UserError, match=r"x\.mp4"):
        probe(tmp_path / "x.mp4")


def test_a_truncated_jpeg_is_an_error(tmp_path):
    path = tmp_path / "0000.jpg"
    rng = np.random.default_rng(0)
    cv2.imwrite(str(path), rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    read_image(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"0000\.jpg.*truncated"):
        read_image(path)


def test_an_image_of_another_size_is_an_error(tmp_path):
    path = tmp_path / "0001.png"
    cv2.imwrite(str(path), np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(UserError, match="64x48.*32x24"):
        read_image(path, (32, 24))
