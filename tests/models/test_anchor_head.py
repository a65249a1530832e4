from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from bevkd.errors import ConfigError
from bevkd.geometry.iou import bev_iou_matrix
from bevkd.grid import BEVGrid
from bevkd.models.heads._anchors import (
    IGNORED,
    NEGATIVE,
    POSITIVE,
    assign,
    decode_anchors,
    direction_of,
    encode_anchors,
    nearest_overlap,
    turned_to,
)
from bevkd.models.heads.anchor import AnchorHead, AnchorOutput, Config, build, code_loss, sigmoid_focal_loss
from bevkd.models.heads.center import decode_boxes
from bevkd.types import Boxes
from tests.geometry.strategies import random_boxes, seeds

GRID = BEVGrid(x_m=(0, 24), y_m=(-9.6, 9.6), z_m=(-3, 1), cell_m=0.8)
ROWS, COLUMNS = GRID.shape
CLASSES = ("Car", "Pedestrian")
CONFIG = {
    "anchors": {
        "Car": {"size_m": [3.9, 1.6, 1.56], "bottom_m": -1.78, "matched": 0.6, "unmatched": 0.45},
        "Pedestrian": {"size_m": [0.8, 0.6, 1.73], "bottom_m": -0.6, "matched": 0.5, "unmatched": 0.35},
    }
}
CAR, WALKER = (3.9, 1.6, 1.56), (0.8, 0.6, 1.73)


def head(in_channels: int = 4, **changes: Any) -> AnchorHead:
    torch.manual_seed(0)
    return build(Config.model_validate({**CONFIG, **changes}), in_channels, GRID, CLASSES)


def frame(*rows: tuple[str, float, float, float]) -> Boxes:
    """Return boxes of (class, x, y, yaw), of the size of their anchors."""
    sizes = {"Car": CAR, "Pedestrian": WALKER}
    values = [[x, y, -1.0, *sizes[name], yaw, math.nan, math.nan] for name, x, y, yaw in rows]
    labels = torch.tensor([CLASSES.index(name) for name, *_ in rows]).long()
    return Boxes(torch.tensor(values).reshape(-1, 9), labels, torch.ones(len(rows)))


def crowd(generator: torch.Generator, count: int) -> Boxes:
    """Return random boxes of both classes, near each other."""
    boxes = random_boxes(count, generator, reach_m=9).values
    boxes[:, 0] += 12
    labels = torch.randint(0, 2, (count,), generator=generator)
    boxes[:, 3:6] = torch.tensor([CAR, WALKER])[labels] * (0.8 + 0.4 * torch.rand(count, 3, generator=generator))
    return Boxes(boxes, labels, torch.ones(count))


def maps(model: AnchorHead, batch: int = 2, seed: int = 0, scale: float = 1.0) -> AnchorOutput:
    """Return random maps that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    count = len(model.anchor_shape)

    def random(values: int) -> Tensor:
        return (scale * torch.randn(batch, count, values, ROWS, COLUMNS, generator=generator)).requires_grad_()

    return AnchorOutput(random(2), random(7), random(2), model.anchors, GRID, model.config.direction_offset_rad)


# --- code and headings ---


@given(seeds())
def test_a_box_survives_its_code(generator: torch.Generator) -> None:
    boxes, anchors = (random_boxes(50, generator).values[:, :7] for _ in range(2))
    torch.testing.assert_close(decode_anchors(encode_anchors(boxes, anchors), anchors), boxes, atol=1e-4, rtol=1e-4)


def test_the_code_is_that_of_second() -> None:
    box, anchor = (
        torch.tensor([[3.0, 1.0, 2.0, 4.0, 2.0, 1.0, 0.5]]),
        torch.tensor([[0.0, 0.0, 1.0, 4.0, 3.0, 2.0, 1.57]]),
    )
    expected = [3 / 5, 1 / 5, 1 / 2, 0.0, math.log(2 / 3), math.log(1 / 2), 0.5 - 1.57]
    assert encode_anchors(box, anchor)[0].tolist() == pytest.approx(expected)


@given(st.floats(-9, 9), st.floats(-1.5, 1.5))
def test_a_heading_known_up_to_half_a_turn_is_completed_by_its_direction(yaw: float, offset: float) -> None:
    assume(1e-6 < (yaw - offset) % math.pi < math.pi - 1e-6)  # on the border either half turn is right
    truth = torch.tensor([yaw], dtype=torch.float64)
    for turns in (-1, 0, 1):
        found = turned_to(truth + turns * math.pi, direction_of(truth, offset), offset)
        assert math.cos(float(found - truth)) == pytest.approx(1, abs=1e-9)


def test_an_untrained_size_decodes_to_a_finite_box() -> None:
    assert decode_anchors(torch.full((1, 7), 1e4), torch.ones(1, 7))[0, 3:6].max() < 150


# --- assignment ---


def slow_overlap(box: list[float], anchor: list[float]) -> float:
    """Return the IoU of two boxes after each is turned to its nearest axis."""

    def rectangle(x: float, y: float, length: float, width: float, yaw: float) -> tuple[float, float, float, float]:
        if abs(math.cos(yaw)) < abs(math.sin(yaw)):
            length, width = width, length
        return x - length / 2, y - width / 2, x + length / 2, y + width / 2

    a, b = (rectangle(each[0], each[1], each[3], each[4], each[6]) for each in (box, anchor))
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_anchors_stand_from_edge_to_edge_class_by_class_and_rotation_by_rotation() -> None:
    anchors = head().anchors
    assert anchors.x[[0, -1]].tolist() == [0, 24]
    assert anchors.y[[0, -1]].tolist() == pytest.approx([-9.6, 9.6])
    assert anchors.shape[:, 4].tolist() == pytest.approx([0, 1.57, 0, 1.57])
    assert anchors.shape[:, 0].tolist() == pytest.approx([-1.0, -1.0, 0.265, 0.265])
    index = torch.tensor([2]), torch.tensor([3]), torch.tensor([5])
    assert anchors.at(*index)[0].tolist() == pytest.approx(
        [anchors.x[5].item(), anchors.y[3].item(), 0.265, *WALKER, 0]
    )


@pytest.mark.parametrize("seed", range(3))
def test_targets_equal_assignment_anchor_by_anchor(seed: int) -> None:
    model, generator = head(), torch.Generator().manual_seed(seed)
    frames = [crowd(generator, 5), Boxes.empty(), crowd(generator, 3)]
    targets = model.targets(frames)
    every = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)
    states = torch.full((3, 4, ROWS, COLUMNS), NEGATIVE)
    expected = {}
    for b, boxes in enumerate(frames):
        for label, name in enumerate(CLASSES):
            inside = [
                each
                for each in boxes[boxes.labels == label].values[:, :7].tolist()
                if 0 <= each[0] < 24 and abs(each[1]) < 9.6
            ]
            if not inside:
                continue
            config = model.config.anchors[name]
            places = [(a, i, j) for a in (2 * label, 2 * label + 1) for i in range(ROWS) for j in range(COLUMNS)]
            flat = torch.stack([model.anchors.at(torch.tensor(a), *every) for a in (2 * label, 2 * label + 1)]).reshape(
                -1, 7
            )
            table = [[slow_overlap(box, anchor) for box in inside] for anchor in flat.tolist()]
            highest = [max(row[g] for row in table) for g in range(len(inside))]
            for place, anchor, row in zip(places, flat, table, strict=True):
                best = max(row)
                forced = any(0 < highest[g] <= row[g] + 1e-7 for g in range(len(inside)))
                state = (
                    POSITIVE if best >= config.matched or forced else IGNORED if best >= config.unmatched else NEGATIVE
                )
                states[(b, *place)] = state
                if state == POSITIVE:
                    expected[(b, *place)] = encode_anchors(torch.tensor(inside[row.index(best)]), anchor)
    assert torch.equal(targets.states, states)
    assert {tuple(place) for place in targets.places.tolist()} == set(expected)
    for place, code in zip(targets.places.tolist(), targets.codes, strict=True):
        torch.testing.assert_close(code, expected[tuple(place)], atol=1e-4, rtol=1e-4)


def test_the_best_anchor_of_every_box_is_positive_however_little_it_overlaps() -> None:
    tiny = frame(("Car", 12.3, 0.2, 0.0))
    tiny.values[:, 3:5] = 0.3
    targets = head().targets([tiny])
    assert len(targets.places) >= 1
    assert nearest_overlap(tiny.values[:, :7], head().anchors)[:, :2].max() < 0.1


def test_every_anchor_of_a_frame_without_boxes_is_negative() -> None:
    state, _ = assign(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), 2, 0.6, 0.45)
    assert (state == NEGATIVE).all()
    assert state.shape == (2, 6)


def test_boxes_of_mixed_frames_stay_in_their_frames() -> None:
    overlap = torch.tensor([[0.9, 0.0, 0.5], [0.0, 0.7, 0.0], [0.0, 0.1, 0.2]])
    state, box = assign(overlap, torch.tensor([1, 0, 1]), 2, 0.6, 0.45)
    # The last box has no better anchor than the third, which itself overlaps the first box more.
    assert state.tolist() == [[NEGATIVE, POSITIVE, NEGATIVE], [POSITIVE, NEGATIVE, POSITIVE]]
    assert box[0, 1] == 1
    assert box[1, [0, 2]].tolist() == [0, 0]


# --- losses ---


def test_losses_equal_their_formulas() -> None:
    logits, truth = torch.tensor([0.3, -2.0, 1.5]), torch.tensor([1.0, 0.0, 0.0])
    p = logits.sigmoid()
    expected = [-0.25 * (1 - p[0]) ** 2 * p[0].log(), *(-0.75 * p[1:] ** 2 * (1 - p[1:]).log())]
    torch.testing.assert_close(sigmoid_focal_loss(logits, truth), torch.stack([torch.as_tensor(e) for e in expected]))

    predicted = torch.tensor([[0.05, 0, 0, 0, 0, -1.0, 0.5 + math.pi]])
    codes = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0.4]])
    small = math.sin(0.1 + math.pi)
    expected_box = 0.5 * 9 * 0.05**2 + (1.0 - 0.5 / 9) + 0.5 * 9 * small**2
    assert code_loss(predicted, codes).item() == pytest.approx(expected_box, rel=1e-4)


def test_the_loss_of_a_batch_is_the_mean_of_that_of_its_labelled_frames() -> None:
    model = head()
    frames = [frame(("Car", 10, 2, 0.1), ("Pedestrian", 5, 1, 1.2)), frame(("Car", 15, -3, 2.0)), Boxes.empty()]
    output = maps(model, 3)

    def alone(index: int) -> AnchorOutput:
        parts = (part[index : index + 1] for part in (output.logits, output.codes, output.directions))
        return AnchorOutput(*parts, model.anchors, GRID, output.direction_offset_rad)

    every = torch.ones(3, dtype=torch.bool)
    whole = model.loss(output, model.targets(frames), every)
    single = [model.loss(alone(k), model.targets([frames[k]]), every[:1]) for k in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in single]).mean())
    two = model.loss(output, model.targets(frames), torch.tensor([True, False, True]))
    for name, value in two.items():
        torch.testing.assert_close(value, (single[0][name] + single[2][name]) / 2)
    assert single[2]["box"] == single[2]["direction"] == 0 < single[2]["class"]


def test_gradients_reach_positive_anchors_only_but_classes_everywhere_else() -> None:
    model = head()
    output, frames = maps(model), [frame(("Car", 10, 2, 0.1)), frame(("Car", 12, 0, 1.5))]
    targets = model.targets(frames)
    sum(model.loss(output, targets, torch.tensor([True, False])).values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
    grads = output.logits.grad, output.codes.grad, output.directions.grad
    assert all(grad is not None and not grad[1].any() for grad in grads)
    classes, codes, directions = (grad[0] for grad in grads if grad is not None)
    positive = targets.states[0] == POSITIVE
    assert torch.equal(codes.abs().sum(1) > 0, positive)
    assert torch.equal(directions.abs().sum(1) > 0, positive)
    assert torch.equal(classes.abs().amin(1) > 0, targets.states[0] != IGNORED)
    assert (targets.states[0] == IGNORED).any()


# --- decoding ---


def oracle(model: AnchorHead, frames: list[Boxes]) -> AnchorOutput:
    """Return the maps of a head that has learned its targets."""
    targets = model.targets(frames)
    b, a, i, j = targets.places.T
    logits = torch.full((len(frames), 4, 2, ROWS, COLUMNS), -20.0)
    codes, turns = torch.zeros(len(frames), 4, 7, ROWS, COLUMNS), torch.zeros(len(frames), 4, 2, ROWS, COLUMNS)
    logits[b, a, a // 2, i, j] = 20.0
    codes[b, a, :, i, j] = targets.codes
    turns[b, a, targets.directions, i, j] = 9.0
    return AnchorOutput(logits, codes, turns, model.anchors, GRID, model.config.direction_offset_rad)


def test_decoding_the_targets_returns_the_annotated_boxes() -> None:
    frames = [frame(("Car", 10, 2, 2.9), ("Pedestrian", 5, 1, -1.2), ("Car", 20, -4, -0.4)), Boxes.empty()]
    found, nothing = head().decode(oracle(head(), frames))
    assert len(nothing) == 0
    truth = frames[0]
    found, truth = found[found.center[:, 0].argsort()], truth[truth.center[:, 0].argsort()]
    assert found.labels.tolist() == truth.labels.tolist()
    torch.testing.assert_close(found.values[:, :6], truth.values[:, :6], atol=1e-4, rtol=0)
    torch.testing.assert_close((found.yaw - truth.yaw).cos(), torch.ones(3), atol=1e-6, rtol=0)
    assert found.velocity.isnan().all()


@pytest.mark.parametrize("seed", range(2))
def test_decoding_equals_suppression_one_by_one(seed: int) -> None:
    model = head(max_boxes=25, candidates=300, score_threshold=0.8)
    output = maps(model, 1, seed)
    (found,) = model.decode(output)
    ranked = []
    probability = output.logits[0].detach().sigmoid()
    for a, i, j in itertools.product(range(4), range(ROWS), range(COLUMNS)):
        score, label = max((float(probability[a, k, i, j]), k) for k in range(2))
        if score > 0.8:
            ranked.append((score, label, a, i, j))
    assert len(ranked) > 300
    ranked = sorted(ranked, reverse=True)[:300]
    boxes = []
    for _, _, a, i, j in ranked:
        anchor = torch.tensor([model.anchors.x[j], model.anchors.y[i], *model.anchors.shape[a]])
        box = decode_anchors(output.codes[0, a, :, i, j].detach(), anchor)
        yaw, direction = float(box[6]) - 0.78539, int(output.directions[0, a, :, i, j].argmax())
        yaw = yaw - math.floor(yaw / math.pi) * math.pi + 0.78539 + math.pi * direction
        box[6] = math.remainder(yaw, 2 * math.pi)
        boxes.append(box)
    clash = bev_iou_matrix(torch.stack(boxes), torch.stack(boxes)) > 0.01
    kept: list[int] = []
    for index in range(300):
        if not clash[index, kept].any():
            kept.append(index)
    kept = kept[:25]
    assert len(found) == len(kept) == 25
    assert found.labels.tolist() == [ranked[index][1] for index in kept]
    torch.testing.assert_close(found.scores, torch.tensor([ranked[index][0] for index in kept]))
    expected = torch.stack([boxes[index] for index in kept])
    torch.testing.assert_close(found.values[:, :7], expected, atol=1e-4, rtol=1e-4)


def test_the_best_anchors_say_the_same_as_box_code() -> None:
    output = maps(head(), 2, seed=3, scale=0.5)
    heatmap, box_code = output.heatmap, output.box_code
    assert heatmap.shape == (2, 2, ROWS, COLUMNS)
    assert box_code.shape == (2, 2, 10, ROWS, COLUMNS)
    assert output.box_code is box_code  # computed once
    for b, k, i, j in [(0, 0, 3, 5), (1, 1, 20, 0), (0, 1, 0, 29), (1, 0, ROWS - 1, COLUMNS - 1)]:
        own = output.logits[b, 2 * k : 2 * k + 2, k, i, j]
        a = 2 * k + int(own.argmax())
        assert heatmap[b, k, i, j] == own.max()
        expected = decode_anchors(
            output.codes[b, a, :, i, j], head().anchors.at(torch.tensor(a), torch.tensor(i), torch.tensor(j))
        )
        ours = decode_boxes(box_code[b, k, :, i, j][None], torch.tensor([[i, j]]), GRID)[0]
        torch.testing.assert_close(ours[:6], expected[:6], atol=1e-4, rtol=1e-4)
        direction = output.directions[b, a, :, i, j].argmax()
        assert torch.cos(ours[6] - turned_to(expected[6], direction, 0.78539)).item() == pytest.approx(1, abs=1e-5)
        assert ours[7:].tolist() == [0, 0]


def test_a_student_with_anchors_learns_from_cached_maps() -> None:
    output = maps(head(), 1)
    (output.heatmap.sum() + output.box_code.sum()).backward()  # type: ignore[no-untyped-call]
    assert output.logits.grad is not None
    assert output.codes.grad is not None
    assert (output.codes.grad != 0).any(dim=2).sum() == 2 * ROWS * COLUMNS  # one of each class's two anchors
    assert output.directions.grad is None


def test_a_small_map_is_learned_by_heart() -> None:
    model = head(in_channels=48)
    features = torch.randn(1, 48, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 2
    boxes = frame(("Car", 10, 2, 2.9), ("Pedestrian", 5, 1, -1.2), ("Car", 20, -4, -0.4))
    targets, labelled = model.targets([boxes]), torch.tensor([True])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 if step < 250 else 0.002
        optimizer.zero_grad()
        total = sum(model.loss(model(features), targets, labelled).values(), torch.zeros(()))
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert total.item() < 0.05
    (found,) = model.decode(model(features))
    best = found[:3][found[:3].center[:, 0].argsort()]
    truth = boxes[boxes.center[:, 0].argsort()]
    assert best.labels.tolist() == truth.labels.tolist()
    assert (best.center - truth.center).abs().max() < 0.3
    assert (best.yaw - truth.yaw).cos().min() > 0.97


# --- names and config ---


def test_weights_have_the_shapes_of_the_public_kitti_models() -> None:
    three = dict.fromkeys(("Car", "Pedestrian", "Cyclist"), CONFIG["anchors"]["Car"])
    model = build(Config.model_validate({"anchors": three}), 512, GRID, tuple(three))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        "cls.weight": (18, 512, 1, 1),
        "cls.bias": (18,),
        "box.weight": (42, 512, 1, 1),
        "box.bias": (42,),
        "direction.weight": (12, 512, 1, 1),
        "direction.bias": (12,),
    }
    assert model.labels_of_task == ((0,), (1,), (2,))
    assert model.config.scaled(0.5) is model.config


def test_classes_without_anchors_and_anchors_without_class_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Config.model_validate(CONFIG), 4, GRID, ("Car", "Tram"))
    assert "'Tram' has no anchors" in str(caught.value)
    assert "'Pedestrian' is no class" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"unmatched": 0.7}, "must not be above matched"), ({"size_m": [1, 0, 1]}, "size_m must be positive")],
)
def test_impossible_anchors_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"anchors": {"Car": {**CONFIG["anchors"]["Car"], **change}}})
