"""Rendering of rally frames: court, stands, players and the ball's motion streak, seen from behind the baseline."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from tracknet.data.physics import HALF_COURT_XY, SUBSTEPS, Rally


class Camera(NamedTuple):
    """Pinhole camera.

    Attributes:
        position: position in meters, ``[3]``.
        rotation: rotation matrix ``[3, 3]`` whose rows are the camera's right, down and forward axes.
        focal_px: focal length in pixels.
        center: principal point in pixels.
    """

    position: np.ndarray
    rotation: np.ndarray
    focal_px: float
    center: tuple[float, float]

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Project points ``[n, 3]`` in meters to pixels ``[n, 2]``, and return their depths ``[n]`` in meters."""
        local = (points - self.position) @ self.rotation.T
        depth = np.maximum(local[:, 2], 0.1)
        return local[:, :2] / depth[:, None] * self.focal_px + self.center, depth


class Scene(NamedTuple):
    """Appearance of a game.

    Attributes:
        camera: camera of the game.
        background: court and stands without players and ball, RGB float32 ``[h, w, 3]`` in gray levels.
        ball_rgb: color of the ball, ``[3]``.
        ball_radius_m: radius of the rendered ball in meters.
        shirts: shirt colors of the two players, ``[2, 3]``.
        noise: standard deviation of the sensor noise in gray levels.
        exposure: fraction of the frame time during which the shutter is open.
    """

    camera: Camera
    background: np.ndarray
    ball_rgb: np.ndarray
    ball_radius_m: float
    shirts: np.ndarray
    noise: float
    exposure: float


def _look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the rotation matrix ``[3, 3]`` of a level camera that looks at a target."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward])


def draw_scene(size_wh: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Draw the camera, court, stands, colors and light of a game at random.

    Args:
        size_wh: width and height of the frames in pixels.
        rng: generator of all random values.
    """
    w, h = size_wh
    position = np.array([rng.uniform(-1.5, 1.5), rng.uniform(-29, -23), rng.uniform(7.5, 12.5)])
    focal = w * rng.uniform(1.15, 1.4)
    camera = Camera(position, _look_at(position, np.array([0, rng.uniform(-2.5, 0.0), 0.5])), focal, (w / 2, h / 2))

    def polygon(image: np.ndarray, corners: list[tuple[float, float]], color: np.ndarray) -> None:
        # OpenCV takes fixed-point coordinates: 4 fractional bits place the edges with subpixel accuracy.
        points, _ = camera.project(np.array([(x, y, 0.0) for x, y in corners]))
        cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], color.tolist(), cv2.LINE_AA, 4)

    palettes = np.array([[60, 110, 160], [70, 140, 80], [190, 100, 60], [60, 90, 70], [120, 80, 140], [90, 100, 110]])
    inner, outer = palettes[rng.permutation(len(palettes))[:2]] * rng.uniform(0.7, 1.2)
    image = np.empty((h, w, 3), np.float32)
    # Stands: blocks of random brightness, smoothed at two scales, which give texture without a ball.
    for cell, amount in ((3, 55.0), (16, 35.0)):
        grid = (h // cell + 2, w // cell + 2)
        blocks = (rng.normal(0, amount, (*grid, 1)) + rng.normal(0, amount / 3, (*grid, 3))).astype(np.float32)
        blocks = cv2.resize(blocks, (w, h), interpolation=cv2.INTER_CUBIC)
        image = 80 + blocks if cell == 3 else image + blocks
    # Court: the surroundings, the playing area, and the lines.
    polygon(image, [(-40, -30), (40, -30), (40, 17), (-40, 17)], outer)
    x, y = HALF_COURT_XY
    polygon(image, [(-x, -y), (x, -y), (x, y), (-x, y)], inner)
    white = np.full(3, rng.uniform(200, 245))
    single, service = 4.115, 6.4
    lines = [
        ((-x, -y), (x, -y)),
        ((-x, y), (x, y)),
        ((-x, -y), (-x, y)),
        ((x, -y), (x, y)),
        ((-single, -y), (-single, y)),
        ((single, -y), (single, y)),
        ((-single, service), (single, service)),
        ((-single, -service), (single, -service)),
        ((0, -service), (0, service)),
    ]
    for (x0, y0), (x1, y1) in lines:
        across = 0.05 if x0 == x1 else 0.0
        along = 0.08 if y0 == y1 else 0.0
        polygon(
            image,
            [
                (x0 - across, y0 - along),
                (x1 + across, y0 - along if y0 == y1 else y1),
                (x1 + across, y1 + along),
                (x0 - across, y0 + along),
            ],
            white,
        )
    # Net: a translucent area between the posts, with a white band on top.
    net, _ = camera.project(np.array([(-6.4, 0, 0), (6.4, 0, 0), (6.4, 0, 1.0), (-6.4, 0, 1.0)]))
    veil = image.copy()
    cv2.fillPoly(veil, [np.round(net * 16).astype(np.int32)], (40, 40, 40), cv2.LINE_AA, 4)
    image = 0.55 * image + 0.45 * veil
    left, right = np.round(net[[3, 2]]).astype(int).tolist()
    cv2.line(image, left, right, (225, 225, 225), 1, cv2.LINE_AA)
    # Static ball-colored and white spots, such as logos and balls at the fence.
    for _ in range(int(rng.integers(4, 12))):
        spot = (int(rng.integers(w)), int(rng.integers(h // 2)))
        color = [(225, 235, 110), (240, 240, 240)][int(rng.integers(2))]
        cv2.circle(image, spot, int(rng.integers(1, 3)), color, -1, cv2.LINE_AA)
    # Light: a horizontal gradient and an overall brightness.
    left_light, right_light = rng.uniform(0.85, 1.15, 2)
    light = np.linspace(left_light, right_light, w)[None, :, None] * rng.uniform(0.8, 1.15)
    ball = np.array([215, 235, 90]) + rng.normal(0, 12, 3)
    return Scene(
        camera,
        np.clip(image * light, 0, 255).astype(np.float32),
        ball,
        rng.uniform(0.05, 0.075),
        rng.uniform(20, 235, (2, 3)),
        rng.uniform(1.5, 5.0),
        rng.uniform(0.3, 0.9),
    )


def render_frame(
    scene: Scene, rally: Rally, frame: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, float | str, float | str]]:
    """Render a frame and its label.

    Args:
        scene: appearance of the game.
        rally: simulated rally.
        frame: frame index.
        rng: generator of the sensor noise.

    Returns:
        Frame, RGB uint8 ``[h, w, 3]``, and its label ``(visibility, x, y)``: visibility 0 (absent), 1, 2 (hard to see)
        or 3 (occluded), and the leading end of the ball's streak in pixels; x and y are empty strings without a ball.
    """
    image = scene.background.copy()
    h, w = image.shape[:2]
    # Streak of the ball during the exposure, which ends with the frame.
    steps = rally.ball[frame * SUBSTEPS : (frame + 1) * SUBSTEPS]
    open_steps = steps[-max(2, round(SUBSTEPS * scene.exposure)) :]
    has_ball = not np.isnan(open_steps[-1, 0])
    depth_of_ball, alpha = np.inf, np.zeros((h, w), np.float32)
    if has_ball:
        path = open_steps[~np.isnan(open_steps[:, 0])]
        points, depths = scene.camera.project(path)
        depth_of_ball = float(depths[-1])
        radius = max(0.9, scene.ball_radius_m * scene.camera.focal_px / depth_of_ball)
        alpha = _streak(points, radius, (h, w))
    # Draw players and ball from back to front, and accumulate the coverage of the players in front of the ball.
    hidden = np.zeros((h, w), np.float32)
    ball_drawn = False
    order = sorted(range(2), key=lambda p: -scene.camera.project(np.array([[*rally.players[frame, p], 1.0]]))[1][0])
    for player in order:
        ground = rally.players[frame, player]
        depth = scene.camera.project(np.array([[*ground, 1.0]]))[1][0]
        if has_ball and not ball_drawn and depth < depth_of_ball:
            image += alpha[..., None] * (scene.ball_rgb - image)
            ball_drawn = True
        cover = _draw_player(image, scene, ground, player, frame)
        if ball_drawn:
            hidden = np.maximum(hidden, cover)
    if has_ball and not ball_drawn:
        image += alpha[..., None] * (scene.ball_rgb - image)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(scene.noise)
    label: tuple[int, float | str, float | str] = (0, "", "")
    if has_ball:
        x, y = points[-1]
        if -0.5 <= x <= w - 0.5 and -0.5 <= y <= h - 0.5:
            # The visibility class depends on the unoccluded fraction of the ball and its contrast to the background.
            total = float(alpha.sum())
            seen = float((alpha * (1 - hidden)).sum()) / total if total else 0.0
            contrast = np.abs(scene.background[round(y) % h, round(x) % w] - scene.ball_rgb).mean()
            kind = 3 if seen < 0.25 else 2 if seen < 0.75 or contrast * alpha.max() < 25 else 1
            label = (kind, round(float(x), 2), round(float(y), 2))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), label


def _streak(points: np.ndarray, radius: float, hw: tuple[int, int]) -> np.ndarray:
    """Return the coverage of a disk that moves along a path while the shutter is open.

    Args:
        points: positions of the disk's center in pixels, ``[n, 2]``.
        radius: radius of the disk in pixels.
        hw: height and width of the frame in pixels.

    Returns:
        Coverage in ``[0, 1]``, float32 ``[h, w]``.
    """
    alpha = np.zeros(hw, np.float32)
    # Only the box around the streak is computed.
    low = np.floor(points.min(axis=0) - radius - 2).astype(int)
    high = np.ceil(points.max(axis=0) + radius + 3).astype(int)
    x0, y0 = np.maximum(low, 0)
    x1, y1 = np.minimum(high, (hw[1], hw[0]))
    if x0 >= x1 or y0 >= y1:
        return alpha
    # Interpolate the path so that neighboring disks overlap at any speed of the ball.
    length = float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
    n = max(len(points), int(length / max(radius, 0.5) * 2) + 1)
    samples = np.linspace(0, len(points) - 1, n)
    px = np.interp(samples, np.arange(len(points)), points[:, 0])
    py = np.interp(samples, np.arange(len(points)), points[:, 1])
    ys, xs = np.mgrid[y0:y1, x0:x1]
    distance = np.hypot(xs[..., None] - px, ys[..., None] - py)
    cover = np.clip(radius + 0.5 - distance, 0, 1).mean(axis=-1)
    # Film and sensors saturate: a streak is brighter than its share of the exposure time.
    alpha[y0:y1, x0:x1] = np.clip(cover * min(2.0, 1 + length / (4 * radius)), 0, 1)
    return alpha


def _draw_player(image: np.ndarray, scene: Scene, ground: np.ndarray, player: int, frame: int) -> np.ndarray:
    """Draw the legs, body, head and arm of a player into an image.

    Args:
        image: frame to draw into, RGB float32 ``[h, w, 3]``, changed in place.
        scene: appearance of the game.
        ground: position of the player on the ground in meters, ``[2]``.
        player: 0 for the near, 1 for the far player.
        frame: frame index, which determines the phase of the movement.

    Returns:
        Coverage of the player in ``[0, 1]``, float32 ``[h, w]``.
    """
    cover = np.zeros(image.shape[:2], np.float32)
    swing = np.sin(frame * 0.9 + player)
    joints = np.array(
        [
            (*ground, 0.05),
            (ground[0] + 0.25 * swing, ground[1], 0.05),
            (*ground, 0.9),
            (*ground, 1.45),
            (*ground, 1.7),
            (ground[0] + 0.7 * (1 if player else -1), ground[1], 1.2 + 0.3 * swing),
        ]
    )
    # Body parts as thick lines: begin and end in pixels, width in meters, color.
    p, depth = scene.camera.project(joints)
    meter = scene.camera.focal_px / depth[0]
    skin = np.array([190.0, 150, 120])
    parts = [
        (p[0], p[2], 0.16, skin),
        (p[1], p[2], 0.16, skin),
        (p[3], p[5], 0.1, skin),
        (p[2], p[3], 0.42, scene.shirts[player]),
        (p[4], p[4] + 0.01, 0.24, skin * 0.8),
    ]
    # Only the box around the player is changed.
    margin = 0.5 * meter + 2
    x0, y0 = np.clip(np.floor(p.min(axis=0) - margin), 0, image.shape[1::-1]).astype(int)
    x1, y1 = np.clip(np.ceil(p.max(axis=0) + margin), 0, image.shape[1::-1]).astype(int)
    if x0 >= x1 or y0 >= y1:
        return cover
    box = image[y0:y1, x0:x1]
    for a, b, width_m, color in parts:
        mask = np.zeros(box.shape[:2], np.uint8)
        # Fixed-point coordinates with 4 fractional bits, as for the court.
        begin, end = np.round((np.stack([a, b]) - (x0, y0)) * 16).astype(int).tolist()
        cv2.line(mask, begin, end, 255, max(1, round(width_m * meter)), cv2.LINE_AA, 4)
        part = mask.astype(np.float32) / 255
        box += part[..., None] * (color.astype(np.float32) - box)
        cover[y0:y1, x0:x1] = np.maximum(cover[y0:y1, x0:x1], part)
    return cover
