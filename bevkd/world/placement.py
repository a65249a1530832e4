"""Where objects of each class are found on a street, and what they do there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bevkd.world.objects import ObjectClass, Rng
from bevkd.world.street import LANE_M, PARKING_M, Street


@dataclass(frozen=True)
class Spot:
    """A place at time 0 in the scene frame and what the object does there.

    Metres and radians; ``foot`` is the height of the surface, ``gap`` the room that the object needs around it.
    """

    x: float
    y: float
    yaw: float
    speed: float
    attribute: str
    foot: float = 0.0
    gap: float = 0.3


def spots(street: Street, cls: ObjectClass, reach: float, rng: Rng) -> Iterator[Spot]:
    """Yield random spots for objects of ``cls`` without end, within ``reach`` metres along the road."""
    if cls.name in ("traffic_cone", "barrier"):
        yield from _rows(street, cls, reach, rng)
    draw = _BY_CLASS.get(cls.name, _vehicle)
    while True:
        yield draw(street, cls, reach, rng)


def _speed(cls: ObjectClass, rng: Rng) -> float:
    return float(rng.uniform(*cls.speed_mps))


def _vehicle(street: Street, cls: ObjectClass, reach: float, rng: Rng) -> Spot:
    kind = rng.random()
    side = 1 if rng.random() < 0.5 else -1
    x = float(rng.uniform(-reach, reach))
    wobble = float(rng.normal(0, 0.03))
    # Right-hand traffic: side -1 drives along +x.
    heading = 0.0 if side < 0 else math.pi
    lane = (0.5 + float(rng.integers(street.lanes))) * LANE_M
    if kind < 0.38:
        if street.cross_x is not None and rng.random() < 0.3:
            return _on_cross_street(street, cls, reach, rng)
        return Spot(x, side * lane + float(rng.normal(0, 0.2)), heading + wobble, _speed(cls, rng), "vehicle.moving")
    if kind < 0.52:
        if street.cross_x is not None:
            queue = street.cross_half_m + 5.5 + cls.size_m[0] / 2 + float(rng.integers(3)) * (cls.size_m[0] + 2.5)
            x = street.cross_x + side * queue
        return Spot(x, side * lane + float(rng.normal(0, 0.2)), heading + wobble, 0.0, "vehicle.stopped")
    if street.parking[0 if side > 0 else 1] and kind < 0.88 and not street.in_cross(x, 6):
        y = side * (street.lanes * LANE_M + PARKING_M / 2)
        return Spot(x, y, heading + wobble, 0.0, "vehicle.parked", gap=0.1)
    return _on_lot(street, side, x, rng)


def _on_lot(street: Street, side: int, x: float, rng: Rng) -> Spot:
    """Return a spot on the ground beside the road: at right angles, along it, or anyhow."""
    room = street.sidewalk_m + street.setback_m[0 if side > 0 else 1]
    y = street.edge(side) + 1.3 + float(rng.uniform(0, max(0.1, room - 2.6)))
    yaw = float(rng.choice([0.0, math.pi])) + float(rng.normal(0, 0.25))
    if room > 6 and rng.random() < 0.6:
        y = street.edge(side) + room / 2
        yaw = side * math.pi / 2 * float(rng.choice([-1, 1])) + float(rng.normal(0, 0.2))
    foot = 0.0 if street.in_cross(x) else street.curb_m
    return Spot(x, side * y, yaw, 0.0, "vehicle.parked", foot)


def _on_cross_street(street: Street, cls: ObjectClass, reach: float, rng: Rng) -> Spot:
    way = 1 if rng.random() < 0.5 else -1
    x = (street.cross_x or 0.0) + way * LANE_M / 2
    y = float(rng.uniform(-reach, reach)) * 0.8
    stopped = rng.random() < 0.35
    speed = 0.0 if stopped else _speed(cls, rng) * 0.6
    if stopped and abs(y) < street.edge(1) + 3:
        y = -way * (street.edge(-way) + 4.5)
    attribute = "vehicle.stopped" if stopped else "vehicle.moving"
    return Spot(x, y, way * math.pi / 2 + float(rng.normal(0, 0.04)), speed, attribute)


def _construction(street: Street, cls: ObjectClass, reach: float, rng: Rng) -> Spot:
    side = 1 if rng.random() < 0.5 else -1
    x = float(rng.uniform(-reach, reach))
    if rng.random() < 0.3:
        return Spot(x, side * LANE_M / 2, 0.0 if side < 0 else math.pi, _speed(cls, rng), "vehicle.moving")
    y = side * (street.edge(side) - 1.6)
    attribute = "vehicle.parked" if rng.random() < 0.6 else "vehicle.stopped"
    return Spot(x, y, float(rng.uniform(-math.pi, math.pi)), 0.0, attribute)


def _pedestrian(street: Street, cls: ObjectClass, reach: float, rng: Rng) -> Spot:
    side = 1 if rng.random() < 0.5 else -1
    x, kind = float(rng.uniform(-reach, reach)), rng.random()
    edge = street.edge(side)
    y = side * (edge + float(rng.uniform(0.6, max(0.8, street.sidewalk_m + 0.4))))
    foot = 0.0 if street.in_cross(x, -0.2) else street.curb_m
    if kind < 0.25:
        # Crossing the road: on the zebra where there is one.
        if street.cross_x is not None:
            x = street.cross_x + float(rng.choice([-1, 1])) * (street.cross_half_m + float(rng.uniform(1, 3.4)))
        y = float(rng.uniform(-street.edge(-1) + 1.5, street.edge(1) - 1.5))
        yaw = float(rng.choice([-1, 1])) * math.pi / 2 + float(rng.normal(0, 0.15))
        return Spot(x, y, yaw, _speed(cls, rng), "pedestrian.moving", 0.0, gap=0.4)
    if kind < 0.72:
        yaw = float(rng.choice([0.0, math.pi])) + float(rng.normal(0, 0.12))
        return Spot(x, y, yaw, _speed(cls, rng), "pedestrian.moving", foot, gap=0.15)
    return Spot(x, y, float(rng.uniform(-math.pi, math.pi)), 0.0, "pedestrian.standing", foot, gap=0.1)


def _cycle(street: Street, cls: ObjectClass, reach: float, rng: Rng) -> Spot:
    side = 1 if rng.random() < 0.5 else -1
    x = float(rng.uniform(-reach, reach))
    heading = (0.0 if side < 0 else math.pi) + float(rng.normal(0, 0.08))
    if rng.random() < 0.72:
        y = side * (street.lanes * LANE_M - 0.7 + float(rng.normal(0, 0.25)))
        if cls.name == "motorcycle":
            y = side * (0.5 + float(rng.integers(street.lanes))) * LANE_M
        if cls.name == "bicycle" and rng.random() < 0.3 and not street.in_cross(x, 4):
            y = side * (street.edge(side) + 1.6)
            return Spot(x, y, heading, 0.6 * _speed(cls, rng), "cycle.with_rider", street.curb_m)
        speed = 0.0 if rng.random() < 0.12 else _speed(cls, rng)
        return Spot(x, y, heading, speed, "cycle.with_rider")
    y = side * (street.edge(side) + float(rng.uniform(0.5, max(0.7, street.sidewalk_m - 0.4))))
    foot = 0.0 if street.in_cross(x) else street.curb_m
    return Spot(x, y, float(rng.uniform(-math.pi, math.pi)), 0.0, "cycle.without_rider", foot, gap=0.1)


def _rows(street: Street, cls: ObjectClass, reach: float, rng: Rng) -> Iterator[Spot]:
    """Yield spots along short rows: cones taper into a lane, barriers stand end to end."""
    pitch = (1.6, 3.2) if cls.name == "traffic_cone" else (cls.size_m[1] + 0.5, cls.size_m[1] + 0.9)
    while True:
        side = 1 if rng.random() < 0.5 else -1
        x, step = float(rng.uniform(-reach, reach)), float(rng.uniform(*pitch))
        drift = float(rng.uniform(-0.35, 0.35)) if cls.name == "traffic_cone" else float(rng.normal(0, 0.03))
        onto_walk = rng.random() < 0.3
        y = street.edge(side) + (1.0 if onto_walk else -float(rng.uniform(0.4, 2.6)))
        for i in range(int(rng.integers(2, 6))):
            wobble = float(rng.normal(0, 0.06))
            here = x + i * step
            foot = street.curb_m if onto_walk and not street.in_cross(here) else 0.0
            # The long side of a barrier is its width, so its yaw is across the row.
            yaw = math.pi / 2 + drift + wobble if cls.name == "barrier" else float(rng.uniform(-3.1, 3.1))
            yield Spot(here, side * (y - i * abs(drift) * 0.8) + wobble, yaw, 0.0, "", foot, gap=0.05)


_BY_CLASS: dict[str, Callable[[Street, ObjectClass, float, Rng], Spot]] = {
    "construction_vehicle": _construction,
    "pedestrian": _pedestrian,
    "motorcycle": _cycle,
    "bicycle": _cycle,
}
