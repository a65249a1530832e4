"""The folder is the registry; other distributions join by entry point."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bevkd import registry
from bevkd.errors import RegistryError

PACKAGE = "plugins_of_a_test"
WHOLE = "Config = object\n\ndef build():\n    return {!r}\n"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder of an importable plug-in package that holds ``alpha`` and ``_private``."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    for name in ("__init__", "base", "_private"):
        (folder / f"{name}.py").write_text("")
    (folder / "alpha.py").write_text(WHOLE.format("own alpha"))
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def offer(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Let another distribution offer plug-ins of the package."""
    original = importlib.metadata.entry_points

    def entry_points(**selection: Any) -> Any:
        if selection != {"group": PACKAGE}:
            return original(**selection)
        return importlib.metadata.EntryPoints(
            importlib.metadata.EntryPoint(name, value, PACKAGE) for name, value in points.items()
        )

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_a_module_in_the_folder_is_a_plug_in() -> None:
    assert registry.names(PACKAGE) == ["alpha"]
    assert registry.load(PACKAGE, "alpha").build() == "own alpha"


def test_naming_plug_ins_imports_none(package: Path) -> None:
    (package / "broken.py").write_text("raise RuntimeError('imported')")
    assert registry.names(PACKAGE) == ["alpha", "broken"]
    assert f"{PACKAGE}.alpha" not in sys.modules


def test_private_modules_and_base_are_no_plug_ins() -> None:
    for name in ("base", "_private"):
        with pytest.raises(RegistryError, match=f"unknown plug-in '{name}'"):
            registry.load(PACKAGE, name)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RegistryError, match=rf"unknown plug-in 'beta' of {PACKAGE}\. Known: alpha\."):
        registry.load(PACKAGE, "beta")


@pytest.mark.parametrize(
    ("text", "missing"),
    [("", "no Config and no build"), ("Config = 1", "no build"), ("build = 1", "no Config")],
)
def test_a_plug_in_without_its_parts_is_told_what_it_misses(package: Path, text: str, missing: str) -> None:
    (package / "half.py").write_text(text)
    with pytest.raises(RegistryError, match=missing):
        registry.load(PACKAGE, "half")


def test_a_foreign_plug_in_joins_by_entry_point(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package.parent / "foreign_of_a_test.py").write_text(WHOLE.format("foreign"))
    offer(monkeypatch, gamma="foreign_of_a_test")
    assert registry.names(PACKAGE) == ["alpha", "gamma"]
    assert registry.load(PACKAGE, "gamma").build() == "foreign"


def test_a_foreign_plug_in_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, gamma="no_such_module_of_a_test")
    with pytest.raises(RegistryError, match=r"'gamma'.*no_such_module_of_a_test"):
        registry.load(PACKAGE, "gamma")


def test_two_plug_ins_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, alpha="foreign_of_a_test")
    with pytest.raises(RegistryError, match=r"'alpha'.*foreign_of_a_test"):
        registry.load(PACKAGE, "alpha")


@pytest.mark.parametrize(
    ("own", "some"),
    [
        ("bevkd.distill", {"unidistill", "x3kd"}),
        ("bevkd.models.encoders", {"lift_splat", "voxel"}),
        ("bevkd.models.heads", {"center"}),
        ("bevkd.teachers", {"detector"}),
        ("bevkd.data.sources", {"nuscenes"}),
    ],
)
def test_every_plug_in_that_ships_is_whole(own: str, some: set[str]) -> None:
    names = registry.names(own)
    assert some <= set(names)
    for name in names:
        module = registry.load(own, name)
        assert module.Config.model_fields["name"].default == name
