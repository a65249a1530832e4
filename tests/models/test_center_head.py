from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bevkd.config import parse
from bevkd.errors import ConfigError
from bevkd.geometry.gaussian import draw_gaussians
from bevkd.grid import BEVGrid
from bevkd.models.heads.center import (
    CenterHead,
    CenterTargets,
    Config,
    HeadOutput,
    box_code_loss,
    build,
    decode_boxes,
    encode_boxes,
    gather_codes,
    gaussian_focal_loss,
)
from bevkd.registry import load
from bevkd.types import Boxes
from tests.golden import T

GRID = BEVGrid(x_m=(-12, 12), y_m=(-9, 9), cell_m=0.6)
ROWS, COLUMNS = GRID.shape
CLASSES = ("car", "truck", "bus", "pedestrian")
TASKS = (("pedestrian",), ("bus", "car"), ("truck",))  # not in the order of the classes, on purpose
ALL = torch.ones(2, dtype=torch.bool)


def head(**changes: Any) -> CenterHead:
    config = Config.model_validate({"tasks": TASKS, "channels": 8, "nms": {"type": "none"}, **changes})
    return build(config, 6, GRID, CLASSES)


def frame(*rows: tuple[str, float, float]) -> Boxes:
    """Return 4 x 2 x 1.5 m boxes of (class, x, y)."""
    values = torch.tensor([[x, y, 0.3, 4.0, 2.0, 1.5, 0.7, 1.0, -2.0] for _, x, y in rows]).reshape(-1, 9)
    return Boxes(values, torch.tensor([CLASSES.index(name) for name, _, _ in rows]).long(), torch.ones(len(rows)))


def blank(batch: int = 2, seed: int = 0) -> HeadOutput:
    """Return random maps that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return HeadOutput(
        torch.randn(batch, len(CLASSES), ROWS, COLUMNS, generator=generator).requires_grad_(),
        torch.randn(batch, len(TASKS), 10, ROWS, COLUMNS, generator=generator).requires_grad_(),
    )


def oracle(targets: CenterTargets) -> HeadOutput:
    """Return the maps of a head that has learned its targets."""
    B, _, Y, X = targets.heatmap.shape
    code = torch.zeros(B, len(TASKS), 10, Y, X)
    where, task, row, column = targets.cells.unbind(1)
    code[where, task, :, row, column] = targets.codes
    return HeadOutput(torch.where(targets.heatmap == 1, 20.0, -20.0), code)


def by_place(boxes: Boxes) -> Boxes:
    return boxes[boxes.values[:, 0].argsort()]


# --- golden numbers (independent public implementations) ---


def golden_target() -> Tensor:
    cells, radii = torch.tensor([[4, 3], [2, 7]]), torch.tensor([2, 3])
    return draw_gaussians((4, 10, 10), torch.tensor([0, 3]), cells, radii).view(2, 2, 10, 10)


def test_the_heatmap_loss_equals_the_published_value() -> None:
    target = golden_target()
    assert target.sum().item() == pytest.approx(12.65596867, rel=1e-6)
    assert gaussian_focal_loss(2 * T(2, 2, 10, 10) - 2, target).item() == pytest.approx(9.23246765, rel=1e-5)


def test_the_box_loss_equals_the_published_values() -> None:
    cells = torch.tensor([[0, 0, 4, 3], [1, 0, 2, 7]])
    predicted = gather_codes(T(2, 10, 10, 10, k=0.8)[:, None], cells)
    ours = box_code_loss(predicted, T(2, 2, 10, k=1.1, ph=0.2)[:, 0], torch.ones(2))
    published = [0.69112146, 1.38637257, 1.79463732, 1.40868258, 0.66365790]
    published += [0.70125455, 1.42464614, 1.46792042, 0.87986815, 0.47379705]
    assert ours.tolist() == pytest.approx(published, rel=1e-5)


def test_decoding_equals_the_published_boxes() -> None:
    grid = BEVGrid(x_m=(-3.6, 3.6), y_m=(-3.6, 3.6), cell_m=0.6)
    config = Config.model_validate({"tasks": (("a", "b"),), "channels": 1, "candidates": 5, "nms": {"type": "none"}})
    cos, sin = T(1, 1, 12, 12), T(1, 1, 12, 12, k=0.5)
    parts = [T(1, 2, 12, 12, k=0.2), T(1, 1, 12, 12, k=0.4), T(1, 3, 12, 12, k=0.3), sin, cos, T(1, 2, 12, 12, k=0.6)]
    output = HeadOutput(3 * T(1, 2, 12, 12, k=1.9), torch.cat(parts, dim=1)[:, None])
    (boxes,) = build(config, 1, grid, ("a", "b")).decode(output)

    assert boxes.scores.tolist() == pytest.approx([0.95256, 0.95256, 0.95251, 0.95250, 0.95234], abs=6e-6)
    assert sorted(boxes.labels[:2].tolist()) == [0, 1]  # a near tie
    assert boxes.labels[2:].tolist() == [1, 0, 0]
    published = torch.tensor([-1.7980, 2.2931, -0.1618, 2.1986, 0.7669, 0.3708, -2.6022, 0.9704, -0.5118])
    assert (boxes.values - published).abs().amax(dim=1).min() < 1e-4


# --- codes ---


def test_a_box_survives_its_code() -> None:
    values = torch.tensor(
        [[3.14, -2.72, 0.5, 4.6, 1.95, 1.7, -2.9, 5.0, -1.0], [-11.9, 8.9, -1, 0.7, 0.6, 1.8, 1.1, 0, 0]]
    )
    cells, codes = encode_boxes(values, GRID)
    assert cells.tolist() == [[10, 25], [29, 0]]
    assert ((codes[:, :2] >= 0) & (codes[:, :2] < 1)).all()
    torch.testing.assert_close(decode_boxes(codes, cells, GRID), values)


def test_an_untrained_size_decodes_to_a_finite_box() -> None:
    assert decode_boxes(torch.full((1, 10), 1e4), torch.zeros(1, 2, dtype=torch.int64), GRID)[:, 3:6].max() < 150


# --- targets ---


def test_decoding_the_targets_returns_the_annotated_boxes() -> None:
    frames = [
        frame(("car", -8, 3), ("pedestrian", 1.3, -4.4), ("bus", 5, 5), ("truck", 11.9, 8.9)),
        frame(("truck", 0, 0)),
        Boxes.empty(),
    ]
    ours = head().decode(oracle(head().targets(frames)))
    for found, expected in zip(ours, frames, strict=True):
        found, expected = by_place(found), by_place(expected)
        torch.testing.assert_close(found.values, expected.values)
        assert found.labels.tolist() == expected.labels.tolist()
        torch.testing.assert_close(found.scores, torch.ones(len(expected)))


def test_a_target_is_drawn_in_the_channel_of_its_class_and_the_code_in_its_task() -> None:
    targets = head().targets([frame(), frame(("car", 0.1, 0.1))])
    assert (targets.heatmap == 1).nonzero().tolist() == [[1, CLASSES.index("car"), 15, 20]]
    assert targets.cells.tolist() == [[1, 1, 15, 20]]


def test_a_target_is_at_least_as_wide_as_the_smallest_radius() -> None:
    small = Boxes(torch.tensor([[0.0, 0, 0, 0.3, 0.3, 1, 0, 0, 0]]), torch.tensor([3]), torch.ones(1))
    drawn = head(min_radius=3).targets([small]).heatmap
    assert (drawn > 0).sum() == 49


def test_boxes_outside_the_grid_or_without_size_have_no_target() -> None:
    boxes = frame(
        ("car", 12.0, 0), ("car", -12.1, 0), ("car", 0, 9.0), ("car", 0, -20), ("car", 5, 5), ("car", 0.1, 0.1)
    )
    boxes.values[4, 4] = 0
    targets = head().targets([boxes])
    assert targets.cells.tolist() == [[0, 1, 15, 20]]
    assert (targets.heatmap == 1).sum() == 1


def test_weights_follow_their_boxes() -> None:
    frames = [frame(("car", 99, 0), ("car", 1, 0)), frame(("bus", 2, 0))]
    targets = head().targets(frames, [torch.tensor([0.1, 0.2]), torch.tensor([0.3])])
    assert targets.weights.tolist() == pytest.approx([0.2, 0.3])


# --- loss ---


def test_the_loss_sums_each_tasks_own_mean() -> None:
    frames = [frame(("car", -8, 3), ("bus", 5, 5)), frame(("truck", 0, 0))]
    output, targets = blank(), head().targets(frames)
    ours = head().loss(output, targets, ALL)
    heatmap, box = torch.zeros(()), torch.zeros(())
    weights = torch.tensor([1.0] * 8 + [0.2] * 2)
    for task, names in enumerate(TASKS):
        channels = [CLASSES.index(name) for name in names]
        heatmap = heatmap + gaussian_focal_loss(output.heatmap[:, channels], targets.heatmap[:, channels])
        for cell, code in zip(targets.cells, targets.codes, strict=True):
            if cell[1] == task:
                error = (output.box_code[cell[0], task, :, cell[2], cell[3]] - code).abs() * weights
                box = box + error.sum() / (targets.cells[:, 1] == task).sum()
    torch.testing.assert_close(ours["heatmap"], heatmap)
    torch.testing.assert_close(ours["box"], box * 0.25)


def test_an_unlabelled_frame_changes_neither_loss_nor_gradient() -> None:
    frames = [frame(("car", -8, 3)), frame(("truck", 0, 0), ("bus", 3, 3))]
    both, alone = blank(2), blank(2)
    first = HeadOutput(alone.heatmap[:1], alone.box_code[:1])
    ours = head().loss(both, head().targets(frames), torch.tensor([True, False]))
    expected = head().loss(first, head().targets(frames[:1]), ALL[:1])
    torch.testing.assert_close(ours, expected)
    sum(ours.values(), torch.zeros(())).backward()
    for maps in (both.heatmap, both.box_code):
        assert maps.grad is not None
        assert maps.grad[0].abs().sum() > 0
        assert maps.grad[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("frames", "labelled"),
    [([Boxes.empty(), Boxes.empty()], [True, True]), ([frame(("car", 0, 0)), Boxes.empty()], [False, False])],
    ids=["no boxes", "no labels"],
)
def test_nothing_to_find_gives_a_finite_loss_with_a_gradient(frames: list[Boxes], labelled: list[bool]) -> None:
    output = blank()
    losses = head().loss(output, head().targets(frames), torch.tensor(labelled))
    assert losses["box"] == 0
    assert (losses["heatmap"] > 0) == any(labelled)
    sum(losses.values(), torch.zeros(())).backward()
    for maps in (output.heatmap, output.box_code):
        assert maps.grad is not None
        assert maps.grad.isfinite().all()


def test_an_unknown_velocity_teaches_nothing() -> None:
    boxes = frame(("car", 0.1, 0.1))
    boxes.values[:, 7:9] = math.nan
    output = blank(1)
    losses = head().loss(output, head().targets([boxes]), ALL[:1])
    sum(losses.values(), torch.zeros(())).backward()
    assert output.box_code.grad is not None
    at_box = output.box_code.grad[0, 1, :, 15, 20]
    assert (at_box[:8] != 0).all()
    assert at_box[8:].tolist() == [0, 0]


def test_scaling_all_scores_of_pseudo_boxes_leaves_the_box_loss_unchanged() -> None:
    boxes, scores = frame(("car", -8, 3), ("car", 5, 5), ("truck", 0, 0)), torch.tensor([0.9, 0.3, 0.6])
    output = blank(1)
    first, second = (head().loss(output, head().targets([boxes], [scores * s]), ALL[:1]) for s in (1.0, 0.1))
    torch.testing.assert_close(first["box"], second["box"])


def test_a_heavier_box_counts_more() -> None:
    boxes, output = frame(("car", -8, 3), ("car", 5, 5)), blank(1)
    each = [head().loss(output, head().targets([boxes[i : i + 1]]), ALL[:1])["box"] for i in range(2)]
    both = head().loss(output, head().targets([boxes], [torch.tensor([3.0, 1.0])]), ALL[:1])["box"]
    torch.testing.assert_close(both, (3 * each[0] + each[1]) / 4)


def test_half_precision_maps_give_a_float32_loss() -> None:
    output = HeadOutput(blank().heatmap.bfloat16(), blank().box_code.bfloat16())
    targets = head().targets([frame(("car", 0, 0)), frame()])
    losses = head().loss(output, targets, ALL)
    exact = head().loss(HeadOutput(output.heatmap.float(), output.box_code.float()), targets, ALL)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.testing.assert_close(losses, exact)


def test_a_perfect_head_has_almost_no_loss() -> None:
    targets = head().targets([frame(("car", -8, 3)), frame(("truck", 0, 0))])
    logits = torch.logit(targets.heatmap, eps=1e-6)
    losses = head().loss(HeadOutput(logits, oracle(targets).box_code), targets, ALL)
    assert losses["box"] == 0
    assert losses["heatmap"] < head().loss(blank(), targets, ALL)["heatmap"] / 20


# --- decode ---


def peaks(*found: tuple[int, int, int, float]) -> HeadOutput:
    """Return maps with 4.5 x 1 x 1 m boxes at (label, row, column) with a score."""
    heatmap = torch.full((1, len(CLASSES), ROWS, COLUMNS), -20.0)
    for label, row, column, score in found:
        heatmap[0, label, row, column] = math.log(score / (1 - score))
    code = torch.zeros(1, len(TASKS), 10, ROWS, COLUMNS)
    code[:, :, 3] = 1.5
    code[:, :, 7] = 1.0
    return HeadOutput(heatmap, code)


def test_boxes_score_above_the_threshold() -> None:
    (boxes,) = head(score_threshold=0.3).decode(peaks((0, 3, 3, 0.29), (0, 9, 9, 0.31)))
    assert boxes.scores.tolist() == pytest.approx([0.31])


def test_suppression_is_blind_to_the_class_within_a_task_but_not_across_tasks() -> None:
    car, truck, bus = (CLASSES.index(name) for name in ("car", "truck", "bus"))
    output = peaks((car, 9, 9, 0.9), (bus, 9, 10, 0.8), (truck, 9, 10, 0.7))
    (boxes,) = head(nms={"type": "rotated"}).decode(output)
    assert boxes.labels.tolist() == [car, truck]
    (boxes,) = head(nms={"type": "rotated", "iou": 0.99}).decode(output)
    assert boxes.labels.tolist() == [car, bus, truck]


def test_circle_nms_has_a_distance_per_task() -> None:
    output = peaks((0, 9, 9, 0.9), (0, 9, 11, 0.8), (1, 9, 9, 0.7), (1, 9, 11, 0.6))  # 1.2 m apart
    (boxes,) = head(nms={"type": "circle", "squared_distance": [1.0, 1.0, 2.0]}).decode(output)
    assert boxes.labels.tolist() == [0, 0, 1]


def test_each_task_keeps_its_best_boxes() -> None:
    output = peaks((0, 1, 1, 0.5), (0, 9, 9, 0.9), (0, 20, 20, 0.7), (1, 5, 5, 0.2))
    (boxes,) = head(max_boxes=2).decode(output)
    assert boxes.scores.tolist() == pytest.approx([0.9, 0.7, 0.2])
    (boxes,) = head(candidates=1).decode(output)
    assert boxes.scores.tolist() == pytest.approx([0.9, 0.2])


def test_boxes_far_outside_the_range_are_dropped() -> None:
    output = peaks((0, 9, 9, 0.9), (0, 9, 20, 0.8), (0, 20, 9, 0.7))
    output.box_code[0, 1, 0, 9, 9] = 99
    output.box_code[0, 1, 2, 9, 20] = -11
    (boxes,) = head().decode(output)
    assert boxes.scores.tolist() == pytest.approx([0.7])


def test_a_quiet_head_decodes_to_no_boxes() -> None:
    (boxes,) = head(nms={"type": "rotated"}).decode(peaks())
    assert boxes.values.shape == (0, 9)
    assert boxes.labels.dtype == torch.int64


# --- the module ---


def test_the_head_maps_bev_high_to_a_logit_per_class_and_a_code_per_task() -> None:
    output = head()(torch.randn(2, 6, ROWS, COLUMNS))
    assert output.heatmap.shape == (2, 4, ROWS, COLUMNS)
    assert output.box_code.shape == (2, 3, 10, ROWS, COLUMNS)


def test_heatmap_channels_stand_in_the_class_order_of_the_data_set() -> None:
    model = head().eval()
    for task, names in enumerate(TASKS):
        last = model.get_submodule(f"tasks.{task}.heatmap.3")
        torch.nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([float(CLASSES.index(name)) for name in names])
    assert model(torch.randn(1, 6, ROWS, COLUMNS)).heatmap[0, :, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_fresh_head_expects_objects_to_be_rare() -> None:
    probability = head()(torch.randn(2, 6, ROWS, COLUMNS)).heatmap.sigmoid().mean().item()
    assert 0.05 < probability < 0.2


def test_every_weight_of_the_head_learns() -> None:
    model = head()
    targets = model.targets([frame(("car", -8, 3), ("pedestrian", 0, 0)), frame(("truck", 0, 0))])
    losses = model.loss(model(torch.randn(2, 6, ROWS, COLUMNS)), targets, ALL)
    sum(losses.values(), torch.zeros(())).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_weights_are_named_after_task_and_branch() -> None:
    names = set(head().state_dict())
    convs = {
        f"tasks.{t}.{b}.{i}.weight"
        for t in range(3)
        for b in ("reg", "height", "dim", "rot", "vel", "heatmap")
        for i in (0, 1, 3)
    }
    assert convs <= names
    assert {"shared.0.weight", "shared.1.running_var"} <= names
    assert {name.split(".")[0] for name in names} == {"shared", "tasks"}


def test_the_public_nuscenes_head_has_as_many_weights_as_openpcdet_but_for_biases_before_norms() -> None:
    tasks = (("c0",), ("c1", "c2"), ("c3", "c4"), ("c5",), ("c6", "c7"), ("c8", "c9"))
    model = build(Config(tasks=tasks), 512, GRID, tuple(f"c{k}" for k in range(10)))
    biases_before_norms = 64 + 36 * 64
    assert sum(weight.numel() for weight in model.parameters()) == 1_669_510 - biases_before_norms


# --- config ---


def test_every_misplaced_class_is_reported_at_once() -> None:
    config = Config(tasks=(("car", "car"), ("tank",), ()))
    with pytest.raises(ConfigError) as caught:
        build(config, 6, GRID, ("car", "bus"))
    message = str(caught.value)
    for fault in ("'bus' stands in no task", "'car' stands in 2 tasks", "'tank' is no class", "task 2 is empty"):
        assert fault in message


def test_circle_nms_needs_one_distance_per_task() -> None:
    with pytest.raises(ConfigError, match="1 values for 3 tasks"):
        head(nms={"type": "circle", "squared_distance": [4.0]})


def test_unknown_nms_and_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="circle"):
        head(nms={"type": "soft"})
    with pytest.raises(ConfigError, match="unknown key"):
        parse(Config, {"name": "center", "tasks": [["car"]], "radius": 2}, "recipe.yaml")


def test_the_head_is_a_plug_in() -> None:
    module = load("bevkd.models.heads", "center")
    assert module.Config is Config
    assert module.build is build
