"""Metrics as tables for a terminal."""

from __future__ import annotations

import math

from rich.table import Table

from bevkd.evaluation.nuscenes import Report


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def report_table(report: Report) -> Table:
    """Return the per-class table of a report: AP in percent, errors in the devkit's units."""
    distances = ("0.5", "1.0", "2.0", "4.0")
    errors = {"trans_err": "ATE m", "scale_err": "ASE", "orient_err": "AOE rad", "vel_err": "AVE m/s", "attr_err": "AAE"}
    table = Table(
        title=f"mAP {_percent(report.mAP)}   NDS {_percent(report.NDS)}   mean AP over the "
        f"{len(report.classes_present)} classes present {_percent(report.mean_ap_present)}   {report.frames} frames",
        title_justify="left",
    )
    table.add_column("class")
    table.add_column("AP", justify="right")
    for distance in distances:
        table.add_column(f"AP@{distance} m", justify="right")
    for unit in errors.values():
        table.add_column(unit, justify="right")
    for name in report.classes_present:
        row = report.per_class[name]
        by_distance = {f"{float(key):.1f}": value for key, value in row["ap_by_distance"].items()}
        table.add_row(
            name,
            _percent(row["ap"]),
            *(_percent(by_distance[distance]) for distance in distances),
            *(_number(row["errors"][error]) for error in errors),
        )
    return table
