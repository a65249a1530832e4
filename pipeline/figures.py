"""The numbers of a run's metrics by name, whichever data set's they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

Group = Literal["headline", "error", "distance", "class"]

_ERRORS = {"trans_err": "ATE", "scale_err": "ASE", "orient_err": "AOE", "vel_err": "AVE", "attr_err": "AAE"}


@dataclass(frozen=True)
class Figure:
    """What a number of a report is.

    Attributes:
        key: name in JSON.
        name: for people.
        group: which table it belongs to. Errors are in their own units and the smaller the better; all others are
            shares from 0 to 1 and the greater the better.
    """

    key: str
    name: str
    group: Group

    @property
    def factor(self) -> float:
        """What a value is multiplied with for people: shares are shown in percent."""
        return 1.0 if self.group == "error" else 100.0


def figures_of(metrics: Mapping[str, Any]) -> dict[Figure, float]:
    """Return the numbers of a report's ``to_json``, the most telling one first; undefined ones are left out.

    Of nuScenes' metrics: mean AP over the classes present, mAP, NDS, the five errors, AP at each matching distance
    (mean over the classes present), AP of each class present. Of KITTI's: AP in 3-D and from above of the moderate
    difficulty by class. Of a segmenter's: AP of masks and boxes.
    """
    kind = _nuscenes if "NDS" in metrics else _kitti if "ap_r40" in metrics else _masks
    return {figure: float(value) for figure, value in kind(metrics) if value is not None}


def _nuscenes(metrics: Mapping[str, Any]) -> Iterator[tuple[Figure, float | None]]:
    classes = {name: metrics["per_class"][name] for name in metrics["classes_present"]}
    for key, name in {"mean_ap_present": "mean AP", "mAP": "mAP", "NDS": "NDS"}.items():
        yield Figure(key, name, "headline"), metrics[key]
    for key, name in _ERRORS.items():
        yield Figure(key, name, "error"), metrics["tp_errors"][key]
    for distance in next(iter(classes.values()), {"ap_by_distance": {}})["ap_by_distance"]:
        mean = fmean(score["ap_by_distance"][distance] for score in classes.values())
        yield Figure(f"ap_at_{distance}_m", f"AP at {distance} m", "distance"), mean
    for name, score in classes.items():
        yield Figure(f"ap_{name}", name, "class"), score["ap"]


def _kitti(metrics: Mapping[str, Any]) -> Iterator[tuple[Figure, float | None]]:
    by_class = metrics["ap_r40"]
    known = [scores["3D"]["moderate"] for scores in by_class.values() if scores["3D"]["moderate"] is not None]
    yield Figure("mean_ap_3d_moderate", "mean 3D AP", "headline"), fmean(known) if known else None
    for key, measure in {"3d": "3D", "bev": "BEV"}.items():
        for name, scores in by_class.items():
            yield Figure(f"ap_{key}_moderate_{name}", f"{name} {measure}", "headline"), scores[measure]["moderate"]


def _masks(metrics: Mapping[str, Any]) -> Iterator[tuple[Figure, float | None]]:
    for kind in ("mask", "box"):
        yield Figure(f"{kind}_ap", f"{kind} AP", "headline"), metrics[kind]["ap"]
    for name, scores in metrics["per_class"].items():
        yield Figure(f"mask_ap_{name}", name, "class"), scores["mask"]["ap"]


def of_group(figures: Sequence[Figure], group: Group) -> list[Figure]:
    """Return the figures of one table."""
    return [figure for figure in figures if figure.group == group]
