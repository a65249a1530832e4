"""Write an embedded world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bevkd.progress import Progress
from bevkd.world import world_preset, write_world


@dataclass(frozen=True)
class WorldSummary:
    """What was written, or was there already."""

    root: str
    scenes: int
    frames: int


def make_world(out: Path, preset: str, scenes: int | None, seed: int, progress: Progress) -> WorldSummary:
    """Write the world of ``preset`` to ``out``; a complete one is left as it is."""
    chosen = {"seed": seed} if scenes is None else {"seed": seed, "scenes": scenes}
    config = world_preset(preset, **chosen)
    if (out / "world.json").exists():
        write_world(config, out)
        progress.note(f"the world in {out} is there already")
    else:
        with progress.task("building the world", config.scenes, "scene") as task:
            write_world(config, out, progress=lambda *_: task.advance())
    return WorldSummary(str(out), config.scenes, config.scenes * config.keyframes_per_scene)
