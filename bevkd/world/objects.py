"""The ten detection classes: official names, sizes, speeds, attributes and what each looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bevkd.world.config import ClassName
from bevkd.world.parts import Part, Texture

Rng = np.random.Generator
Size = tuple[float, float, float]
Colour = tuple[float, float, float]

MARGIN_M = 0.04
"""Annotated boxes are this much larger than the object on every side, so that range noise rarely leaves them."""


@dataclass(frozen=True)
class ObjectClass:
    """What the tables say about a class; ``size_m`` is (length, width, height)."""

    name: ClassName
    category: str
    size_m: Size
    speed_mps: tuple[float, float]
    attributes: tuple[str, ...]


_VEHICLE = ("vehicle.moving", "vehicle.stopped", "vehicle.parked")
_CYCLE = ("cycle.with_rider", "cycle.without_rider")
_PERSON = ("pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down")

CLASSES: dict[ClassName, ObjectClass] = {
    c.name: c
    for c in (
        ObjectClass("car", "vehicle.car", (4.6, 1.92, 1.68), (3.0, 13.0), _VEHICLE),
        ObjectClass("truck", "vehicle.truck", (7.2, 2.5, 3.0), (3.0, 10.0), _VEHICLE),
        ObjectClass("bus", "vehicle.bus.rigid", (11.0, 2.9, 3.4), (3.0, 9.0), _VEHICLE),
        ObjectClass("trailer", "vehicle.trailer", (10.5, 2.75, 3.7), (3.0, 8.0), _VEHICLE),
        ObjectClass("construction_vehicle", "vehicle.construction", (6.3, 2.7, 3.2), (0.6, 2.0), _VEHICLE),
        ObjectClass("pedestrian", "human.pedestrian.adult", (0.72, 0.68, 1.75), (0.6, 1.9), _PERSON),
        ObjectClass("motorcycle", "vehicle.motorcycle", (2.1, 0.78, 1.55), (3.0, 12.0), _CYCLE),
        ObjectClass("bicycle", "vehicle.bicycle", (1.75, 0.64, 1.72), (2.0, 6.0), _CYCLE),
        ObjectClass("traffic_cone", "movable_object.trafficcone", (0.43, 0.43, 1.04), (0.0, 0.0), ()),
        ObjectClass("barrier", "movable_object.barrier", (0.52, 2.45, 1.0), (0.0, 0.0), ()),
    )
}

_CAR_PAINT: tuple[Colour, ...] = (
    (232, 232, 230),
    (176, 180, 184),
    (96, 100, 106),
    (38, 40, 44),
    (152, 32, 30),
    (34, 62, 128),
    (52, 92, 74),
    (188, 158, 110),
)
_CARGO_PAINT: tuple[Colour, ...] = (
    (226, 226, 222),
    (196, 200, 204),
    (44, 92, 152),
    (208, 150, 44),
    (142, 52, 44),
    (74, 122, 88),
)
_CLOTHES: tuple[Colour, ...] = (
    (40, 44, 58),
    (92, 34, 38),
    (186, 182, 170),
    (58, 84, 122),
    (112, 104, 88),
    (174, 108, 58),
    (70, 100, 72),
    (30, 30, 32),
)
_SKIN: tuple[Colour, ...] = ((224, 180, 152), (186, 136, 102), (120, 82, 60))
_RIDER: tuple[Colour, ...] = ((206, 212, 58), (222, 118, 44), (70, 154, 190), (188, 60, 120))


def draw_size(cls: ObjectClass, rng: Rng) -> Size:
    """Return (length, width, height) of one instance in metres: 10 to 13 % around the class's mean."""
    common = float(np.clip(rng.normal(0, 0.09), -0.2, 0.2))
    own = np.clip(rng.normal(0, 0.06, 3), -0.14, 0.14)
    length, width, height = (float(m * (1 + common + o)) for m, o in zip(cls.size_m, own, strict=True))
    return length, width, height


def fit_size(size: Size, attribute: str) -> Size:
    """Return the size of an instance that does what ``attribute`` says: a cycle without its rider is lower."""
    if attribute != "cycle.without_rider":
        return size
    return size[0], size[1], 0.64 * size[2]


def build_parts(cls: ClassName, size: Size, attribute: str, rng: Rng) -> list[Part]:
    """Return the parts of one instance; they fill its annotated box up to the margin."""
    margin = [min(MARGIN_M, 0.1 * s) for s in size]
    inner = (size[0] - 2 * margin[0], size[1] - 2 * margin[1], size[2] - margin[2])
    return _BUILDERS[cls](inner, attribute, rng)


def vary(colour: Colour, rng: Rng, spread: float = 14.0) -> Colour:
    """Return a colour near ``colour``: mostly lighter or darker, a little shifted in hue."""
    shift = rng.normal(0, spread) + rng.normal(0, 0.3 * spread, 3)
    r, g, b = (float(np.clip(c + d, 8, 248)) for c, d in zip(colour, shift, strict=True))
    return r, g, b


def _pick(colours: tuple[Colour, ...], rng: Rng) -> Colour:
    return vary(colours[int(rng.integers(len(colours)))], rng)


def _wheels(length: float, width: float, radius: float, at: tuple[float, ...]) -> list[Part]:
    # One part per axle, a finger wider than the body, so that only the discs of its sides stand out.
    return [Part(x * length, 0, 0, 2 * radius, radius, width / 2, (26, 26, 28), 8, Texture.WHEEL) for x in at]


def _car(size: Size, attribute: str, rng: Rng) -> list[Part]:
    del attribute
    length, width, height = size
    paint, shine = _pick(_CAR_PAINT, rng), float(rng.uniform(22, 62))
    kind = rng.choice(3, p=[0.5, 0.35, 0.15])
    # Sedan, estate / SUV, delivery van: where the cabin sits and how long it is.
    centre, half, belt = ((-0.05, 0.27, 0.55), (-0.10, 0.36, 0.54), (-0.07, 0.42, 0.5))[kind]
    body = Part(0, 0, 0.1 * height, belt * height, length / 2, width / 2 - 0.03, paint, shine, Texture.CAR_BODY)
    cabin = Part(
        centre * length, 0, belt * height, height, half * length, 0.43 * width, paint, 0.6 * shine, Texture.CABIN
    )
    return [body, cabin, *_wheels(length, width, 0.2 * height, (-0.3, 0.31))]


def _truck(size: Size, attribute: str, rng: Rng) -> list[Part]:
    del attribute
    length, width, height = size
    cab_share = float(rng.uniform(0.22, 0.3))
    cab_height = float(rng.uniform(0.72, 0.9)) * height
    paint, cargo = _pick(_CAR_PAINT, rng), _pick(_CARGO_PAINT, rng)
    cab_x, cargo_x = length * (0.5 - cab_share / 2), -length * (cab_share + 0.015) / 2
    cab = Part(cab_x, 0, 0.13 * height, cab_height, length * cab_share / 2, width / 2 - 0.05, paint, 45, Texture.CAB)
    box = Part(
        cargo_x, 0, 0.3 * height, height, length * (1 - cab_share - 0.03) / 2, width / 2, cargo, 52, Texture.CARGO
    )
    frame = Part(cargo_x, 0, 0.15 * height, 0.3 * height, length * 0.34, width * 0.38, (44, 44, 48), 20)
    return [cab, frame, box, *_wheels(length, width - 0.02, 0.155 * height, (-0.34, 0.36))]


def _bus(size: Size, attribute: str, rng: Rng) -> list[Part]:
    del attribute
    length, width, height = size
    paint = _pick(((196, 48, 40), (52, 120, 176), (228, 190, 60), (70, 150, 92)), rng)
    body = Part(0, 0, 0.09 * height, height, length / 2, width / 2 - 0.03, paint, 40, Texture.BUS)
    return [body, *_wheels(length, width, 0.13 * height, (-0.3, 0.33))]


def _trailer(size: Size, attribute: str, rng: Rng) -> list[Part]:
    del attribute
    length, width, height = size
    box = Part(0, 0, 0.28 * height, height, length / 2, width / 2, _pick(_CARGO_PAINT, rng), 55, Texture.CARGO)
    frame = Part(0, 0, 0.15 * height, 0.28 * height, length * 0.45, width * 0.35, (50, 50, 54), 20)
    return [frame, box, *_wheels(length, width - 0.02, 0.13 * height, (-0.4, -0.3, -0.2))]


def _construction_vehicle(size: Size, attribute: str, rng: Rng) -> list[Part]:
    del attribute
    length, width, height = size
    paint = vary((226, 166, 28), rng)
    dark = (48, 46, 42)
    tracks = [
        Part(-0.1 * length, side * width * 0.38, 0, 0.28 * height, 0.32 * length, 0.12 * width, dark, 18)
        for side in (-1, 1)
    ]
    body = Part(-0.2 * length, 0, 0.28 * height, 0.62 * height, 0.3 * length, 0.42 * width, paint, 60)
    cab = Part(
        -0.06 * length, 0.1 * width, 0.62 * height, height, 0.14 * length, 0.26 * width, paint, 40, Texture.CABIN
    )
    boom = Part(0.26 * length, 0, 0.45 * height, 0.62 * height, 0.2 * length, 0.08 * width, paint, 60)
    bucket = Part(0.42 * length, 0, 0.02 * height, 0.42 * height, 0.08 * length, 0.3 * width, dark, 35)
    return [*tracks, body, cab, boom, bucket]


def _person(
    x: float, foot: float, top: float, girth: Size, clothes: Colour, legs: Colour, rng: Rng, lean: float = 0.0
) -> list[Part]:
    """Return legs, torso and head between ``foot`` and ``top``; girth is (half length, half width, head radius)."""
    tall = top - foot
    half_length, half_width, head = girth
    leg = Part(x, 0, foot, foot + 0.47 * tall, 0.7 * half_length, 0.75 * half_width, legs, 12, Texture.CLOTH, True)
    torso = Part(
        x + lean,
        0,
        foot + 0.45 * tall,
        foot + 0.84 * tall,
        half_length * 0.8,
        half_width,
        clothes,
        14,
        Texture.CLOTH,
        True,
    )
    skin = _pick(_SKIN, rng)
    face = Part(x + 2 * lean, 0, foot + 0.84 * tall, foot + 0.95 * tall, head, head, skin, 20, round=True)
    hair = Part(x + 2 * lean, 0, foot + 0.95 * tall, top, head, head, vary((46, 36, 30), rng), 12, round=True)
    return [leg, torso, face, hair]


def _pedestrian(size: Size, attribute: str, rng: Rng) -> list[Part]:
    length, width, height = size
    clothes, legs = _pick(_CLOTHES, rng), vary((52, 54, 66), rng, 22)
    if attribute != "pedestrian.moving":
        return _person(0, 0, height, (length * 0.36, width / 2, 0.13), clothes, legs, rng)
    # A walker: two legs apart along the direction of travel.
    stride = length / 2 - 0.12
    body = _person(0, 0, height, (length * 0.42, width / 2, 0.13), clothes, legs, rng)[1:]
    apart = [
        Part(s * stride, s * 0.1 * width, 0, 0.47 * height, 0.12, 0.13, legs, 12, Texture.CLOTH, True) for s in (-1, 1)
    ]
    return [*apart, *body]


def _cycle_frame(length: float, top: float, half_width: float, colour: Colour, intensity: float) -> list[Part]:
    return [Part(0, 0, 0, top, length / 2, half_width, colour, intensity, Texture.BIKE, density=0.75)]


def _bicycle(size: Size, attribute: str, rng: Rng) -> list[Part]:
    length, width, height = size
    paint = _pick(_RIDER, rng)
    if attribute == "cycle.without_rider":
        bar = Part(0.24 * length, 0, 0.88 * height, height, 0.05, width / 2, (40, 40, 42), 110)
        return [*_cycle_frame(length, 0.88 * height, 0.05, paint, 120), bar]
    frame = _cycle_frame(length, 0.52 * height, 0.05, (44, 44, 48), 120)
    bar = Part(0.27 * length, 0, 0.52 * height, 0.58 * height, 0.05, width / 2, (40, 40, 42), 110)
    girth = (0.17, width * 0.36, 0.12)
    rider = _person(-0.08 * length, 0.16 * height, height, girth, paint, vary((44, 46, 56), rng), rng, lean=0.07)
    # Reflective clothing and the bare metal of the frame set a cyclist apart from a pedestrian in LiDAR intensity.
    shining = [replace(part, intensity=85.0) for part in rider[:2]]
    return [*frame, bar, *shining, *rider[2:]]


def _motorcycle(size: Size, attribute: str, rng: Rng) -> list[Part]:
    length, width, height = size
    paint, dark = _pick(_CAR_PAINT, rng), (36, 36, 40)
    ridden = attribute == "cycle.with_rider"
    seat = (0.55 if ridden else 0.75) * height
    wheels = [
        Part(s * 0.36 * length, 0, 0, 0.4 * seat * 2, 0.14 * length, 0.09, dark, 30, Texture.WHEEL) for s in (-1, 1)
    ]
    body = Part(0, 0, 0.3 * seat, seat, 0.3 * length, 0.17 * width, paint, 70)
    bar = Part(0.24 * length, 0, seat, seat + 0.2 * height, 0.06, width / 2, dark, 60)
    if not ridden:
        return [*wheels, body, bar]
    rider = _person(
        -0.1 * length, 0.3 * height, height, (0.2, 0.36 * width, 0.15), _pick(_CLOTHES, rng), dark, rng, 0.06
    )
    return [*wheels, body, bar, *rider]


def _traffic_cone(size: Size, attribute: str, rng: Rng) -> list[Part]:
    del attribute
    length, width, height = size
    orange, white = vary((236, 98, 30), rng), (236, 236, 230)
    base = Part(0, 0, 0, 0.05 * height, length / 2, width / 2, vary((60, 54, 52), rng), 30)
    rings = ((0.05, 0.3, orange, 70), (0.3, 0.48, white, 190), (0.48, 0.66, orange, 70), (0.66, 0.8, white, 190))
    cone = [
        Part(0, 0, a * height, b * height, length * (0.42 - 0.36 * a), width * (0.42 - 0.36 * a), colour, i, round=True)
        for a, b, colour, i in rings
    ]
    tip = Part(0, 0, 0.8 * height, height, length * 0.1, width * 0.1, orange, 70, round=True)
    return [base, *cone, tip]


def _barrier(size: Size, attribute: str, rng: Rng) -> list[Part]:
    del attribute
    length, width, height = size
    if rng.random() < 0.5:
        grey = vary((168, 166, 160), rng)
        foot = Part(0, 0, 0, 0.3 * height, length / 2, width / 2, grey, 34)
        return [foot, Part(0, 0, 0.3 * height, height, 0.28 * length, width / 2, grey, 34)]
    feet = [Part(0, s * 0.42 * width, 0, 0.3 * height, length / 2, 0.06, (60, 60, 62), 25) for s in (-1, 1)]
    board = Part(0, 0, 0.3 * height, height, 0.1, width / 2, (232, 232, 228), 95, Texture.STRIPES)
    return [*feet, board]


_BUILDERS: dict[ClassName, Callable[[Size, str, Rng], list[Part]]] = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "trailer": _trailer,
    "construction_vehicle": _construction_vehicle,
    "pedestrian": _pedestrian,
    "motorcycle": _motorcycle,
    "bicycle": _bicycle,
    "traffic_cone": _traffic_cone,
    "barrier": _barrier,
}
