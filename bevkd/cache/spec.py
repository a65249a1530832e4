"""What a cache stores and how: one declarative YAML file per spec."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from bevkd.config import StrictModel, load
from bevkd.errors import ConfigError
from bevkd.types import SIGNALS


def _known(name: str) -> str:
    if name not in SIGNALS:
        raise ValueError(f"'{name}' is no signal; signals are {', '.join(SIGNALS)}")
    return name


SignalName = Annotated[str, AfterValidator(_known)]
Encoding = Literal["float16", "uint8", "int8", "logit8", "boxes"]


class SignalSpec(StrictModel):
    """How one signal is stored.

    Attributes:
        encoding: ``float16`` keeps the values as they are; ``uint8`` quantises non-negative maps and ``int8`` signed
            maps, with one scale per sample and channel; ``logit8`` quantises class logits; ``boxes`` stores boxes.
        max_error: largest error a stored sample may have: the relative L2 norm of the difference, or for ``logit8``
            the largest difference of a probability. A sample beyond it is refused, never stored silently.
        capacity: most boxes per sample; beyond it the highest scores are kept (``boxes`` only).
        min_score: boxes with a lower score are not stored (``boxes`` only).
    """

    encoding: Encoding
    max_error: float = Field(default=0.02, gt=0, le=1)
    capacity: int = Field(default=500, ge=1, le=10_000)
    min_score: float = Field(default=0.05, ge=0, le=1)


class CacheSpec(StrictModel):
    """What a cache stores.

    Attributes:
        block: samples per shard, which is also the unit of work and of commit.
        signals: the signals to store; names as in ``bevkd.types.SIGNALS``.
    """

    name: str
    block: int = Field(default=32, ge=1, le=1024)
    signals: dict[SignalName, SignalSpec] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for signal, stored in self.signals.items():
            if (signal == "boxes") != (stored.encoding == "boxes"):
                wanted = "boxes" if signal == "boxes" else "float16, uint8 or int8"
                raise ValueError(f"signals.{signal}.encoding is '{stored.encoding}', set it to {wanted}")
            if stored.encoding == "logit8" and signal != "heatmap":
                raise ValueError(f"signals.{signal}.encoding is 'logit8', which only holds the logits of heatmap")
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
