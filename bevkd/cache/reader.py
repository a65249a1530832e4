"""Reading a sealed cache: one open, one pread and one decompression per array; no threads, no state but indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.cache import blocks, shard
from bevkd.cache.arrays import ArraySpec, arrays_for
from bevkd.cache.encoding import Array, decode
from bevkd.cache.manifest import MANIFEST, RESTORE, Manifest, open_manifest, record_key
from bevkd.cache.store import Store, open_store
from bevkd.cache.variants import frames_in, variants_in
from bevkd.data.identity import DatasetIdentity
from bevkd.errors import CacheError
from bevkd.grid import BEVGrid
from bevkd.types import Boxes, BoxPoints, Instances, LidarDepth, SparseMap

if TYPE_CHECKING:
    from bevkd.cache.local_copy import LocalCopies

_SHOWN = 3


class CacheReader:
    """A sealed cache, by sample token.

    Attributes:
        variants: the names of those that it holds of each frame, see ``bevkd.cache.variants``; the frame as it is ("")
            first.

    It holds no open file, so it may be used after a fork and by several threads; it is pickled as its path.
    """

    def __init__(self, store: Store, manifest: Manifest, copies: LocalCopies | None = None) -> None:
        self.store, self.manifest, self.copies = store, manifest, copies
        self._local = copies.over(store, manifest) if copies and store.remote else None
        self._shards: shard.ShardSource = self._local or store
        self.variants = variants_in(manifest.tokens)
        self._samples = {token: sample for sample, token in enumerate(manifest.tokens)}
        self._arrays = {
            signal: arrays_for(signal, spec, manifest.sample_shapes.get(signal, ()))
            for signal, spec in manifest.spec.signals.items()
        }
        self._indices: dict[tuple[str, int], shard.Index] = {}

    @classmethod
    def open(cls, uri: str | Path, copies: LocalCopies | None = None) -> Self:
        """Return a reader of the cache at ``uri``: a path, a ``file://`` address or ``s3://bucket/prefix``.

        Args:
            copies: where whole shards of a remote cache are kept for the next read; None reads single samples.

        Raises:
            CacheError: there is no cache, it is not sealed, or its manifest or metadata are damaged.
        """
        store = open_store(Path(uri).absolute() if "://" not in str(uri) else uri)
        return cls(store, open_manifest(store), copies)

    def __reduce__(self) -> tuple[Callable[..., CacheReader], tuple[str, LocalCopies | None]]:
        return type(self).open, (self.store.uri, self.copies)

    @property
    def uri(self) -> str:
        """The cache's address."""
        return self.store.uri

    @property
    def tokens(self) -> tuple[str, ...]:
        """The sample tokens, in stored order."""
        return self.manifest.tokens

    @property
    def frames(self) -> tuple[str, ...]:
        """The tokens of the frames as they are, without variants, in stored order."""
        return frames_in(self.manifest.tokens)

    @property
    def sample_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of one sample of each map, and [9,C] of points."""
        return self.manifest.sample_shapes

    def __len__(self) -> int:
        return len(self._samples)

    def __contains__(self, token: object) -> bool:
        return token in self._samples

    def arrays(self, signals: Sequence[str]) -> tuple[ArraySpec, ...]:
        """Return the arrays that :meth:`read` returns for ``signals``.

        Raises:
            CacheError: the cache does not hold one of them.
        """
        if absent := [signal for signal in signals if signal not in self._arrays]:
            raise CacheError(
                f"cache {self.uri} holds no {', '.join(absent)}, only {', '.join(self._arrays)}. Write a cache "
                "with a spec that stores it."
            )
        return tuple(array for signal in signals for array in self._arrays[signal])

    def read_bytes(self, signals: Sequence[str]) -> int:
        """Return the bytes of all shards that hold ``signals``."""
        names = [array.name for array in self.arrays(signals)]
        return sum(record.arrays[name].bytes for record in self.manifest.records for name in names)

    def read(self, token: str, signals: Sequence[str], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Return the stored arrays of one sample, by array name, as ``decode`` takes them.

        Args:
            out: buffers to fill, by array name; missing ones are allocated. Each must be contiguous and have the shape
                and type of its array.

        Raises:
            CacheError: unknown token or signal, or a shard is missing, truncated or damaged.
        """
        arrays = self.arrays(signals)
        return {
            array.name: self.read_array(token, array, None if out is None else out.get(array.name)) for array in arrays
        }

    def read_array(self, token: str, array: ArraySpec, buffer: Array | None = None) -> Array:
        """Return one stored array of one sample, in ``buffer`` if there is one; see :meth:`read`."""
        sample = self._samples.get(token)
        if sample is None:
            raise CacheError(f"cache {self.uri} holds no sample '{token}'. Write a cache of the data set you use.")
        block, slot = blocks.locate(sample, self.manifest.spec.block)
        if buffer is None:
            buffer = np.empty(array.shape, array.dtype)
        elif buffer.shape != array.shape or buffer.dtype != array.dtype or not buffer.flags.c_contiguous:
            raise CacheError(f"out['{array.name}'] must be a contiguous {array.dtype} array of {array.shape}.")
        try:
            self._read_sample(array, block, slot, buffer)
            self._check_count(array, buffer)
        except CacheError as error:
            raise CacheError(f"sample '{token}' of cache {self.uri}: {error}. {self._advice(block)}") from error
        return buffer

    def tensors(self, token: str, signals: Sequence[str]) -> dict[str, Tensor]:
        """Return the stored arrays of one sample as tensors that share their memory; see :meth:`read`."""
        return {name: torch.from_numpy(array) for name, array in self.read(token, signals).items()}

    def boxes(self, token: str) -> Boxes:
        """Return the teacher's boxes of one sample."""
        boxes = self.signal(token, "boxes")
        assert isinstance(boxes, Boxes)  # the spec's validator sees to it
        return boxes

    def lidar_depth(self, token: str) -> LidarDepth:
        """Return the LiDAR's depth in the cameras of one sample, in pixels of the original images."""
        depth = self.signal(token, "lidar_depth")
        assert isinstance(depth, LidarDepth)  # the spec's validator sees to it
        return depth

    def instances(self, token: str) -> Instances:
        """Return the instances of one sample, in pixels of the original images."""
        instances = self.signal(token, "instances")
        assert isinstance(instances, Instances)  # the spec's validator sees to it
        return instances

    def signal(
        self, token: str, name: str
    ) -> Float[Tensor, "..."] | Boxes | SparseMap | BoxPoints | Instances | LidarDepth:
        """Return one decoded signal of one sample: a float32 map, or what else the signal is."""
        stored = {key: array[None] for key, array in self.tensors(token, [name]).items()}
        return decode(name, self.manifest.spec.signals[name], stored)[0]

    def check_index(self, array: ArraySpec, block: int) -> shard.Index:
        """Return the checked index of a shard, read once per process.

        Raises:
            CacheError: the shard is missing, truncated or damaged.
        """
        index = self._indices.get((array.name, block))
        if index is None:
            record = self.manifest.records[block]
            key = shard.shard_name(array, block)
            used, size = len(record.tokens), record.arrays[array.name].bytes
            index = shard.read_index(self._shards, key, self.manifest.spec.block, used, size, array.nbytes)
            self._indices[array.name, block] = index
        return index

    def require(
        self,
        signals: Sequence[str],
        grid: BEVGrid | None = None,
        tokens: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        dataset: DatasetIdentity | None = None,
    ) -> list[str]:
        """Return everything in which the cache does not fit its use; None is not checked."""
        held = self.manifest
        faults = [
            f"{signal} is not stored (stored are {', '.join(self._arrays)}): write a cache with a spec that stores it"
            for signal in signals
            if signal not in self._arrays
        ]
        if grid is not None and grid != held.grid:
            faults.append(f"grid: the cache has {held.grid}, z {list(held.grid.z_m)} m; wanted is {grid}")
        if classes is not None and tuple(classes) != held.classes:
            faults.append(f"classes: the cache has {', '.join(held.classes)}; wanted are {', '.join(classes)}")
        if dataset is not None:
            # Which frames of it are used, and how the split is called, is for the tokens to say.
            old, new = held.dataset.model_dump(), dataset.model_dump()
            faults += [
                f"dataset.{key}: the cache has {old[key]!r}, wanted is {new[key]!r}"
                for key in ("name", "version")
                if old[key] != new[key]
            ]
            if old["annotation_digest"] != new["annotation_digest"]:
                faults.append(
                    f"dataset.annotation_digest: the cache has {old['annotation_digest'][:12]}, wanted is "
                    f"{new['annotation_digest'][:12]}: another data set, or one that was annotated anew"
                )
        if tokens is not None and (absent := [token for token in tokens if token not in self]):
            some = ", ".join(absent[:_SHOWN]) + (", ..." if len(absent) > _SHOWN else "")
            faults.append(f"tokens: {len(absent)} of {len(tokens)} samples are not in the cache: {some}")
        return [f"cache {self.uri}: {fault}" for fault in faults]

    def _read_sample(self, array: ArraySpec, block: int, slot: int, buffer: Array) -> None:
        try:
            self._decompress(array, block, slot, buffer)
        except CacheError:
            if self._local is None:
                raise
            # The disk may have harmed the local copy: take a new one.
            self._indices.pop((array.name, block), None)
            self._local.drop(shard.shard_name(array, block))
            self._decompress(array, block, slot, buffer)

    def _decompress(self, array: ArraySpec, block: int, slot: int, buffer: Array) -> None:
        offset, size = self.check_index(array, block)[slot].tolist()
        key = shard.shard_name(array, block)
        try:
            data = self._shards.read_range(key, offset, size)
        except OSError as error:
            raise CacheError(f"shard {self._shards.place(key)} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise CacheError(f"shard {self._shards.place(key)} is truncated")
        try:
            shard.decompress(data, buffer)
        except CacheError as error:
            raise CacheError(f"shard {self._shards.place(key)}: {error}") from error

    def _check_count(self, array: ArraySpec, value: Array) -> None:
        """Refuse a number of rows that there cannot be."""
        signal = array.name.removesuffix("_count")
        if signal == array.name or signal not in self.manifest.spec.signals:
            return
        capacity = self.manifest.spec.signals[signal].capacity
        if not 0 <= value.item() <= capacity:
            raise CacheError(f"{array.name} is {value.item()}, it must be 0 to {capacity}")

    def _advice(self, block: int) -> str:
        return (
            f"{RESTORE}, or delete {MANIFEST}, {record_key(block)} and the shards c.{block}* and run cache-teacher "
            "again"
        )
