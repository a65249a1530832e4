"""Frames as the methods see them: cameras and views from above, with what each found, missed and made up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bevkd.data.source import FrameSource, Sensor
from bevkd.errors import BevkdError
from bevkd.evaluation.ranges import Outcome
from bevkd.types import Boxes, Frame
from bevkd.viz.html.element import Content, Html, element
from bevkd.viz.html.page import Section, note, small
from bevkd.viz.html.pictures import Layer, camera_views, points_defs, top_view
from pipeline.reporting.detections import Detections, Judged
from pipeline.reporting.methods import Scene, Shown

SHOWN = 3
"""Most distilled methods whose boxes are drawn."""

_SENSORS: tuple[Literal["camera", "lidar"], ...] = ("camera", "lidar")


@dataclass(frozen=True)
class Pick:
    """A frame to show, and why.

    Attributes:
        index: its number among the frames of the evaluation.
    """

    index: int
    reason: str


def frames_section(scene: Scene, detections: Detections | str, count: int) -> Section:
    """Return ``count`` frames with the boxes of the best methods, or what is missing to draw them."""
    key, title = "frames", "Frames side by side"
    if isinstance(detections, str):
        return Section(key, "Frames", title, None, note(detections))
    if count == 0:
        return Section(key, "Frames", title, None, note("No frames were asked for. --frames N draws N of them."))
    methods = [(each, judged) for each in scene.few(SHOWN) if (judged := _first(each, detections))]
    picks = pick_frames(scene, detections, count)
    drawn = [_frame(pick, number, methods, detections) for number, pick in enumerate(picks, start=1)]
    first = methods[0][0]
    default = [each for each, _ in methods if each.role != "teacher"][:2]
    shown = [_switch("truth", "annotated", "c-truth", True)]
    shown += [_switch(each.layer, each.name, each.tone, each in default or each is first) for each, _ in methods]
    toggles = element("fieldset", element("legend", "Boxes of"), shown, class_="toggles")
    sure = ", ".join(f"{each.name} {judged.min_score:.2f}" for each, judged in methods)
    remarks = small(
        "Drawn are the detections of each method's first seed above the score at which it has its best F1 over all "
        f"frames ({sure}), within the range that was scored. On the cameras annotated objects are dashed."
    )
    return Section(
        key, "Frames", title, _how(picks), [toggles, _key(), remarks, element("div", drawn, class_="frames")]
    )


def pick_frames(scene: Scene, detections: Detections, count: int) -> list[Pick]:
    """Return frames where the best distilled student gains and loses most, and as many or more drawn by their token.

    A frame's measure is how many more objects the distilled student finds, less how many more false boxes it has, on
    average over seeds. Scenes are not repeated as long as there are others.
    """
    plain, distilled = ((*scene.of(role)[:1], None)[0] for role in ("plain", "distilled"))
    by_chance = sorted(
        range(len(detections.tokens)),
        key=lambda index: hashlib.sha256(detections.tokens[index].encode()).hexdigest(),
    )
    measures = (_measure(plain, detections), _measure(distilled, detections)) if plain and distilled else (None, None)
    before, after = measures
    picked: list[Pick] = []
    if before is not None and after is not None:
        gain = (after - before).tolist()
        for sign, share, word in ((1, max(1, count // 3), "gains"), (-1, count // 3 and max(1, count // 6), "loses")):
            ranked = sorted((index for index in by_chance if sign * gain[index] > 0), key=lambda i: -sign * gain[i])
            for index in _apart(ranked, picked, detections)[:share]:
                picked.append(Pick(index, f"where the distilled student {word} most"))
    chance = _apart(by_chance, picked, detections)
    picked += [Pick(index, "drawn by chance") for index in chance[: count - len(picked)]]
    return picked[:count]


def _apart(candidates: Sequence[int], picked: Sequence[Pick], detections: Detections) -> list[int]:
    """Return the candidates that are not picked, first one per scene that no pick is of, then the others."""
    scene_of = getattr(detections.source, "scene", lambda token: token)
    taken = {pick.index for pick in picked}
    seen = {scene_of(detections.tokens[index]) for index in taken}
    fresh, others = list[int](), list[int]()
    for index in candidates:
        scene = scene_of(detections.tokens[index])
        if index not in taken:
            (others if scene in seen else fresh).append(index)
            seen.add(scene)
    return [*fresh, *others]


def _measure(shown: Shown, detections: Detections) -> Tensor | None:
    """Return found objects less false boxes of each frame, mean over the seeds."""
    judged = [detections.judged[run.folder] for run in shown.runs if run.folder in detections.judged]
    if not judged:
        return None
    counts = [each.outcome.frame_counts(each.min_score) for each in judged]
    return torch.stack([each[:, 0] - each[:, 2] for each in counts]).double().mean(0)


def _first(shown: Shown, detections: Detections) -> Judged | None:
    return next((detections.judged[run.folder] for run in shown.runs if run.folder in detections.judged), None)


def _how(picks: Sequence[Pick]) -> str:
    reasons = [pick.reason for pick in picks]
    counted = [f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)]
    chance = (
        " The measure is objects found less false boxes, mean over seeds. Frames drawn by chance are the fair "
        "impression, the others show the extremes."
        if len(counted) > 1
        else ""
    )
    return f"{len(picks)} frames of the evaluation: {', '.join(counted)}.{chance}"


def _frame(pick: Pick, number: int, methods: Sequence[tuple[Shown, Judged]], detections: Detections) -> Html:
    token, source = detections.tokens[pick.index], detections.source
    truth = detections.truth[token]
    layers, scored = [], truth
    for shown, judged in methods:
        layer, scored = _layer(shown, judged, pick.index, truth, judged.boxes[token])
        layers.append(layer)
    words = [element("span", "token ", element("code", token))]
    if scene_of := getattr(source, "scene", None):
        words = [element("span", str(scene_of(token)), ", "), *words]
    content: list[Content] = [
        element("header", element("h3", f"{number}. {pick.reason[:1].upper()}{pick.reason[1:]}"), small(words)),
    ]
    frame = _load(source, token)
    points = None
    if isinstance(frame, str):
        content.append(note(frame))
    else:
        points = f"points-{number}" if frame.points is not None else None
        content.append(camera_views(frame, scored, layers, source.classes))
        content.append(points_defs(frame.points, detections.grid, points or ""))
    tops = [top_view(layer, scored, detections.grid, source.classes, points) for layer in layers]
    content.append(element("div", tops, class_="tops"))
    return element("article", content, class_="frame")


def _load(source: FrameSource, token: str) -> Frame | str:
    """Return the frame with the sensors whose files are there, or why there is none."""
    present = frozenset[Sensor](each for each in _SENSORS if not source.check([token], frozenset({each})))
    if not present:
        return "The sensor files of this frame are not where the data set says; set another place by data.root=FOLDER."
    try:
        return source.load(token, present)
    except (BevkdError, OSError) as error:
        return f"The sensor files of this frame cannot be read: {error}"


def _layer(shown: Shown, judged: Judged, index: int, truth: Boxes, boxes: Boxes) -> tuple[Layer, Boxes]:
    """Return what a method has in a frame, and the annotated objects that count."""
    kept, right, counted, missed = frame_outcome(judged.outcome, index, judged.min_score)
    return Layer(shown.name, shown.tone, boxes[kept], right, missed), truth[counted]


def frame_outcome(outcome: Outcome, index: int, min_score: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of a frame the detections that count and whether each is right, the objects and whether each is missed."""
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for each in outcome.classes:
        mine = (each.frame == index) & (each.scores >= min_score)
        theirs = each.truth_frame == index
        parts.append((each.row[mine], each.hit[mine], each.truth_row[theirs], ~each.found(min_score)[theirs]))
    rows, right, counted, missed = (torch.cat(column) for column in zip(*parts, strict=True))
    order, truth_order = rows.argsort(), counted.argsort()
    return rows[order], right[order], counted[truth_order], missed[truth_order]


def _switch(layer: str, name: str, tone: str, checked: bool) -> Html:
    box = element("input", type="checkbox", data_layer=layer, checked=checked)
    return element("label", box, element("span", class_="swatch"), name, class_=tone)


def _key() -> Html:
    """Return what the lines of the views from above mean."""
    entries = (
        ("truth", "found object"),
        ("missed", "missed object"),
        ("true", "detection"),
        ("false", "false detection"),
    )
    items = [
        element(
            "li",
            element(
                "svg",
                element("rect", x=2, y=3, width=20, height=10, class_=kind),
                viewBox="0 0 24 16",
                class_="key",
                aria_hidden="true",
            ),
            words,
        )
        for kind, words in entries
    ]
    return element("ul", items, class_="legend top-key")
