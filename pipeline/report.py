"""``bevkd report``: one HTML page about runs, which needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bevkd.progress import Progress
from bevkd.training.checkpoint import write_atomic
from bevkd.viz.html.page import document
from pipeline.reporting.curves import curves_section
from pipeline.reporting.detections import read_detections
from pipeline.reporting.features import features_section
from pipeline.reporting.finding import finding_of, finding_section
from pipeline.reporting.frames import frames_section
from pipeline.reporting.gains import gains_section
from pipeline.reporting.methods import Scene, scene_of
from pipeline.reporting.recipes import recipes_section
from pipeline.reporting.results import results_section
from pipeline.runs import read_runs


@dataclass(frozen=True)
class Written:
    """The page that was written.

    Attributes:
        gain: of the best distilled student over the plain one in the first score, points; None without either.
    """

    path: Path
    bytes: int
    runs: int
    methods: int
    score: str | None
    gain: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {**asdict(self), "path": str(self.path)}

    @property
    def text(self) -> str:
        """What a person reads."""
        gain = "" if self.gain is None else f", gain {self.gain:+.1f} points of {self.score}"
        return f"{self.path}: {self.runs} runs of {self.methods} methods, {self.bytes / 1e6:.1f} MB{gain}"


def write_report(
    places: Sequence[Path], out: Path, frames: int, overrides: Sequence[str], progress: Progress
) -> Written:
    """Write the page about the finished runs in ``places`` and say what was written.

    The same runs give the same bytes. What a section lacks, it says itself.

    Args:
        places: run folders, and folders that hold such.
        out: file to write; one that is there is replaced.
        frames: of the evaluation that are drawn; 0 draws none.
        overrides: change the recipes, e.g. where the data lies.

    Raises:
        ConfigError: a place holds no run, or ``out`` cannot be written.
        ContractError: the metrics of the runs are not of one kind.
    """
    runs = read_runs(places, skip_unfinished=True)
    scene = scene_of(runs)
    command = [*(str(place) for place in places), "--out", str(out), "--frames", str(frames)]
    command += [part for override in overrides for part in ("--set", override)]
    page = page_of(scene, frames, overrides, command, progress).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)
    finding = finding_of(scene)
    return Written(
        out,
        len(page),
        len(runs),
        len(scene.methods),
        scene.main.name if scene.main else None,
        finding.gain if finding else None,
    )


def page_of(scene: Scene, frames: int, overrides: Sequence[str], command: Sequence[str], progress: Progress) -> str:
    """Return the page about the methods of ``scene``."""
    detections = read_detections(scene, overrides, progress)
    sections = [
        finding_section(scene),
        results_section(scene),
        gains_section(scene, detections),
        curves_section(scene),
        frames_section(scene, detections, frames),
        features_section(scene, overrides),
        recipes_section(scene, command),
    ]
    names = ", ".join(shown.name for shown in scene.methods[:3])
    foot = "Written by bevkd report. The page holds everything it shows and loads nothing."
    return document(f"bevkd report: {names}", sections, foot)
