"""Scores of detections by the metrics of the data set that they were made on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from bevkd.data.source import FrameSource, Sensor
from bevkd.errors import ContractError
from bevkd.types import Boxes

if TYPE_CHECKING:
    from rich.table import Table


_FAULTS_SHOWN = 30


class Report(Protocol):
    """What metrics say about detections."""

    @property
    def headline(self) -> dict[str, float]:
        """The few numbers to show first, by the field's names for them; undefined ones (NaN) are left out."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values; NaN becomes null."""
        ...

    def table(self) -> Table:
        """Return what a person reads in a terminal."""
        ...


class Metrics(Protocol):
    """What a module that a source names in ``metrics`` must offer; ``source`` is always a source that names it."""

    def evaluate(
        self, source: Any, detections: Any, tokens: Sequence[str] | None = None, max_distance_m: float | None = None
    ) -> Report:
        """Return the scores of ``detections``: boxes by token, or what ``load_detections`` returns."""
        ...

    def load_detections(self, path: Path, source: Any) -> Any:
        """Return the detections in a file or folder of the data set's own format, checked."""
        ...

    def save_detections(
        self, path: Path, source: Any, found: Mapping[str, Boxes], sensors: frozenset[Sensor] = frozenset()
    ) -> Path:
        """Write detections in that format, whether or not there are annotations, and return where.

        Args:
            path: of a file or folder, as the format has it; a suffix that the format's files have is added if it has
                none.
            sensors: what the detector sees, for formats that say so.
        """
        ...


def metrics_of(source: FrameSource) -> Metrics:
    """Return the metrics of a data set.

    Raises:
        ContractError: it has none, or names a module that cannot be imported.
    """
    name = source.metrics
    if name is None:
        raise ContractError(
            f"the data set '{source.identity.name}' has no metrics. Set evaluation: null, or give its source the "
            "attribute 'metrics', the name of a module with evaluate, load_detections and save_detections."
        )
    try:
        module = importlib.import_module(name if "." in name else f"bevkd.evaluation.{name}")
    except ImportError as error:
        raise ContractError(
            f"the metrics '{name}' of the data set '{source.identity.name}' cannot be imported: {error}. "
            "Correct the attribute 'metrics' of its source."
        ) from error
    return cast(Metrics, module)


def evaluate(
    source: FrameSource,
    detections: Mapping[str, Boxes] | Any,
    tokens: Sequence[str] | None = None,
    max_distance_m: float | None = None,
) -> Report:
    """Return the scores of ``detections`` on ``tokens``, or on all frames of ``source`` if None.

    Args:
        source: gives ground truth, and says by which metrics it is scored.
        detections: boxes in the BEV frame by token, or what the metrics' ``load_detections`` returns.
        tokens: frames to score; every one of them needs an entry in ``detections``.
        max_distance_m: score only boxes this near to the ego; None is the benchmark itself.

    Raises:
        ContractError: the data set has no metrics, or these detections cannot be scored by them.
    """
    return metrics_of(source).evaluate(source, detections, tokens, max_distance_m)


def shortened(faults: list[str]) -> list[str]:
    """Return the first faults and how many more there are."""
    more = len(faults) - _FAULTS_SHOWN
    return faults if more <= 0 else [*faults[:_FAULTS_SHOWN], f"and {more} more"]
