"""What `bevkd cache fidelity` found, as plain values and as tables."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bevkd.cache.spec import CacheSpec

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Agreement:
    """How the gradients of stored and exact signals agree, over all frames side by side.

    Attributes:
        product, stored2, exact2: summed over frames and parameters.
    """

    product: float = 0.0
    stored2: float = 0.0
    exact2: float = 0.0

    def add(self, stored: Tensor, exact: Tensor) -> None:
        """Count the gradients of one more frame."""
        stored, exact = stored.double(), exact.double()
        self.product += float(stored @ exact)
        self.stored2 += float(stored @ stored)
        self.exact2 += float(exact @ exact)

    @property
    def cosine(self) -> float | None:
        """Cosine similarity; None if neither has a gradient."""
        if self.exact2 == 0 and self.stored2 == 0:
            return None
        norm = math.sqrt(self.stored2) * math.sqrt(self.exact2)
        return self.product / norm if norm > 0 else 0.0

    @property
    def relative_norm(self) -> float | None:
        """Norm from stored signals over norm from exact ones; None if that is zero."""
        return math.sqrt(self.stored2 / self.exact2) if self.exact2 > 0 else None


@dataclass
class Row:
    """What one choice of encodings costs.

    Attributes:
        encodings: per signal.
        bytes: per signal, mean of the frames, compressed.
        errors: per signal, worst of the frames; see ``SignalSpec.max_error``.
        decode_ms: to decompress and decode all signals of a frame, best of three rounds, mean of the frames.
    """

    name: str
    spec: CacheSpec
    bytes: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    decode_ms: float = 0.0
    losses: dict[str, Agreement] = field(default_factory=dict)

    @property
    def bytes_per_frame(self) -> float:
        """Bytes of all signals."""
        return sum(self.bytes.values())

    def to_json(self, fp32_bytes: float) -> dict[str, Any]:
        """Return the row as plain values."""
        return {
            "name": self.name,
            "encodings": {name: spec.encoding for name, spec in self.spec.signals.items()},
            "bytes_per_frame": self.bytes_per_frame,
            "fp32_over_stored": fp32_bytes / self.bytes_per_frame,
            "bytes": self.bytes,
            "errors": self.errors,
            "decode_ms": self.decode_ms,
            "gradient_cosine": {loss: found.cosine for loss, found in self.losses.items()},
            "gradient_norm": {loss: found.relative_norm for loss, found in self.losses.items()},
        }


@dataclass(frozen=True)
class FidelityReport:
    """What encodings cost, by row; the first row is the spec's own.

    Attributes:
        at: what gradients are taken of: the student's ``parameters`` or its ``outputs``.
        fp32_bytes: of one frame's maps as the teacher computes them, also where points stand for them; others as
            stored.
    """

    teacher: str
    spec: str
    frames: tuple[str, ...]
    at: str
    fp32_bytes: float
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        head = {key: value for key, value in asdict(self).items() if key != "rows"}
        return {**head, "rows": [row.to_json(self.fp32_bytes) for row in self.rows]}


def fidelity_table(report: FidelityReport) -> Table:
    """Return the report as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    losses = list(report.rows[0].losses)
    table = Table(
        title=f"spec {report.spec}, teacher {report.teacher}, {len(report.frames)} frames",
        caption=f"cosine and relative norm of the gradient of the student's {report.at}, stored against exact signals; "
        f"fp32: {report.fp32_bytes / 1e6:.1f} MB per frame",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("encodings")
    for heading in ("kB/frame", "fp32 / stored", "decode ms", *losses):
        table.add_column(heading, justify="right")
    for row in report.rows:
        agreements = [row.losses[loss] for loss in losses]
        table.add_row(
            row.name,
            f"{row.bytes_per_frame / 1e3:.1f}",
            f"{report.fp32_bytes / row.bytes_per_frame:.1f}",
            f"{row.decode_ms:.1f}",
            *(_agreement(each) for each in agreements),
        )
    return table


def signal_table(report: FidelityReport) -> Table:
    """Return the size and error of each signal as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    signals = list(report.rows[0].bytes)
    table = Table(
        caption="kB per frame, and the error of storing as the spec bounds it", caption_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("encodings")
    for name in signals:
        table.add_column(name, justify="right")
    for row in report.rows:
        table.add_row(row.name, *(f"{row.bytes[name] / 1e3:.1f}  {row.errors[name]:.2g}" for name in signals))
    return table


def _agreement(found: Agreement) -> str:
    cosine, norm = found.cosine, found.relative_norm
    return "none" if cosine is None else f"{cosine:.5f} {norm:.3f}" if norm is not None else f"{cosine:.5f}"
