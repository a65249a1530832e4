"""Distillation in somebody else's training loop."""

from __future__ import annotations

import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

import bevkd
from bevkd import BEVAffine, BEVGrid, Boxes, CacheReader, Distiller
from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.distill import x3kd
from bevkd.distill.base import DistillContext, TeacherBatch
from bevkd.errors import ConfigError, ContractError
from bevkd.models.detector import DetectorConfig, DetectorOutput
from bevkd.models.heads.center import HeadOutput
from bevkd.progress import Silent
from pipeline.cache_teacher import cache_teacher
from pipeline.recipe import CacheRecipe
from pipeline.world import make_world
from tests.docs.test_how_to import python
from tests.pipeline import kit

GRID = BEVGrid(x_m=(-25.6, 25.6), y_m=(-25.6, 25.6), z_m=(-5, 3), cell_m=0.8)
CLASSES, TASKS = kit.CLASSES, kit.HEAD["tasks"]
UNIDISTILL = {"name": "unidistill", "feature": 1, "relation": 1, "response": 1, "adapter": True}
CHANNELS = {"bev_low": 16, "bev_high": 24}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a world and a made-up teacher's cache of it, named as the demo names them."""
    folder = tmp_path_factory.mktemp("own-loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        make_world(folder / "demo" / "world", "tiny", None, 0, Silent())
        teacher = {"name": "synthetic", "grid": GRID.model_dump(), "bev_low": 8, "bev_high": 8, "tasks": 2, "boxes": 10}
        recipe = {"data": kit.data(folder / "demo" / "world"), "teacher": teacher, "spec": "unidistill", "loaders": 0}
        made = parse(CacheRecipe, {**recipe, "device": "cpu"}, "a test")
        cache_teacher(made, str(folder / "demo" / "cache"), limit=None, progress=Silent())
    return folder


@pytest.fixture
def cache(demo: Path) -> Path:
    return demo / "demo" / "cache"


def opened(cache: Path, *losses: dict[str, Any], **changes: Any) -> Distiller:
    settings = {"grid": GRID, "classes": CLASSES, "tasks": TASKS, "channels": CHANNELS, **changes}
    return Distiller.open({"teacher": str(cache)}, losses or [{"name": "x3kd"}, UNIDISTILL], **settings)


def maps(frames: int = 2) -> dict[str, torch.Tensor]:
    """Return maps of a model."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"bev_low": (16,), "bev_high": (24,), "heatmap": (5,), "box_code": (2, 10)}
    return {
        name: torch.randn(frames, *shape, *GRID.shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def a_box() -> Boxes:
    return Boxes(torch.tensor([[3.0, 4.0, 0.0, 4.0, 2.0, 1.5, 0.3, 0.0, 0.0]]), torch.tensor([0]), torch.ones(1))


def given(distiller: Distiller, cache: Path, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a step."""
    tokens = CacheReader.open(cache).tokens[:2]
    stored = default_collate([distiller.stored(token) for token in tokens])
    return {"stored": stored, "tokens": tokens, "boxes": [a_box(), Boxes.empty()], **maps(), **changes}


def test_the_loop_of_the_how_to_runs_as_it_stands_and_learns(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(code for title, code in python("own-loop") if title == "own_loop.py")
    code = code.replace("range(50)", "range(2)").replace("num_workers=2", "num_workers=0")
    (demo / "own_loop.py").write_text(code)
    monkeypatch.chdir(demo)
    names = runpy.run_path("own_loop.py")
    history, distiller = names["history"], names["distiller"]
    assert len(history) == 2
    assert {"x3kd/output_heatmap", "unidistill/feature", "unidistill/response_box"} <= set(history[0])
    assert all(torch.isfinite(torch.tensor(list(terms.values()))).all() for terms in history)
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert len(names["frames"].tokens) == 4  # the validation frames of the world are not in the cache


def test_the_terms_are_those_of_the_losses_themselves(cache: Path) -> None:
    head = {key: kit.HEAD[key] for key in ("min_overlap", "min_radius")}
    distiller = opened(cache, {"name": "x3kd"}, head=head)
    arguments = given(distiller, cache)
    affine = BEVAffine(flip_x=True, rotation_rad=0.3, scale=1.05)
    matrices = torch.stack([affine.matrix(), BEVAffine.identity().matrix()]).float()
    found = distiller(**arguments, bev_affines=matrices)

    reader, detector = CacheReader.open(cache), {**kit.STUDENT, "grid": GRID.model_dump()}
    student = bevkd_detector(detector)
    loss = x3kd.build(x3kd.Config(), DistillContext(student, reader.manifest.sample_shapes))
    teacher = TeacherBatch.decode(
        reader.manifest.spec, arguments["stored"]["teacher"], (affine, BEVAffine.identity()), GRID
    )
    head = HeadOutput(arguments["heatmap"], arguments["box_code"])
    output = DetectorOutput(arguments["bev_low"], arguments["bev_high"], head)
    batch = Batch(arguments["tokens"], tuple(arguments["boxes"]), torch.ones(2, dtype=torch.bool), teacher.affines)
    wanted = loss(output, teacher, batch)
    assert set(found) == {f"x3kd/{name}" for name in wanted}
    for name, term in wanted.items():
        assert float(term.detach()) > 0
        torch.testing.assert_close(found[f"x3kd/{name}"], term)


def bevkd_detector(values: dict[str, Any]) -> Any:
    from bevkd.models.detector import Detector

    return Detector(parse(DetectorConfig, values, "a test"), CLASSES)


def test_gradients_reach_the_model_and_the_adapters(cache: Path) -> None:
    distiller = opened(cache)
    arguments = given(distiller, cache)
    torch.stack([*distiller(**arguments).values()]).sum().backward()
    assert all(bool(arguments[name].grad.any()) for name in maps())
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_a_map_that_no_loss_reads_may_be_left_out(cache: Path) -> None:
    distiller = opened(cache, {"name": "x3kd"}, channels=None)
    terms = distiller(**given(distiller, cache, bev_low=None, bev_high=None))
    assert all(bool(term.isfinite()) for term in terms.values())


def test_a_map_that_a_loss_reads_is_asked_for(cache: Path) -> None:
    distiller = opened(cache)
    with pytest.raises(ContractError, match=r"unidistill/feature cannot be told without bev_low"):
        distiller(**given(distiller, cache, bev_low=None))


def test_everything_that_does_not_fit_is_said_at_once(cache: Path) -> None:
    with pytest.raises(ContractError) as error:
        opened(
            cache,
            {"name": "x3kd", "teacher": "nobody"},
            {"name": "rdd"},
            UNIDISTILL,
            channels=None,
            tasks=None,
            classes=CLASSES,
            tokens=["nowhere"],
        )
    text = str(error.value)
    assert "'nobody', given are: teacher" in text
    assert "1 of 1 samples are not in the cache: nowhere" in text


def test_missing_channels_are_named(cache: Path) -> None:
    with pytest.raises(ContractError, match=r"a loss compares bev_low: give channels=\{'bev_low': ...\}"):
        opened(cache, {**UNIDISTILL, "adapter": False}, channels=None)


def test_unknown_losses_are_named(cache: Path) -> None:
    with pytest.raises(ConfigError, match="unknown plug-in 'nonsense'"):
        opened(cache, {"name": "nonsense"})


def test_the_reader_of_the_data_set_is_small_to_pickle(cache: Path) -> None:
    distiller = opened(cache)
    token = CacheReader.open(cache).tokens[0]
    again = pickle.loads(pickle.dumps(distiller.stored))
    assert len(pickle.dumps(distiller.stored)) < 2000
    assert all(
        torch.equal(value, distiller.stored(token)["teacher"][key]) for key, value in again(token)["teacher"].items()
    )


def test_the_short_names_are_loaded_on_demand_and_the_package_stays_light() -> None:
    code = (
        "import bevkd, sys, json\n"
        "before = [name for name in sys.modules if name.startswith('bevkd.') or name in ('torch', 'numpy')]\n"
        "from bevkd import BEVGrid\n"
        "print(json.dumps([before, BEVGrid.__module__, dir(bevkd)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=kit.ROOT)
    assert json.loads(done.stdout) == [[], "bevkd.grid", sorted(bevkd.__all__)]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bevkd.nonsense  # noqa: B018


def test_losses_of_one_name_keep_their_terms_apart(cache: Path) -> None:
    distiller = opened(cache, {"name": "x3kd"}, {"name": "x3kd", "output": 2})
    terms = distiller(**given(distiller, cache))
    torch.testing.assert_close(terms["x3kd-2/output_heatmap"], 2 * terms["x3kd/output_heatmap"])


def test_it_says_which_frames_are_cached(cache: Path) -> None:
    distiller = opened(cache)
    assert CacheReader.open(cache).tokens[0] in distiller
    assert "nowhere" not in distiller


def test_a_schedule_scales_terms_by_the_progress_that_the_loop_tells(cache: Path) -> None:
    scheduled = {**UNIDISTILL, "schedule": {"response": {"warmup": 0.5}}}
    torch.manual_seed(0)
    plain = opened(cache, UNIDISTILL)
    torch.manual_seed(0)
    distiller = opened(cache, scheduled)
    arguments = given(plain, cache)
    wanted, found = plain(**arguments), distiller(**arguments, progress=0.25)
    torch.testing.assert_close(found["unidistill/feature"], wanted["unidistill/feature"])
    torch.testing.assert_close(found["unidistill/response_class"], wanted["unidistill/response_class"] / 2)


@pytest.mark.parametrize("progress", [{}, {"progress": 1.5}])
def test_a_schedule_without_progress_is_refused_by_name(cache: Path, progress: dict[str, float]) -> None:
    distiller = opened(cache, {**UNIDISTILL, "schedule": {"response": {"warmup": 0.5}}})
    with pytest.raises(ContractError, match=r"unidistill has a schedule: give progress=step / steps"):
        distiller(**given(distiller, cache), **progress)


def test_features_are_standardised_by_the_statistics_of_the_cache(cache: Path) -> None:
    torch.manual_seed(0)
    distiller = opened(cache, {**UNIDISTILL, "standardise": True})
    torch.manual_seed(0)
    raw = opened(cache, UNIDISTILL)
    arguments = given(distiller, cache)
    found, plain = distiller(**arguments), raw(**arguments)
    assert not torch.equal(found["unidistill/feature"], plain["unidistill/feature"])
    assert torch.equal(found["unidistill/relation"], plain["unidistill/relation"])
    assert "mean" not in " ".join(distiller.state_dict())
