"""What a cache says about itself: the header before the work, a record per block, the manifest at the end."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, JsonValue, model_validator

from bevkd.cache import blocks
from bevkd.cache.arrays import ArraySpec, all_arrays
from bevkd.cache.self_check import SelfCheck
from bevkd.cache.spec import CacheSpec, SignalName
from bevkd.cache.statistics import FEATURES, ChannelStatistics, ChannelSums
from bevkd.cache.store import FileRecord, Store
from bevkd.config import StrictModel, digest, parse
from bevkd.data.identity import DatasetIdentity
from bevkd.errors import CacheError, ConfigError
from bevkd.grid import BEVGrid
from bevkd.signals import MAPS, POINTS

SCHEMA_VERSION: Literal[1] = 1
FRAME: Literal["LIDAR frame, [C,Y,X]"] = "LIDAR frame, [C,Y,X]"
ROOT = "zarr.json"
MANIFEST = "manifest.json"
COMMITS = "commits"
_MAX_ELEMENTS = 2**28
_MAX_SAMPLE_BYTES = 2**30
_CONTROL = re.compile(rb"\\u00(?:0[0-8bBcCeEfF]|1[0-9a-fA-F]|7[fF]|[89][0-9a-fA-F])|\x7f|\xc2[\x80-\x9f]")
MAX_JSON_BYTES = 2**28
"""A manifest of 28,130 samples has 3 MB."""

RESTORE = "Restore the file from a copy of the cache"
_WRITERS = ("bevkd", "numcodecs", "numpy", "torch", "zarr")

Model = TypeVar("Model", bound=BaseModel)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Token = Annotated[str, Field(min_length=1, max_length=256)]
Dimension = Annotated[int, Field(ge=1, le=65_536)]


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine the bytes of a cache."""
    versions = {"python": platform.python_version()}
    for name in _WRITERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "source tree"
    return versions


class TeacherIdentity(StrictModel):
    """Which teacher wrote a cache.

    Attributes:
        architecture: the teacher's resolved config.
        weights_sha256: SHA-256 of the weight file.
        preprocessing: what happens to sensor data before the teacher sees it (sweeps, image size, normalisation).
        origin: where the weights come from, for readers.
    """

    name: str
    architecture: dict[str, JsonValue]
    weights_sha256: Sha256
    preprocessing: dict[str, JsonValue] = Field(default_factory=dict)
    origin: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, which every commit record repeats."""
        return digest(self)


class Header(StrictModel):
    """Everything about a cache that is fixed before the work starts.

    Attributes:
        classes: class names in the order of heatmap channels and box labels.
        tokens: sample tokens; their order is axis 0 of every array. Variants of a frame follow it.
        sample_shapes: shape of one sample per stored map signal; ``CacheWriter.open`` fills it in.
        config: the resolved config of the run.
        licence: what the licences of data set and weights ask of users of the cache.
        frame: axes of all maps and boxes.
        versions: of Python and packages when the cache was begun.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    spec: CacheSpec
    teacher: TeacherIdentity
    dataset: DatasetIdentity
    grid: BEVGrid
    classes: tuple[str, ...]
    tokens: tuple[Token, ...] = Field(min_length=1)
    sample_shapes: dict[SignalName, tuple[Dimension, ...]] = Field(default_factory=dict)
    config: dict[str, JsonValue] = Field(default_factory=dict)
    licence: str = ""
    frame: Literal["LIDAR frame, [C,Y,X]"] = FRAME
    versions: dict[str, str] = Field(default_factory=package_versions)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"tokens: {len(self.tokens) - len(set(self.tokens))} are repeated, each must occur once")
        for signal, shape in self.sample_shapes.items():
            self._check_shape(signal, shape)
        if not self._shapes_missing():
            for array in self.arrays:
                if array.nbytes > _MAX_SAMPLE_BYTES:
                    raise ValueError(f"array {array.name} has {array.nbytes:,} bytes per sample, at most 2^30 may be")
        return self

    def _shapes_missing(self) -> set[str]:
        return {name for name in self.spec.signals if name in (*MAPS, *POINTS)} - set(self.sample_shapes)

    def _check_shape(self, signal: str, shape: tuple[int, ...]) -> None:
        wanted = "[9,C]" if signal in POINTS else "[T,10,Y,X]" if signal == "box_code" else "[C,Y,X]"
        fixed = {"[9,C]": (9, None), "[T,10,Y,X]": (None, 10, None, None), "[C,Y,X]": (None, None, None)}[wanted]
        if len(shape) != len(fixed) or any(want not in (None, got) for want, got in zip(fixed, shape, strict=True)):
            raise ValueError(f"sample_shapes.{signal} is {list(shape)}, it must be {wanted}")
        if math.prod(shape) > _MAX_ELEMENTS:
            raise ValueError(f"sample_shapes.{signal} is {list(shape)}, more than {_MAX_ELEMENTS} values per sample")
        if signal not in POINTS and shape[-2:] != self.grid.shape:
            raise ValueError(f"sample_shapes.{signal} is {list(shape)}, but the grid is {self.grid}")
        if signal == "heatmap" and shape[0] != len(self.classes):
            raise ValueError(f"sample_shapes.heatmap has {shape[0]} channels for {len(self.classes)} classes")

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The stored arrays, ordered by signal."""
        return all_arrays(self.spec, self.sample_shapes)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return blocks.count(len(self.tokens), self.spec.block)

    def block_tokens(self, block: int) -> tuple[str, ...]:
        """Return the tokens of a block."""
        return blocks.tokens_of(self.tokens, self.spec.block, block)


class SignalStats(StrictModel):
    """The worst sample of a block: highest error (see ``SignalSpec.max_error``), lowest cosine similarity."""

    error_max: float
    cosine_min: float


class BlockRecord(StrictModel):
    """Proof that a block is complete: ``commits/<block>.json``, written after all its shards.

    Attributes:
        sums: from which the manifest's ``statistics`` are made; the manifest's own records leave them out.
        sums_sha256: their digest, which the manifest keeps; None in blocks that an older bevkd wrote, without sums.
    """

    block: int = Field(ge=0)
    tokens: tuple[Token, ...]
    arrays: dict[str, FileRecord]
    stats: dict[SignalName, SignalStats]
    teacher: Sha256
    versions: dict[str, str]
    sums: dict[SignalName, ChannelSums] = Field(default_factory=dict)
    sums_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _check(self) -> BlockRecord:
        if self.sums and digest_of(self.sums) != self.sums_sha256:
            raise ValueError("sums: their digest is not sums_sha256")
        return self

    @property
    def sealed(self) -> BlockRecord:
        """The record as the manifest holds it."""
        return self.model_copy(update={"sums": {}})

    def faults(self, header: Header, block: int) -> list[str]:
        """Return how this record does not fit block ``block`` of ``header``."""
        found = []
        if self.block != block or self.tokens != header.block_tokens(block):
            found.append(f"commit record of block {block} is of block {self.block} or of other tokens")
        if set(self.arrays) != {array.name for array in header.arrays}:
            found.append(f"commit record of block {block} lists the arrays {sorted(self.arrays)}")
        if self.teacher != header.teacher.fingerprint:
            found.append(f"commit record of block {block} is of another teacher ({self.teacher[:12]})")
        return found


class Manifest(Header):
    """A sealed cache: header, all commit records, and size and checksum of each metadata file.

    Attributes:
        name: SHA-256 of everything else in the manifest, which is the cache's name.
        files: the ``zarr.json`` files by path in the cache.
        statistics: of features, by signal; of points also where the cache holds the map that they lie on. Caches of an
            older bevkd have none.
        self_check: how its boxes score; None if whoever sealed the cache did not look.
    """

    name: Sha256
    records: tuple[BlockRecord, ...]
    files: dict[str, FileRecord]
    statistics: dict[SignalName, ChannelStatistics] = Field(default_factory=dict)
    self_check: SelfCheck | None = None

    @model_validator(mode="after")
    def _check_records(self) -> Self:
        if missing := self._shapes_missing():
            raise ValueError(f"sample_shapes lacks {', '.join(sorted(missing))}")
        if len(self.records) != self.blocks:
            raise ValueError(f"records: {len(self.records)} for {self.blocks} blocks")
        for block, record in enumerate(self.records):
            if found := record.faults(self, block):
                raise ValueError("; ".join(found))
        if set(self.files) != {ROOT, *(f"{array.name}/{ROOT}" for array in self.arrays)}:
            raise ValueError(f"files: lists {sorted(self.files)}")
        for signal, kept in self.statistics.items():
            if signal not in FEATURES:
                raise ValueError(f"statistics: there are none of {signal}")
            if (channels := self._channels(signal)) != len(kept.mean):
                raise ValueError(f"statistics.{signal} has {len(kept.mean)} channels, the cache {channels}")
        return self

    def _channels(self, signal: str) -> int | None:
        """Return the channels of a feature signal, or of the map that its points lie on."""
        if signal in self.sample_shapes:
            return self.sample_shapes[signal][1 if signal in POINTS else 0]
        shape = self.sample_shapes.get(POINTS.get(signal, ""))
        return shape[0] if shape else None


def digest_of(sums: Mapping[str, ChannelSums]) -> str:
    """Return the SHA-256 of the sums of a block."""
    return digest({name: own.model_dump(mode="json") for name, own in sums.items()})


def name_of(manifest: Mapping[str, Any]) -> str:
    """Return the name of a manifest: the SHA-256 of its JSON without ``name``."""
    return digest({key: value for key, value in manifest.items() if key != "name"})


def to_json(value: BaseModel | Mapping[str, Any]) -> bytes:
    """Return the one JSON text that a model or mapping of plain values has in a cache.

    Raises:
        CacheError: a number is infinite or not a number.
    """
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    try:
        return (json.dumps(data, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except ValueError as error:
        raise CacheError(f"the teacher's identity or the config holds {error}: write such numbers as text.") from error


def read_json(store: Store, key: str) -> dict[str, Any]:
    """Return the mapping in a JSON file of a cache.

    Raises:
        CacheError: the file is missing, damaged, or far larger than such a file can be.
    """
    place = store.place(key)
    try:
        text = store.read(key, MAX_JSON_BYTES)
        data = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise CacheError(f"cannot read {place}: {error.strerror}. {RESTORE}.") from error
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{place} is damaged: it is no JSON text of finite numbers. {RESTORE}.") from error
    if _CONTROL.search(text):
        raise CacheError(
            f"{place} holds control characters, which could write to your terminal. Do not use this cache."
        )
    if not isinstance(data, dict):
        raise CacheError(f"{place} is damaged: it holds no mapping. {RESTORE}.")
    return data


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def parse_json(model: type[Model], data: dict[str, Any], place: str) -> Model:
    """Return ``data``, read from the file named ``place``, as ``model``.

    Raises:
        CacheError: written by a later version of bevkd, or faults, all of which are listed.
    """
    version = data.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise CacheError(f"{place} has schema version {version}, this bevkd reads {SCHEMA_VERSION}. Upgrade bevkd.")
    try:
        return parse(model, data, place)
    except ConfigError as error:
        raise CacheError(f"{error}\n{RESTORE}.") from error
    except RecursionError as error:
        raise CacheError(f"{place} is damaged: its values are nested too deep. {RESTORE}.") from error


def read_manifest(store: Store) -> Manifest:
    """Return the manifest of a sealed cache.

    Raises:
        CacheError: the manifest is missing, damaged, or does not have its own digest as its name.
    """
    place = store.place(MANIFEST)
    data = read_json(store, MANIFEST)
    manifest = parse_json(Manifest, data, place)
    if name_of(data) != manifest.name:
        raise CacheError(
            f"{place} was changed after the cache was sealed: its digest is {name_of(data)[:12]}, its name is "
            f"{manifest.name[:12]}. Restore it from a copy of the cache."
        )
    return manifest


def record_key(block: int) -> str:
    """Return the place of a commit record in the cache."""
    return f"{COMMITS}/{block}.json"


def committed(store: Store) -> set[int]:
    """Return the blocks of a cache that have a commit record."""
    names = (name.removesuffix(".json") for name in store.sizes(COMMITS) if name.endswith(".json"))
    return {int(name) for name in names if name.isdecimal()}


def read_header(store: Store) -> Header:
    """Return the header of a cache, sealed or not.

    Raises:
        CacheError: there is none, or it is damaged.
    """
    place = store.place(ROOT)
    attributes = read_json(store, ROOT).get("attributes")
    found = attributes.get("bevkd") if isinstance(attributes, dict) else None
    if not isinstance(found, dict):
        raise CacheError(f"{place} is not of a bevkd cache. Give the folder that cache-teacher wrote, or a new one.")
    return parse_json(Header, found, place)


def open_manifest(store: Store) -> Manifest:
    """Return the manifest of a sealed cache after checking it and the metadata files that it lists.

    Raises:
        CacheError: there is no cache, it is not sealed, or manifest or metadata are damaged.
    """
    try:
        if not store.exists(MANIFEST):
            raise CacheError(_why_not_sealed(store))
        manifest = read_manifest(store)
        for key, record in manifest.files.items():
            _check_metadata(store, key, record)
    except OSError as error:
        raise CacheError(f"cannot read the cache {store.uri}: {error.strerror}. Check address and rights.") from error
    return manifest


def _check_metadata(store: Store, key: str, record: FileRecord) -> None:
    try:
        found = store.record(key)
    except OSError as error:
        raise CacheError(f"{store.place(key)} cannot be read: {error.strerror}. {RESTORE}.") from error
    if found != record:
        raise CacheError(f"{store.place(key)} is damaged: its checksum is not the manifest's. {RESTORE}.")


def _why_not_sealed(store: Store) -> str:
    if not store.exists(ROOT):
        return f"there is no cache at {store.uri}. Check the address, or write one with cache-teacher."
    header = read_header(store)
    done = len(committed(store))
    return (
        f"cache {store.uri} is not sealed: {done} of {header.blocks} blocks are committed. Run cache-teacher with "
        "the same recipe again to finish it."
    )


def refuse_foreign(store: Store) -> None:
    """Refuse a place that holds something other than a cache or its beginning.

    Raises:
        CacheError: says so. OSError: the storage fails.
    """
    # The root is the first file of a cache: a writer that begins one meanwhile has written it when others are seen.
    if not store.exists(ROOT) and not store.empty() and not store.exists(ROOT):
        raise CacheError(f"{store.uri} is not empty and holds no cache. Give a new or an empty folder.")
