"""Every cache spec that ships holds what its suite says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cache_specs
from bevkd import testing
from bevkd.cache.spec import CacheSpec, load_spec

NAMES = sorted(path.stem for path in Path(cache_specs.__path__[0]).glob("*.yaml"))


class TestCacheSpecs(testing.CacheSpecTests):
    @pytest.fixture(autouse=True, params=NAMES)
    def plug_in(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", lambda _: None)
        self.name = request.param

    def spec(self) -> CacheSpec:
        return load_spec(self.name)
