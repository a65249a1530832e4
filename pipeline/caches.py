"""What a cache holds, in words and as a picture; and where caches lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bevkd.cache.arrays import arrays_for
from bevkd.cache.catalogue import stored_bytes
from bevkd.cache.manifest import Manifest, open_manifest
from bevkd.cache.statistics import ChannelStatistics
from bevkd.cache.store import open_store
from bevkd.cache.variants import frames_in, split_token, variants_in
from bevkd.errors import CacheError

_UNCHECKED = "none; 'bevkd evaluate --cache' scores the boxes"


def info(uri: str) -> dict[str, Any]:
    """Return what a person asks of a cache, as plain values."""
    manifest = open_manifest(open_store(uri))
    teacher, size, variants = manifest.teacher, stored_bytes(manifest), variants_in(manifest.tokens)
    return {
        "name": manifest.name,
        "teacher": f"{teacher.name}, weights {teacher.weights_sha256[:12]}, {teacher.origin}",
        "data set": f"{manifest.dataset.name} {manifest.dataset.version}, split {manifest.dataset.split}",
        "frames": len(frames_in(manifest.tokens)),
        "variants of each frame": ", ".join(name or "as it is" for name in variants),
        "blocks": f"{manifest.blocks} of {manifest.spec.block} {'frames' if len(variants) == 1 else 'samples'}",
        "classes": ", ".join(manifest.classes),
        "grid": str(manifest.grid),
        "frame of maps and boxes": manifest.frame,
        "signals": {name: _signal(manifest, name) for name in manifest.spec.signals},
        "statistics": {name: _spread(each) for name, each in manifest.statistics.items()} or "none: an older cache",
        "self-check": manifest.self_check.text if manifest.self_check else _UNCHECKED,
        "kB per frame": round(size / len(frames_in(manifest.tokens)) / 1e3, 1),
        "bytes": size,
        "licence": manifest.licence or "not stated",
        "versions": manifest.versions,
    }


def _spread(found: ChannelStatistics) -> str:
    """Return the statistics of a feature signal in a few words."""
    return f"{found.share:.0%} hold something, deviations of the channels {min(found.std):.2g} to {max(found.std):.2g}"


def _signal(manifest: Manifest, name: str) -> str:
    """Return shape, encoding, size and error of a signal in a few words."""
    arrays = arrays_for(name, manifest.spec.signals[name], manifest.sample_shapes.get(name, ()))
    size = sum(record.arrays[array.name].bytes for record in manifest.records for array in arrays)
    error = max(record.stats[name].error_max for record in manifest.records)
    shape = " ".join(str(length) for length in arrays[0].shape)
    encoding = manifest.spec.signals[name].encoding
    kilobytes = size / len(frames_in(manifest.tokens)) / 1e3
    return f"{shape}, {encoding}, {kilobytes:.1f} kB per frame, error at most {error:.2g}"


def show(uri: str, token: str | None, score: float, out: Path, overrides: Sequence[str]) -> None:
    """Draw one frame of a cache to a PNG: cameras and BEV with boxes and points, and the teacher's maps.

    ``overrides`` complete the recorded data config, which does not say where the data set lies. Sensors whose files
    are not there are left out of the picture.
    """
    from bevkd.cache.reader import CacheReader
    from bevkd.data.augment import apply_affine
    from bevkd.distill.base import TeacherBatch
    from bevkd.geometry.affine import BEVAffine
    from bevkd.geometry.symmetries import SYMMETRIES
    from bevkd.viz import FrameHeader, frame_page, save
    from pipeline.evaluate import source_of_cache

    reader = CacheReader.open(uri)
    token = token or reader.tokens[0]
    if token not in reader:
        raise CacheError(f"no sample '{token}' in {uri}. Its first is {reader.tokens[0]}; it holds {len(reader)}.")
    own, variant = split_token(token) if len(reader.variants) > 1 else (token, "")
    source = source_of_cache(reader, overrides)
    sensors: tuple[Literal["camera", "lidar"], ...] = ("camera", "lidar")
    present = frozenset(sensor for sensor in sensors if not source.check([own], frozenset({sensor})))
    frame = source.load(own, present)
    if variant:
        frame = apply_affine(frame, SYMMETRIES[variant])
    stored = {key: array[None] for key, array in reader.tensors(token, tuple(reader.manifest.spec.signals)).items()}
    teacher = TeacherBatch.decode(reader.manifest.spec, stored, (BEVAffine.identity(),), reader.manifest.grid)
    dataset = reader.manifest.dataset
    header = FrameHeader(f"{dataset.name} {dataset.version}", reader.manifest.teacher.name, score)
    save(frame_page(frame, reader.manifest.grid, reader.manifest.classes, header, teacher.canonical), out)
