"""Other ways to store and read the same samples: what ``bevkd bench store`` compares the cache with.

A peer is opened on a folder with the same arrays and returns a function that reads all arrays of one sample. Those that
read Zarr read the cache's own files; the others get a copy in their own format. All of them decode into memory of their
own or into the buffers given, as their interface allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd
from torch import Tensor

from bevkd.cache.reader import CacheReader
from bevkd.cache.shard import LEVEL, read_index, shard_name
from bevkd.errors import BevkdError
from bevkd.signals import MAPS

Array = npt.NDArray[Any]
Read = Callable[[int], object]
COLD = ("npy memmap", "safetensors")
"""Uncompressed float16, as one stores maps without a cache format. They are quick while everything fits into the page
cache, which a data set does not: theirs are the figures from a cold one."""


def names() -> list[str]:
    """Return all peers, the limit and bevkd first."""
    return list(_OPEN)


def open_peer(name: str, folder: Path) -> Read:
    """Return what reads the arrays of a sample, by its index.

    Raises:
        BevkdError: the peer's library is not installed.
    """
    try:
        return _OPEN[name](folder)
    except ImportError as error:
        raise BevkdError(f"{error.name} is not installed. Install the peers: pip install 'bevkd[bench]'.") from error


def files_of(name: str, folder: Path) -> list[Path]:
    """Return the files that a peer reads."""
    own = folder / _FOLDERS.get(name, "cache")
    return sorted(path for path in own.rglob("*") if path.is_file())


def write_copies(folder: Path) -> None:
    """Write the samples of ``folder``'s cache in the format of every peer that has its own.

    Raises:
        BevkdError: a peer's library is not installed.
    """
    reader = _reader(folder)
    quantised = [reader.read(token, tuple(reader.manifest.spec.signals)) for token in reader.tokens]
    plain = [_float16(reader, token) for token in reader.tokens]
    try:
        for name, write in _WRITE.items():
            (folder / _FOLDERS[name]).mkdir()
            write(folder / _FOLDERS[name], plain if name in COLD else quantised)
    except ImportError as error:
        raise BevkdError(f"{error.name} is not installed. Install the peers: pip install 'bevkd[bench]'.") from error
    os.sync()


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Make the next read of these files come from the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _reader(folder: Path) -> CacheReader:
    return CacheReader.open(folder / "cache")


def _buffers(reader: CacheReader) -> dict[str, Array]:
    return {
        array.name: np.empty(array.shape, array.dtype) for array in reader.arrays(tuple(reader.manifest.spec.signals))
    }


def _float16(reader: CacheReader, token: str) -> dict[str, Array]:
    """Return the arrays of a sample with float16 maps in place of quantised ones."""
    plain: dict[str, Array] = {}
    for signal in reader.manifest.spec.signals:
        if signal in MAPS:
            value = reader.signal(token, signal)
            assert isinstance(value, Tensor)
            plain[signal] = value.half().numpy()
        else:
            plain |= reader.read(token, [signal])
    return plain


def _limit(folder: Path) -> Read:
    """Read with nothing but pread and one-shot zstd: open files, known offsets, reused buffers."""
    reader, codec = _reader(folder), Zstd()
    spec, places, buffers = reader.manifest.spec, [], _buffers(reader)
    for array in reader.arrays(tuple(spec.signals)):
        shards = []
        for block, record in enumerate(reader.manifest.records):
            key, size = shard_name(array, block), record.arrays[array.name].bytes
            index = read_index(reader.store, key, spec.block, len(record.tokens), size, array.nbytes)
            shards.append((os.open(reader.store.place(key), os.O_RDONLY), index.tolist()))
        places.append((shards, buffers[array.name]))

    def read(sample: int) -> None:
        block, slot = divmod(sample, spec.block)
        for shards, buffer in places:
            handle, index = shards[block]
            offset, size = index[slot]
            codec.decode(os.pread(handle, size, offset), out=buffer)

    return read


def _bevkd(folder: Path) -> Read:
    reader = _reader(folder)
    signals, buffers = tuple(reader.manifest.spec.signals), _buffers(reader)
    return lambda sample: reader.read(reader.tokens[sample], signals, out=buffers)


def _zarr_python(folder: Path) -> Read:
    import zarr

    arrays = [array for _, array in zarr.open_group(folder / "cache", mode="r").arrays()]
    return lambda sample: [array[sample] for array in arrays]


def _zarrs(folder: Path) -> Read:
    import zarr
    import zarrs  # noqa: F401  registers its codec pipeline

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        arrays = [array for _, array in zarr.open_group(folder / "cache", mode="r").arrays()]
    return lambda sample: [array[sample] for array in arrays]


def _tensorstore(folder: Path) -> Read:
    import tensorstore

    arrays = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "cache" / name)}}, open=True
        ).result()
        for name in _buffers(_reader(folder))
    ]
    return lambda sample: [array[sample].read().result() for array in arrays]


def _write_hdf5(folder: Path, samples: Sequence[Mapping[str, Array]]) -> None:
    import h5py
    import hdf5plugin

    with h5py.File(folder / "samples.h5", "w") as file:
        for name, first in samples[0].items():
            codec = hdf5plugin.Zstd(clevel=LEVEL) if first.shape else {}
            stored = file.create_dataset(
                name, (len(samples), *first.shape), first.dtype, chunks=(1, *first.shape), **codec
            )
            for index, sample in enumerate(samples):
                stored[index] = sample[name]


def _hdf5(folder: Path) -> Read:
    import h5py
    import hdf5plugin  # noqa: F401  registers the zstd filter

    file, buffers = h5py.File(folder / "hdf5" / "samples.h5"), _buffers(_reader(folder))
    arrays = [(file[name], buffer) for name, buffer in buffers.items()]

    def read(sample: int) -> None:
        for stored, buffer in arrays:
            stored.read_direct(buffer, np.s_[sample]) if buffer.shape else stored[sample]

    return read


def _write_lmdb(folder: Path, samples: Sequence[Mapping[str, Array]]) -> None:
    import lmdb

    codec = Zstd(level=LEVEL, checksum=True)
    size = 2 * sum(array.nbytes for sample in samples for array in sample.values()) + 2**24
    with lmdb.open(str(folder), map_size=size) as environment, environment.begin(write=True) as transaction:
        for index, sample in enumerate(samples):
            for name, array in sample.items():
                transaction.put(f"{index}/{name}".encode(), codec.encode(np.ascontiguousarray(array)))


def _lmdb(folder: Path) -> Read:
    import lmdb

    environment, codec = lmdb.open(str(folder / "lmdb"), readonly=True, lock=False, readahead=False), Zstd()
    buffers = _buffers(_reader(folder))

    def read(sample: int) -> None:
        with environment.begin(buffers=True) as transaction:
            for name, buffer in buffers.items():
                codec.decode(transaction.get(f"{sample}/{name}".encode()), out=buffer)

    return read


def _write_npy(folder: Path, samples: Sequence[Mapping[str, Array]]) -> None:
    for name in samples[0]:
        np.save(folder / f"{name}.npy", np.stack([sample[name] for sample in samples]))


def _npy(folder: Path) -> Read:
    arrays = [np.load(path, mmap_mode="r") for path in sorted((folder / "npy").glob("*.npy"))]
    buffers = [np.empty(array.shape[1:], array.dtype) for array in arrays]

    def read(sample: int) -> None:
        for stored, buffer in zip(arrays, buffers, strict=True):
            np.copyto(buffer, stored[sample])

    return read


def _write_safetensors(folder: Path, samples: Sequence[Mapping[str, Array]]) -> None:
    from safetensors.numpy import save_file

    for index, sample in enumerate(samples):
        save_file(
            {name: np.ascontiguousarray(array) for name, array in sample.items()}, folder / f"{index}.safetensors"
        )


def _safetensors(folder: Path) -> Read:
    from safetensors.numpy import load_file

    return lambda sample: load_file(folder / "safetensors" / f"{sample}.safetensors")


_OPEN: dict[str, Callable[[Path], Read]] = {
    "limit": _limit,
    "bevkd": _bevkd,
    "zarr-python": _zarr_python,
    "zarrs": _zarrs,
    "tensorstore": _tensorstore,
    "HDF5": _hdf5,
    "LMDB + zstd": _lmdb,
    "npy memmap": _npy,
    "safetensors": _safetensors,
}
_FOLDERS = {"HDF5": "hdf5", "LMDB + zstd": "lmdb", "npy memmap": "npy", "safetensors": "safetensors"}
_WRITE: dict[str, Callable[[Path, Sequence[Mapping[str, Array]]], None]] = {
    "HDF5": _write_hdf5,
    "LMDB + zstd": _write_lmdb,
    "npy memmap": _write_npy,
    "safetensors": _write_safetensors,
}
