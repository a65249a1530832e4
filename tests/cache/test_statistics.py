"""The statistics of features in the manifest: of what is stored, exact, and the same however the cache came about."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.cache import manifest
from bevkd.cache.manifest import Manifest, record_key
from bevkd.cache.packing import ANNOTATED
from bevkd.cache.reader import CacheReader
from bevkd.cache.statistics import ChannelStatistics
from bevkd.cache.transfer import copy
from bevkd.cache.verify import verify
from bevkd.cache.writer import CacheWriter
from bevkd.errors import CacheError
from bevkd.geometry.sampling import points_of
from bevkd.progress import Silent
from bevkd.types import Boxes
from tests.cache import kit

ENCODINGS = {
    "eight": {"bev_low": {"encoding": "uint8"}, "bev_high": {"encoding": "root8"}},
    "half": {"bev_low": {"encoding": "float16"}, "bev_high": {"encoding": "int8"}},
}


def annotations(token: str) -> Boxes:
    """Return two boxes of a sample, the second of which reaches over the edge; of every third sample none."""
    number = int(token[-3:])
    if number % 3 == 2:
        return Boxes.empty()
    values = torch.tensor([[0.3 * number - 2, 1.1, 0, 3, 1.5, 1, 0.2 * number, 0, 0], [5.5, -3.5, 0, 2, 2, 2, 0, 0, 0]])
    return Boxes(values, torch.zeros(2, dtype=torch.long), torch.ones(2))


def sample(token: str) -> dict[str, Any]:
    """Return a sample whose lower map is empty in a part of its cells, with its annotations."""
    made = kit.sample(token)
    made["bev_low"][:, :3] = 0
    return {**made, ANNOTATED: annotations(token)}


def samples(tokens: Sequence[str]) -> Iterator[dict[str, Any]]:
    return (sample(token) for token in tokens)


def write(path: Path, described: manifest.Header, order: int = 1) -> Manifest:
    writer = CacheWriter.open(path, described, kit.SHAPES)
    for block in writer.pending()[::order]:
        writer.write_block(block, samples(described.block_tokens(block)))
    return writer.seal()


def vectors(reader: CacheReader, name: str) -> np.ndarray[Any, Any]:
    """Return all cells of a cached map [n,C], in float64."""
    maps = torch.stack([reader.signal(token, name) for token in reader.tokens])  # type: ignore[misc]
    return maps.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()


def check(found: ChannelStatistics, values: np.ndarray[Any, Any]) -> None:
    filled = values[(values != 0).any(axis=1)]
    assert found.vectors == len(filled)
    assert found.share == pytest.approx(len(filled) / len(values), rel=1e-6)
    np.testing.assert_allclose(found.mean, filled.mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.std, filled.std(axis=0), rtol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_they_are_mean_and_deviation_over_the_cells_that_hold_something(encoding: str, tmp_path: Path) -> None:
    found = write(tmp_path / "cache", kit.header(7, 3, signals=ENCODINGS[encoding])).statistics
    reader = CacheReader.open(tmp_path / "cache")
    for name in ("bev_low", "bev_high"):
        check(found[name], vectors(reader, name))
    assert found["bev_low"].share < 0.7
    assert found["bev_high"].share == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_points_are_those_of_annotated_boxes_on_the_stored_maps(encoding: str, tmp_path: Path) -> None:
    found = write(tmp_path / "cache", kit.header(7, 3, signals=ENCODINGS[encoding])).statistics
    reader = CacheReader.open(tmp_path / "cache")
    for name, source in (("points_low", "bev_low"), ("points_high", "bev_high")):
        on_boxes = [
            points_of(reader.signal(token, source), annotations(token), kit.GRID).values  # type: ignore[arg-type]
            for token in reader.tokens
        ]
        check(found[name], torch.cat(on_boxes).flatten(0, 1).double().numpy())


def test_stored_points_have_the_statistics_of_their_maps(tmp_path: Path) -> None:
    signals = {"bev_low": {"encoding": "float16"}}
    of_maps = write(tmp_path / "maps", kit.header(7, 3, signals=signals)).statistics["points_low"]
    described = kit.header(7, 3, signals={"points_low": {"encoding": "float16"}})
    writer = CacheWriter.open(tmp_path / "points", described, kit.SHAPES)
    for block in writer.pending():
        tokens = described.block_tokens(block)
        maps = [torch.from_numpy(sample(token)["bev_low"]) for token in tokens]
        points = [points_of(each, annotations(token), kit.GRID) for each, token in zip(maps, tokens, strict=True)]
        writer.write_block(block, [{"points_low": each} for each in points])
    of_points = writer.seal().statistics["points_low"]
    assert of_points.vectors == of_maps.vectors
    np.testing.assert_allclose(of_points.mean, of_maps.mean, atol=1e-3)
    np.testing.assert_allclose(of_points.std, of_maps.std, rtol=1e-3)


def test_the_order_of_blocks_and_how_samples_are_cut_into_them_change_nothing(tmp_path: Path) -> None:
    first = write(tmp_path / "a", kit.header(11, 4))
    assert write(tmp_path / "b", kit.header(11, 4), order=-1).name == first.name
    assert write(tmp_path / "c", kit.header(11, 3)).statistics == first.statistics


def test_a_cache_without_annotations_has_no_statistics_of_points(tmp_path: Path) -> None:
    assert set(kit.write(tmp_path / "cache", kit.header(5, 2)).statistics) == {"bev_low", "bev_high"}


def test_the_sums_stand_in_the_commit_records_alone_and_are_copied_with_them(tmp_path: Path) -> None:
    sealed = write(tmp_path / "cache", kit.header(7, 3))
    assert all(not record.sums for record in sealed.records)
    copy(tmp_path / "cache", tmp_path / "copy", Silent())
    assert kit.tree(tmp_path / "copy") == kit.tree(tmp_path / "cache")
    assert verify(tmp_path / "copy", deep=True) == []


def older(folder: Path, block: int) -> None:
    """Make the commit record of a block one of a bevkd that knew no statistics."""
    path = folder / record_key(block)
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: value for name, value in record.items() if not name.startswith("sums")}))


def test_a_cache_that_an_older_bevkd_began_is_sealed_without_statistics(tmp_path: Path) -> None:
    described = kit.header(7, 3)
    writer = CacheWriter.open(tmp_path / "cache", described, kit.SHAPES)
    for block in writer.pending():
        writer.write_block(block, samples(described.block_tokens(block)))
    older(tmp_path / "cache", 1)
    assert writer.seal().statistics == {}
    assert verify(tmp_path / "cache", deep=True) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["bev_low"]["mean"].pop(), "3 means and 4 standard"),
        (lambda found: [found["bev_low"][name].pop() for name in ("mean", "std")], "statistics.bev_low has 3 channels"),
        (lambda found: found.update(heatmap=found["bev_low"]), "there are none of heatmap"),
        (lambda found: found["bev_low"]["std"].__setitem__(0, -1.0), "greater than or equal to 0"),
    ],
)
def test_statistics_that_do_not_fit_the_cache_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "cache", kit.header(7, 3))
    path = tmp_path / "cache" / manifest.MANIFEST
    data = json.loads(path.read_bytes())
    change(data["statistics"])
    path.write_text(json.dumps({**data, "name": manifest.name_of(data)}))
    with pytest.raises(CacheError, match=message):
        CacheReader.open(tmp_path / "cache")


def test_statistics_that_are_not_those_of_the_records_are_found(tmp_path: Path) -> None:
    write(tmp_path / "cache", kit.header(7, 3))
    path = tmp_path / "cache" / manifest.MANIFEST
    data = json.loads(path.read_bytes())
    data["statistics"]["bev_low"]["mean"][0] += 1
    path.write_text(json.dumps({**data, "name": manifest.name_of(data)}))
    (fault,) = verify(tmp_path / "cache")
    assert "statistics" in fault
