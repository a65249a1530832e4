from __future__ import annotations

import typing
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from bevkd.cache.spec import CacheSpec, load_spec
from bevkd.distill.unidistill import Config as UniDistill
from bevkd.errors import ConfigError
from bevkd.signals import MAPS


def spec(**signals: object) -> CacheSpec:
    return CacheSpec.model_validate({"name": "test", "signals": signals})


SHIPPED = ("all_float16", "all_methods", "boxes", "instances", "points", "unidistill", "x3kd")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_load_by_name(name: str) -> None:
    assert load_spec(name).name == name


def test_the_specs_of_the_methods_store_what_their_losses_read() -> None:
    stored = {name: set(load_spec(name).signals) for name in SHIPPED}
    assert stored["unidistill"] == stored["all_methods"] == {*MAPS, "boxes"}
    assert stored["x3kd"] == {"bev_low", "bev_high", "boxes"}
    assert set(UniDistill(source="points", response=0).signals()) == stored["points"]
    assert set(UniDistill(pseudo_score=0.5).signals()) <= stored["unidistill"]


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_spec_uses_an_encoding_of_the_first_release_that_blurs_gradients(name: str) -> None:
    assert not {"uint8", "int8", "logit8"} & {stored.encoding for stored in load_spec(name).signals.values()}


def test_the_float16_spec_quantises_nothing() -> None:
    assert {stored.encoding for stored in load_spec("all_float16").signals.values()} == {"float16", "boxes"}


def test_a_spec_loads_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "block": 4, "signals": {"bev_low": {"encoding": "int8"}}}))
    assert load_spec(path).block == load_spec(str(path)).block == 4


def test_an_unknown_spec_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown cache spec 'unidistil'\. Known: all_float16, .*unidistill"):
        load_spec("unidistil")


def test_a_missing_spec_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_spec(tmp_path / "none.yaml")


def test_all_faults_of_a_spec_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    signals = {"bev_low": {"encoding": "uint4"}, "bev_high": {"encoding": "int8", "max_error": 0, "colour": 1}}
    path.write_text(yaml.safe_dump({"name": "mine", "block": 2000, "signals": signals}))
    with pytest.raises(ConfigError) as error:
        load_spec(path)
    for part in ("block", "signals.bev_low.encoding", "signals.bev_high.max_error", "signals.bev_high.colour"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("signal", "encoding", "advice"),
    [
        ("boxes", "float16", "set it to boxes"),
        ("bev_low", "boxes", "set it to float16, root8, uint8 or int8"),
        ("bev_low", "logits", "set it to float16, root8, uint8 or int8"),
        ("points_low", "sparse", "set it to float16 or root8"),
        ("instances", "boxes", "set it to masks"),
        ("bev_mid", "uint8", "is no signal; signals are bev_low"),
    ],
)
def test_an_encoding_that_cannot_hold_its_signal_is_refused(signal: str, encoding: str, advice: str) -> None:
    with pytest.raises(ValidationError, match=advice):
        spec(**{signal: {"encoding": encoding}})


def test_a_spec_survives_its_own_json() -> None:
    for name in SHIPPED:
        loaded = load_spec(name)
        assert CacheSpec.model_validate(loaded.model_dump(mode="json")) == loaded


def test_the_annotations_of_the_spec_resolve() -> None:
    assert typing.get_type_hints(CacheSpec)["block"] is int
