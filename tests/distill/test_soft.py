"""Dense soft outputs: the released quality focal loss (golden.md, 1.10), and closed forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, TeacherBatch
from bevkd.distill.soft import Config, build
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput
from bevkd.models.heads.center import HeadOutput, quality_focal_loss
from bevkd.types import Boxes, Signals
from tests.golden import T

GRID = BEVGrid(x_m=(-4, 4), y_m=(-4, 4), cell_m=1.0)
STUDENT = cast("Detector", SimpleNamespace(head=SimpleNamespace(labels_of_task=((0,), (1, 2)))))


def maps(seed: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "heatmap": torch.randn(batch, 3, 8, 8, generator=generator),
        "box_code": torch.randn(batch, 2, 10, 8, 8, generator=generator),
    }


def run(student: dict[str, Tensor], teacher: dict[str, Tensor], affine: BEVAffine | None = None, **config: Any) -> Any:
    affines = (affine or BEVAffine.identity(),) * len(student["heatmap"])
    nothing = torch.zeros(len(affines), 1, 8, 8)
    output = DetectorOutput(nothing, nothing, HeadOutput(**student))
    batch = Batch(("a", "b"), (Boxes.empty(),) * 2, torch.zeros(2, dtype=torch.bool), affines)
    loss = build(Config(**config), DistillContext(STUDENT, {}))
    return loss(output, TeacherBatch(Signals(**teacher), affines, GRID), batch)


def test_the_quality_focal_loss_has_the_released_value() -> None:
    target = T(2, 3, 4, k=1.3, ph=0.4).sigmoid()
    assert quality_focal_loss(T(2, 3, 4), target).sum().item() == pytest.approx(1.44999540, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    terms = run(maps(0), maps(0))
    assert {name: value.item() for name, value in terms.items()} == pytest.approx({"heatmap": 0, "box": 0}, abs=1e-6)


def test_a_confident_peak_where_the_teacher_sees_nothing_is_punished() -> None:
    teacher = maps(0)
    teacher["heatmap"] = torch.full_like(teacher["heatmap"], -8.0)
    student = {**teacher, "heatmap": teacher["heatmap"].clone()}
    before = run(student, teacher)["heatmap"].item()
    student["heatmap"][0, 1, 3, 3] = 4.0
    assert run(student, teacher)["heatmap"].item() > before + 3


def test_boxes_are_learned_where_the_teacher_is_sure_of_their_task() -> None:
    student, teacher = maps(1), maps(2)
    teacher["heatmap"] = torch.full_like(teacher["heatmap"], -8.0)
    teacher["heatmap"][1, 2, 4, 5] = 3.0
    student["box_code"].requires_grad_()
    run(student, teacher, code_weights=(1.0,) * 10)["box"].backward()
    gradient = student["box_code"].grad
    assert gradient is not None
    assert gradient.abs().sum(dim=2).nonzero().tolist() == [[1, 1, 4, 5]]
    expected = 2 * (student["box_code"] - teacher["box_code"])[1, 1, :, 4, 5].abs().sum()
    torch.testing.assert_close(run(student, teacher, code_weights=(1.0,) * 10)["box"], expected)


def test_a_teacher_that_sees_nothing_gives_finite_terms() -> None:
    teacher = maps(0)
    teacher["heatmap"] = torch.full_like(teacher["heatmap"], -20.0)
    terms = run(maps(1), teacher)
    assert terms["box"].item() == 0
    assert terms["heatmap"].isfinite()


def test_cells_beyond_the_teachers_map_add_nothing() -> None:
    terms = run(maps(1), maps(2), BEVAffine(translation_m=(20.0, 0.0, 0.0)))
    assert {name: value.item() for name, value in terms.items()} == {"heatmap": 0, "box": 0}


def test_terms_without_weight_read_nothing() -> None:
    assert Config(box=0).signals() == ("heatmap",)
    assert Config(heatmap=0).signals() == ("heatmap", "box_code")
