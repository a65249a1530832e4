"""What teacher and students see of one frame: the maps that distillation brings together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.cache.reader import CacheReader
from bevkd.data.collate import collate
from bevkd.data.join import FrameDataset
from bevkd.data.source import FrameSource
from bevkd.errors import BevkdError, DataError
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, view_of
from bevkd.types import Boxes, SparseMap
from bevkd.viz.html.element import Html, element
from bevkd.viz.html.page import Section, block, note, small
from bevkd.viz.html.pictures import map_view
from bevkd.viz.maps import class_peak, feature_energy
from pipeline.parts import open_source
from pipeline.recipe import StudentRecipe
from pipeline.reporting.methods import Scene, Shown
from pipeline.runs import Run
from pipeline.trained import detector_recipe, recipe_values, trained_detector

Map = Literal["bev_low", "bev_high", "heatmap"]
MAPS: tuple[Map, ...] = ("bev_low", "bev_high", "heatmap")
TITLES = {
    "bev_low": "bev_low: after the encoder",
    "bev_high": "bev_high: after the BEV encoder",
    "heatmap": "heatmap: where the head sees objects",
}
_LOOKED_AT, _NEAR_M = 64, 20.0
_CELLS = 256
"""Most cells of a drawn map along a side."""

Maps = Mapping[Map, Float[Tensor, "Y X"]]


def features_section(scene: Scene, overrides: Sequence[str]) -> Section:
    """Return the maps of the teacher, from the cache, beside those of the students, or what is missing to show them."""
    distilled = next((each for each in scene.of("distilled") if each.runs[0].caches), None)
    key, title = "features", "What the networks see"
    if distilled is None:
        return Section(key, "Features", title, None, note("No distilled run that reads a cache is among the runs."))
    remarks: list[str] = []
    reader, held = _open(distilled.runs[0], remarks)
    students = [each for each in (distilled.base, distilled) if each]
    try:
        source, token = _frame(distilled.runs[0], reader, overrides)
    except (BevkdError, OSError) as error:
        advice = " Say where the data lies with --set data.root=FOLDER."
        return Section(
            key, "Features", title, None, note(*remarks, f"The frames of the training cannot be read: {error}{advice}")
        )
    rows: dict[str, tuple[str, Maps]] = {}
    if reader is not None:
        rows["teacher (cache)"] = ("c-teacher", {name: _cached(reader, token, name) for name in held})
    for shown in students:
        try:
            rows[shown.name] = (shown.tone, _student(shown, token, overrides))
        except (BevkdError, ImportError, OSError) as error:
            remarks.append(f"{shown.name}: {error}")
    grid = _grid(distilled.runs[0])
    truth = source.annotations(token)
    blocks = [
        block(TITLES[name], _row(name, rows, grid, truth))
        for name in MAPS
        if any(name in maps for _, maps in rows.values())
    ]
    lead = (
        f"One frame of the training data ({token}), as the cache holds it: of {_LOOKED_AT} evenly spaced ones that "
        f"with most objects within {_NEAR_M:.0f} m. Annotated objects are outlined."
    )
    how = (
        "bev_low, bev_high: length of the feature vector of each cell, each map on its own scale. Heatmap: highest "
        "class probability, square root."
    )
    content: list[Html] = [*blocks, small(how)]
    if remarks:
        content.append(note(*remarks))
    return Section(key, "Features", title, lead, content)


def _open(run: Run, remarks: list[str]) -> tuple[CacheReader | None, tuple[Map, ...]]:
    """Return the cache of a run that holds most maps, and which ones; or add to ``remarks`` why there is none."""
    best: tuple[CacheReader | None, tuple[Map, ...]] = (None, ())
    for cache in run.caches:
        try:
            reader = CacheReader.open(cache.uri)
        except (BevkdError, OSError) as error:
            remarks.append(f"The cache '{cache.name}' cannot be opened, so the teacher's maps are missing: {error}")
            continue
        held = tuple(name for name in MAPS if name in reader.manifest.spec.signals)
        if len(held) > len(best[1]):
            best = (reader, held)
        elif not held:
            stored = ", ".join(reader.manifest.spec.signals)
            remarks.append(f"The cache '{cache.name}' holds no maps to draw, only {stored}.")
    return best


def _frame(run: Run, reader: CacheReader | None, overrides: Sequence[str]) -> tuple[FrameSource, str]:
    """Return the data that a run was trained on, and the frame of it to show."""
    recipe = _recipe(run, overrides)
    source = open_source(recipe.data, frozenset())
    tokens = [token for token in source.tokens if token in source.annotated and (reader is None or token in reader)]
    spaced = (
        [tokens[index * len(tokens) // _LOOKED_AT] for index in range(_LOOKED_AT)]
        if len(tokens) > _LOOKED_AT
        else tokens
    )
    if not spaced:
        raise DataError("none of the annotated frames is in the cache. Say which data the cache was made from.")
    return source, max(
        spaced, key=lambda each: int((source.annotations(each).center[:, :2].norm(dim=1) < _NEAR_M).sum())
    )


def _recipe(run: Run, overrides: Sequence[str]) -> StudentRecipe:
    values, where = recipe_values(str(run.folder), overrides)
    return detector_recipe(values, where)


def _cached(reader: CacheReader, token: str, name: Map) -> Float[Tensor, "Y X"]:
    value = reader.signal(token, name)
    if isinstance(value, SparseMap):
        value = value.values
    assert isinstance(value, Tensor)
    return _drawn(name, value)


def _student(shown: Shown, token: str, overrides: Sequence[str]) -> Maps:
    """Return the maps of a method's first run for one frame.

    Raises:
        BevkdError: weights or sensor files are missing.
    """
    run = shown.runs[0]
    recipe = _recipe(run, overrides)
    detector: Detector = trained_detector(recipe, str(run.folder), torch.device("cpu")).eval()
    source = open_source(recipe.data, recipe.detector.sensors)
    with torch.inference_mode():
        output = detector(collate([FrameDataset(source, [token], view_of(recipe.detector))[0]]))
    found = {"bev_low": output.bev_low[0], "bev_high": output.bev_high[0], "heatmap": output.head.heatmap[0]}
    return {name: _drawn(name, found[name]) for name in MAPS}


def _drawn(name: Map, values: Float[Tensor, "C Y X"]) -> Float[Tensor, "Y X"]:
    """Return what is shown of a map, on no more cells than a picture needs."""
    shown = class_peak(values).sqrt() if name == "heatmap" else feature_energy(values)
    factor = -(-max(shown.shape) // _CELLS)
    return shown if factor == 1 else torch.nn.functional.max_pool2d(shown[None], factor, ceil_mode=True)[0]


def _row(name: Map, rows: Mapping[str, tuple[str, Maps]], grid: BEVGrid, truth: Boxes) -> Html:
    views = [
        map_view(maps[name], grid, truth, method, tone, name) for method, (tone, maps) in rows.items() if name in maps
    ]
    return element("div", views, class_="map-row")


def _grid(run: Run) -> BEVGrid:
    assert isinstance(run.recipe, StudentRecipe)
    return run.recipe.detector.grid
