"""Rendered tennis rallies with exact labels, deterministic by seed.

A pinhole camera behind the baseline looks at a court; the ball flies under gravity, bounces and is hit back by two
players, streaks during the exposure, is hidden by players and leaves the picture; then come sensor noise and H.264.
Written in TrackNet's layout, and like TrackNet's annotators the label marks the leading end of the streak.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from rich.progress import track

from tracknet.data.video import VideoWriter
from tracknet.errors import UserError

FPS = 30
SUBSTEPS = 12  # positions of the ball per frame
GRAVITY = 9.81
HALF_COURT_XY = (5.485, 11.885)  # metres, doubles
MARKER = "synthetic.json"


@dataclass
class SyntheticConfig:
    """What to render; another setting needs another ``data.root``."""

    games: int = 21
    """Number of games, each with its own court, camera, light and players."""
    clips_per_game: int = 1
    """Rallies per game."""
    frames_per_clip: int = 60
    """Length of a rally at 30 frames per second."""
    size: tuple[int, int] = (512, 288)
    """Width and height of the video in pixels."""
    seed: int = 0
    """Everything follows from it."""

    def __post_init__(self) -> None:
        if min(self.games, self.clips_per_game) < 1 or self.frames_per_clip < 4 or min(self.size) < 64:
            raise UserError("data.synthetic: games and clips_per_game are at least 1, frames_per_clip at least 4, "
                            "size at least [64, 64].")  # fmt: skip


def ensure_rallies(root: Path, config: SyntheticConfig) -> None:
    """Render the rallies unless the folder holds just these already.

    Raises:
        UserError: the folder exists and holds something else.
    """
    # Through JSON, so that tuples compare equal to what a file gives back.
    wanted = json.loads(json.dumps(asdict(config)))
    if root.exists():
        marker = root / MARKER
        found = json.loads(marker.read_text()) if marker.is_file() else None
        if found != wanted:
            held = "other data" if found is None else f"rallies of other settings ({found})"
            raise UserError(f"data.root: '{root}' holds {held}, and the settings ask for {wanted}. "
                            "Delete the folder or choose another data.root.")  # fmt: skip
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.part-"))
    try:
        for game in track(range(config.games), description=f"Rendering {config.games} synthetic games"):
            for clip in range(config.clips_per_game):
                write_clip(work / f"game{game + 1}" / f"Clip{clip + 1}", config, game, clip)
        (work / MARKER).write_text(json.dumps(wanted, indent=2))
        work.chmod(0o755)
        try:
            os.rename(work, root)
        except OSError:
            if not root.exists():
                raise
            ensure_rallies(root, config)  # another process was faster: what it made is either the same or an error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_clip(folder: Path, config: SyntheticConfig, game: int, clip: int) -> None:
    """Render one rally into ``folder/clip.mp4`` and ``folder/Label.csv``."""
    scene_rng = np.random.default_rng([config.seed, game])
    rng = np.random.default_rng([config.seed, game, clip + 1])
    scene = _draw_scene(config.size, scene_rng)
    rally = _simulate(config.frames_per_clip, rng)
    folder.mkdir(parents=True)
    rows = []
    crf = int(scene_rng.integers(20, 28))
    with VideoWriter(folder / "clip.mp4", config.size, Fraction(FPS), crf) as video:
        for i in range(config.frames_per_clip):
            image, label = _render_frame(scene, rally, i, rng)
            video.write(image)
            rows.append((f"{i:04d}.jpg", *label, rally.status[i]))
    with (folder / "Label.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file name", "visibility", "x-coordinate", "y-coordinate", "status"])
        writer.writerows(rows)


class _Camera(NamedTuple):
    position: np.ndarray
    rotation: np.ndarray
    focal_px: float
    centre: tuple[float, float]

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map ``[n, 3]`` metres to ``[n, 2]`` pixels and ``[n]`` depths in metres."""
        local = (points - self.position) @ self.rotation.T
        depth = np.maximum(local[:, 2], 0.1)
        return local[:, :2] / depth[:, None] * self.focal_px + self.centre, depth


class _Scene(NamedTuple):
    camera: _Camera
    background: np.ndarray  # float32 RGB
    ball_rgb: np.ndarray
    ball_radius_m: float
    shirts: np.ndarray
    noise: float
    exposure: float  # fraction of the frame during which the shutter is open


class _Rally(NamedTuple):
    ball: np.ndarray  # [frame * SUBSTEPS, 3] metres; NaN where there is no ball
    players: np.ndarray  # [frame, 2, 2] metres on the ground
    status: list[int | str]  # 0 flying, 1 hit, 2 bounce, blank when absent


def _look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward])


def _draw_scene(size_wh: tuple[int, int], rng: np.random.Generator) -> _Scene:
    w, h = size_wh
    position = np.array([rng.uniform(-1.5, 1.5), rng.uniform(-29, -23), rng.uniform(7.5, 12.5)])
    focal = w * rng.uniform(1.15, 1.4)
    camera = _Camera(position, _look_at(position, np.array([0, rng.uniform(-2.5, 0.0), 0.5])), focal, (w / 2, h / 2))

    def polygon(image: np.ndarray, corners: list[tuple[float, float]], colour: np.ndarray) -> None:
        points, _ = camera.project(np.array([(x, y, 0.0) for x, y in corners]))
        cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], colour.tolist(), cv2.LINE_AA, 4)

    palettes = np.array([[60, 110, 160], [70, 140, 80], [190, 100, 60], [60, 90, 70], [120, 80, 140], [90, 100, 110]])
    inner, outer = palettes[rng.permutation(len(palettes))[:2]] * rng.uniform(0.7, 1.2)
    image = np.empty((h, w, 3), np.float32)
    # Stands: blocks of random brightness, smoothed at two scales, so that there is texture that is no ball.
    for cell, amount in ((3, 55.0), (16, 35.0)):
        grid = (h // cell + 2, w // cell + 2)
        blocks = (rng.normal(0, amount, (*grid, 1)) + rng.normal(0, amount / 3, (*grid, 3))).astype(np.float32)
        blocks = cv2.resize(blocks, (w, h), interpolation=cv2.INTER_CUBIC)
        image = 80 + blocks if cell == 3 else image + blocks
    polygon(image, [(-40, -30), (40, -30), (40, 17), (-40, 17)], outer)
    x, y = HALF_COURT_XY
    polygon(image, [(-x, -y), (x, -y), (x, y), (-x, y)], inner)
    white = np.full(3, rng.uniform(200, 245))
    single, service = 4.115, 6.4
    lines = [((-x, -y), (x, -y)), ((-x, y), (x, y)), ((-x, -y), (-x, y)), ((x, -y), (x, y)),
             ((-single, -y), (-single, y)), ((single, -y), (single, y)), ((-single, service), (single, service)),
             ((-single, -service), (single, -service)), ((0, -service), (0, service))]  # fmt: skip
    for (x0, y0), (x1, y1) in lines:
        across = 0.05 if x0 == x1 else 0.0
        along = 0.08 if y0 == y1 else 0.0
        polygon(image, [(x0 - across, y0 - along), (x1 + across, y0 - along if y0 == y1 else y1),
                        (x1 + across, y1 + along), (x0 - across, y0 + along)], white)  # fmt: skip
    # The net: a veil between the posts, with a white band on top.
    net, _ = camera.project(np.array([(-6.4, 0, 0), (6.4, 0, 0), (6.4, 0, 1.0), (-6.4, 0, 1.0)]))
    veil = image.copy()
    cv2.fillPoly(veil, [np.round(net * 16).astype(np.int32)], (40, 40, 40), cv2.LINE_AA, 4)
    image = 0.55 * image + 0.45 * veil
    cv2.line(image, *np.round(net[[3, 2]]).astype(int).tolist(), (225, 225, 225), 1, cv2.LINE_AA)
    # Ball-coloured and white marks that stand still: logos, balls at the fence.
    for _ in range(int(rng.integers(4, 12))):
        spot = (int(rng.integers(w)), int(rng.integers(h // 2)))
        colour = [(225, 235, 110), (240, 240, 240)][int(rng.integers(2))]
        cv2.circle(image, spot, int(rng.integers(1, 3)), colour, -1, cv2.LINE_AA)
    light = np.linspace(*rng.uniform(0.85, 1.15, 2), w)[None, :, None] * rng.uniform(0.8, 1.15)
    ball = np.array([215, 235, 90]) + rng.normal(0, 12, 3)
    return _Scene(camera, np.clip(image * light, 0, 255).astype(np.float32), ball, rng.uniform(0.05, 0.075),
                  rng.uniform(20, 235, (2, 3)), rng.uniform(1.5, 5.0), rng.uniform(0.3, 0.9))  # fmt: skip


def _simulate(num_frames: int, rng: np.random.Generator) -> _Rally:
    """Simulate a rally: an optional pause, shots to and fro, and what remains after the last one."""
    num_steps = num_frames * SUBSTEPS
    dt = 1 / (FPS * SUBSTEPS)
    ball = np.full((num_steps, 3), np.nan)
    events: dict[int, int] = {}
    hits: list[tuple[int, int, np.ndarray]] = []  # step, player, ground position
    step = int(rng.integers(0, 10)) * SUBSTEPS if rng.random() < 0.3 else 0
    side = int(rng.integers(2))  # 0 near, 1 far
    sign = (-1.0, 1.0)
    at = np.array([rng.uniform(-4, 4), sign[side] * rng.uniform(10.5, 12.5), rng.uniform(0.6, 2.6)])
    while step < num_steps:
        hits.append((step, side, at[:2].copy()))
        events[step // SUBSTEPS] = 1
        last = rng.random() < 0.15  # nobody returns this one
        land = np.array([rng.uniform(-4.5, 4.5), -sign[side] * rng.uniform(3, 10.5)])
        flight = np.linalg.norm(land - at[:2]) / rng.uniform(17, 36)
        speed = np.array([*(land - at[:2]) / flight, (0.5 * GRAVITY * flight**2 - at[2]) / flight])
        bounced, until = False, flight + rng.uniform(0.3, 0.6)
        for _ in range(int((2.5 if last else until) / dt)):
            if step >= num_steps:
                break
            ball[step] = at
            speed[2] -= GRAVITY * dt
            at = at + speed * dt
            if at[2] < 0.033 and speed[2] < 0:
                speed *= (0.75, 0.75, -0.72)
                at[2] = 0.033
                if not bounced:
                    events.setdefault(step // SUBSTEPS, 2)
                bounced = True
            step += 1
        if last:
            break
        side = 1 - side
        at[2] = max(at[2], 0.3)
    players = _move_players(num_frames, hits, rng)
    absent = np.isnan(ball[SUBSTEPS - 1 :: SUBSTEPS, 0])
    status: list[int | str] = ["" if absent[i] else events.get(i, 0) for i in range(num_frames)]
    return _Rally(ball, players, status)


def _move_players(num_frames: int, hits: list, rng: np.random.Generator) -> np.ndarray:
    """Let each player run from one of his hits to the next, ``[frame, 2, 2]`` metres."""
    players = np.empty((num_frames, 2, 2))
    for side, home_y in ((0, -12.5), (1, 12.5)):
        own = [(step // SUBSTEPS, at) for step, s, at in hits if s == side]
        times = [0.0, *(t + 0.0 for t, _ in own), float(num_frames)]
        # A player hits beside himself, not through himself.
        spots = [np.array([rng.uniform(-2, 2), home_y])]
        spots += [at + np.array([rng.choice([-0.7, 0.7]), 0.2 * np.sign(home_y)]) for _, at in own]
        spots.append(np.array([rng.uniform(-3, 3), home_y]))
        for axis in range(2):
            players[:, side, axis] = np.interp(np.arange(num_frames), times, [s[axis] for s in spots])
    return players


def _render_frame(
    scene: _Scene, rally: _Rally, frame: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, float | str, float | str]]:
    """Draw a frame; return it with ``(visibility, x, y)`` of the label."""
    image = scene.background.copy()
    h, w = image.shape[:2]
    steps = rally.ball[frame * SUBSTEPS : (frame + 1) * SUBSTEPS]
    open_steps = steps[-max(2, round(SUBSTEPS * scene.exposure)) :]
    there = not np.isnan(open_steps[-1, 0])
    depth_of_ball, alpha = np.inf, np.zeros((h, w), np.float32)
    if there:
        path = open_steps[~np.isnan(open_steps[:, 0])]
        points, depths = scene.camera.project(path)
        depth_of_ball = float(depths[-1])
        radius = max(0.9, scene.ball_radius_m * scene.camera.focal_px / depth_of_ball)
        alpha = _streak(points, radius, (h, w))
    hidden = np.zeros((h, w), np.float32)
    ball_drawn = False
    order = sorted(range(2), key=lambda p: -scene.camera.project(np.array([[*rally.players[frame, p], 1.0]]))[1][0])
    for player in order:
        ground = rally.players[frame, player]
        depth = scene.camera.project(np.array([[*ground, 1.0]]))[1][0]
        if there and not ball_drawn and depth < depth_of_ball:
            image += alpha[..., None] * (scene.ball_rgb - image)
            ball_drawn = True
        cover = _draw_player(image, scene, ground, player, frame)
        if ball_drawn:
            hidden = np.maximum(hidden, cover)
    if there and not ball_drawn:
        image += alpha[..., None] * (scene.ball_rgb - image)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(scene.noise)
    label: tuple[int, float | str, float | str] = (0, "", "")
    if there:
        x, y = points[-1]
        if -0.5 <= x <= w - 0.5 and -0.5 <= y <= h - 0.5:
            total = float(alpha.sum())
            seen = float((alpha * (1 - hidden)).sum()) / total if total else 0.0
            contrast = np.abs(scene.background[round(y) % h, round(x) % w] - scene.ball_rgb).mean()
            kind = 3 if seen < 0.25 else 2 if seen < 0.75 or contrast * alpha.max() < 25 else 1
            label = (kind, round(float(x), 2), round(float(y), 2))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), label


def _streak(points: np.ndarray, radius: float, hw: tuple[int, int]) -> np.ndarray:
    """Coverage ``[h, w]`` of a disk that moves along the points while the shutter is open."""
    alpha = np.zeros(hw, np.float32)
    low = np.floor(points.min(axis=0) - radius - 2).astype(int)
    high = np.ceil(points.max(axis=0) + radius + 3).astype(int)
    x0, y0 = np.maximum(low, 0)
    x1, y1 = np.minimum(high, (hw[1], hw[0]))
    if x0 >= x1 or y0 >= y1:
        return alpha
    # Fill in so that neighbouring disks overlap, however fast the ball is.
    length = float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
    n = max(len(points), int(length / max(radius, 0.5) * 2) + 1)
    at = np.linspace(0, len(points) - 1, n)
    px = np.interp(at, np.arange(len(points)), points[:, 0])
    py = np.interp(at, np.arange(len(points)), points[:, 1])
    ys, xs = np.mgrid[y0:y1, x0:x1]
    distance = np.hypot(xs[..., None] - px, ys[..., None] - py)
    cover = np.clip(radius + 0.5 - distance, 0, 1).mean(axis=-1)
    # Film and sensors saturate: a streak is brighter than its share of the exposure.
    alpha[y0:y1, x0:x1] = np.clip(cover * min(2.0, 1 + length / (4 * radius)), 0, 1)
    return alpha


def _draw_player(image: np.ndarray, scene: _Scene, ground: np.ndarray, player: int, frame: int) -> np.ndarray:
    """Draw legs, body, head and arm of a player; return the coverage ``[h, w]``."""
    cover = np.zeros(image.shape[:2], np.float32)
    swing = np.sin(frame * 0.9 + player)
    joints = np.array([
        (*ground, 0.05), (ground[0] + 0.25 * swing, ground[1], 0.05), (*ground, 0.9), (*ground, 1.45), (*ground, 1.7),
        (ground[0] + 0.7 * (1 if player else -1), ground[1], 1.2 + 0.3 * swing),
    ])  # fmt: skip
    p, depth = scene.camera.project(joints)
    metre = scene.camera.focal_px / depth[0]
    skin = np.array([190.0, 150, 120])
    parts = [(p[0], p[2], 0.16, skin), (p[1], p[2], 0.16, skin), (p[3], p[5], 0.1, skin),
             (p[2], p[3], 0.42, scene.shirts[player]), (p[4], p[4] + 0.01, 0.24, skin * 0.8)]  # fmt: skip
    # Only the box around the player is touched.
    margin = 0.5 * metre + 2
    x0, y0 = np.clip(np.floor(p.min(axis=0) - margin), 0, image.shape[1::-1]).astype(int)
    x1, y1 = np.clip(np.ceil(p.max(axis=0) + margin), 0, image.shape[1::-1]).astype(int)
    if x0 >= x1 or y0 >= y1:
        return cover
    box = image[y0:y1, x0:x1]
    for a, b, width_m, colour in parts:
        mask = np.zeros(box.shape[:2], np.uint8)
        ends = np.round((np.stack([a, b]) - (x0, y0)) * 16).astype(int).tolist()
        cv2.line(mask, *ends, 255, max(1, round(width_m * metre)), cv2.LINE_AA, 4)
        part = mask.astype(np.float32) / 255
        box += part[..., None] * (colour.astype(np.float32) - box)
        cover[y0:y1, x0:x1] = np.maximum(cover[y0:y1, x0:x1], part)
    return cover
