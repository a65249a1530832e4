from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from bevkd.data.source import FrameSource
from bevkd.errors import ContractError
from bevkd.evaluation import nuscenes
from bevkd.evaluation.score import evaluate, metrics_of, scored_frames


def source(metrics: str | None) -> FrameSource:
    """Return as much of a source as choosing its metrics and frames takes."""
    frames = {"tokens": ("frame", "sweep"), "annotated": frozenset({"frame"})}
    named = SimpleNamespace(name="mine", version="1", split="all")
    return cast(FrameSource, SimpleNamespace(metrics=metrics, identity=named, **frames))


def test_a_source_names_the_module_that_scores_it() -> None:
    assert metrics_of(source("nuscenes")) is cast(Any, nuscenes)


def test_a_module_from_elsewhere_is_named_in_full_and_gets_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def score(
        source: FrameSource, detections: Mapping[str, Any], tokens: Sequence[str] | None, max_distance_m: float | None
    ) -> str:
        seen.append((source, detections, tokens, max_distance_m))
        return "a report"

    module = ModuleType("my_bev.metrics")
    module.__dict__["evaluate"] = score
    monkeypatch.setitem(sys.modules, "my_bev", ModuleType("my_bev"))
    monkeypatch.setitem(sys.modules, "my_bev.metrics", module)
    own = source("my_bev.metrics")
    assert cast(Any, evaluate(own, {"frame": 1}, ["frame"], 30.0)) == "a report"
    assert seen == [(own, {"frame": 1}, ("frame",), 30.0)]


def test_a_source_without_metrics_is_refused_with_the_way_out() -> None:
    with pytest.raises(ContractError, match=r"'mine' has no metrics. Set evaluation: null"):
        metrics_of(source(None))


def test_metrics_that_do_not_exist_are_refused_by_name() -> None:
    with pytest.raises(ContractError, match=r"the metrics 'kiti' of the data set 'mine' cannot be imported"):
        metrics_of(source("kiti"))


def test_frames_whose_annotations_nobody_knows_are_not_scored_as_empty_ones() -> None:
    own = source("nuscenes")
    assert scored_frames(own) == ("frame",)
    with pytest.raises(ContractError, match=r"1 of 2 frames to score are no annotated frames .* first 'sweep'"):
        scored_frames(own, ["frame", "sweep"])


def test_a_data_set_without_annotations_is_not_scored() -> None:
    own = source("nuscenes")
    own.annotated = frozenset()
    with pytest.raises(ContractError, match=r"'mine' 1, split 'all', has no annotations.*'bevkd predict'"):
        scored_frames(own)
