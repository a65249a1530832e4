"""UniDistill against the values of its released code (golden.md 1.1), and its contract with the cache."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bevkd.cache.encoding import decode, encode
from bevkd.cache.spec import SignalSpec
from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, TeacherBatch, sample_at
from bevkd.distill.unidistill import (
    Config,
    UniDistill,
    build,
    feature_loss,
    foreground_mask,
    relation_loss,
    response_losses,
)
from bevkd.errors import ContractError
from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.boxes import nine_points
from bevkd.geometry.sampling import foreground_cells, points_of
from bevkd.grid import BEVGrid
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads.center import HeadOutput
from bevkd.signals import POINTS
from bevkd.types import Boxes, Signals
from tests.geometry.strategies import D4
from tests.golden import T

GRID = BEVGrid(x_m=(-6, 6), y_m=(-6, 6), cell_m=0.6)


def boxes(*rows: tuple[float, ...]) -> Boxes:
    values = torch.zeros(len(rows), 9)
    values[:, :7] = torch.tensor(rows).reshape(-1, 7)
    return Boxes(values, torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows)))


GOLDEN = (
    boxes((1, 2, 0, 4, 1.8, 1.6, 0.4), (-3, 1.5, 0, 0.8, 0.8, 1.7, 1.2)),
    boxes((-2.2, -4.1, 0, 2, 6, 3, -0.9), (4, 4, 0, 1, 1, 1, 0), (3, -3, 0, 5, 2, 2, 2.1)),
)


def golden_points(maps: Tensor, swap: bool) -> Tensor:
    return sample_at(maps, [nine_points(each.values[:, :7]) for each in GOLDEN], GRID, swap)


def golden_heads() -> dict[str, Tensor]:
    """Return the response maps of both sides: heatmap logits, and regression and IoU maps of all tasks."""
    maps: dict[str, Tensor] = {}
    for side, k, ph in (("student", 1.0, 0.0), ("teacher", 1.3, 0.4)):
        heatmaps, codes = [], []
        for task, classes in enumerate((1, 2)):
            for index, channels in enumerate((classes, 2, 1, 3, 2, 2, 1)):
                values = T(2, channels, 20, 20, k=k, ph=ph + 0.1 * task + 0.2 * index)
                (heatmaps if index == 0 else codes).append(values)
        maps[f"{side}_heatmap"], maps[f"{side}_box"] = torch.cat(heatmaps, 1), torch.cat(codes, 1)
    return maps


# ---------------------------------------------------------------------------------------------- published values


@pytest.mark.parametrize(("swap", "expected"), [(True, 0.68074119), (False, 0.67865932)])
def test_the_feature_loss_equals_the_published_value(swap: bool, expected: float) -> None:
    student, teacher = T(2, 8, 20, 20), T(2, 8, 20, 20, k=1.3, ph=0.4)
    loss = feature_loss(golden_points(student, swap), golden_points(teacher, swap))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("swap", "expected"), [(True, 0.67865670), (False, 0.54661590)])
def test_the_relation_loss_equals_the_published_value(swap: bool, expected: float) -> None:
    student, teacher = T(2, 8, 20, 20), T(2, 8, 20, 20, k=1.3, ph=0.4)
    loss = relation_loss(golden_points(student, swap), golden_points(teacher, swap))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_response_losses_equal_the_published_values() -> None:
    class_term, box_term = response_losses(**golden_heads(), mask=foreground_mask(GOLDEN, GRID))
    assert float(class_term) == pytest.approx(0.14004098, rel=1e-4)
    assert float(box_term) == pytest.approx(0.81684440, rel=1e-4)


def test_the_foreground_mask_equals_the_published_one() -> None:
    mask = foreground_mask(GOLDEN, GRID)
    assert float(mask.sum()) == pytest.approx(6.84381104, rel=1e-4)
    assert int((mask > 0).sum()) == 29


@pytest.mark.parametrize(("frame", "row_column"), [(0, [12, 5]), (1, [3, 6])])
def test_the_first_peak_of_the_mask_stands_in_row_y_and_column_x(frame: int, row_column: list[int]) -> None:
    # The published peaks are those of the second and of the first box; both are ones of the mask.
    mask = foreground_mask(GOLDEN, GRID)
    peaks = (mask[frame] == 1).nonzero().tolist()
    assert row_column in peaks
    assert [row_column[1], row_column[0]] not in peaks


@pytest.mark.parametrize(("swap", "expected"), [(False, 122.82105), (True, 39.4960)])
def test_columns_are_x_unless_the_released_code_is_imitated(swap: bool, expected: float) -> None:
    grid = BEVGrid(x_m=(-54, 54), y_m=(-54, 54), cell_m=0.6)
    ramp = torch.arange(180.0).expand(1, 1, 180, 180)
    points = [nine_points(torch.tensor([[20.0, -30, 0, 4, 2, 1.5, 0.3]]))]
    student, teacher = (sample_at(maps, points, grid, swap) for maps in (ramp, torch.zeros(1, 1, 180, 180)))
    assert float(feature_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------- sampling


def test_points_outside_the_map_sample_zero() -> None:
    sampled = sample_at(torch.ones(1, 2, 20, 20), [torch.tensor([[[0.0, 0.0], [20.0, 0.0]]])], GRID)
    torch.testing.assert_close(sampled, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))


def test_each_frame_is_sampled_at_its_own_points() -> None:
    maps = torch.stack([torch.zeros(1, 20, 20), torch.ones(1, 20, 20)])
    middle = torch.zeros(1, 1, 2)
    assert sample_at(maps, [middle, middle.repeat(2, 1, 1)], GRID).flatten().tolist() == [0.0, 1.0, 1.0]


def test_the_similarity_ignores_the_length_of_vectors() -> None:
    points = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    assert float(relation_loss(points, 7 * points)) < 1e-3
    assert float(feature_loss(points, 7 * points)) > 1


# ---------------------------------------------------------------------------------------------- the loss as a whole


def context() -> DistillContext:
    parts: Any = SimpleNamespace(
        config=SimpleNamespace(grid=GRID),
        head=SimpleNamespace(labels_of_task=((0,), (1,))),
        encoder=SimpleNamespace(out_channels=4),
        bev_encoder=SimpleNamespace(out_channels=6),
    )
    return DistillContext(parts, {"bev_low": (4, 20, 20), "bev_high": (6, 20, 20)})


def random_maps(seed: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4, 20, 20), (batch, 6, 20, 20), (batch, 3, 20, 20), (batch, 2, 10, 20, 20))
    low, high, heatmap, code = (torch.randn(shape, generator=generator) for shape in shapes)
    return low, high, heatmap, code


def student_output(seed: int, batch: int) -> DetectorOutput:
    low, high, heatmap, code = (maps.requires_grad_() for maps in random_maps(seed, batch))
    return DetectorOutput(low, high, HeadOutput(heatmap, code))


def teacher_batch(seed: int, affines: tuple[BEVAffine, ...], found: tuple[Boxes, ...] | None = None) -> TeacherBatch:
    low, high, heatmap, code = random_maps(seed, len(affines))
    return TeacherBatch(Signals(low, high, heatmap, code, found), affines, GRID)


def batch_of(annotated: tuple[Boxes, ...], labelled: list[bool], affines: tuple[BEVAffine, ...]) -> Batch:
    return Batch(tuple("ab"[: len(annotated)]), annotated, torch.tensor(labelled), affines)


IDENTITY = (BEVAffine.identity(), BEVAffine.identity())


def test_the_terms_carry_their_weights() -> None:
    student, teacher = student_output(0, 2), teacher_batch(1, IDENTITY)
    batch = batch_of(GOLDEN, [True, True], IDENTITY)
    unit = UniDistill(Config(feature=1, relation=1, response=1), context())(student, teacher, batch)
    published = UniDistill(Config(), context())(student, teacher, batch)
    weights = {"feature": 100.0, "relation": 40.0, "response_class": 10.0, "response_box": 10.0}
    assert published.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(published[name], weight * unit[name])


def test_a_student_equal_to_its_teacher_loses_nothing_but_the_temperature() -> None:
    low, high, heatmap, code = random_maps(3, 2)
    student = DetectorOutput(low, high, HeadOutput(heatmap / 2, code))
    terms = UniDistill(Config(), context())(student, teacher_batch(3, IDENTITY), batch_of(GOLDEN, [True] * 2, IDENTITY))
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(dict.fromkeys(terms, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", ["feature", "relation", "response"])
def test_a_term_without_weight_reads_no_signal_and_is_not_computed(name: str) -> None:
    config = Config(**{"feature": 0, "relation": 0, "response": 0, name: 1})  # type: ignore[arg-type]
    needed = {"feature": ("bev_low",), "relation": ("bev_high",), "response": ("heatmap", "box_code")}[name]
    assert config.signals() == needed
    teacher = teacher_batch(1, IDENTITY)
    only = {signal: getattr(teacher.canonical, signal) for signal in needed}
    teacher = dataclasses.replace(teacher, canonical=Signals(**only))
    terms = UniDistill(config, context())(student_output(0, 2), teacher, batch_of(GOLDEN, [True] * 2, IDENTITY))
    assert all(term.startswith(name) for term in terms)


@pytest.mark.parametrize("affine", D4)
def test_sampling_the_canonical_teacher_equals_sampling_the_warped_one_at_augmented_boxes(affine: BEVAffine) -> None:
    teacher = teacher_batch(2, (affine,))
    augmented = affine.apply_to_boxes(GOLDEN[1])
    points = nine_points(augmented.values[:, :7])
    warped, valid = teacher.warped("bev_low")
    canonical = teacher.canonical.need("bev_low")
    assert bool(valid.all())
    torch.testing.assert_close(
        sample_at(canonical, [teacher.to_canonical(points, 0)], GRID),
        sample_at(warped, [points], GRID),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("affine", D4)
def test_turning_student_and_world_together_changes_no_term(affine: BEVAffine) -> None:
    plain = UniDistill(Config(), context())(
        student_output(0, 1), teacher_batch(1, IDENTITY[:1]), batch_of(GOLDEN[1:], [True], IDENTITY[:1])
    )
    # The student of the augmented run says the same things about the turned world.
    low, high, heatmap, code = random_maps(0, 1)
    own = TeacherBatch(Signals(low, high, heatmap, code), (affine,), GRID)
    head = HeadOutput(own.warped("heatmap")[0], own.warped("box_code")[0])
    student = DetectorOutput(own.warped("bev_low")[0], own.warped("bev_high")[0], head)
    batch = batch_of((affine.apply_to_boxes(GOLDEN[1]),), [True], (affine,))
    turned = UniDistill(Config(), context())(student, teacher_batch(1, (affine,)), batch)
    del plain["response_box"], turned["response_box"]  # offsets and (sin, cos) trade values, so their L1 may not
    torch.testing.assert_close(turned, plain, atol=1e-4, rtol=1e-4)


def test_cells_that_the_teacher_does_not_cover_add_no_response() -> None:
    affine = BEVAffine(translation_m=(5.0, 0.0, 0.0))
    annotated = (boxes((-4.0, 0, 0, 4, 2, 1.5, 0.0)),)  # in the augmented frame: 5 m further left than the teacher saw
    teacher = teacher_batch(1, (affine,))
    terms = UniDistill(Config(), context())(student_output(0, 1), teacher, batch_of(annotated, [True], (affine,)))
    assert terms["response_class"].item() == 0
    assert terms["response_box"].item() == 0


def test_frames_without_boxes_give_finite_zeros_with_a_gradient() -> None:
    nothing = (Boxes.empty(), Boxes.empty())
    student = student_output(0, 2)
    terms = UniDistill(Config(), context())(
        student, teacher_batch(1, IDENTITY), batch_of(nothing, [True, False], IDENTITY)
    )
    assert {name: value.item() for name, value in terms.items()} == dict.fromkeys(terms, 0.0)
    torch.stack([*terms.values()]).sum().backward()
    assert student.bev_low.grad is not None
    assert float(student.bev_low.grad.abs().sum()) == 0


def test_confident_teacher_boxes_stand_in_on_frames_without_labels() -> None:
    found = dataclasses.replace(GOLDEN[1], scores=torch.tensor([0.9, 0.2, 0.9]))
    affines = (BEVAffine.identity(), BEVAffine(flip_x=True))
    student = student_output(0, 2)
    teacher = teacher_batch(1, affines, (GOLDEN[0], found))
    pseudo = UniDistill(Config(pseudo_score=0.5), context())(
        student, teacher, batch_of((GOLDEN[0], Boxes.empty()), [True, False], affines)
    )
    labelled = batch_of((GOLDEN[0], affines[1].apply_to_boxes(GOLDEN[1][torch.tensor([0, 2])])), [True, True], affines)
    torch.testing.assert_close(pseudo, UniDistill(Config(), context())(student, teacher, labelled))
    assert "boxes" in Config(pseudo_score=0.5).signals()


def test_a_labelled_frame_keeps_its_annotations_even_if_it_is_empty() -> None:
    teacher = teacher_batch(1, IDENTITY[:1], GOLDEN[:1])
    batch = batch_of((Boxes.empty(),), [True], IDENTITY[:1])
    terms = UniDistill(Config(pseudo_score=0.5), context())(student_output(0, 1), teacher, batch)
    assert terms["feature"].item() == 0


def test_adapters_bring_the_student_to_the_teachers_channels() -> None:
    wide = dataclasses.replace(context(), teacher_shapes={"bev_low": (8, 20, 20), "bev_high": (5, 20, 20)})
    torch.manual_seed(0)
    loss = build(Config(adapter=True, response=0), wide)
    assert isinstance(loss, UniDistill)
    assert {name: tuple(weight.shape) for name, weight in loss.named_parameters() if name.endswith("weight")} == {
        "adapters.bev_low.weight": (8, 4, 1, 1),
        "adapters.bev_high.weight": (5, 6, 1, 1),
    }
    signals = Signals(bev_low=T(2, 8, 20, 20), bev_high=T(2, 5, 20, 20))
    terms = loss(student_output(0, 2), TeacherBatch(signals, IDENTITY, GRID), batch_of(GOLDEN, [True] * 2, IDENTITY))
    torch.stack([*terms.values()]).sum().backward()
    assert all(weight.grad is not None for weight in loss.parameters())


def test_the_published_adapter_is_a_convolution_over_neighbours_with_norm() -> None:
    loss = build(Config(adapter="conv", response=0), context())
    assert isinstance(loss, UniDistill)
    for stage, channels in (("bev_low", 4), ("bev_high", 6)):
        convolution, norm, activation = loss.adapters[stage].children()
        assert convolution.weight.shape == (channels, channels, 3, 3)
        assert (type(norm).__name__, type(activation).__name__) == ("BatchNorm2d", "ReLU")


@pytest.mark.parametrize(
    ("config", "shapes", "advice"),
    [
        ({"response": 0}, {"bev_low": (8, 20, 20)}, "set adapter: true"),
        ({"feature": 0}, {"box_code": (6, 10, 20, 20)}, "detector.head.tasks"),
    ],
)
def test_maps_that_cannot_be_compared_are_reported_with_the_way_out(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], advice: str
) -> None:
    fitting = {"bev_low": (4, 20, 20), "box_code": (2, 10, 20, 20)}
    assert Config().misfits(dataclasses.replace(context(), teacher_shapes=fitting)) == []
    misfit = dataclasses.replace(context(), teacher_shapes={**fitting, **shapes})
    (fault,) = Config(**config).misfits(misfit)
    assert advice in fault
    assert all(Config(feature=0, response=0).misfits(each) == [] for each in (misfit, context()))


def test_an_adapter_makes_channels_fit() -> None:
    wide = dataclasses.replace(context(), teacher_shapes={"bev_low": (8, 20, 20)})
    assert Config(adapter=True, response=0).misfits(wide) == []


def test_half_precision_students_give_a_float32_loss() -> None:
    full = student_output(0, 2)
    half = DetectorOutput(
        full.bev_low.bfloat16(),
        full.bev_high.bfloat16(),
        HeadOutput(full.head.heatmap.bfloat16(), full.head.box_code.bfloat16()),
    )
    torch.manual_seed(0)
    loss = UniDistill(Config(adapter=True), context())
    batch = batch_of(GOLDEN, [True] * 2, IDENTITY)
    expected, terms = (loss(output, teacher_batch(1, IDENTITY), batch) for output in (full, half))
    assert {value.dtype for value in terms.values()} == {torch.float32}
    torch.testing.assert_close(terms, expected, rtol=2e-2, atol=1e-2)


def test_a_missing_signal_is_named() -> None:
    teacher = TeacherBatch(Signals(), IDENTITY, GRID)
    with pytest.raises(KeyError, match="bev_low"):
        UniDistill(Config(), context())(student_output(0, 2), teacher, batch_of(GOLDEN, [True] * 2, IDENTITY))


def test_canonical_points_are_where_augmented_points_came_from() -> None:
    affine = BEVAffine(True, False, math.radians(33), 1.07, (0.4, -0.2, 0.1))
    teacher = teacher_batch(0, (affine,))
    points = nine_points(affine.apply_to_boxes(GOLDEN[0]).values[:, :7])
    expected = nine_points(GOLDEN[0].values[:, :7])
    back = teacher.to_canonical(points, 0)
    # A mirror image lists its corners in another order; the set of points is the same.
    distance = torch.cdist(back, expected)
    assert float(distance.min(dim=1).values.max()) < 1e-5
    assert float(distance.min(dim=2).values.max()) < 1e-5


# ---------------------------------------------------------------------------------------------- points for maps


def with_points(teacher: TeacherBatch, annotated: tuple[Boxes, ...], precision: str) -> TeacherBatch:
    """Return the teacher with its points, after a way through the encoding, instead of its maps."""
    points = {}
    for name, source in POINTS.items():
        spec = SignalSpec.model_validate({"encoding": precision, "max_error": 0.05, "capacity": 8})
        exact = [
            points_of(each, found, GRID) for each, found in zip(teacher.canonical.need(source), annotated, strict=True)
        ]
        arrays = [encode(name, spec, each, "t").arrays for each in exact]
        stored = {key: torch.stack([torch.from_numpy(each[key]) for each in arrays]) for key in arrays[0]}
        points[name] = tuple(exact) if precision == "float16" else decode(name, spec, stored)
    return dataclasses.replace(teacher, canonical=Signals(**points))


SPUN = (BEVAffine(flip_x=True, rotation_rad=0.3, scale=1.05), BEVAffine(rotation_rad=-1.1, translation_m=(0.4, 0.2, 0)))


@pytest.mark.parametrize("affines", [IDENTITY, SPUN])
def test_points_give_the_loss_of_maps(affines: tuple[BEVAffine, ...]) -> None:
    teacher, student = teacher_batch(1, affines), student_output(0, 2)
    augmented = tuple(affine.apply_to_boxes(each) for affine, each in zip(affines, GOLDEN, strict=True))
    batch = batch_of(augmented, [True, True], affines)
    maps = UniDistill(Config(response=0), context())(student, teacher, batch)
    config = Config(response=0, source="points")
    assert config.signals() == ("points_low", "points_high")
    points = UniDistill(config, context())(student, with_points(teacher, GOLDEN, "float16"), batch)
    torch.testing.assert_close(points, maps, rtol=1e-5, atol=1e-5)


def test_stored_points_give_the_gradient_of_maps() -> None:
    teacher, batch = teacher_batch(1, IDENTITY), batch_of(GOLDEN, [True, True], IDENTITY)
    gradients = []
    for config, read in (
        (Config(response=0), teacher),
        (Config(response=0, source="points"), with_points(teacher, GOLDEN, "root8")),
    ):
        student = student_output(0, 2)
        sum(UniDistill(config, context())(student, read, batch).values(), torch.zeros(())).backward()
        gradients.append(torch.cat([maps.grad.flatten() for maps in (student.bev_low, student.bev_high)]))
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.995


def test_points_of_frames_without_labels_stay_unread() -> None:
    teacher, student = teacher_batch(1, IDENTITY), student_output(0, 2)
    loss = UniDistill(Config(response=0, source="points"), context())
    hidden = batch_of((GOLDEN[0], Boxes.empty()), [True, False], IDENTITY)
    terms = loss(student, with_points(teacher, GOLDEN, "float16"), hidden)
    alone = loss(student, with_points(teacher, (GOLDEN[0], Boxes.empty()), "float16"), hidden)
    torch.testing.assert_close(terms, alone)


def test_points_of_other_boxes_than_the_students_are_refused() -> None:
    teacher = with_points(teacher_batch(1, IDENTITY), GOLDEN, "float16")
    batch = batch_of((GOLDEN[0], GOLDEN[1][:2]), [True, True], IDENTITY)
    with pytest.raises(ContractError, match=r"sample 'b' has 2 annotated boxes and points of 3 in the cache"):
        UniDistill(Config(response=0, source="points"), context())(student_output(0, 2), teacher, batch)


@pytest.mark.parametrize("changes", [{"pseudo_score": 0.5}, {"legacy_xy_swap": True}])
def test_points_cannot_stand_for_everything(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="points"):
        Config(source="points", **changes)


def test_channels_of_points_are_compared_with_the_students() -> None:
    shapes = {"points_low": (9, 8), "points_high": (9, 6)}
    misfit = dataclasses.replace(context(), teacher_shapes=shapes)
    (fault,) = Config(source="points", response=0).misfits(misfit)
    assert "bev_low has 8 channels in the cache and 4 in the student" in fault
    assert isinstance(build(Config(source="points", response=0, adapter=True), misfit), UniDistill)


# ---------------------------------------------------------------------------------------------- sparse box codes


def test_box_codes_that_the_cache_did_not_keep_are_not_read() -> None:
    teacher = teacher_batch(1, IDENTITY)
    code = teacher.canonical.need("box_code")
    known = torch.stack([foreground_cells(each, GRID) for each in GOLDEN])
    spoilt = torch.where(known[:, None, None], code, 1e6)
    batch = batch_of(GOLDEN, [True, True], IDENTITY)
    student, loss = student_output(0, 2), UniDistill(Config(feature=0, relation=0), context())
    sparse = dataclasses.replace(teacher.canonical, box_code=spoilt, box_code_known=known)
    kept = loss(student, dataclasses.replace(teacher, canonical=sparse), batch)
    torch.testing.assert_close(kept, loss(student, teacher, batch))
    nothing = dataclasses.replace(sparse, box_code_known=torch.zeros_like(known))
    terms = loss(student, dataclasses.replace(teacher, canonical=nothing), batch)
    assert {name: value.item() for name, value in terms.items()} == {"response_class": 0.0, "response_box": 0.0}


def test_a_student_whose_pillars_are_finer_than_the_grid_cannot_learn_bev_low() -> None:
    encoder = SimpleNamespace(out_channels=8, fineness=4)
    student: Any = SimpleNamespace(encoder=encoder, head=SimpleNamespace(labels_of_task=((0,),)))
    context = DistillContext.__new__(DistillContext)
    vars(context).update(student=student, teacher_shapes={"bev_low": (8, 4, 4), "box_code": (1, 10, 4, 4)})
    assert Config(feature=1.0).misfits(context) == [
        "bev_low of the student's pillars is finer than the grid: set feature: 0"
    ]
    assert Config(feature=0.0).misfits(context) == []
