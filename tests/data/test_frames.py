"""Frames at the model's size: from the cache, from images and from a video, the same by every way."""

import gc
import multiprocessing
import pickle
import threading
import warnings
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from tracknet.data import cache
from tracknet.data.cache import ensure_cached
from tracknet.data.frames import CachedFrames, ImageFrames, Kept, RecentFrames, VideoFrames, planar
from tracknet.data.images import read_image, resize
from tracknet.data.labels import Clip
from tracknet.data.video import VideoWriter, read_video
from tracknet.errors import UserError

WH, SMALL, NUM = (96, 64), (40, 24), 70


def picture(i: int) -> np.ndarray:
    ys, xs = np.mgrid[0 : WH[1], 0 : WH[0]]
    return np.stack([(xs + 3 * i) % 256, (2 * ys + i) % 256, (xs + ys) % 256], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def video_clip(tmp_path_factory) -> Clip:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with VideoWriter(path, WH, Fraction(30)) as writer:
        for i in range(NUM):
            writer.write(picture(i))
    return Clip("g/c", "g", (), path, NUM, WH, {})


@pytest.fixture
def image_clip(tmp_path) -> Clip:
    paths = tuple(tmp_path / "images" / f"{i:04d}.jpg" for i in range(8))
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        smooth = cv2.GaussianBlur(picture(i), (0, 0), 3)
        cv2.imwrite(str(path), smooth[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
    return Clip("g/i", "g", paths, None, 8, WH, {})


@pytest.mark.parametrize("order", [range(NUM), [69, 0, 7, 8, 9, 8, 60, 3], [5, 5, 4]])
def test_a_video_gives_any_frame(video_clip, order):
    frames = VideoFrames(video_clip, SMALL)
    wanted = [planar(resize(f, SMALL)) for _, f in read_video(video_clip.video)]
    assert all(np.array_equal(frames[i], wanted[i]) for i in order)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("open_gop.mp4", "libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0"}),
        ("b_frames.mkv", "libx264", {"bf": "3", "g": "12"}),
        ("b_frames.mp4", "mpeg4", {"bf": "2", "g": "12"}),
    ],
)
def test_a_video_of_any_making_gives_any_frame(tmp_path, name, codec, options):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = *WH, "yuv420p"
        for i in range(NUM):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        container.mux(stream.encode(None))
    wanted = [planar(resize(f, SMALL)) for _, f in read_video(path)]
    frames = VideoFrames(Clip("g/c", "g", (), path, len(wanted), WH, {}), SMALL)
    order = np.random.default_rng(0).permutation(len(wanted)).tolist() + list(range(len(wanted)))
    assert all(np.array_equal(frames[i], wanted[i]) for i in order)


def test_a_forked_process_opens_the_video_anew(video_clip):
    """It inherits a decoder whose threads it does not have; using that would wait for ever."""
    frames = VideoFrames(video_clip, SMALL)
    first = frames[3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking a process with threads: just that is tried here
        child = context.Process(
            target=lambda: queue.put(np.array_equal(frames[3], first) and frames[4].shape == first.shape), daemon=True
        )
        child.start()
    assert queue.get(timeout=60) is True
    child.join(timeout=60)
    assert child.exitcode == 0


def test_a_forked_process_does_not_collect_decoders_that_it_inherits(video_clip):
    """They are garbage in the process that it comes from, with threads that only that one has."""
    frames = VideoFrames(video_clip, SMALL)
    frames[3]
    gc.collect()
    gc.disable()
    try:
        frames.itself = frames
        del frames
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = context.Process(target=lambda: queue.put(gc.collect() >= 0), daemon=True)
            child.start()
    finally:
        gc.enable()
    try:
        assert queue.get(timeout=60) is True
    finally:
        child.kill()


def test_a_loading_process_begins_afresh(video_clip):
    frames = VideoFrames(video_clip, SMALL)
    first = frames[3]
    copy = pickle.loads(pickle.dumps(frames))
    assert np.array_equal(copy[3], first) and np.array_equal(copy[4], frames[4])


def test_the_cache_gives_the_same_frames_at_random(video_clip, image_clip, tmp_path):
    paths = ensure_cached([video_clip, image_clip], SMALL, tmp_path / "cache")
    direct = [planar(resize(f, SMALL)) for _, f in read_video(video_clip.video)]
    cached = CachedFrames(paths[0], SMALL)
    assert all(np.array_equal(cached[i], direct[i]) for i in (69, 0, 7))
    images = ImageFrames(image_clip, SMALL)
    assert all(np.array_equal(CachedFrames(paths[1], SMALL)[i], images[i]) for i in (7, 0))
    before = {p: p.stat().st_mtime_ns for p in paths}
    assert ensure_cached([video_clip, image_clip], SMALL, tmp_path / "cache") == paths
    assert {p: p.stat().st_mtime_ns for p in paths} == before
    assert ensure_cached([video_clip], (16, 12), tmp_path / "cache")[0] not in paths


def test_a_changed_file_is_decoded_anew(image_clip, tmp_path):
    (before,) = ensure_cached([image_clip], SMALL, tmp_path / "cache")
    cv2.imwrite(str(image_clip.frames[3]), np.zeros((WH[1], WH[0], 3), np.uint8))
    (after,) = ensure_cached([image_clip], SMALL, tmp_path / "cache")
    assert before != after and CachedFrames(after, SMALL)[3].max() < 5 < CachedFrames(before, SMALL)[3].max()


def test_two_that_want_one_clip_decode_it_once(image_clip, tmp_path, monkeypatch):
    decoded = []
    real = cache.read_image

    def count(path, *args):
        decoded.append(path)
        return real(path, *args)

    monkeypatch.setattr(cache, "read_image", count)
    threads = [threading.Thread(target=ensure_cached, args=([image_clip], SMALL, tmp_path / "cache")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == len(image_clip.frames)


def test_a_damaged_frame_leaves_no_cache(image_clip, tmp_path):
    image_clip.frames[5].write_bytes(image_clip.frames[5].read_bytes()[:200])
    with pytest.raises(UserError, match=r"0005\.jpg"):
        ensure_cached([image_clip], SMALL, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name != "CACHEDIR.TAG"]


def test_a_disk_too_full_is_said_before(image_clip, tmp_path, monkeypatch):
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match=r"data\.cache=none"):
        ensure_cached([image_clip], SMALL, tmp_path / "cache")


def test_a_jpeg_decoded_at_a_fraction_is_the_picture_resized(image_clip):
    for path in image_clip.frames[:3]:
        reduced, whole = read_image(path, WH, SMALL), resize(read_image(path), SMALL)
        assert reduced.shape == whole.shape == (SMALL[1], SMALL[0], 3)
        assert np.abs(reduced.astype(int) - whole.astype(int)).mean() < 1.5
    with pytest.raises(UserError, match="96x64, but the clip's first frame is 192x128"):
        read_image(image_clip.frames[0], (192, 128), SMALL)


@pytest.mark.parametrize("size", [(48, 32), (40, 24), (20, 12), (96, 64), (120, 80), (50, 40)])
def test_resizing_keeps_places(size):
    """A blob stays where the coordinate convention says, by halves, by area, by interpolation and enlarged."""
    image = np.zeros((64, 96, 3), np.float32)
    ys, xs = np.mgrid[0:64, 0:96]
    image += 255 * np.exp(-((xs - 30.3) ** 2 + (ys - 40.6) ** 2) / 72)[..., None]
    small = resize(image.astype(np.uint8), size)[..., 0].astype(float)
    ys, xs = np.mgrid[0 : size[1], 0 : size[0]]
    at = np.array([(xs * small).sum(), (ys * small).sum()]) / small.sum()
    wanted = (np.array([30.3, 40.6]) + 0.5) * np.array(size) / (96, 64) - 0.5
    assert np.abs(at - wanted).max() < 0.1


def test_odd_sides_do_not_shift_the_picture():
    image = np.zeros((767, 1367, 3), np.uint8)
    cv2.circle(image, (1340, 400), 12, (255, 255, 255), -1)
    small = resize(image, (320, 180))[..., 0].astype(float)
    ys, xs = np.mgrid[0:180, 0:320]
    at = np.array([(xs * small).sum(), (ys * small).sum()]) / small.sum()
    assert np.abs(at - ((np.array([1340, 400]) + 0.5) * (320, 180) / (1367, 767) - 0.5)).max() < 0.1


def test_recent_frames_are_decoded_once_and_bounded():
    decoded = []

    class Source:
        def __getitem__(self, i):
            decoded.append(i)
            return np.zeros(4, np.uint8)

    kept = Kept()
    recent = RecentFrames(Source(), 6, kept, (128 << 20) // 3, together=1)
    for i in (0, 1, 2, 1, 2, 3, 0):
        recent[i]
    assert decoded == [0, 1, 2, 3, 0] and len(kept) == 3
    other = RecentFrames(Source(), 6, kept, (128 << 20) // 3, together=2)
    decoded.clear()
    other[5], other[4], other[0]
    assert decoded == [4, 5, 0, 1] and len(kept) == 3
