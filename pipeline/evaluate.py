"""Metrics of a run, of the boxes in a cache, or of a detections file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bevkd.cache.reader import CacheReader
from bevkd.config import apply_overrides, parse
from bevkd.data.source import FrameSource
from bevkd.errors import ConfigError, ContractError
from bevkd.evaluation.predict import predict
from bevkd.evaluation.score import Report, evaluate, metrics_of, scored_frames
from bevkd.models.detector import Detector
from bevkd.progress import Progress
from pipeline.parts import check_files, contract, is_main_process, open_source
from pipeline.recipe import EvaluateRecipe, EvaluationConfig
from pipeline.segmentation import evaluate_segmenter_run
from pipeline.trained import WEIGHTS, detector_recipe, joined_processes, recipe_values, trained_detector, weight_file


def open_evaluation(config: EvaluationConfig, detector: Detector, progress: Progress) -> FrameSource:
    """Return the frames to evaluate ``detector`` on, with all their files checked.

    Raises:
        ContractError: their classes are not the detector's, so that its labels would mean other classes.
    """
    sensors = detector.config.sensors
    source = open_source(config.data, sensors, progress)
    if source.classes != detector.classes:
        raise ContractError(
            f"evaluation.data.classes has {', '.join(source.classes)}, but the detector is trained on data.classes: "
            f"{', '.join(detector.classes)}. Give both the same list, in the same order."
        )
    metrics_of(source)  # refuses now, not after the training
    check_files(source, source.tokens, sensors)
    return source


def evaluate_detector(
    detector: Detector,
    source: FrameSource,
    config: EvaluationConfig,
    run: Path,
    progress: Progress,
    tokens: Sequence[str] | None = None,
) -> Report | None:
    """Predict on the annotated frames of ``source``, keep the detections in the run folder, and return their metrics.

    Processes of torch.distributed share the work, see ``predict``; the first one returns the metrics, the others None.

    Args:
        tokens: evaluate on these frames only, and keep nothing.

    Raises:
        ContractError: frames have no annotations.
    """
    frames = scored_frames(source, tokens)
    found = predict(detector, source, frames, progress, config.batch_size, config.workers)
    if not is_main_process():
        return None
    if tokens is None:
        metrics_of(source).save_detections(run / "detections", source, found, detector.config.sensors)
    return evaluate(source, found, frames, max_distance_m=config.max_distance_m)


def evaluate_run(run: Path, overrides: Sequence[str], progress: Progress, weights: str = WEIGHTS) -> Report | None:
    """Return the metrics of a finished run, None in all but the first of several processes.

    Args:
        overrides: change its recipe, e.g. the frames.
        weights: a name within the run folder, or the path of a file.
    """
    values, where = recipe_values(str(run), overrides)
    if "segmenter" in values:
        return evaluate_segmenter_run(run, values, weight_file(str(run), weights), progress)
    recipe = detector_recipe(values, where)
    if recipe.evaluation is None:
        raise ConfigError(f"the recipe of {run} has no 'evaluation'. Add --set evaluation.data='{{name: ..., ...}}'.")
    with joined_processes(recipe.device) as device:
        detector = trained_detector(recipe, str(run), device, weights)
        source = open_evaluation(recipe.evaluation, detector, progress)
        return evaluate_detector(detector, source, recipe.evaluation, run, progress)


_PLACES = ("root", "index_dir")


def evaluate_cache(uri: str, overrides: Sequence[str]) -> Report:
    """Return the metrics of the teacher's boxes in a cache, on the annotated frames of the cache.

    ``overrides`` complete the recorded data config, which does not say where the data set lies.
    """
    reader = CacheReader.open(uri)
    contract(f"{uri} cannot be scored:", reader.require(("boxes",)))
    source = source_of_cache(reader, overrides)
    frames = [token for token in reader.frames if token in source.annotated]
    contract(f"{uri} cannot be scored:", [] if frames else ["none of its frames is annotated"])
    return evaluate(source, {token: reader.boxes(token) for token in frames}, frames)


def source_of_cache(reader: CacheReader, overrides: Sequence[str]) -> FrameSource:
    """Return the data set that a cache was made from; it has all frames of the cache.

    Raises:
        ContractError: the data set there is another one, was annotated anew, or has other classes or frames.
    """
    hint = "it leaves out where the data lies: --set data.root=FOLDER, or data.sources.0.root and so on"
    where = f"the data config recorded in {reader.uri} ({hint})"
    source = _source({"data": _without_places(reader.manifest.config.get("data"))}, overrides, where)
    faults = reader.require((), classes=source.classes, dataset=source.identity)
    held = frozenset(source.tokens)
    if absent := [token for token in reader.frames if token not in held]:
        faults.append(f"{len(absent)} of {len(reader.frames)} frames of the cache are not in it, first '{absent[0]}'")
    contract("the data set is not the one of the cache:", faults)
    return source


def _without_places(data: object) -> dict[str, object]:
    """Return a recorded data config without folders: a cache of a stranger must not say which are used here."""
    kept = {key: value for key, value in (data if isinstance(data, dict) else {}).items() if key not in _PLACES}
    sources = kept.get("sources")
    return {**kept, "sources": [_without_places(each) for each in sources]} if isinstance(sources, list) else kept


def evaluate_detections(path: Path, overrides: Sequence[str]) -> Report:
    """Return the metrics of detections in the format of their data set, which ``overrides`` name.

    That is nuScenes unless they say otherwise.
    """
    where = "the data set of the detections (give --set data.root=FOLDER, data.split, and data.name or data.version)"
    source = _source({"data": {"name": "nuscenes"}}, overrides, where)
    return evaluate(source, metrics_of(source).load_detections(path, source))


def _source(values: dict[str, object], overrides: Sequence[str], where: str) -> FrameSource:
    recipe = parse(EvaluateRecipe, apply_overrides(values, overrides), where)
    return open_source(recipe.data, frozenset())
