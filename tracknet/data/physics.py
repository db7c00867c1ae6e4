"""Physics of a rendered rally: trajectories of the ball and the players.

Positions are in meters, with the origin on the ground at the center of the court; x points across the court, y along
it, and z up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FPS = 30  # frames per second
SUBSTEPS = 12  # simulated ball positions per frame
GRAVITY = 9.81  # m/s^2
HALF_COURT_XY = (5.485, 11.885)  # half width and half length of the doubles court in meters


class Rally(NamedTuple):
    """Simulated rally.

    Attributes:
        ball: ball positions in meters, float ``[frame * SUBSTEPS, 3]``; NaN where there is no ball.
        players: positions of the two players on the ground in meters, float ``[frame, 2, 2]``.
        status: status of each frame: 0 flying, 1 hit, 2 bounce, or an empty string without a ball.
    """

    ball: np.ndarray
    players: np.ndarray
    status: list[int | str]


def simulate(num_frames: int, rng: np.random.Generator) -> Rally:
    """Simulate a rally: an optional pause, alternating shots, and the frames after the last shot, without a ball.

    Args:
        num_frames: number of frames at ``FPS`` frames per second.
        rng: generator of all random values.
    """
    num_steps = num_frames * SUBSTEPS
    dt = 1 / (FPS * SUBSTEPS)
    ball = np.full((num_steps, 3), np.nan)
    events: dict[int, int] = {}
    hits: list[tuple[int, int, np.ndarray]] = []  # step, player, ground position
    step = int(rng.integers(0, 10)) * SUBSTEPS if rng.random() < 0.3 else 0
    side = int(rng.integers(2))  # 0 near, 1 far
    sign = (-1.0, 1.0)
    position = np.array([rng.uniform(-4, 4), sign[side] * rng.uniform(10.5, 12.5), rng.uniform(0.6, 2.6)])
    while step < num_steps:
        # The player on this side hits the ball toward a random landing point at a random horizontal speed; the vertical
        # speed makes the ballistic flight end there.
        hits.append((step, side, position[:2].copy()))
        events[step // SUBSTEPS] = 1
        last = rng.random() < 0.15  # nobody returns this one
        land = np.array([rng.uniform(-4.5, 4.5), -sign[side] * rng.uniform(3, 10.5)])
        flight = np.linalg.norm(land - position[:2]) / rng.uniform(17, 36)
        speed = np.array([*(land - position[:2]) / flight, (0.5 * GRAVITY * flight**2 - position[2]) / flight])
        # Integrate until the other player hits the ball, 0.3 to 0.6 s after it lands; a ball that is not returned is
        # followed for 2.5 s.
        bounced, duration = False, flight + rng.uniform(0.3, 0.6)
        for _ in range(int((2.5 if last else duration) / dt)):
            if step >= num_steps:
                break
            ball[step] = position
            speed[2] -= GRAVITY * dt
            position = position + speed * dt
            # Bounce: the center of the ball is one radius (0.033 m) above the ground. Only the first bounce of a shot
            # is an event, and a hit in the same frame takes precedence.
            if position[2] < 0.033 and speed[2] < 0:
                speed *= (0.75, 0.75, -0.72)
                position[2] = 0.033
                if not bounced:
                    events.setdefault(step // SUBSTEPS, 2)
                bounced = True
            step += 1
        if last:
            break
        side = 1 - side
        position[2] = max(position[2], 0.3)  # nobody hits the ball closer to the ground
    players = _move_players(num_frames, hits, rng)
    # The label of a frame refers to the last of its substeps.
    absent = np.isnan(ball[SUBSTEPS - 1 :: SUBSTEPS, 0])
    status: list[int | str] = ["" if absent[i] else events.get(i, 0) for i in range(num_frames)]
    return Rally(ball, players, status)


def _move_players(num_frames: int, hits: list, rng: np.random.Generator) -> np.ndarray:
    """Move each player from each of the player's hits to the next one.

    Args:
        num_frames: number of frames.
        hits: step, player and ground position ``[2]`` of each hit.
        rng: generator of all random values.

    Returns:
        Positions on the ground in meters, ``[frame, 2, 2]``.
    """
    players = np.empty((num_frames, 2, 2))
    for side, home_y in ((0, -12.5), (1, 12.5)):
        player_hits = [(step // SUBSTEPS, position) for step, s, position in hits if s == side]
        times = [0.0, *(t + 0.0 for t, _ in player_hits), float(num_frames)]
        # Players stand 0.7 m beside the ball they hit and slightly behind it, so that the ball does not pass through
        # them.
        spots = [np.array([rng.uniform(-2, 2), home_y])]
        spots += [position + np.array([rng.choice([-0.7, 0.7]), 0.2 * np.sign(home_y)]) for _, position in player_hits]
        spots.append(np.array([rng.uniform(-3, 3), home_y]))
        for axis in range(2):
            players[:, side, axis] = np.interp(np.arange(num_frames), times, [s[axis] for s in spots])
    return players
