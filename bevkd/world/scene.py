"""One scene: a street, the objects on it, and how they and the ego vehicle move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from bevkd.world.config import WorldConfig
from bevkd.world.geometry import Floats, Ints, Pose, rotation_zyx
from bevkd.world.objects import CLASSES, ObjectClass, Rng, Size, build_parts, draw_size, fit_size
from bevkd.world.parts import Part, Parts, place, stack
from bevkd.world.placement import Spot, spots
from bevkd.world.street import Street, building_parts, curb_parts, draw_clutter, draw_street

EGO_SIZE = (4.1, 1.75)


@dataclass(frozen=True)
class Motion:
    """A drive at constant speed (m/s) and turn rate (rad/s) from (x, y, yaw) at time 0."""

    x: float
    y: float
    yaw: float
    speed: float = 0.0
    turn: float = 0.0

    def at(self, t: float) -> tuple[float, float, float]:
        """Return (x, y, yaw) at time ``t`` seconds."""
        yaw = self.yaw + self.turn * t
        if abs(self.turn) < 1e-6:
            way = self.speed * t
            return self.x + way * math.cos(self.yaw), self.y + way * math.sin(self.yaw), yaw
        radius = self.speed / self.turn
        return (
            self.x + radius * (math.sin(yaw) - math.sin(self.yaw)),
            self.y - radius * (math.cos(yaw) - math.cos(self.yaw)),
            yaw,
        )


@dataclass(frozen=True)
class Actor:
    """One labelled object.

    ``size`` is the annotated (length, width, height) and ``foot`` the height above the ground it stands on, in metres.
    """

    cls: ObjectClass
    size: Size
    motion: Motion
    foot: float
    attribute: str
    parts: list[Part] = field(repr=False)


@dataclass(frozen=True)
class ActorState:
    """All actors at one time, one row each: box centre and yaw in the scene frame, and velocity ``n 2``."""

    centre: Floats
    yaw: Floats
    velocity: Floats


@dataclass(frozen=True)
class Light:
    """Sun, sky and air of a scene."""

    sun: Floats
    ambient: float
    strength: float
    tint: Floats
    sky_low: Floats
    sky_high: Floats
    cloud: float
    haze_m: float
    exposure: float


@dataclass(frozen=True)
class Scene:
    """A scene at all times; the scene frame is turned by ``heading`` and moved by ``origin`` into the global frame."""

    street: Street
    light: Light
    actors: list[Actor]
    ego: Motion
    heading: float
    jitter: Floats
    static: Parts
    _local: Parts
    _actor_of: Ints

    @property
    def global_from_scene(self) -> Pose:
        """Every scene has its own map, whose lower left corner is the global origin."""
        half = self.map_half_m
        return Pose(rotation_zyx(self.heading), np.array([half, half, 0.0]))

    @property
    def map_half_m(self) -> float:
        """Half the side of the square map that holds the turned scene."""
        return math.ceil(self.street.extent_m * math.sqrt(2))

    def actors_at(self, t: float) -> ActorState:
        """Return the boxes of all actors at time ``t`` seconds."""
        poses = np.array([a.motion.at(t) for a in self.actors]).reshape(-1, 3)
        foot = np.array([a.foot for a in self.actors]) + self.street.terrain.height(poses[:, 0], poses[:, 1])
        half_height = np.array([a.size[2] / 2 for a in self.actors])
        speed = np.array([a.motion.speed for a in self.actors])
        velocity = speed[:, None] * np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=1)
        return ActorState(np.column_stack([poses[:, :2], foot + half_height]), poses[:, 2], velocity)

    def moving_parts_at(self, t: float) -> Parts:
        """Return the parts of all actors at time ``t``."""
        state, of = self.actors_at(t), self._actor_of
        foot = state.centre[:, 2] - np.array([a.size[2] / 2 for a in self.actors])
        return place(self._local, state.centre[of, 0], state.centre[of, 1], foot[of], state.yaw[of])

    def ego_pose_at(self, t: float) -> Pose:
        """Return ``scene_from_ego`` at time ``t``: on hills it follows the ground and nods."""
        x, y, yaw = self.ego.at(t)
        if self.street.terrain.flat:
            return Pose(rotation_zyx(yaw), np.array([x, y, 0.0]))
        gx, gy = self.street.terrain.slope(x, y)
        nod, rock = (self.jitter[:, 0] * np.sin(self.jitter[:, 1] * t + self.jitter[:, 2])).reshape(2, -1).sum(axis=1)
        pitch = -math.atan(gx * math.cos(yaw) + gy * math.sin(yaw)) + float(nod)
        roll = math.atan(-gx * math.sin(yaw) + gy * math.cos(yaw)) + float(rock)
        z = float(self.street.terrain.height(np.array(x), np.array(y)))
        return Pose(rotation_zyx(yaw, pitch, roll), np.array([x, y, z]))

    def ego_velocity_at(self, t: float) -> tuple[Floats, float]:
        """Return the ego vehicle's velocity ``2`` in the scene frame (m/s) and its turn rate (rad/s)."""
        yaw = self.ego.at(t)[2]
        return self.ego.speed * np.array([math.cos(yaw), math.sin(yaw)]), self.ego.turn


def draw_scene(config: WorldConfig, index: int) -> Scene:
    """Return scene ``index``; it depends on the config's seed and the index alone."""
    rng = np.random.default_rng([config.seed, index])
    street = draw_street(config, rng)
    light = _draw_light(rng)
    ego = _draw_ego(street, config.duration_s, rng)
    crowd = _Crowd(config, street, ego)
    actors = _draw_actors(config, street, ego, crowd, rng)
    beside = [*curb_parts(street), *building_parts(street, rng), *_draw_clutter(config, street, crowd, rng)]
    static = _settle(stack([(-1, beside)]), street)
    local = stack([(i, actor.parts) for i, actor in enumerate(actors)])
    jitter = np.stack([rng.uniform(0.002, 0.012, 6), rng.uniform(2, 9, 6), rng.uniform(0, 6.28, 6)], axis=1)
    return Scene(street, light, actors, ego, float(rng.uniform(-math.pi, math.pi)), jitter, static, local, local.owner)


def _settle(static: Parts, street: Street) -> Parts:
    """Return the clutter on top of the ground, sunk into slopes, so that no foot hangs in the air."""
    if street.terrain.flat:
        return static
    zero = np.zeros(len(static))
    placed = place(static, zero, zero, street.terrain.height(static.x, static.y), zero)
    sink = np.minimum(0.4, 0.5 * (static.z1 - static.z0)) * (static.z0 == 0)
    return replace(placed, z0=placed.z0 - sink)


def _draw_light(rng: Rng) -> Light:
    azimuth, elevation = rng.uniform(-math.pi, math.pi), math.radians(rng.uniform(18, 65))
    level = math.cos(elevation)
    sun = np.array([math.cos(azimuth) * level, math.sin(azimuth) * level, math.sin(elevation)])
    overcast = float(np.clip(rng.beta(0.7, 0.9), 0, 1))
    warm = float(rng.uniform(0, 1)) * (1 - overcast) * (1.2 - elevation)
    clear_high, clear_low = np.array([92, 142, 208.0]), np.array([196, 214, 230.0])
    grey_high, grey_low = np.array([176, 182, 190.0]), np.array([206, 208, 210.0])
    low = clear_low + overcast * (grey_low - clear_low) + warm * np.array([34, -8, -56.0])
    return Light(
        sun=sun,
        ambient=0.58 + 0.34 * overcast,
        strength=0.6 * (1 - 0.85 * overcast),
        tint=np.array([1 + 0.12 * warm, 1.0, 1 - 0.16 * warm]),
        sky_low=low,
        sky_high=clear_high + overcast * (grey_high - clear_high),
        cloud=float(rng.uniform(6, 30)),
        haze_m=float(rng.uniform(90, 400)),
        exposure=float(rng.uniform(0.78, 1.15)),
    )


def _draw_ego(street: Street, duration: float, rng: Rng) -> Motion:
    """Return the ego vehicle's drive, placed so that the middle of the scene finds it near the origin."""
    lane = -(0.5 + float(rng.integers(street.lanes))) * 3.4
    speed = 0.0 if rng.random() < 0.12 else float(rng.uniform(2.5, 12))
    turning = street.cross_x is not None and duration < 8 and rng.random() < 0.3
    middle, turn = Motion(0.0, lane + float(rng.normal(0, 0.15)), float(rng.normal(0, 0.03)), speed), 0.0
    if turning and street.cross_x is not None:
        hand = 1 if rng.random() < 0.5 else -1
        speed = max(1.0, speed * 0.45)
        yaw = hand * float(rng.uniform(0.25, 1.1))
        middle = Motion(street.cross_x + float(rng.uniform(-1, 1)), lane + hand * 1.5, yaw, speed)
        turn = hand * speed / (9.0 if hand > 0 else 6.5)
    x, y, yaw = Motion(middle.x, middle.y, middle.yaw, speed, turn).at(-duration / 2)
    return Motion(x, y, yaw, speed, turn)


class _Crowd:
    """Keeps everything that has been placed apart, at several times of the scene."""

    def __init__(self, config: WorldConfig, street: Street, ego: Motion) -> None:
        self._times = np.linspace(-config.keyframe_interval_s, config.duration_s, 7)
        self._street = street
        self._discs: Floats = np.zeros((len(self._times), 0, 3))
        self.add(ego, *EGO_SIZE)

    def _cover(self, motion: Motion, length: float, width: float) -> Floats:
        """Return discs ``times n 3`` (x, y, radius) that cover the footprint."""
        count = max(1, math.ceil(max(length, width) / min(length, width)))
        radius = 0.5 * math.hypot(min(length, width), max(length, width) / count)
        along = (np.arange(count) + 0.5) / count - 0.5
        poses = np.array([motion.at(float(t)) for t in self._times])
        axis = poses[:, 2] if length >= width else poses[:, 2] + math.pi / 2
        way = along[None] * max(length, width)
        x = poses[:, :1] + np.cos(axis)[:, None] * way
        y = poses[:, 1:2] + np.sin(axis)[:, None] * way
        return np.stack([x, y, np.full_like(x, radius)], axis=2)

    def fits(self, motion: Motion, length: float, width: float, gap: float = 0.3) -> bool:
        """Return whether the footprint keeps clear of all others by ``gap`` metres."""
        new = self._cover(motion, length, width)
        apart = np.hypot(*(new[:, :, None, k] - self._discs[:, None, :, k] for k in (0, 1)))
        return bool((apart > new[:, :, None, 2] + self._discs[:, None, :, 2] + gap).all())

    def add(self, motion: Motion, length: float, width: float) -> None:
        """Remember a footprint."""
        self._discs = np.concatenate([self._discs, self._cover(motion, length, width)], axis=1)


def _draw_actors(config: WorldConfig, street: Street, ego: Motion, crowd: _Crowd, rng: Rng) -> list[Actor]:
    actors: list[Actor] = []
    # Large things first: they are the hardest to find room for.
    # A long drive needs objects all along its way, at the same density.
    reach = max(config.spawn_range_m, 30.0 + ego.speed * config.duration_s / 2)
    names = sorted(config.classes, key=lambda name: -CLASSES[name].size_m[0] * CLASSES[name].size_m[1])
    for name in names:
        cls = CLASSES[name]
        wanted = int(rng.poisson(config.classes[name] * reach / config.spawn_range_m))
        found: Iterator[Spot] = spots(street, cls, reach, rng)
        for _ in range(wanted):
            drawn = draw_size(cls, rng)
            for _ in range(15):
                spot = next(found)
                size = fit_size(drawn, spot.attribute)
                motion = Motion(spot.x, spot.y, spot.yaw, spot.speed)
                if crowd.fits(motion, size[0], size[1], spot.gap):
                    crowd.add(motion, size[0], size[1])
                    parts = build_parts(name, size, spot.attribute, rng)
                    actors.append(Actor(cls, size, motion, spot.foot, spot.attribute, parts))
                    break
    return actors


def _draw_clutter(config: WorldConfig, street: Street, crowd: _Crowd, rng: Rng) -> list[Part]:
    parts: list[Part] = []
    for _ in range(int(rng.poisson(config.clutter * 0.55 * street.extent_m))):
        x, y, radius, shape = draw_clutter(street, rng)
        here = Motion(x, y, 0.0)
        if street.in_cross(x, 0.6 + radius) or not crowd.fits(here, 2 * radius, 2 * radius, 0.1):
            continue
        crowd.add(here, 2 * radius, 2 * radius)
        parts += [replace(p, x=p.x + x, y=p.y + y, z1=p.z1 + street.curb_m) for p in shape]
    return parts
