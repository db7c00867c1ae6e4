"""The physics of a rendered rally: where ball and players are, in meters; x across the court, y along it, z up."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FPS = 30
SUBSTEPS = 12  # positions of the ball per frame
GRAVITY = 9.81
HALF_COURT_XY = (5.485, 11.885)  # doubles


class Rally(NamedTuple):
    """What happens.

    Attributes:
        ball: ``[frame * SUBSTEPS, 3]`` meters; NaN where there is no ball.
        players: ``[frame, 2, 2]`` meters on the ground.
        status: of each frame 0 flying, 1 hit, 2 bounce, blank when absent.
    """

    ball: np.ndarray
    players: np.ndarray
    status: list[int | str]


def simulate(num_frames: int, rng: np.random.Generator) -> Rally:
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
    return Rally(ball, players, status)


def _move_players(num_frames: int, hits: list, rng: np.random.Generator) -> np.ndarray:
    """Let each player run from one of his hits to the next, ``[frame, 2, 2]`` meters."""
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
