"""Scores of detections by the metrics of the data set that they were made on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from bevkd.data.source import FrameSource, Sensor
from bevkd.data.sources.concat import ConcatSource
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

    def to_boxes(self, source: Any, detections: Any, tokens: Sequence[str]) -> dict[str, Boxes]:
        """Return what ``load_detections`` returns as boxes in the BEV frame, for pictures and comparisons."""
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
        ContractError: it has none, names a module that cannot be imported, or is several data sets put together.
    """
    if isinstance(source, ConcatSource):
        raise ContractError(
            f"the data set is put together of {len(source.parts)} sources ('concat'), and detections are scored and "
            f"written for one of them: set the data set to evaluate on to one of {source.identity.split}."
        )
    name = source.metrics
    if name is None:
        raise ContractError(
            f"the data set '{source.identity.name}' has no metrics. Set evaluation: null, or give its source the "
            "attribute 'metrics', the name of a module with evaluate, load_detections, to_boxes and save_detections."
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
    """Return the scores of ``detections`` on ``tokens``, or on all annotated frames of ``source`` if None.

    Args:
        source: gives ground truth, and says by which metrics it is scored. Of several that are put together it is the
            one that all frames to score are of.
        detections: boxes in the BEV frame by token, or what the metrics' ``load_detections`` returns.
        tokens: frames to score; every one of them needs an entry in ``detections``.
        max_distance_m: score only boxes this near to the ego; None is the benchmark itself.

    Raises:
        ContractError: the data set has no metrics, these detections cannot be scored by them, or frames to score are
            not annotated or of several data sets.
    """
    frames = scored_frames(source, tokens)
    if isinstance(source, ConcatSource):
        source, detections = _part(source, frames), {token: detections[token] for token in frames}
    return metrics_of(source).evaluate(source, detections, frames, max_distance_m)


def scored_frames(source: FrameSource, tokens: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the frames that detections are scored on: ``tokens``, each once, or all that are annotated if None.

    A frame whose annotations nobody knows is not one without objects.

    Raises:
        ContractError: the data set has no annotations, or some of ``tokens`` have none.
    """
    if not source.annotated:
        named = source.identity
        raise ContractError(
            f"the data set '{named.name}' {named.version}, split '{named.split}', has no annotations, so there is "
            "nothing to score detections with. 'bevkd predict' writes them, e.g. for the benchmark's server."
        )
    if tokens is None:
        return tuple(token for token in source.tokens if token in source.annotated)
    if unknown := [token for token in tokens if token not in source.annotated]:
        raise ContractError(
            f"{len(unknown)} of {len(tokens)} frames to score are no annotated frames of the data set, first "
            f"'{unknown[0]}'. Sweeps between key frames and drives that nobody annotated cannot be scored: leave them "
            "out, or correct the data set."
        )
    return tuple(dict.fromkeys(tokens))


def _part(source: ConcatSource, frames: Sequence[str]) -> FrameSource:
    parts = {id(part): part for part in map(source.part_of, frames)}
    if len(parts) != 1:
        splits = ", ".join(part.identity.split for part in parts.values())
        raise ContractError(
            f"the frames to score are of {len(parts)} data sets ({splits}), and metrics are those of one. Score them "
            "one by one."
        )
    return next(iter(parts.values()))


def shortened(faults: list[str]) -> list[str]:
    """Return the first faults and how many more there are."""
    more = len(faults) - _FAULTS_SHOWN
    return faults if more <= 0 else [*faults[:_FAULTS_SHOWN], f"and {more} more"]
