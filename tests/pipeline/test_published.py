"""Every recipe of a distilled student that ships fits the caches that ships with it, and trains."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.cache.spec import load_spec
from bevkd.config import parse, read_yaml
from bevkd.distill.base import DistillContext
from bevkd.models.detector import Detector, DetectorConfig
from bevkd.progress import Silent
from bevkd.training.checkpoint import Checkpoints
from pipeline.cache_teacher import cache_teacher
from pipeline.recipe import CacheRecipe, StudentRecipe, find, load_cache, load_student, shipped
from pipeline.train_student import train_student
from tests.conformance.cases import segmenter_run
from tests.data import kitti_kit
from tests.pipeline import kit

pytest.importorskip("spconv")  # LiDAR students

Cache = tuple[str, *tuple[str, ...]]
"""Name of the recipe that writes a cache, and what its comments or the student's say to change."""

CENTERPOINT: Cache = ("nuscenes_cache_01",)
RDD: Cache = ("nuscenes_cache_01", "spec=rdd")
PILLARS: Cache = ("nuscenes_cache_public_pillar",)
MASKS: Cache = ("mask2former_cache",)


def pillars(edge: float, reach: float) -> Cache:
    grid = f"{{x_m: [-{reach}, {reach}], y_m: [-{reach}, {reach}], z_m: [-5, 3], cell_m: {4 * edge}}}"
    changes = (f"teacher.detector.grid={grid}", f"teacher.detector.encoder.pillar_m={edge}", "spec=rdd")
    return ("nuscenes_cache_public_pillar", *changes)


CACHES: Mapping[str, Mapping[str, Cache]] = {
    "nuscenes_student": {"teacher": ("nuscenes_cache",)},
    "nuscenes_unidistill_camera_lidar": {"teacher": ("nuscenes_cache_camera",)},
    "nuscenes_unidistill_fusion_lidar": {"teacher": ("nuscenes_cache_fusion",)},
    "nuscenes_unidistill_fusion_camera": {"teacher": ("nuscenes_cache_fusion",)},
    "nuscenes_unidistill_balanced": {"teacher": ("nuscenes_cache",)},
    "nuscenes_x3kd": {"lidar": CENTERPOINT, "masks": MASKS},
    "nuscenes_x3kd_balanced": {"lidar": CENTERPOINT, "masks": MASKS},
    "nuscenes_x3kd_lss": {"lidar": CENTERPOINT, "masks": MASKS},
    "nuscenes_x3kd_radar": {"lidar": CENTERPOINT},
    "nuscenes_x3kd_unlabelled": {"lidar": CENTERPOINT, "masks": MASKS},
    "nuscenes_x3kd_boxes_unlabelled": {"lidar": ("nuscenes_cache_01", "spec=boxes")},
    "nuscenes_itkd": {"teacher": PILLARS},
    "nuscenes_itkd_quarter": {"teacher": PILLARS},
    "nuscenes_itkd_voxel": {"teacher": CENTERPOINT},
    "nuscenes_itkd_voxel_quarter": {"teacher": CENTERPOINT},
    "nuscenes_rdd": {"teacher": RDD},
    "nuscenes_rdd_xs": {"teacher": RDD},
    "nuscenes_rdd_xxs": {"teacher": RDD},
    "nuscenes_rdd_pillar_040": {"teacher": pillars(0.2, 51.2)},
    "nuscenes_rdd_pillar_048": {"teacher": pillars(0.24, 51.84)},
    "nuscenes_rdd_pillar_064": {"teacher": pillars(0.32, 51.2)},
    "kitti_rdd": {"teacher": ("kitti_cache", "spec=rdd")},
    "kitti_rdd_xs": {"teacher": ("kitti_cache", "spec=rdd")},
    "kitti_rdd_pointpillars": {"teacher": ("kitti_cache_pointpillars",)},
    "kitti_rdd_pointpillars_xs": {"teacher": ("kitti_cache_pointpillars",)},
    "demo_student_distilled": {"teacher": ("demo_cache",)},
    "bench_student": {"teacher": ("bench_cache",)},
}
"""Of each distilled student that ships, the recipe of each cache that it reads."""

SAME: Mapping[str, str] = {
    "nuscenes_itkd_quarter": "nuscenes_itkd",
    "nuscenes_itkd_voxel_quarter": "nuscenes_itkd_voxel",
    "nuscenes_rdd_xs": "nuscenes_rdd",
    "nuscenes_rdd_xxs": "nuscenes_rdd",
    "nuscenes_rdd_pillar_048": "nuscenes_rdd_pillar_040",
    "nuscenes_rdd_pillar_064": "nuscenes_rdd_pillar_040",
    "kitti_rdd_xs": "kitti_rdd",
    "kitti_rdd_pointpillars_xs": "kitti_rdd_pointpillars",
}
"""Students that differ from another in their size alone."""

PUBLISHED = [name for name in CACHES if name.startswith(("nuscenes", "kitti")) and name not in SAME]


STATISTICS: Any = dict.fromkeys(("bev_low", "bev_high", "points_low", "points_high"))
"""That a cache of maps keeps statistics of them; their values do not matter."""


def losses_of(recipe: StudentRecipe) -> tuple[Any, ...]:
    """Return the configs of a student's losses."""
    return recipe.distill.losses if recipe.distill else ()


@functools.cache
def built(detector: str, classes: tuple[str, ...]) -> Detector:
    """Return a detector without memory for its weights, from its config as JSON."""
    with torch.device("meta"):
        return Detector(DetectorConfig.model_validate_json(detector), classes)


def shapes_of(cache: CacheRecipe, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the maps that a cache will hold."""
    data: Any = cache.data
    teacher: Any = cache.teacher
    if (config := getattr(teacher, "detector", None)) is None:
        # The demo's and the benchmark's teachers are runs.
        trained = read_yaml(find(name.replace("cache", "teacher")))["detector"] if teacher.name == "detector" else None
        if trained is None:
            return {}
        config = parse(DetectorConfig, trained, name)
    detector, grid = built(config.model_dump_json(), tuple(data.classes)), config.grid.shape
    shapes = {
        "bev_high": (detector.bev_encoder.out_channels, *grid),
        "heatmap": (len(data.classes), *grid),
        "box_code": (len(detector.head.labels_of_task), 10, *grid),
    }
    if getattr(detector.encoder, "fineness", 1) == 1:
        shapes["bev_low"] = (detector.encoder.out_channels, *grid)
    return shapes


def test_every_distilled_student_that_ships_stands_in_the_table() -> None:
    distilled = [name for name in shipped() if (read_yaml(find(name)).get("distill") or {}).get("losses")]
    assert sorted(CACHES) == distilled


@pytest.mark.parametrize("name", CACHES)
def test_a_student_fits_the_caches_that_it_names(name: str) -> None:
    recipe = load_student(name, [])
    data: Any = recipe.data
    student = built(recipe.detector.model_dump_json(), tuple(data.classes))
    assert recipe.distill is not None
    assert set(recipe.distill.caches) == set(CACHES[name]) == {loss.teacher for loss in losses_of(recipe)}
    for teacher, (cache_name, *changes) in CACHES[name].items():
        cache = load_cache(cache_name, changes)
        grid = getattr(cache.teacher, "grid", None) or getattr(getattr(cache.teacher, "detector", None), "grid", None)
        assert grid in (None, recipe.detector.grid)
        of_teacher: Any = cache.data
        assert tuple(of_teacher.classes) == tuple(data.classes)
        signals, shapes = load_spec(cache.spec).signals, shapes_of(cache, cache_name)
        for loss in losses_of(recipe):
            if loss.teacher == teacher:
                assert set(loss.signals()) <= set(signals), f"{cache_name} does not hold what {loss.name} reads"
                assert loss.misfits(DistillContext(student, shapes, STATISTICS)) == []


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("nuscenes_student", (100, 40, 10)),
        ("nuscenes_unidistill_camera_lidar", (10, 5, 1)),
        ("nuscenes_unidistill_fusion_lidar", (10, 1, 10)),
        ("nuscenes_unidistill_fusion_camera", (10, 5, 10)),
    ],
)
def test_each_path_of_unidistill_has_its_published_weights(name: str, weights: tuple[float, ...]) -> None:
    (loss,) = losses_of(load_student(name, []))
    assert (loss.feature, loss.relation, loss.response) == weights
    assert loss.adapter == ("conv" if name.endswith("camera_lidar") else False)


ONE_TASK = ["data.classes=[car,pedestrian,bicycle]", "detector.head.tasks=[[car,pedestrian,bicycle]]"]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # The paper counts its Waymo models: three classes, one task.
        *[("nuscenes_rdd", 4.0), ("nuscenes_rdd_xs", 2.8), ("nuscenes_rdd_xxs", 1.0)],
        *[(f"nuscenes_rdd_pillar_{edge}", 5.2) for edge in ("040", "048", "064")],
        *[("kitti_rdd", 1.6), ("kitti_rdd_xs", 1.4)],
    ],
)
def test_students_of_rdd_have_as_many_parameters_as_published(name: str, millions: float) -> None:
    recipe = load_student(name, ONE_TASK if name.startswith("nuscenes") else [])
    data: Any = recipe.data
    student = built(recipe.detector.model_dump_json(), tuple(data.classes))
    assert sum(each.numel() for each in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.07)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("nuscenes_itkd", 192),
        ("nuscenes_itkd_quarter", 96),
        ("nuscenes_itkd_voxel", 256),
        ("nuscenes_itkd_voxel_quarter", 128),
    ],
)
def test_students_of_itkd_have_the_published_widths(name: str, channels: int) -> None:
    assert load_student(name, []).detector.scaled().bev_encoder.out_channels == channels


# ---------------------------------------------------------------------------------------------- two steps of each

CLASSES = tuple(load_student("nuscenes_student", []).data.classes)  # type: ignore[attr-defined]
NARROW = "{layers: [0], strides: [1], channels: [8], up_channels: [8]}"
BACKBONE = (
    "{embedding_size: 16, hidden_sizes: [16, 16, 16, 16], depths: [1, 1, 1, 1], layer_type: basic, "
    "out_features: [stage3, stage4]}"
)
CAMERA = {
    "backbone.options": BACKBONE,
    "image_height": "32",
    "image_width": "96",
    "neck_channels": "8",
    "channels": "8",
    "depth.step": "4.0",
}
ENCODERS: Mapping[str, Mapping[str, str]] = {
    "lift_splat": CAMERA,
    "voxel": {"voxel_m": "[0.8, 0.8, 1.0]", "channels": "[8, 8]", "blocks": "1", "out_channels": "8"},
    "pillar": {"pillar_m": "0.8", "channels": "[8]"},
    "radar": {"channels": "[8]"},
}
TRAINING = {
    "steps": 2,
    "batch_size": 2,
    "workers": 0,
    "threads": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "precision": "no",
}
KITTI_GRID = {"x_m": [0, 51.2], "y_m": [-25.6, 25.6], "z_m": [-3, 1], "cell_m": 1.6}
KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")


def small(name: str, root: Path) -> list[str]:
    """Return the overrides that make a student of a second of a published one; losses and augmentation stay."""
    recipe = load_student(name, [])
    kitti = recipe.data.name == "kitti"
    encoder = dict(ENCODERS[recipe.detector.encoder.name])
    if kitti and "voxel_m" in encoder:
        encoder["voxel_m"] = "[0.8, 0.8, 0.4]"
    changes = {
        "data.root": str(root),
        **({} if kitti else {"data.version": "v1.0-world", "data.split": "world_train"}),
        "evaluation": "null",
        "device": "cpu",
        "detector.grid": str(KITTI_GRID if kitti else kit.GRID),
        "detector.bev_encoder": NARROW,
        "detector.head.channels": "8",
        **{f"detector.encoder.{key}": value for key, value in encoder.items()},
    }
    if kitti:
        del changes["detector.head.channels"]
    return [f"{key}={value}" for key, value in changes.items()] + [
        f"training.{key}={value}" for key, value in TRAINING.items()
    ]


SIGNALS = {**kit.SIGNALS, "box_code": {"encoding": "sparse", "threshold": 0.1}}


@pytest.fixture(scope="module")
def kitti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a KITTI folder of four frames with an object each."""
    root, rng, tokens = tmp_path_factory.mktemp("kitti"), np.random.default_rng(0), [f"{i:06d}" for i in range(4)]
    kitti_kit.write(root, {token: [kitti_kit.label("Car", (1.0, 1.7, 12.0))] for token in tokens}, {"train": tokens})
    for token in tokens:
        points = rng.uniform((2, -20, -2.5, 0), (50, 20, 0.5, 1), (2000, 4))
        kitti_kit.write_points(root, token, points.tolist())
    return root


@pytest.fixture(scope="module")
def maps(world: Path, kitti: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the cache of a made-up detector, by data set: as wide as the small students, with every signal."""
    folder = tmp_path_factory.mktemp("maps")
    spec = {"name": "every", "block": 2, "signals": SIGNALS}
    path = kit.write(folder / "spec.yaml", spec)
    data = {
        "nuscenes": kit.data(world, classes=list(CLASSES)),
        "kitti": {"name": "kitti", "root": str(kitti), "split": "train", "classes": list(KITTI_CLASSES)},
    }
    for name, values in data.items():
        recipe = kit.synthetic_recipe(world, path, data=values)
        recipe["teacher"] |= {"tasks": 3, "grid": KITTI_GRID} if name == "kitti" else {"tasks": 6}
        cache_teacher(parse(CacheRecipe, recipe, name), str(folder / name), None, Silent())
    return {name: folder / name for name in data}


@pytest.fixture(scope="module")
def masks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache of an untrained segmenter."""
    folder = tmp_path_factory.mktemp("masks")
    spec = {
        "name": "masks",
        "block": 2,
        "signals": {"instances": {"encoding": "masks", "min_score": 0.0, "capacity": 12}},
    }
    recipe = {
        "data": kit.data(world, classes=list(CLASSES)),
        "teacher": {"name": "segmenter", **segmenter_run(folder, CLASSES), "grid": kit.GRID},
        "spec": str(kit.write(folder / "spec.yaml", spec)),
        "loaders": 0,
        "device": "cpu",
    }
    cache_teacher(parse(CacheRecipe, recipe, "masks"), str(folder / "cache"), None, Silent())
    return folder / "cache"


def test_students_of_another_size_have_the_losses_and_the_training_of_their_model() -> None:
    for name, model in SAME.items():
        changes = [*small(name, Path("nowhere")), "distill.caches={}", "detector.widths={}"]
        assert load_student(name, changes) == load_student(model, changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_student_of_every_published_recipe_trains_and_resumes(
    name: str, world: Path, kitti: Path, maps: dict[str, Path], masks: Path, tmp_path: Path
) -> None:
    data = name.split("_")[0]
    caches = {teacher: str(masks if teacher == "masks" else maps[data]) for teacher in CACHES[name]}
    changes = [*small(name, world if data == "nuscenes" else kitti), f"distill.caches={caches}"]
    if "masks" in caches:
        changes.append("distill.losses.1.instance_head.channels=8")
    recipe, run = load_student(name, changes), tmp_path / "run"
    train_student(recipe, run, False, Silent())
    logged = kit.losses(run)
    assert len(logged) == 2
    for loss in losses_of(recipe):
        terms = [key for key in logged[1] if key.startswith(f"{loss.name}")]
        assert terms, f"{loss.name} gave no term"
    assert all(np.isfinite(value) for line in logged for value in line.values())
    before = kit.weights_of(run)
    (run / "model.safetensors").unlink()
    shutil.rmtree(Checkpoints(run / "checkpoints", 2).path(2).parent)
    train_student(recipe, run, True, Silent())
    assert kit.weights_of(run) == before
