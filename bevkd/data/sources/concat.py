"""Several data sets or splits as one, e.g. a labelled split and the drives that nobody annotated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from bevkd import registry
from bevkd.config import PluginConfig, plugin
from bevkd.data.identity import DatasetIdentity
from bevkd.data.images import ImageView
from bevkd.data.source import FrameSource, Sensor
from bevkd.data.sources._labels import some
from bevkd.errors import DataError
from bevkd.types import Boxes, Frame

_PACKAGE = __name__.rpartition(".")[0]


class Config(PluginConfig):
    """Which data sets to put together.

    Attributes:
        sources: config of each, with its own ``labels``, ``skip_missing`` and so on; their classes must be the same.
        classes: those classes; need not be given.
    """

    name: Literal["concat"] = "concat"
    sources: tuple[plugin(_PACKAGE), ...] = Field(min_length=1)  # type: ignore[valid-type]
    classes: tuple[str, ...] = Field(default=(), validate_default=True)

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, sources: tuple[PluginConfig, ...]) -> tuple[PluginConfig, ...]:
        if any(source.name == "concat" for source in sources):
            raise ValueError("a source of 'concat' cannot be another 'concat'; list all sources in one")
        return sources

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Return the classes that all sources have, so that recipes of runs name them where others do."""
        sources: tuple[Any, ...] = info.data.get("sources", ())
        named = [(f"sources.{index}", tuple(source.classes)) for index, source in enumerate(sources)]
        named += [("classes", tuple(classes))] if classes else []
        different = [f"{name} has {', '.join(own)}" for name, own in named if own != named[0][1]]
        if different:
            raise ValueError(
                f"all sources need the same classes in the same order: {named[0][0]} has {', '.join(named[0][1])}; "
                f"{'; '.join(different)}"
            )
        return named[0][1] if named else classes


class ConcatSource:
    """The frames of several sources, one source after the other; a ``FrameSource``.

    Attributes:
        parts: the sources.
        metrics: what scores the parts that have annotations, if they agree.
        notes: those of all parts.
    """

    def __init__(self, parts: Sequence[FrameSource]) -> None:
        self.parts = tuple(parts)
        self.classes: tuple[str, ...] = self.parts[0].classes
        self.tokens = tuple(token for part in self.parts for token in part.tokens)
        self.annotated: frozenset[str] = frozenset[str]().union(*(part.annotated for part in self.parts))
        self.labelled: frozenset[str] = frozenset[str]().union(*(part.labelled for part in self.parts))
        named = {part.metrics for part in self.parts if part.annotated}
        self.metrics: str | None = named.pop() if len(named) == 1 else None
        self.notes = tuple(note for part in self.parts for note in getattr(part, "notes", ()))
        self.identity = _together([part.identity for part in self.parts])

    def __reduce__(self) -> tuple[Any, ...]:
        return ConcatSource, (self.parts,)

    def part_of(self, token: str) -> FrameSource:
        """Return the source that a frame is of.

        Raises:
            DataError: it is of none.
        """
        try:
            return self.parts[self._numbers[token]]
        except KeyError:
            raise DataError(
                f"frame '{token}' is in none of the {len(self.parts)} sources that are put together "
                f"({self.identity.split}). Correct the token, or the recipe's sources."
            ) from None

    def load(self, token: str, sensors: frozenset[Sensor], views: Mapping[str, ImageView] | None = None) -> Frame:
        """Return the frame with the sensors asked for; see ``FrameSource.load``."""
        return self.part_of(token).load(token, sensors, views)

    def image_sizes(self, token: str) -> dict[str, tuple[int, int]]:
        """Return ``(H, W)`` of each camera's original image, in the rig's order."""
        return self.part_of(token).image_sizes(token)

    def annotations(self, token: str) -> Boxes:
        """Return the boxes of an ``annotated`` frame, ``labelled`` or not."""
        return self.part_of(token).annotations(token)

    def global_from_lidar(self, token: str) -> Float[Tensor, "4 4"]:
        """Return the pose of the BEV frame in the map frame of its source (float64)."""
        return self.part_of(token).global_from_lidar(token)

    def check(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return a fault, naming the file, for each sensor file of ``tokens`` that is missing or damaged."""
        own: list[list[str]] = [[] for _ in self.parts]
        for token in tokens:
            self.part_of(token)
            own[self._numbers[token]].append(token)
        return [
            fault for part, asked in zip(self.parts, own, strict=True) if asked for fault in part.check(asked, sensors)
        ]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, part in enumerate(self.parts) for token in part.tokens}


def _together(parts: Sequence[DatasetIdentity]) -> DatasetIdentity:
    """Return the identity of several data sets, whatever their order; splits of one data set have that one's."""
    known = sorted({(part.annotation_digest, part.name, part.version) for part in parts})
    digest = hashlib.sha256("\n".join(map("\t".join, known)).encode()).hexdigest()
    return DatasetIdentity(
        name="+".join(sorted({part.name for part in parts})),
        version="+".join(sorted({part.version for part in parts})),
        split="+".join(part.split for part in parts),
        frames=sum(part.frames for part in parts),
        annotation_digest=digest if len(known) > 1 else parts[0].annotation_digest,
    )


def build(config: Config, sensors: frozenset[Sensor] = frozenset()) -> ConcatSource:
    """Return the sources as one.

    Raises:
        DataError: a source cannot be opened, two have a token in common, or their numbers of cameras differ.
    """
    parts: list[FrameSource] = [registry.load(_PACKAGE, each.name).build(each, sensors) for each in config.sources]
    names = [f"sources.{number} ({part.identity.split})" for number, part in enumerate(parts)]
    owner: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        if shared := [token for token in part.tokens if token in owner]:
            raise DataError(
                f"{owner[shared[0]]} and {name} have {len(shared)} frames in common: {some(shared)}. Give the sources "
                "splits, scenes or tokens that do not overlap."
            )
        owner |= dict.fromkeys(part.tokens, name)
    if "camera" in sensors:
        counts = [len(part.image_sizes(part.tokens[0])) for part in parts]
        if len(set(counts)) > 1:
            each = ", ".join(f"{name} has {count}" for name, count in zip(names, counts, strict=True))
            raise DataError(f"frames of one batch need the same number of cameras, but {each}. Leave sources out.")
    return ConcatSource(parts)
