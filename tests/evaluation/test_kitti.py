"""KITTI's metrics against a reference that follows the benchmark object by object."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch

from bevkd.data.sources.kitti import Config, KittiSource, build
from bevkd.errors import ContractError
from bevkd.evaluation.kitti import DIFFICULTIES, Report, evaluate, load_detections, to_results
from bevkd.evaluation.score import metrics_of
from bevkd.types import Boxes
from tests.data import kitti_kit
from tests.data.kitti_kit import Line, label

CLASSES = ("Car", "Pedestrian", "Cyclist")
SIZES = {"Car": (1.5, 1.6, 4.0), "Van": (2.0, 1.9, 5.0), "Pedestrian": (1.8, 0.6, 0.8), "Cyclist": (1.7, 0.6, 1.8)}
SIZES |= {"Person_sitting": (1.3, 0.6, 0.8), "Truck": (3.0, 2.5, 8.0)}


# --- the reference: one object after another, as evaluate_object of the development kit ---


@dataclass
class Thing:
    """One line of a label or result file."""

    name: str
    truncated: float
    occluded: float
    alpha: float
    rectangle: list[float]
    size: list[float]
    location: list[float]
    rotation: float
    score: float

    @classmethod
    def parse(cls, line: str) -> Thing:
        name, *words = line.split()
        v = [float(word) for word in words] + [1.0] * (15 - len(words))
        return cls(name, v[0], v[1], v[2], v[3:7], v[7:10], v[10:13], v[13], v[14])

    @property
    def height_px(self) -> float:
        return self.rectangle[3] - self.rectangle[1]

    @property
    def ground(self) -> shapely.Polygon:
        """The footprint in the camera's (x, z) plane."""
        _, width, length = self.size
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        ends = [(length / 2, width / 2), (length / 2, -width / 2), (-length / 2, -width / 2), (-length / 2, width / 2)]
        x, _, z = self.location
        return shapely.Polygon([(x + a * cos + b * sin, z - a * sin + b * cos) for a, b in ends])


def image_overlap(a: Thing, b: Thing, of_a: bool = False) -> float:
    first, second = shapely.box(*a.rectangle), shapely.box(*b.rectangle)
    shared = first.intersection(second).area
    return float(shared / (first.area if of_a else first.union(second).area))


def ground_overlap(a: Thing, b: Thing) -> float:
    shared = a.ground.intersection(b.ground).area
    return float(shared / (a.ground.area + b.ground.area - shared))


def volume_overlap(a: Thing, b: Thing) -> float:
    high = max(a.location[1] - a.size[0], b.location[1] - b.size[0])  # y points down
    shared = a.ground.intersection(b.ground).area * max(0.0, min(a.location[1], b.location[1]) - high)
    return float(shared / (math.prod(a.size) + math.prod(b.size) - shared))


OVERLAPS: dict[str, Callable[[Thing, Thing], float]] = {
    "2D": image_overlap,
    "BEV": ground_overlap,
    "3D": volume_overlap,
}


@dataclass
class Scene:
    """One frame for one class and difficulty, prepared as the kit's cleanData does."""

    truth: list[Thing]
    found: list[Thing]
    ignored_truth: list[int]
    ignored_found: list[int]
    overlaps: list[list[float]]
    excused: list[bool]


def prepare(truth: list[Thing], found: list[Thing], overlaps: Any, name: str, level: int, metric: str) -> Scene:
    least = 0.7 if name == "Car" else 0.5
    neighbour = {"Car": "Van", "Pedestrian": "Person_sitting"}.get(name)
    ignored_truth = []
    for each in truth:
        too_hard = (
            each.occluded > (0, 1, 2)[level]
            or each.truncated > (0.15, 0.3, 0.5)[level]
            or each.height_px <= (40, 25, 25)[level]
        )
        if each.name == name and not too_hard:
            ignored_truth.append(0)
        else:
            ignored_truth.append(1 if each.name in (name, neighbour) else -1)
    ignored_found = []
    for each in found:
        if abs(each.height_px) < (40, 25, 25)[level]:
            ignored_found.append(1)
        else:
            ignored_found.append(0 if each.name == name else -1)
    regions = [each for each in truth if each.name == "DontCare"] if metric == "2D" else []
    excused = [any(image_overlap(each, region, of_a=True) > least for region in regions) for each in found]
    return Scene(truth, found, ignored_truth, ignored_found, overlaps, excused)


def match(scene: Scene, least: float, threshold: float | None) -> tuple[int, int, list[float], float]:
    """Return true positives, false positives, scores of true positives and similarity; no threshold, no false ones."""
    taken = [False] * len(scene.found)
    true, scores, similarity = 0, [], 0.0
    for i, truth in enumerate(scene.truth):
        if scene.ignored_truth[i] == -1:
            continue
        best, best_score, best_overlap, by_ignored = -1, -math.inf, 0.0, False
        for j, found in enumerate(scene.found):
            overlap = scene.overlaps[i][j]
            if overlap <= least or scene.ignored_found[j] == -1 or taken[j]:
                continue
            if threshold is None:
                if found.score > best_score:
                    best, best_score = j, found.score
            elif found.score >= threshold:
                if scene.ignored_found[j] == 0 and (overlap > best_overlap or by_ignored):
                    best, best_overlap, by_ignored = j, overlap, False
                elif scene.ignored_found[j] == 1 and best == -1:
                    best, by_ignored = j, True
        if best == -1:
            continue
        taken[best] = True
        if scene.ignored_truth[i] == 0 and scene.ignored_found[best] == 0:
            true += 1
            scores.append(scene.found[best].score)
            similarity += (1 + math.cos(truth.alpha - scene.found[best].alpha)) / 2
    false = 0
    for j, found in enumerate(scene.found):
        if threshold is not None and found.score >= threshold and scene.ignored_found[j] == 0:
            false += not taken[j] and not scene.excused[j]
    return true, false, scores, similarity


def reference(scenes: Sequence[Scene], least: float) -> tuple[float, float, float]:
    """Return AP at 40 positions and at 11, and AOS at 40."""
    objects = sum(state == 0 for scene in scenes for state in scene.ignored_truth)
    scores = sorted((score for scene in scenes for score in match(scene, least, None)[2]), reverse=True)
    thresholds, recall = [], 0.0
    for index, score in enumerate(scores):
        left = (index + 1) / objects
        right = (index + 2) / objects if index < len(scores) - 1 else left
        if right - recall < recall - left and index < len(scores) - 1:
            continue
        thresholds.append(score)
        recall += 1 / 40.0
    precision, similarity = [0.0] * 41, [0.0] * 41
    for position, threshold in enumerate(thresholds):
        counts = [match(scene, least, threshold) for scene in scenes]
        total = sum(true + false for true, false, _, _ in counts)
        precision[position] = sum(true for true, _, _, _ in counts) / total
        similarity[position] = sum(alike for _, _, _, alike in counts) / total
    best, best_alike = ([max(curve[position:]) for position in range(41)] for curve in (precision, similarity))
    return sum(best[1:]) / 40, sum(best[::4]) / 11, sum(best_alike[1:]) / 40


# --- random scenes ---


def random_frame(rng: np.random.Generator) -> tuple[list[Line], list[Line]]:
    """Return label and result lines: objects beside and on each other, found well, badly, twice or not at all."""
    truth: list[Line] = []
    found: list[Line] = []
    for _ in range(rng.integers(2, 11)):
        name = str(rng.choice(list(SIZES), p=[0.3, 0.1, 0.25, 0.2, 0.1, 0.05]))
        size = np.array(SIZES[name]) * rng.uniform(0.9, 1.1, 3)
        location = np.array([rng.uniform(-3, 3), 1.6, rng.uniform(8, 16)])
        rotation, alpha = rng.uniform(-3, 3, 2)
        corner = rng.uniform([300, 150], [340, 170])
        extent = rng.uniform([30, 20], [80, 60])
        truncated, occluded = round(rng.uniform(0, 0.6), 2) * (rng.random() < 0.4), int(rng.integers(0, 4))
        occluded *= int(rng.random() < 0.5)
        rectangle = np.concatenate([corner, corner + extent])
        truth.append((name, truncated, occluded, alpha, *rectangle, *size, *location, rotation))
        for _ in range(rng.integers(0, 3)):
            near = rng.choice([0.02, 0.1])
            called = name if rng.random() < 0.85 else str(rng.choice(CLASSES))
            moved = location + rng.normal(0, near, 3) * [1, 0.3, 1] * size[1]
            shifted = rectangle + rng.normal(0, 40 * near, 4)
            shifted[3] = max(shifted[3], shifted[1] + 5)
            grown = size * (1 + rng.normal(0, near / 2, 3))
            turned = [alpha + rng.normal(0, 1), *shifted, *grown, *moved, rotation + rng.normal(0, near)]
            found.append((called, -1, -1, *turned, round(rng.random(), 2)))
    for _ in range(rng.integers(0, 3)):
        corner = rng.uniform([250, 140], [380, 180])
        region = np.concatenate([corner, corner + rng.uniform(40, 90, 2)])
        truth.append(("DontCare", -1, -1, -10, *region, -1, -1, -1, -1000, -1000, -1000, -10))
        inside = np.concatenate([corner + 3, corner + rng.uniform(28, 60, 2)])
        name = str(rng.choice(CLASSES))
        found.append((name, -1, -1, 0, *inside, *SIZES[name], 20, 1.6, 30, 0.1, round(rng.random(), 2)))
    order = rng.permutation(len(found)).tolist()
    return truth, [found[index] for index in order]


def source_of(root: Path, frames: dict[str, list[Line]], **options: Any) -> KittiSource:
    return build(Config(root=kitti_kit.write(root, frames), split="trainval", **options))


def results(folder: Path, frames: dict[str, list[Line]]) -> Path:
    folder.mkdir()
    for token, lines in frames.items():
        (folder / f"{token}.txt").write_text(kitti_kit.text(lines))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Return the folder of 200 random frames with detections, and their metrics."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    frames = {f"{index:06d}": random_frame(rng) for index in range(200)}
    source = source_of(root, {token: truth for token, (truth, _) in frames.items()})
    folder = results(root / "found", {token: found for token, (_, found) in frames.items()})
    return root, evaluate(source, load_detections(folder, source))


@pytest.fixture(scope="module")
def things(scenes: tuple[Path, Report]) -> list[tuple[list[Thing], list[Thing]]]:
    root, _ = scenes

    def read(path: Path) -> list[Thing]:
        return [Thing.parse(line) for line in path.read_text().splitlines()]

    return [(read(path), read(root / "found" / path.name)) for path in sorted((root / "training/label_2").glob("*"))]


@pytest.mark.parametrize("metric", OVERLAPS)
def test_ap_equals_the_reference_on_200_random_scenes(
    scenes: tuple[Path, Report], things: list[tuple[list[Thing], list[Thing]]], metric: str
) -> None:
    _, report = scenes
    overlaps = [
        [[OVERLAPS[metric](a, b) if a.name != "DontCare" else 0.0 for b in found] for a in truth]
        for truth, found in things
    ]
    seen = set()
    for name in CLASSES:
        for level, difficulty in enumerate(DIFFICULTIES):
            prepared = [
                prepare(truth, found, overlap, name, level, metric)
                for (truth, found), overlap in zip(things, overlaps, strict=True)
            ]
            r40, r11, aos = reference(prepared, 0.7 if name == "Car" else 0.5)
            where = f"{name} {difficulty}"
            assert report.ap[name][metric][level] == pytest.approx(r40, abs=1e-12), where
            assert report.ap_r11[name][metric][level] == pytest.approx(r11, abs=1e-12), where
            if metric == "2D":
                assert report.ap[name]["AOS"][level] == pytest.approx(aos, abs=1e-12), where
            assert report.objects[name][level] == sum(each.ignored_truth.count(0) for each in prepared) > 41
            seen.add(r40)
    assert len(seen) == 9  # so that equality says something
    assert 0.01 < min(seen) < max(seen) < 0.9


# --- what the rules mean ---


def many(count: int = 60, **changes: Any) -> dict[str, list[Line]]:
    """Return frames with one car each, all of which count at every difficulty."""
    return {f"{index:06d}": [label(location=(2.0, 1.6, 10 + index / 4), **changes)] for index in range(count)}


def scored(lines: dict[str, list[Line]]) -> dict[str, list[Line]]:
    """Return labels as results of falling scores."""
    return {
        token: [(*line, 0.9 - index / 1000) for line in group if line[0] != "DontCare"]
        for index, (token, group) in enumerate(lines.items())
    }


def report_of(tmp_path: Path, truth: dict[str, list[Line]], found: dict[str, list[Line]], **options: Any) -> Report:
    source = source_of(tmp_path / "kitti", truth)
    return evaluate(source, load_detections(results(tmp_path / "found", found), source), **options)


def test_perfect_detections_score_100_percent(tmp_path: Path) -> None:
    names = ("Car", "Pedestrian", "Cyclist")
    truth = {
        f"{k:06d}": [label(name, (4.0 * n - 4, 1.6, 20.0), size=SIZES[name]) for n, name in enumerate(names)]
        for k in range(45)
    }
    source = source_of(tmp_path, truth)
    report = evaluate(source, {token: source.annotations(token) for token in source.tokens})
    assert all(report.ap[name][metric] == (1, 1, 1) for name in names for metric in ("3D", "BEV"))
    assert report.headline == {f"{name} 3D moderate": 1 for name in names}
    assert report.objects["Car"] == (45, 45, 45)


def test_each_object_that_counts_reaches_one_recall_position(tmp_path: Path) -> None:
    truth = many(11)
    assert report_of(tmp_path, truth, scored(truth)).ap["Car"]["3D"] == pytest.approx((10 / 40,) * 3)


def test_what_is_not_found_costs_recall_and_what_is_not_there_costs_precision(tmp_path: Path) -> None:
    truth = many(80)
    found = scored(truth)
    halved = {token: lines if index % 2 else [] for index, (token, lines) in enumerate(found.items())}
    assert report_of(tmp_path / "a", truth, halved).ap["Car"]["3D"][1] == pytest.approx(0.5, abs=0.03)
    wrong = (*label(location=(-8.0, 1.6, 30.0)), 0.99)
    crowded = {token: [*lines, wrong] for token, lines in found.items()}
    assert report_of(tmp_path / "b", truth, crowded).ap["Car"]["3D"][1] == pytest.approx(0.5, abs=0.03)


def test_vans_are_neither_cars_nor_false_alarms(tmp_path: Path) -> None:
    truth = many()
    found = scored(truth)
    vans = {token: [*lines, label("Van", (-8.0, 1.6, 30.0))] for token, lines in truth.items()}
    trucks = {token: [*lines, label("Truck", (-8.0, 1.6, 30.0))] for token, lines in truth.items()}
    more = {token: [*lines, (*label(location=(-8.0, 1.6, 30.0)), 0.95)] for token, lines in found.items()}
    assert report_of(tmp_path / "vans", vans, more).ap["Car"]["3D"][1] == 1
    assert report_of(tmp_path / "trucks", trucks, more).ap["Car"]["3D"][1] < 0.6


def test_regions_of_dont_care_excuse_detections_in_the_image_only(tmp_path: Path) -> None:
    region: Line = ("DontCare", -1, -1, -10, 100, 100, 300, 300, -1, -1, -1, -1000, -1000, -1000, -10)
    truth = {token: [*lines, region] for token, lines in many().items()}
    wrong = (*label(location=(-8.0, 1.6, 30.0), rectangle=(150, 150, 250, 250)), 0.95)
    found = {token: [*lines, wrong] for token, lines in scored(truth).items()}
    report = report_of(tmp_path, truth, found)
    assert report.ap["Car"]["2D"][1] == 1
    assert report.ap["Car"]["3D"][1] < 0.6


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({}, (60, 60, 60)),
        ({"rectangle": (600.0, 150.0, 700.0, 190.0)}, (0, 60, 60)),  # 40 px are not enough
        ({"rectangle": (600.0, 150.0, 700.0, 175.0)}, (0, 0, 0)),
        ({"occluded": 1}, (0, 60, 60)),
        ({"occluded": 3}, (0, 0, 0)),
        ({"truncated": 0.15}, (60, 60, 60)),
        ({"truncated": 0.16}, (0, 60, 60)),
        ({"truncated": 0.5}, (0, 0, 60)),
    ],
)
def test_difficulty_depends_on_height_occlusion_and_truncation(
    tmp_path: Path, changes: dict[str, Any], counted: tuple[int, ...]
) -> None:
    truth = many(**changes)
    report = report_of(tmp_path, truth, scored(truth))
    assert report.objects["Car"] == counted
    assert [math.isnan(ap) for ap in report.ap["Car"]["3D"]] == [count == 0 for count in counted]


def test_a_detection_turned_around_matches_but_its_orientation_is_wrong(tmp_path: Path) -> None:
    truth = many()
    turned = {
        token: [(*line[:3], float(line[3]) + math.pi, *line[4:14], float(line[14]) + math.pi, line[15])]
        for token, (line,) in scored(truth).items()
    }
    report = report_of(tmp_path, truth, turned)
    assert report.ap["Car"]["2D"] == report.ap["Car"]["3D"] == (1, 1, 1)
    assert report.ap["Car"]["AOS"] == pytest.approx((0, 0, 0), abs=1e-12)


def test_a_distance_leaves_out_what_is_farther_on_both_sides(tmp_path: Path) -> None:
    truth = many()
    found = {token: [] if float(truth[token][0][13]) > 20 else lines for token, lines in scored(truth).items()}
    report = report_of(tmp_path, truth, found, max_distance_m=20.2)
    assert report.objects["Car"] == (41, 41, 41)
    assert report.ap["Car"]["3D"] == (1, 1, 1)


# --- frames, files, refusals ---


def test_a_run_keeps_its_detections_as_result_files_that_score_the_same(tmp_path: Path) -> None:
    source = source_of(tmp_path / "kitti", many())
    found = {token: source.annotations(token) for token in source.tokens}
    (tmp_path / "detections").mkdir()
    (tmp_path / "detections" / "999999.txt").write_text("of an earlier run")
    folder = metrics_of(source).save_detections(tmp_path / "detections", source, found)
    assert sorted(path.stem for path in folder.iterdir()) == list(source.tokens)
    again = load_detections(folder, source)
    assert evaluate(source, again).to_json() == evaluate(source, found).to_json()
    words = (folder / "000000.txt").read_text().split()
    assert words[0] == "Car"
    assert [float(word) for word in words[8:15]] == pytest.approx([1.5, 1.6, 4.0, 2.0, 1.6, 10.0, 0.3], abs=1e-4)
    assert float(words[15]) == 1


def test_result_files_become_the_boxes_that_they_were_made_of(tmp_path: Path) -> None:
    source = source_of(tmp_path / "kitti", many(5))
    found = {token: source.annotations(token) for token in source.tokens}
    metrics = metrics_of(source)
    folder = metrics.save_detections(tmp_path / "detections", source, found)
    back = metrics.to_boxes(source, metrics.load_detections(folder, source), source.tokens)
    for token, boxes in found.items():
        assert torch.allclose(back[token].values[:, :7], boxes.values[:, :7], atol=1e-3)
        assert torch.equal(back[token].labels, boxes.labels)


def test_boxes_outside_the_image_are_no_results(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"000000": [label()]})
    (box,) = source.annotations("000000").values
    behind, beside = box.clone(), box.clone()
    behind[0] = -20
    beside[1] = 60
    boxes = Boxes(torch.stack([box, behind, beside]), torch.zeros(3, dtype=torch.int64), torch.ones(3))
    assert len(to_results(source, {"000000": boxes})["000000"]) == 1


def test_chosen_frames_alone_are_scored(tmp_path: Path) -> None:
    source = source_of(tmp_path, many(50))
    found = {token: source.annotations(token) for token in source.tokens[:45]}
    report = evaluate(source, found, tokens=source.tokens[:45])
    assert (report.frames, report.objects["Car"][0], report.ap["Car"]["BEV"][0]) == (45, 45, 1)
    with pytest.raises(ContractError, match="5 of 50 frames have no entry, first 000045"):
        evaluate(source, found)
    with pytest.raises(ContractError, match=r"1 tokens are not in split 'trainval', first 7"):
        evaluate(source, {**found, "7": Boxes.empty()}, tokens=source.tokens[:45])


def test_the_report_is_json_and_a_table(tmp_path: Path) -> None:
    truth = many()
    report = report_of(tmp_path, truth, scored(truth))
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert values["ap_r40"]["Car"]["3D"] == {"easy": 1, "moderate": 1, "hard": 1}
    assert values["ap_r11"]["Pedestrian"]["AOS"]["hard"] is None
    assert report.headline == {"Car 3D moderate": 1}
    assert report.table().row_count == 9


def test_boxes_that_cannot_be_scored_are_refused_with_their_frames(tmp_path: Path) -> None:
    source = source_of(tmp_path, many(3))
    good = source.annotations("000000")
    flat, foreign, broken = (Boxes(good.values.clone(), good.labels.clone(), good.scores.clone()) for _ in range(3))
    flat.values[0, 3] = 0
    foreign.labels[0] = 3
    broken.values[0, 6] = math.nan
    with pytest.raises(ContractError) as caught:
        evaluate(source, {"000000": flat, "000001": foreign, "000002": broken})
    for fault in (
        "000000: 1 of 1 boxes have a size",
        "000001: 1 of 1 boxes have a label",
        "000002: 1 of 1 boxes have val",
    ):
        assert fault in str(caught.value)


def test_every_fault_of_a_result_folder_is_reported_at_once(tmp_path: Path) -> None:
    truth = many(4)
    source = source_of(tmp_path / "kitti", truth)
    found = scored(truth)
    (line,) = found["000001"]
    found["000001"] = [line, line[:-1]]
    found["000002"] = [("Bus", *line[1:])]
    del found["000003"]
    with pytest.raises(ContractError) as caught:
        load_detections(results(tmp_path / "found", found), source)
    for fault in (
        "1 of 4 frames have no file, first 000003.txt",
        "000001.txt, line 2 is no result (class, 14 numbers, score): 14 numbers after the class, not 15",
        "000002.txt: no class of KITTI: Bus",
    ):
        assert fault in str(caught.value)
    with pytest.raises(ContractError, match="is no folder"):
        load_detections(tmp_path / "nowhere", source)


def test_nothing_found_scores_nothing_and_nothing_to_find_scores_no_number(tmp_path: Path) -> None:
    source = source_of(tmp_path, many(3))
    nothing = evaluate(source, dict.fromkeys(source.tokens, Boxes.empty()))
    assert nothing.ap["Car"] == dict.fromkeys(nothing.ap["Car"], (0, 0, 0))
    empty = source_of(tmp_path / "empty", {"000000": []})
    for found in (Boxes.empty(), source.annotations("000000")):
        report = evaluate(empty, {"000000": found})
        assert report.headline == {}
        assert all(math.isnan(ap) for scores in report.ap["Car"].values() for ap in scores)
