"""What a cache holds, in words and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bevkd.cache.reader import CacheReader
from bevkd.data.source import Sensor
from bevkd.distill.base import TeacherBatch
from bevkd.errors import CacheError
from bevkd.geometry.affine import BEVAffine
from pipeline.cache_teacher import bytes_per_frame
from pipeline.evaluate import source_of_cache


def info(uri: str) -> dict[str, Any]:
    """Return what a person asks of a cache, as plain values."""
    manifest = CacheReader.open(uri).manifest
    teacher = manifest.teacher
    return {
        "name": manifest.name,
        "teacher": f"{teacher.name}, weights {teacher.weights_sha256[:12]}, {teacher.origin}",
        "data set": f"{manifest.dataset.name} {manifest.dataset.version}, split {manifest.dataset.split}",
        "frames": len(manifest.tokens),
        "blocks": f"{manifest.blocks} of {manifest.spec.block} frames",
        "classes": ", ".join(manifest.classes),
        "grid": str(manifest.grid),
        "frame of maps and boxes": manifest.frame,
        "signals": {
            name: f"{list(manifest.sample_shapes[name]) if name in manifest.sample_shapes else 'n 11'} {spec.encoding}"
            for name, spec in manifest.spec.signals.items()
        },
        "kB per frame": round(bytes_per_frame(manifest) / 1e3, 1),
        "licence": manifest.licence or "not stated",
        "versions": manifest.versions,
    }


def show(uri: str, token: str | None, score: float, out: Path, overrides: Sequence[str]) -> None:
    """Draw one frame of a cache to a PNG: cameras and BEV with boxes and points, and the teacher's maps.

    ``overrides`` complete the recorded data config, which does not say where the data set lies. Sensors whose files
    are not there are left out of the picture.
    """
    from bevkd.viz import FrameHeader, frame_page, save

    reader = CacheReader.open(uri)
    token = token or reader.tokens[0]
    if token not in reader:
        raise CacheError(f"no sample '{token}' in {uri}. Its first is {reader.tokens[0]}; it holds {len(reader)}.")
    source = source_of_cache(reader, overrides)
    sensors: tuple[Sensor, ...] = ("camera", "lidar")
    present = frozenset(sensor for sensor in sensors if not source.check([token], frozenset({sensor})))
    frame = source.load(token, present)
    stored = {key: array[None] for key, array in reader.tensors(token, tuple(reader.manifest.spec.signals)).items()}
    teacher = TeacherBatch.decode(reader.manifest.spec, stored, (BEVAffine.identity(),), reader.manifest.grid)
    dataset = reader.manifest.dataset
    header = FrameHeader(f"{dataset.name} {dataset.version}", reader.manifest.teacher.name, score)
    save(frame_page(frame, reader.manifest.grid, reader.manifest.classes, header, teacher.canonical), out)
