"""``bevkd bench models`` measures what it says, on sizes small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bevkd.errors import ConfigError
from bevkd.models.sparse import down_conv, sparse_tensor, sub_m_conv
from bevkd.progress import Silent
from pipeline.bench import lift_splat, models
from pipeline.bench.lift_splat import Problem, Size
from pipeline.bench.memory import peak_mb
from pipeline.bench.models import ModelSettings, bench_models, count_flops, result_tables
from pipeline.recipe import shipped
from tests.pipeline import kit

CPU = torch.device("cpu")
SMALL = Size(cameras=2, height=64, width=96, bins=20, channels=8, cells=32)


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = kit.train_recipe(world, kit.STUDENT)
    return kit.write(tmp_path_factory.mktemp("recipe") / "student.yaml", values)


@pytest.fixture(scope="module")
def result(recipe: Path) -> dict[str, Any]:
    """Return the figures of one detector and of lift-splat, measured in this process, which saves the start of four."""

    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    settings = ModelSettings([str(recipe)], rounds=1, device="cpu", lift_splat=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "in_new_process", here)
        patch.setattr(lift_splat, "in_new_process", here)
        figures: dict[str, Any] = json.loads(json.dumps(bench_models(settings, Silent())))
    return figures


def test_every_detector_has_the_figures_that_the_json_promises(result: dict[str, Any]) -> None:
    (row,) = result["detectors"].values()
    assert {"forward_ms", "forward_ms_batch_4", "peak_mb", "parameters", "flops", "input", "device"} == set(row)
    assert min(row["forward_ms"], row["peak_mb"], row["parameters"], row["flops"]) > 0
    assert row["input"] == "made up, 6 images of 32 x 96"
    assert {"memory_over_naive", "time_over_naive"} < set(result["lift_splat"])
    assert result_tables(result)


def test_frames_of_the_recipes_own_data_set_are_taken_on_demand(recipe: Path) -> None:
    row = models.measure(models.Job(str(recipe), (), data=True, rounds=1, device="cpu"))
    assert row.input.startswith("sample ")


def test_a_recipe_without_a_detector_is_refused_also_from_another_process() -> None:
    with pytest.raises(ConfigError, match="'demo_cache' describes no detector"):
        bench_models(ModelSettings(["demo_cache"], lift_splat=None), Silent())


def test_by_default_each_detector_that_ships_is_measured_once() -> None:
    names = list(models._with_detector())
    assert {"demo_teacher", "nuscenes_teacher", "nuscenes_student"} <= set(names) <= set(shipped())
    assert len({"demo_student", "demo_student_distilled"} & set(names)) == 1


# ---------------------------------------------------------------------------------------------- what is counted


def test_dense_convolutions_count_two_operations_per_product() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 8 * 6, 7))
    assert count_flops(layers, torch.zeros(1, 3, 8, 6)) == 2 * (8 * 6 * 5 * 3 * 9 + 5 * 8 * 6 * 7)


@pytest.mark.parametrize("strided", [False, True])
def test_sparse_convolutions_count_two_operations_per_product_of_a_pair_of_voxels(strided: bool) -> None:
    pytest.importorskip("spconv")
    chance = torch.Generator().manual_seed(0)
    occupied = (torch.rand(1, 5, 6, 7, generator=chance) < 0.4).nonzero()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = down_conv(4, 6, "key") if strided else sub_m_conv(4, 6, "key")

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            features_out: torch.Tensor = self.conv(sparse_tensor(features, occupied, (5, 6, 7), 1)).features
            return features_out

    places, pairs = {tuple(place[1:]) for place in occupied.tolist()}, 0
    for place, step in product(places, product((-1, 0, 1), repeat=3)):
        other = tuple(a + b for a, b in zip(place, step, strict=True))
        # Strided output cells lie on even places; those of five rows reach to the fourth.
        even = all(0 <= at <= last and at % 2 == 0 for at, last in zip(other, (4, 5, 6), strict=True))
        pairs += even if strided else other in places
    with torch.inference_mode():
        assert count_flops(Layer().eval(), torch.ones(len(occupied), 4)) == 2 * pairs * 4 * 6


def test_products_with_a_sparse_matrix_are_not_counted_as_dense_ones() -> None:
    class Product(nn.Module):
        def forward(self, dense: torch.Tensor) -> torch.Tensor:
            sparse = torch.sparse_coo_tensor([[0], [1]], [1.0], (50, 50), check_invariants=True)
            return sparse @ dense

    assert count_flops(Product(), torch.ones(50, 50)) == 0


def test_peak_memory_is_what_work_holds_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(10_000_000)  # 40 MB, one after the other
        kept = [torch.ones(10_000_000) for _ in range(2)]
        del kept

    peak = peak_mb(work, CPU)
    assert peak is None or 79 < peak < 95


# ---------------------------------------------------------------------------------------------- lift-splat


def test_both_forms_of_lift_splat_give_the_same_map_and_gradients() -> None:
    problem = Problem(SMALL, CPU)
    inside = problem.cells >= 0
    assert 0.2 < float(inside.float().mean()) < 0.95
    for ours, naive in zip(problem.run("bevkd"), problem.run("naive"), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)


def test_the_naive_form_is_the_sum_over_pixels_and_depths() -> None:
    depth, context = torch.rand(1, 2, 3), torch.rand(1, 2, 4)
    cells = torch.tensor([[[0, 3, -1], [3, 3, 1]]])
    expected = torch.zeros(4, 4)
    for pixel, column in product(range(2), range(3)):
        if cells[0, pixel, column] >= 0:
            expected[cells[0, pixel, column]] += depth[0, pixel, column] * context[0, pixel]
    bev = lift_splat.naive_splat(depth, context, cells, (2, 2))
    torch.testing.assert_close(bev[0].flatten(1).T, expected)


def test_a_recipe_of_a_segmenter_has_no_detector_to_measure(bevkd: Bevkd) -> None:
    outcome = bevkd("bench", "models", "world_segmenter")
    assert outcome.code == 1
    assert "describes no detector" in " ".join(outcome.err.split())
