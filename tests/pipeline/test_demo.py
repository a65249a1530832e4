"""The demo, with few drives and ten steps of each training."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.pipeline.kit import Bevkd


@pytest.fixture(scope="module")
def rehearsed(bevkd: Bevkd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    bevkd.well("demo", "--rehearse", "--out", out)
    return out


def test_a_rehearsal_leaves_all_runs_and_pictures(rehearsed: Path) -> None:
    for run in ("teacher", "plain", "distilled"):
        assert (rehearsed / run / "model.safetensors").is_file(), run
    pictures = sorted((rehearsed / "pictures").glob("*.png"))
    assert [path.stem for path in pictures] == ["bev", "cameras", "features", "results"]
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 300, path


def test_a_second_call_does_nothing_again_and_prints_the_same(bevkd: Bevkd, rehearsed: Path) -> None:
    before = {run: (rehearsed / run / "log.jsonl").stat().st_mtime_ns for run in ("teacher", "plain", "distilled")}
    result = bevkd.well("demo", "--rehearse", "--out", rehearsed, "--json").json
    assert before == {run: (rehearsed / run / "log.jsonl").stat().st_mtime_ns for run in before}
    assert set(result["rows"]) == set(before)
    assert {row["steps"] for row in result["rows"].values()} == {10}
    assert result["cache_bytes_per_frame"] > 0


def test_a_rehearsal_is_not_taken_for_the_demo(bevkd: Bevkd, rehearsed: Path) -> None:
    outcome = bevkd("demo", "--out", rehearsed)
    assert outcome.code == 1
    assert "holds another world" in " ".join(outcome.err.split())
