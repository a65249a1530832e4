"""A comparison for people: tables for the terminal and for Markdown pages, and a chart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bevkd.training.checkpoint import write_atomic
from pipeline.compare import Comparison, Gain, Method
from pipeline.estimate import Estimate
from pipeline.figures import Figure, Group, figures_of, of_group

if TYPE_CHECKING:
    from rich.table import Table

    from bevkd.viz import Picture

_Column = tuple[str, Callable[[Method], str]]
"""Heading and what stands below it for a method."""

_WIDE = 10

_TITLES: dict[Group, str] = {
    "error": "Errors of true positives",
    "distance": "AP by matching distance",
    "class": "AP by class",
}


@dataclass(frozen=True)
class TextTable:
    """A table of words: one line per method."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def text_tables(comparison: Comparison) -> list[TextTable]:
    """Return scores and costs by method, gains if there are, then errors, matching distances and classes if known."""
    tables = [_main_table(comparison)]
    if any(method.gain for method in comparison.methods):
        tables.append(_gain_table(comparison))
    for group in ("error", "distance", "class"):
        if figures := of_group(comparison.figures, group):
            tables.append(_group_table(comparison, group, figures))
    return tables


def _main_table(comparison: Comparison, more: Sequence[_Column] = ()) -> TextTable:
    """Return scores and costs, with ``more`` columns between them."""
    scores = [(figure.name, _cell(figure)) for figure in of_group(comparison.figures, "headline")]
    scenes: list[_Column] = [("95 % over scenes", lambda method: _range(method.scenes, 100))]
    columns: list[_Column] = [
        ("seeds", lambda method: str(len(method.runs))),
        *scores,
        *(scenes if comparison.bootstrap else []),
        *more,
        ("s per step", lambda method: f"{method.step_seconds:.3g}"),
        ("cache MB per frame", lambda method: _megabytes(method.cache_bytes_per_frame)),
    ]
    note = "Scores in percent, mean ± sample standard deviation over seeds."
    if comparison.bootstrap:
        note += f" Intervals over scenes: of {scores[0][0]}, the same {comparison.bootstrap} draws for all runs."
    return _table("Methods", note, columns, comparison.methods)


def _gain_table(comparison: Comparison) -> TextTable:
    """Return the gains, with intervals of the first figure's."""
    figures = of_group(comparison.figures, "headline")
    scenes: list[_Column] = [("95 % over scenes", lambda each: _range(_gain_of(each).scenes, 100, "+"))]
    columns: list[_Column] = [
        ("pairs", lambda method: str(len(_gain_of(method).pairs))),
        (figures[0].name, _gain_cell(figures[0])),
        ("95 % over seeds", lambda method: _range(_gain_of(method).figures[figures[0]].interval, 100, "+")),
        *(scenes if comparison.bootstrap else []),
        *((figure.name, _gain_cell(figure)) for figure in figures[1:]),
    ]
    gained = [method for method in comparison.methods if method.gain]
    over = ", ".join(dict.fromkeys(_gain_of(method).over for method in gained))
    note = (
        "In points: mean ± sample standard deviation of the differences between runs of equal seed, labels and steps; "
        "the interval over seeds is Student's t."
    )
    return _table(f"Gain over {over}", note, columns, gained)


def _gain_of(method: Method) -> Gain:
    assert method.gain is not None
    return method.gain


def _group_table(comparison: Comparison, group: Group, figures: Sequence[Figure]) -> TextTable:
    columns: list[_Column] = [(figure.name, _cell(figure)) for figure in figures]
    units = "in m, 1 - IoU, rad, m/s, 1 - accuracy; less is better" if group == "error" else "in percent"
    return _table(_TITLES[group], f"Mean ± sample standard deviation over seeds, {units}.", columns, comparison.methods)


def _table(title: str, note: str, columns: Sequence[_Column], methods: Sequence[Method]) -> TextTable:
    rows = tuple((method.name, *(text(method) for _, text in columns)) for method in methods)
    return TextTable(title, note, ("method", *(name for name, _ in columns)), rows)


def _cell(figure: Figure) -> Callable[[Method], str]:
    return lambda method: _estimate(method.figures.get(figure), figure)


def _gain_cell(figure: Figure) -> Callable[[Method], str]:
    return lambda method: _estimate(method.gain.figures.get(figure) if method.gain else None, figure, "+")


def _estimate(estimate: Estimate | None, figure: Figure, sign: str = "") -> str:
    if estimate is None:
        return "-"
    digits = 3 if figure.group == "error" else 1
    text = f"{figure.factor * estimate.mean:{sign}.{digits}f}"
    return text if estimate.spread is None else f"{text} ± {figure.factor * estimate.spread:.{digits}f}"


def _range(interval: tuple[float, float] | None, factor: float, sign: str = "") -> str:
    return f"[{', '.join(f'{factor * end:{sign}.1f}' for end in interval)}]" if interval else "-"


def _megabytes(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.3g}" if size else "-"


def rich_table(table: TextTable) -> Table:
    """Return a table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=table.title,
        caption=table.note,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    first, *others = table.columns
    shown.add_column(first, overflow="fold", min_width=12)
    for column in others:
        # A figure is broken by no line, so that a narrow terminal costs the names of methods first.
        heading = "\n".join(column.rsplit(" ", 1)) if len(column) > _WIDE else column
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown: what is asked first in one table, then the others, then the warnings."""
    first, errors = comparison.figures[0], of_group(comparison.figures, "error")
    more: list[_Column] = [(figure.name, _mean(figure)) for figure in errors]
    if any(method.gain for method in comparison.methods):
        more.append(("gain", _gain_cell(first)))
    tables = [_main_table(comparison, more), *text_tables(comparison)[1:]]
    blocks = [_markdown_table(table) for table in tables]
    blocks += ["\n".join(f"- {warning}" for warning in comparison.warnings)] if comparison.warnings else []
    return "\n\n".join(blocks) + "\n"


def _mean(figure: Figure) -> Callable[[Method], str]:
    return lambda method: f"{method.figures[figure].mean:.2f}" if figure in method.figures else "-"


def _markdown_table(table: TextTable) -> str:
    lines = [table.columns, ("---", *["---:"] * (len(table.columns) - 1)), *table.rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{table.title}.** {table.note}\n\n{text}"


def chart(comparison: Comparison) -> Picture:
    """Return the first figure and its gain by method, with a dot per seed."""
    from bevkd.viz import MethodScores, draw_methods

    first = comparison.figures[0]
    scores = []
    for method in comparison.methods:
        gain, own = method.gain, method.figures.get(first)
        estimate = gain.figures.get(first) if gain else None
        scores.append(
            MethodScores(
                label=method.name,
                role="student" if method.role == "plain" else method.role,
                values=tuple(figures_of(run.metrics or {})[first] for run in method.runs),
                spread=own.spread if own else None,
                gains=tuple(value for _, value in gain.pairs) if gain else (),
                interval=estimate.interval if estimate else None,
            )
        )
    return draw_methods(scores, first.name)


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write ``table.md``, ``table.json`` and ``table.png`` into a folder, and return their paths."""
    from bevkd.viz import save

    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "table.md", markdown(comparison).encode())
    write_atomic(out / "table.json", json.dumps(comparison.to_json(), indent=1).encode())
    return [out / "table.md", out / "table.json", save(chart(comparison), out / "table.png")]
