"""Caches that hold each frame flipped and turned as well: what the teacher says of exactly that input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bevkd.cache.reader import CacheReader
from bevkd.cache.spec import CacheSpec
from bevkd.cache.variants import VARIANTS, variant_token
from bevkd.cache.verify import verify
from bevkd.data.augment import AugmentConfig
from bevkd.data.collate import Batch, collate
from bevkd.data.join import TrainingDataset
from bevkd.data.sampler import FrameOrder
from bevkd.distill.base import TeacherBatch
from bevkd.geometry.affine import BEVAffine
from bevkd.progress import Silent
from bevkd.training.objective import Cached
from pipeline.cache_teacher import Stage, prepare
from pipeline.recipe import load_cache
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

SIGNALS = {
    "bev_low": {"encoding": "float16"},
    "bev_high": {"encoding": "float16"},
    "heatmap": {"encoding": "float16"},
    "box_code": {"encoding": "float16"},
    "boxes": {"encoding": "boxes", "capacity": 50},
    "points_high": {"encoding": "float16", "capacity": 60},
    "lidar_depth": {"encoding": "depth", "capacity": 20000},
}


@pytest.fixture(scope="module")
def recipe(world: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a cache with all eight variants of each frame.

    Frames pass the teacher one by one: sums of other batches round differently.
    """
    folder = tmp_path_factory.mktemp("variants")
    spec = kit.write(folder / "spec.yaml", {"name": "exact", "block": 16, "signals": SIGNALS})
    return kit.write(folder / "cache.yaml", kit.cache_recipe(world, teacher, spec, variants="d4", batch_size=1))


@pytest.fixture(scope="module")
def cache(bevkd: Bevkd, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants") / "cache"
    said = bevkd.well("cache-teacher", recipe, "--out", folder).out
    assert "32 of 32 samples (8 variants of each frame)" in said
    return folder


@pytest.fixture(scope="module")
def plain(bevkd: Bevkd, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache of the same teacher without variants."""
    folder = tmp_path_factory.mktemp("variants") / "plain"
    bevkd.well("cache-teacher", recipe, "--set", "variants=none", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def stage(recipe: Path) -> Stage:
    return prepare(load_cache(str(recipe), []), None, Silent())


def training(stage: Stage, cache: Path, augment: Any) -> TrainingDataset:
    """Return what a LiDAR student would load, with all signals of the cache."""
    reader = CacheReader.open(cache)
    order = FrameOrder(reader.frames, (), None, 0)
    signals = tuple(name for name in SIGNALS if name != "lidar_depth")
    config = AugmentConfig.model_validate(augment)
    return TrainingDataset(stage.source, stage.teacher.view, order, config, {"lidar": (reader, signals)}, seed=3)


def read(batch: Batch, spec: CacheSpec, stage: Stage) -> TeacherBatch:
    """Return what the losses of a training step would read."""
    return Cached("lidar", spec, stage.teacher.grid)(batch)


def test_a_variant_is_what_the_teacher_says_of_the_augmented_frame(stage: Stage, cache: Path) -> None:
    dataset, spec = training(stage, cache, "d4"), stage.header.spec
    drawn = set()
    for position in range(24):
        batch = collate([dataset[position]])
        cached, written = read(batch, spec, stage), stage.teacher.infer(batch)
        drawn.add(tuple(batch.affines[0].matrix().flatten().tolist()))
        assert cached.affines == (BEVAffine.identity(),)
        for name in ("bev_low", "bev_high", "heatmap", "box_code"):
            warped, valid = cached.warped(name)
            assert valid.all()
            torch.testing.assert_close(warped, written.need(name), atol=2e-3, rtol=2e-3)
        assert written.boxes is not None
        torch.testing.assert_close(cached.boxes[0].values, written.boxes[0].values, atol=1e-3, rtol=1e-3)
        held = cached.points("points_high")[0]
        assert len(held) == len(batch.boxes[0])
        torch.testing.assert_close(held.boxes[:, :6], batch.boxes[0].values[:, :6], atol=1e-4, rtol=0)
    assert len(drawn) == 8


def test_warping_instead_would_not_be_exact(stage: Stage, plain: Path) -> None:
    """The teacher of these tests is not equivariant, or they would prove nothing."""
    dataset, spec = training(stage, plain, "d4"), stage.header.spec
    worst = 0.0
    for position in range(8):
        batch = collate([dataset[position]])
        warped, _ = read(batch, spec, stage).warped("bev_high")
        worst = max(worst, float((warped - stage.teacher.infer(batch).need("bev_high")).abs().max()))
    assert worst > 0.05


def test_of_other_augmentations_only_the_rest_is_warped(stage: Stage, cache: Path, plain: Path) -> None:
    augment = {"bev": {"flip": True, "rotation_deg": [-20, 20], "scale": [0.9, 1.1], "translation_std_m": 0.5}}
    pair = [training(stage, folder, augment) for folder in (cache, plain)]
    nearer = []
    for position in range(12):
        batches = [collate([dataset[position]]) for dataset in pair]
        assert batches[0].affines == batches[1].affines
        exact = stage.teacher.infer(batches[0]).need("bev_high")
        errors = []
        for batch in batches:
            warped, valid = read(batch, stage.header.spec, stage).warped("bev_high")
            errors.append(float(((warped - exact) * valid).norm()))
        nearer.append(errors[0] <= errors[1] + 1e-3)
        assert batches[0].left is not None
        rest = batches[0].left["lidar"][0]
        assert (rest.flip_x, rest.flip_y) == (False, False)
    assert sum(nearer) > 6


def test_frames_as_they_are_have_the_bytes_of_a_cache_without_variants(cache: Path, plain: Path) -> None:
    with_variants, without = CacheReader.open(cache), CacheReader.open(plain)
    assert with_variants.variants == VARIANTS
    assert without.variants == ("",)
    assert with_variants.frames == without.frames == without.tokens
    for token in without.tokens:
        ours, theirs = (reader.read(token, tuple(SIGNALS)) for reader in (with_variants, without))
        differing = [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
        assert differing == []


def test_depth_of_the_lidar_is_the_same_in_all_variants(cache: Path) -> None:
    """A camera and its points are flipped and turned together."""
    reader = CacheReader.open(cache)
    as_it_is, flipped = (reader.lidar_depth(variant_token(reader.frames[0], name)) for name in ("", "r90x"))
    assert len(as_it_is) == len(flipped) > 100
    assert torch.equal(as_it_is.pixels, flipped.pixels)


def test_a_cache_with_variants_is_verified_copied_compared_listed_and_scored_as_any(
    bevkd: Bevkd, world: Path, cache: Path, plain: Path, tmp_path: Path
) -> None:
    assert verify(cache, deep=True) == []
    bevkd.well("cache", "copy", cache, tmp_path / "copy")
    assert bevkd.well("cache", "diff", cache, tmp_path / "copy", "--json").json["differences"] == []
    differences = bevkd("cache", "diff", plain, cache, "--json").json["differences"]
    assert any("28 only in the second" in line for line in differences)
    info = bevkd.well("cache", "info", cache, "--json").json
    assert info["frames"] == 4
    assert info["variants of each frame"] == "as it is, r90, r180, r270, x, r90x, r180x, r270x"
    assert bevkd.well("cache", "ls", cache, "--json").json[0]["frames"] == 4
    checks = [CacheReader.open(folder).manifest.self_check for folder in (cache, plain)]
    assert checks[0] == checks[1]
    where = ("--set", f"data.root={world}")
    scores = [bevkd.well("evaluate", "--cache", folder, *where, "--json").json for folder in (cache, plain)]
    assert scores[0] == scores[1]
    token = variant_token(CacheReader.open(cache).frames[1], "r90")
    bevkd.well("cache", "show", cache, "--token", token, "--out", tmp_path / "picture.png", *where)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_plan_says_that_variants_multiply_the_space(bevkd: Bevkd, recipe: Path) -> None:
    many = bevkd.well("cache", "plan", recipe, "--frames", "2", "--json").json
    one = bevkd.well("cache", "plan", recipe, "--frames", "2", "--set", "variants=none", "--json").json
    assert (many["frames"], many["variants"], one["frames"], one["variants"]) == (32, 8, 4, 1)
    assert many["bytes"] == pytest.approx(8 * one["bytes"], rel=0.2)
    assert "8 variants of 4, so 8 times the space" in bevkd.well("cache", "plan", recipe, "--frames", "1").out


def test_an_interrupted_cache_with_variants_is_finished_with_the_same_bytes(
    bevkd: Bevkd, recipe: Path, cache: Path, tmp_path: Path
) -> None:
    bevkd.well("cache-teacher", recipe, "--shard", "1/2", "--out", tmp_path / "cache")
    bevkd.well("cache-teacher", recipe, "--out", tmp_path / "cache")
    assert kit.tree(tmp_path / "cache") == kit.tree(cache)


def test_a_student_learns_from_a_cache_with_variants(bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path) -> None:
    recipe = kit.distilled(kit.train_recipe(world, kit.STUDENT, augment="d4"), cache)
    bevkd.well("train-student", kit.write(tmp_path / "student.yaml", recipe), "--out", tmp_path / "run")
    assert all("unidistill/response_box" in line for line in kit.losses(tmp_path / "run"))


@pytest.mark.parametrize(
    ("variants", "x_m", "samples"), [("flips", [-25.6, 25.6], 4), ("d4", [0, 25.6], 2), ("flips", [-3.2, 25.6], 2)]
)
def test_a_grid_gets_the_variants_that_it_is_symmetric_under(
    bevkd: Bevkd, world: Path, tmp_path: Path, variants: str, x_m: list[float], samples: int
) -> None:
    spec = kit.write(tmp_path / "spec.yaml", kit.spec())
    recipe = kit.write(tmp_path / "cache.yaml", kit.synthetic_recipe(world, spec, variants=variants))
    plan = bevkd.well("cache", "plan", recipe, "--set", f"teacher.grid.x_m={x_m}", "--frames", "1", "--json").json
    assert plan["variants"] == samples


def test_a_grid_without_symmetry_has_no_variants(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    spec = kit.write(tmp_path / "spec.yaml", kit.spec())
    recipe = kit.write(tmp_path / "cache.yaml", kit.synthetic_recipe(world, spec, variants="d4"))
    skewed = ("--set", "teacher.grid.x_m=[0, 16]", "--set", "teacher.grid.y_m=[0, 16]")
    outcome = bevkd("cache-teacher", recipe, "--out", tmp_path / "cache", *skewed)
    assert outcome.code == 1
    assert "no flip or turn maps the teacher's grid" in outcome.err
