"""The boxes of a finished cache are scored before it is sealed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bevkd.cache.catalogue import differences
from bevkd.cache.manifest import Header, Manifest, open_manifest
from bevkd.cache.reader import CacheReader
from bevkd.cache.self_check import SelfCheck
from bevkd.cache.spec import CacheSpec
from bevkd.cache.store import open_store
from bevkd.cache.writer import CacheWriter
from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.grid import BEVGrid
from bevkd.progress import Silent
from bevkd.types import Boxes
from pipeline import self_check
from pipeline.caches import info
from pipeline.self_check import check_boxes, reach_m
from tests.cache import kit as cache_kit
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd, Synthetic

GRID = BEVGrid.model_validate(kit.GRID)
GOLDEN = Path(cache_kit.__file__).parent / "golden" / "v1"


@pytest.fixture
def source(world: Path, bevkd: Bevkd) -> NuScenesSource:
    return build(config(world, bevkd))


def config(world: Path, bevkd: Bevkd, **changes: Any) -> Config:
    return Config(**kit.data(world, **changes), index_dir=bevkd.home / "bevkd" / "nuscenes")


def as_it_is(boxes: Boxes) -> Boxes:
    return boxes


def turned(boxes: Boxes) -> Boxes:
    """Return boxes in a frame whose x axis points to the right, as of a checkpoint with another convention."""
    x, y = boxes.values[:, 0:1], boxes.values[:, 1:2]
    return Boxes(torch.cat([y, -x, boxes.values[:, 2:]], dim=1), boxes.labels, boxes.scores)


def inside_out(boxes: Boxes) -> Boxes:
    return Boxes(-boxes.values, boxes.labels, boxes.scores)


def sealed(
    folder: Path, source: NuScenesSource, teacher: Callable[[Boxes], Boxes] = as_it_is, order: int = 1
) -> Manifest:
    """Return the manifest of a cache of what ``teacher`` makes of the annotations."""
    spec = {"name": "boxes", "block": 1, "signals": {"boxes": {"encoding": "boxes"}}}
    header = Header(
        spec=CacheSpec.model_validate(spec),
        teacher=cache_kit.TEACHER,
        dataset=source.identity,
        grid=GRID,
        classes=source.classes,
        tokens=source.tokens,
    )
    writer = CacheWriter.open(folder, header, {})
    for block in writer.pending()[::order]:
        (token,) = header.block_tokens(block)
        writer.write_block(block, [{"boxes": teacher(source.annotations(token))}])
    return writer.seal(partial(check_boxes, source, Silent()))


def check_of(manifest: Manifest) -> SelfCheck:
    assert manifest.self_check is not None
    return manifest.self_check


# ---------------------------------------------------------------------------------------------- what is found


def test_a_perfect_teacher_scores_all_and_is_no_noise(tmp_path: Path, source: NuScenesSource) -> None:
    check = check_of(sealed(tmp_path / "cache", source))
    assert check.scores["mean AP"] == pytest.approx(1, abs=0.01)
    assert check.by_chance["mean AP"] < 0.1
    assert (check.frames, check.max_distance_m) == (4, 25.6)
    assert not check.noise
    assert check.text.startswith("NDS 0.")
    assert "WARNING" not in check.text


@pytest.mark.parametrize("wrong", [turned, lambda boxes: boxes[:0]], ids=["another frame", "nothing"])
def test_boxes_that_score_like_noise_are_called_out(
    tmp_path: Path, source: NuScenesSource, wrong: Callable[[Boxes], Boxes]
) -> None:
    check = check_of(sealed(tmp_path / "cache", source, wrong))
    assert check.noise
    assert max(check.scores.values()) < 0.05
    for advice in ("WARNING", "checkpoint", "classes", "yaw", "sweeps"):
        assert advice in check.text


@pytest.mark.parametrize(
    ("scores", "chance", "noise"),
    [
        ({"mAP": 0.009}, {}, True),
        ({"mAP": 0.011}, {}, False),
        ({"mAP": 0.03}, {"mAP": 0.02}, True),
        ({"mAP": 0.05}, {"mAP": 0.02}, False),
        ({"mAP": 0.0, "NDS": 0.3}, {"mAP": 0.0, "NDS": 0.01}, False),
        ({}, {}, False),
    ],
)
def test_noise_is_what_chance_gives_too(scores: dict[str, float], chance: dict[str, float], noise: bool) -> None:
    assert SelfCheck(scores=scores, by_chance=chance).noise is noise


def test_large_caches_are_scored_on_frames_spread_over_them(
    tmp_path: Path, source: NuScenesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "MOST_FRAMES", 2)
    assert check_of(sealed(tmp_path / "cache", source)).frames == 2


@pytest.mark.parametrize(
    ("x_m", "y_m", "reach"), [((-8, 8), (-6, 6), 6), ((-8, 4), (-6, 6), 4), ((0, 8), (-6, 6), None)]
)
def test_boxes_beyond_what_the_grid_holds_all_around_are_left_out(
    x_m: tuple[float, float], y_m: tuple[float, float], reach: float | None
) -> None:
    assert reach_m(BEVGrid(x_m=x_m, y_m=y_m, cell_m=1.0)) == reach


# ---------------------------------------------------------------------------------------------- what is not scored


def test_a_data_set_without_metrics_is_not_scored_and_says_so(
    tmp_path: Path, source: NuScenesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "metrics", None)
    check = check_of(sealed(tmp_path / "cache", source))
    assert check.text == "not scored: the data set 'nuscenes' has no metrics"
    assert not check.noise


def test_a_cache_without_boxes_is_not_scored_and_says_so(tmp_path: Path, source: NuScenesSource) -> None:
    cache_kit.write(tmp_path / "cache", cache_kit.header(signals={"bev_low": {"encoding": "uint8"}}))
    check = check_boxes(source, Silent(), CacheReader.open(tmp_path / "cache"))
    assert check.text == "not scored: the cache holds no boxes"


def test_boxes_that_the_metrics_refuse_do_not_keep_a_cache_from_being_sealed(
    tmp_path: Path, source: NuScenesSource
) -> None:
    manifest = sealed(tmp_path / "cache", source, inside_out)
    assert "the metrics refuse its boxes" in check_of(manifest).text


def test_a_cache_that_was_sealed_without_a_check_opens_and_says_how_to_score_it() -> None:
    assert open_manifest(open_store(GOLDEN)).self_check is None
    assert info(str(GOLDEN))["self-check"] == "none; 'bevkd evaluate --cache' scores the boxes"


# ---------------------------------------------------------------------------------------------- what it is part of


def test_whoever_seals_writes_the_same_manifest(tmp_path: Path, source: NuScenesSource) -> None:
    first, second = sealed(tmp_path / "a", source), sealed(tmp_path / "b", source, order=-1)
    assert first == second
    assert kit.tree(tmp_path / "a") == kit.tree(tmp_path / "b")


def test_hidden_labels_count_and_change_nothing(tmp_path: Path, world: Path, bevkd: Bevkd) -> None:
    every, few = build(config(world, bevkd)), build(config(world, bevkd, labels=0.1))
    assert few.labelled < every.labelled
    assert sealed(tmp_path / "few", few).name == sealed(tmp_path / "every", every).name


def test_the_check_is_under_the_seal(tmp_path: Path, source: NuScenesSource) -> None:
    good, bad = sealed(tmp_path / "good", source), sealed(tmp_path / "bad", source, turned)
    changed = good.model_copy(update={"self_check": check_of(bad), "name": "0" * 64})
    (found,) = differences(good, changed)
    assert found.startswith("self_check: NDS 0.")
    path = tmp_path / "good" / "manifest.json"
    path.write_text(path.read_text().replace('"frames": 4', '"frames": 5'))
    with pytest.raises(Exception, match=r"was changed after the cache was sealed|frames"):
        open_manifest(open_store(tmp_path / "good"))


# ---------------------------------------------------------------------------------------------- on the command line


def test_cache_teacher_and_cache_info_show_it(bevkd: Bevkd, synthetic: Synthetic) -> None:
    shown = bevkd.well("cache-teacher", synthetic.recipe, "--out", synthetic.cache).out
    assert "self-check: NDS 0" in shown
    assert "WARNING: these boxes score like noise" in shown
    told = bevkd.well("cache-teacher", synthetic.recipe, "--out", synthetic.cache, "--json").json
    assert told["self_check"]["noise"] is True
    assert set(told["self_check"]["scores"]) == {"mAP", "NDS", "mean AP"}
    assert "score like noise" in bevkd.well("cache", "info", synthetic.cache, "--json").json["self-check"]


@pytest.mark.parametrize(("frames", "told"), [(5, True), (500, False)])
def test_few_frames_are_an_excuse(frames: int, told: bool) -> None:
    check = SelfCheck(scores={"mAP": 0.0}, frames=frames)
    assert ("On so few frames" in check.text) is told
    assert "score like noise" in check.text
