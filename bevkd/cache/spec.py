"""What a cache stores and how: one declarative YAML file per spec."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from bevkd.config import StrictModel, load
from bevkd.errors import ConfigError
from bevkd.signals import SIGNALS


def _known(name: str) -> str:
    if name not in SIGNALS:
        raise ValueError(f"'{name}' is no signal; signals are {', '.join(SIGNALS)}")
    return name


SignalName = Annotated[str, AfterValidator(_known)]
Encoding = Literal["float16", "root8", "uint8", "int8", "logits", "logit8", "sparse", "boxes", "masks", "depth"]

_ENCODINGS: dict[str, tuple[Encoding, ...]] = {
    "bev_low": ("float16", "root8", "uint8", "int8"),
    "bev_high": ("float16", "root8", "uint8", "int8"),
    "heatmap": ("float16", "root8", "uint8", "int8", "logits", "logit8"),
    "box_code": ("float16", "root8", "uint8", "int8", "sparse"),
    "boxes": ("boxes",),
    "points_low": ("float16", "root8"),
    "points_high": ("float16", "root8"),
    "instances": ("masks",),
    "lidar_depth": ("depth",),
}
"""What can hold each signal."""


class SignalSpec(StrictModel):
    """How one signal is stored.

    Attributes:
        encoding: ``float16`` keeps values as they are. ``root8`` quantises maps and points to the root of their value,
            with one scale per channel of a map or per point, and is right for nearly all. ``logits`` quantises class
            logits evenly. ``sparse`` keeps box codes where objects are. ``boxes`` stores boxes, ``masks`` instances,
            ``depth`` the depth of LiDAR returns in 1/4 pixel and 1/64 m.
            ``uint8`` and ``int8`` quantise maps evenly, ``logit8`` folds logits under -6.9 into one: of the first
            caches, still read and written. ``root8`` and ``logits`` keep gradients better at about the same size.
        max_error: largest error a stored sample may have: the relative L2 norm of the difference; for logits the
            largest difference of a probability, also that of half the logit; for ``masks`` 1 - the mean IoU of
            the masks at original resolution. A sample beyond it is refused, never stored silently.
        levels: of ``root8`` on each side of zero; fewer take fewer bytes.
        threshold: ``sparse`` keeps the cells at which a class has at least this probability, and those around
            annotated boxes and around the teacher's boxes above this score.
        capacity: most boxes, instances or depths per sample. Beyond it the highest scores are kept; of points and
            depths, which have no scores, the sample is refused.
        min_score: boxes and instances with a lower score are not stored.
        resolution: rows and columns of a stored mask, spread over its box; a multiple of 8.
    """

    encoding: Encoding
    max_error: float = Field(default=0.02, gt=0, le=1)
    levels: int = Field(default=127, ge=1, le=127)
    threshold: float = Field(default=0.3, gt=0, lt=1)
    capacity: int = Field(default=500, ge=1, le=100_000)
    min_score: float = Field(default=0.05, ge=0, le=1)
    resolution: int = Field(default=64, ge=8, le=512, multiple_of=8)


class CacheSpec(StrictModel):
    """What a cache stores.

    Attributes:
        block: samples per shard, which is also the unit of work and of commit.
        signals: the signals to store; names as in ``bevkd.signals.SIGNALS``.
    """

    name: str
    block: int = Field(default=32, ge=1, le=1024)
    signals: dict[SignalName, SignalSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        for signal, stored in self.signals.items():
            if stored.encoding not in _ENCODINGS[signal]:
                *others, last = _ENCODINGS[signal]
                wanted = f"{', '.join(others)} or {last}" if others else last
                faults.append(f"signals.{signal}.encoding is '{stored.encoding}', set it to {wanted}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def load_spec(name_or_path: str | Path) -> CacheSpec:
    """Return the spec of that name in ``cache_specs/``, or the one in a YAML file.

    Raises:
        ConfigError: no such spec, or the file has faults (all are listed).
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return load(CacheSpec, path)
    folder = resources.files("cache_specs")
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if path.name not in known:
        raise ConfigError(
            f"unknown cache spec '{name_or_path}'. Known: {', '.join(known)}; or give the path of a .yaml file."
        )
    with resources.as_file(folder / f"{path.name}.yaml") as file:
        return load(CacheSpec, file)
