"""Metrics as tables for a terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bevkd.evaluation.nuscenes import Report

_LIMITS = (0.5, 1.0, 2.0, 4.0)
_ERRORS = {"trans_err": "ATE", "scale_err": "ASE", "orient_err": "AOE", "vel_err": "AVE", "attr_err": "AAE"}


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def report_table(report: Report) -> Table:
    """Return the per-class table of a report: AP in percent, errors in the devkit's units."""
    table = Table(
        title=f"mAP {_percent(report.mAP)}   NDS {_percent(report.NDS)}   mean AP over the "
        f"{len(report.classes_present)} classes present {_percent(report.mean_ap_present)}   {report.frames} frames",
        title_justify="left",
        caption="AP in percent, also by matching distance in metres; errors in m, 1 - IoU, rad, m/s, 1 - accuracy",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("class")
    for heading in ("AP", *(f"@{limit:g}" for limit in _LIMITS), *_ERRORS.values()):
        table.add_column(heading, justify="right")
    for name in report.classes_present:
        score = report.per_class[name]
        table.add_row(
            name,
            _percent(score["ap"]),
            *(_percent(score["ap_by_distance"][limit]) for limit in _LIMITS),
            *(_number(score["errors"][error]) for error in _ERRORS),
        )
    return table
