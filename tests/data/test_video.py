"""Frames come back as they went in, and damage is said."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from tracknet.data.images import read_image
from tracknet.data.video import VideoWriter, _to_rgb, decode_from, frame_times, probe, read_video
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


QUADRANTS = np.repeat(np.repeat(np.arange(4).reshape(2, 2), 32, 0), 48, 1)  # 0 1 over 2 3, in a picture of 96x64
MATRICES = {
    # display matrix (a, b, c, d) and the corners of the picture as shown, row by row
    "upright": ((1, 0, 0, 1), [[0, 1], [2, 3]]),
    "turned right": ((0, 1, -1, 0), [[2, 0], [3, 1]]),
    "turned over": ((-1, 0, 0, -1), [[3, 2], [1, 0]]),
    "turned left": ((0, -1, 1, 0), [[1, 3], [0, 2]]),
    "mirrored": ((-1, 0, 0, 1), [[1, 0], [3, 2]]),
    "upside down": ((1, 0, 0, -1), [[2, 3], [0, 1]]),
    "transposed": ((0, 1, 1, 0), [[0, 2], [1, 3]]),
    "transverse": ((0, -1, -1, 0), [[3, 1], [2, 0]]),
}


def stored_with(matrix, path):
    """Write a video of four quadrants, and the matrix by which a player turns it into the header of its track."""
    with VideoWriter(path, (96, 64), Fraction(25), crf=1) as writer:
        for _ in range(6):
            writer.write(np.repeat((60 * QUADRANTS + 30).astype(np.uint8)[..., None], 3, 2))
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    a, b, c, d = matrix
    numbers = (
        [(n * 65536) % 2**32 for n in (a, b)] + [0] + [(n * 65536) % 2**32 for n in (c, d)] + [0, 0, 0, 0x40000000]
    )
    at = header + 40  # of version 0: flags, times, ids, duration, layer and volume come before it
    data[at : at + 36] = b"".join(n.to_bytes(4, "big") for n in numbers)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", MATRICES)
def test_frames_are_upright_however_they_are_stored(tmp_path, kind):
    """Phones store videos lying; labels and coordinates are of the picture as a player shows it."""
    matrix, corners = MATRICES[kind]
    path = stored_with(matrix, tmp_path / "phone.mp4")
    info = probe(path)
    frames = [image for _, image in read_video(path)]
    frames += [get() for _, get in decode_from(path, frame_times(path)[3])]
    assert len(frames) >= 9
    for image in frames:
        h, w = image.shape[:2]
        assert (w, h) == info.size_wh == ((64, 96) if matrix[0] == 0 else (96, 64))
        seen = [[round((float(image[y, x, 0]) - 30) / 60) for x in (w // 4, 3 * w // 4)] for y in (h // 4, 3 * h // 4)]
        assert seen == corners


def test_a_title_in_another_encoding_is_no_reason_to_refuse_a_video(tmp_path):
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as target:
        target.metadata["title"] = "TITLE"
        stream = target.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        target.mux(stream.encode(None))
    data = path.read_bytes()
    assert b"TITLE" in data
    path.write_bytes(data.replace(b"TITLE", "試合".encode("shift_jis") + b"\x81"))
    assert probe(path).num_frames == 5 and len(list(read_video(path))) == 5


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_what_can_be_decoded_of_a_damaged_video_is_kept_where_that_is_asked(tmp_path, damage):
    path, rng = tmp_path / "clip.mkv", np.random.default_rng(0)
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(60):
            picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 30_000] = bytes(30_000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"clip\.mkv"):
        list(read_video(path))
    said = []
    frames = [image for _, image in read_video(path, said.append)]
    assert 10 < len(frames) < 60 and {f.shape for f in frames} == {(48, 64, 3)}
    assert len(said) == 1 and "clip.mkv" in said[0]


def test_a_video_of_which_nothing_can_be_decoded_is_an_error_either_way(video):
    data = bytearray(video.read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin : data.index(b"moov")] = bytes(data.index(b"moov") - begin)
    video.write_bytes(data)
    with pytest.raises(UserError, match=r"clip\.mp4"):
        list(read_video(video, lambda problem: None))


def test_frames_larger_than_any_camera_makes_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "huge.avi"
    with av.open(str(path), "w") as target:
        stream = target.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16000, 8000, "yuvj420p"
        target.mux(stream.encode(av.VideoFrame(16000, 8000, "yuvj420p")))
        target.mux(stream.encode(None))
    with pytest.raises(UserError, match="16000x8000, more than 89 million pixels"):
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


def test_a_machine_that_is_out_of_threads_does_not_call_the_video_damaged():
    """FFmpeg starts threads to convert frames too, and reports a machine's limit on them as EAGAIN."""

    class Frame:  # one of av cannot be made to fail
        def to_ndarray(self, **_):
            raise av.error.BlockingIOError(11, "Resource temporarily unavailable")

    with pytest.raises(UserError, match="another thread") as error:
        _to_rgb(Frame())
    assert "damaged" not in str(error.value)
