"""Files are read strictly: every fault at once, each with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from bevkd.config import PluginConfig, StrictModel, apply_overrides, digest, load, parse, plugin, read_yaml
from bevkd.errors import ConfigError


class Inner(StrictModel):
    size: int = Field(1, gt=0)
    kind: Literal["a", "b"] = "a"


class Outer(StrictModel):
    name: str
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    share: float | None = None


class WithPlugin(StrictModel):
    loss: plugin("bevkd.distill")  # type: ignore[valid-type]
    losses: tuple[plugin("bevkd.distill"), ...] = ()  # type: ignore[valid-type]


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(model: type[StrictModel], values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(model, values, "a.yaml")
    return str(caught.value).splitlines()


# ---------------------------------------------------------------------------------------------- parse


def test_every_fault_is_reported_at_once_with_its_path() -> None:
    found = faults(Outer, {"inner": {"size": 0, "kind": "c"}, "several": [{}, {"sise": 2}], "share": "much"})
    assert found[0] == "a.yaml has 5 fault(s):"
    assert len(found) == 6
    assert "  - name: missing; this key is required" in found
    assert "  - several.1.sise: unknown key; remove it or correct its spelling" in found
    assert any(line.startswith("  - inner.size: ") and line.endswith("got 0") for line in found)
    assert any(line.startswith("  - inner.kind: ") and line.endswith("got 'c'") for line in found)
    assert any(line.startswith("  - share: ") for line in found)


def test_a_config_cannot_be_changed() -> None:
    config = parse(Outer, {"name": "x"}, "a.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "y"


# ---------------------------------------------------------------------------------------------- plug-ins


def test_a_plug_in_is_read_with_its_own_config() -> None:
    config = parse(WithPlugin, {"loss": {"name": "x3kd", "score": 0.5}}, "a.yaml")
    assert config.loss.score == 0.5
    assert config.loss.teacher == "teacher"


def test_faults_inside_a_plug_in_have_their_whole_path() -> None:
    found = faults(WithPlugin, {"loss": {"name": "x3kd", "score": 5}, "losses": [{"name": "unidistill", "wait": 1}]})
    assert any(line.startswith("  - loss.score: ") for line in found)
    assert "  - losses.0.wait: unknown key; remove it or correct its spelling" in found


def test_an_unknown_plug_in_is_reported_with_the_known_ones() -> None:
    found = faults(WithPlugin, {"loss": {"name": "x4kd"}})
    assert "loss: unknown plug-in 'x4kd' of bevkd.distill. Known: " in found[1]
    assert "unidistill" in found[1]


@pytest.mark.parametrize("value", [{}, {"score": 1}])
def test_a_plug_in_without_a_name_is_told_the_names(value: dict[str, Any]) -> None:
    assert "loss: needs 'name', one of: " in faults(WithPlugin, {"loss": value})[1]


@pytest.mark.parametrize("value", [{"name": 3}, {"name": ["x3kd"]}, {"name": None}, "x3kd", 3, None])
def test_a_plug_in_that_is_no_mapping_with_a_name_is_a_fault_of_the_file(value: Any) -> None:
    assert faults(WithPlugin, {"loss": value})[1].startswith("  - loss")


def test_a_dumped_plug_in_keeps_its_own_keys() -> None:
    config = parse(WithPlugin, {"loss": {"name": "x3kd", "score": 0.5}}, "a.yaml")
    dumped = config.model_dump(mode="json")
    assert dumped["loss"]["score"] == 0.5
    assert parse(WithPlugin, dumped, "dump") == config
    assert isinstance(config.loss, PluginConfig)


# ---------------------------------------------------------------------------------------------- files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [1,", "- 1\n- 2", "", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        read_yaml(write(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a YAML file"):
        read_yaml(path)


def test_yaml_cannot_build_python_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a YAML file"):
        read_yaml(write(tmp_path, "name: !!python/object/apply:os.getcwd []"))


def test_a_date_is_read_as_its_text(tmp_path: Path) -> None:
    assert load(Outer, write(tmp_path, "name: 2026-11-21")).name == "2026-11-21"


def test_a_file_with_overrides_gives_the_config(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\ninner: {size: 2}\n")
    assert load(Outer, path, ["inner.size=3", "share=0.5"]) == Outer(name="x", inner=Inner(size=3), share=0.5)


def test_faults_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "nam: x")
    with pytest.raises(ConfigError, match=str(path)):
        load(Outer, path)


# ---------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=1", {"a": 1}),
        ("a=text", {"a": "text"}),
        ("a=", {"a": None}),
        ("a=x=y", {"a": "x=y"}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a={b: 1}", {"a": {"b": 1}}),
        ("a.b.c=1", {"a": {"b": {"c": 1}}}),
        ("a=3.0e-3", {"a": 0.003}),
        ("a=true", {"a": True}),
    ],
)
def test_an_override_is_read_as_yaml(override: str, expected: dict[str, Any]) -> None:
    assert apply_overrides({}, [override]) == expected


def test_an_override_reaches_into_lists_by_index() -> None:
    values = {"losses": [{"name": "a"}, {"name": "b", "weights": [1, 2]}]}
    changed = apply_overrides(values, ["losses.1.weights.0=5", "losses.0={name: c}"])
    assert changed == {"losses": [{"name": "c"}, {"name": "b", "weights": [5, 2]}]}


def test_the_given_values_stay_as_they_are() -> None:
    values = {"a": {"b": [1]}}
    apply_overrides(values, ["a.b.0=2", "c=3"])
    assert values == {"a": {"b": [1]}}


def test_a_later_override_wins_and_null_can_be_filled() -> None:
    assert apply_overrides({"a": None}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_an_alias_in_the_file_is_not_changed_with_its_twin(tmp_path: Path) -> None:
    values = read_yaml(write(tmp_path, "first: &x {size: 1}\nsecond: *x\n"))
    assert apply_overrides(values, ["first.size=2"]) == {"first": {"size": 2}, "second": {"size": 1}}


def test_every_override_that_cannot_be_applied_is_named() -> None:
    overrides = ["novalue", "=1", "list.5=1", "list.x.y=1", "text.deep=1", "a=[1,"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"list": [1, 2], "text": "abc"}, ["fine=1", *overrides])
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(overrides)
    for line, override in zip(lines, overrides, strict=True):
        assert repr(override) in line
    assert "list is a list of 2 entries" in lines[2]


@given(st.recursive(st.integers() | st.booleans() | st.text("abc", max_size=3), st.lists, max_leaves=5))
def test_any_value_can_be_set_through_its_yaml(value: Any) -> None:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True)
    assert apply_overrides({}, [f"a={text}"]) == {"a": value}


# ---------------------------------------------------------------------------------------------- digest


def test_the_digest_ignores_the_order_of_keys_and_sees_every_value() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1, "b": [2]}) != digest({"a": 1, "b": [3]})
    assert digest(Inner(size=2)) == digest({"kind": "a", "size": 2})


def test_the_digest_sees_a_plug_ins_own_keys() -> None:
    first, second = ({"loss": {"name": "x3kd", "score": score}} for score in (0.1, 0.2))
    assert digest(parse(WithPlugin, first, "a")) != digest(parse(WithPlugin, second, "a"))
