"""The command line: parses, renders, and calls the pipeline. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from bevkd import console
from bevkd.console import Bars, print_json, say, size_text
from bevkd.errors import BevkdError

app = typer.Typer(
    name="bevkd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Offline knowledge distillation for bird's-eye-view 3D object detection: cache-teacher runs a heavy teacher "
    "once and stores what it knows, train-student trains a light student from that store, with no teacher in memory.",
    epilog="Start with: bevkd demo. Every command takes --debug for the traceback of an error.",
)
cache_app = typer.Typer(no_args_is_help=True, help="List, check, compare, copy, draw and remove caches.")
app.add_typer(cache_app, name="cache")
bench_app = typer.Typer(no_args_is_help=True, help="Measure on this machine what documentation claims.")
app.add_typer(bench_app, name="bench")

Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a value of the recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")]
Recipe = Annotated[str, typer.Argument(help="Path of a recipe, or the name of one that ships with bevkd.")]
Weights = Annotated[
    str, typer.Option(metavar="NAME", help="Weights of the run, e.g. best; or the path of a .safetensors file.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]


def _caches(values: list[str] | None) -> dict[str, str]:
    caches = {}
    for value in values or []:
        name, equals, uri = value.partition("=")
        if not equals or not name or not uri:
            raise typer.BadParameter(f"'{value}' is not of the form NAME=URI", param_hint="--cache")
        caches[name] = uri
    return caches


@app.command()
def world(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    preset: Annotated[str, typer.Option(help="tiny, demo, bench, full or hills.")] = "demo",
    scenes: Annotated[
        int | None, typer.Option(min=2, help="Number of scenes, a quarter of them for validation.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another world.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a small driving world in nuScenes format."""
    from pipeline.world import make_world

    summary = make_world(out, preset, scenes, seed, Bars(as_json))
    if as_json:
        print_json(asdict(summary))
    else:
        say(f"{summary.frames} key frames in {summary.scenes} scenes at {summary.root}")


@app.command()
def cache_teacher(
    recipe: Recipe,
    out: Annotated[str, typer.Option(metavar="URI", help="Where the cache goes.")],
    overrides: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Cache only the first frames.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Write the I-th of N equal shares of the blocks, I from 0.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Spread the blocks over this many worker processes and their GPUs.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Spread them over the workers of a dask scheduler.")
    ] = None,
    space_check: Annotated[bool, typer.Option(help="Refuse to begin what does not seem to fit on the disk.")] = True,
    as_json: Json = False,
) -> None:
    """Run a teacher once and store what it knows; run again to finish an interrupted cache."""
    if sum(value is not None for value in (shard, workers, scheduler)) > 1:
        raise typer.BadParameter("give at most one of --shard, --workers and --scheduler")
    from pipeline.recipe import load_cache

    loaded = load_cache(recipe, overrides or [])
    if workers is not None or scheduler is not None:
        from pipeline.schedule import cache_on_workers

        summary = cache_on_workers(loaded, out, limit, Bars(as_json), workers or 1, scheduler, space_check)
    else:
        from pipeline.cache_teacher import Share
        from pipeline.cache_teacher import cache_teacher as story

        summary = story(loaded, out, limit, Bars(as_json), Share.parse(shard) if shard else Share(), space_check)
    if as_json:
        print_json(summary.to_json())
        return
    say(summary.text)


@app.command()
def train_teacher(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    overrides: Set = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a detector or a segmenter from annotations alone."""
    from pipeline.recipe import load_teacher
    from pipeline.train_teacher import train_teacher as story

    summary = story(load_teacher(recipe, overrides or []), out, resume, Bars(as_json))
    _show_run(summary, as_json)


@app.command()
def train_student(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    cache: Annotated[list[str] | None, typer.Option(metavar="NAME=URI", help="A cache that the losses read.")] = None,
    overrides: Set = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a student from caches, with no teacher in memory unless distill.teacher is online."""
    from pipeline.recipe import load_student
    from pipeline.train_student import train_student, with_caches

    loaded = with_caches(load_student(recipe, overrides or []), _caches(cache))
    if loaded.distill is not None and loaded.distill.teacher == "online":
        from pipeline.online import train_online

        summary = train_online(loaded, out, resume, Bars(as_json))
    else:
        summary = train_student(loaded, out, resume, Bars(as_json))
    _show_run(summary, as_json)


def _show_run(summary: Any, as_json: bool) -> None:
    from pipeline.parts import is_main_process

    if not is_main_process():
        return
    if as_json:
        print_json(summary.to_json())
        return
    if summary.report is not None:
        console.out.print(summary.report.table())
    cost = summary.cost
    say(
        f"{summary.run}: {cost.step_seconds:.3f} s per step, {cost.data_wait_fraction:.0%} of it waiting for data, "
        f"peak memory {cost.peak_memory_bytes / 1e9:.2f} GB"
    )


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Option(help="Folder of a finished run.")] = None,
    cache: Annotated[str | None, typer.Option(metavar="URI", help="A cache that stores boxes.")] = None,
    detections: Annotated[Path | None, typer.Option(help="A nuScenes result file, or a folder of KITTI ones.")] = None,
    weights: Weights = "model",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Score a run, a cache's boxes or result files with the metrics of their data set."""
    if sum(value is not None for value in (run, cache, detections)) != 1:
        raise typer.BadParameter("give exactly one of --run, --cache and --detections")
    from pipeline import evaluate as story

    if run is not None:
        report = story.evaluate_run(run, overrides or [], Bars(as_json), weights)
        if report is None:  # not the first of the processes that torchrun started
            return
    elif cache is not None:
        report = story.evaluate_cache(cache, overrides or [])
    else:
        assert detections is not None
        report = story.evaluate_detections(detections, overrides or [])
    if as_json:
        print_json(report.to_json())
    else:
        console.out.print(report.table())


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, or folders that hold such.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for table.md, table.json and table.png.")] = None,
    plain: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Method that gains are over, as listed; the plain students.")
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, metavar="N", help="Draw the evaluation's scenes N times, for intervals; e.g. 1000.")
    ] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change 'evaluation' of the recipes, e.g. evaluation.data.root."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put methods side by side: scores and spread over seeds, gains over the plain student, costs."""
    from pipeline.compare import compare as story
    from pipeline.compare_report import write_comparison

    comparison = story(runs, plain, bootstrap, overrides or [], Bars(as_json))
    written = write_comparison(comparison, out) if out is not None else []
    if as_json:
        print_json(comparison.to_json())
    else:
        _show_comparison(comparison, written)


def _show_comparison(comparison: Any, written: Iterable[Path]) -> None:
    from pipeline.compare_report import rich_table, text_tables

    for table in text_tables(comparison):
        console.out.print(rich_table(table), "")
    for warning in comparison.warnings:
        console.out.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False, soft_wrap=True)
    for path in written:
        say(str(path))


@app.command()
def ablate(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the comparison; run again to go on.")],
    terms: Annotated[
        str | None, typer.Option(metavar="A,B", help="LOSS.WEIGHT or LOSS, others are off; by default all in use.")
    ] = None,
    grid: Annotated[
        str, typer.Option(metavar="KINDS", help="each, add, drop, all; beside plain and all terms together.")
    ] = "each",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each method: 0, 1, ...")] = 3,
    seed_list: Annotated[str | None, typer.Option(metavar="0,1", help="In place of --seeds.")] = None,
    cache: Annotated[list[str] | None, typer.Option(metavar="NAME=URI", help="A cache that the losses read.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; one per GPU, or one.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all recipes and list the runs; train none.")
    ] = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train a distilled student with some of its terms at a time, over several seeds, and compare the runs.

    KINDS, apart by commas: each term alone, add one at a time, drop one at a time, all selections.
    """
    from pipeline.ablate import KINDS, check, outlook, plan
    from pipeline.ablate import ablate as story
    from pipeline.recipe import load_student
    from pipeline.train_student import with_caches

    kinds = [kind for kind in KINDS if kind in grid.split(",")]
    if len(kinds) < len(grid.split(",")):
        raise typer.BadParameter(f"give some of {', '.join(KINDS)}, apart by commas", param_hint="--grid")
    try:
        numbers = [int(seed) for seed in seed_list.split(",")] if seed_list else list(range(seeds))
    except ValueError as error:
        raise typer.BadParameter("give numbers, apart by commas", param_hint="--seed-list") from error
    bars = Bars(as_json)
    loaded = with_caches(load_student(recipe, overrides or []), _caches(cache))
    points = plan(loaded, out, terms.split(",") if terms else [], kinds, list(dict.fromkeys(numbers)))
    check(points, bars)
    if dry_run:
        _show_outlook(outlook(points), as_json)
        return
    result = story(points, out, jobs, bars)
    if as_json:
        print_json(result.to_json())
    elif result.comparison is not None:
        _show_comparison(result.comparison, result.written)
    if result.error is not None:
        raise result.error


def _show_outlook(planned: list[Any], as_json: bool) -> None:
    if as_json:
        print_json([{**asdict(each), "run": str(each.run)} for each in planned])
        return
    for each in planned:
        state = "finished" if each.step == each.steps else f"{each.step} of {each.steps} steps"
        time = "" if each.seconds is None else f", {each.seconds / 60:.0f} min"
        say(f"{each.run}: {each.method}, seed {each.seed}, {state}{time}")
    left = [each.seconds for each in planned if each.seconds is not None]
    total = f", {sum(left) / 60:.0f} min one after the other" if left else ""
    say(f"{len(planned)} runs, {sum(each.steps - each.step for each in planned)} steps to go{total}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, or folders that hold such.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    frames: Annotated[int, typer.Option(min=0, max=24, help="Frames of the evaluation to draw.")] = 6,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change the recipes, e.g. data.root if the data has moved."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: what helped and by how much, curves, frames, features, recipes."""
    from pipeline.report import write_report

    written = write_report(runs, out, frames, overrides or [], Bars(as_json))
    if as_json:
        print_json(written.to_json())
    else:
        say(written.text)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run, or a recipe with --weights.")],
    out: Annotated[Path, typer.Option(help="File (nuScenes) or folder (KITTI) to write.")],
    split: Annotated[str | None, typer.Option(help="In place of that of evaluation.data, e.g. test.")] = None,
    weights: Weights = "model",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write a detector's boxes in the format of the data set, for its metrics or the benchmark's server."""
    from pipeline.predict import predict_run

    summary = predict_run(run, out, split, overrides or [], Bars(as_json), weights)
    if summary is None:  # not the first of the processes that torchrun started
        return
    if as_json:
        print_json(summary.to_json())
    else:
        say(summary.text)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run, or a recipe with --weights.")],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    weights: Weights = "model",
    part: Annotated[str, typer.Option(help="all, or dense: what follows the encoder, from bev_low on.")] = "all",
    opset: Annotated[int, typer.Option(help="Version of ONNX's operator set.")] = 18,
    batch: Annotated[int, typer.Option(min=1, help="Frames that the graph takes at once.")] = 1,
    checks: Annotated[int, typer.Option(min=1, help="Batches on which it is compared with torch.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Of torch and onnxruntime in the comparison.")] = 1,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write a student as ONNX, checked with onnxruntime against torch on frames of its data set."""
    if part not in ("all", "dense"):
        raise typer.BadParameter("give all or dense", param_hint="--part")
    from pipeline.export import ExportSettings, export_run

    settings = ExportSettings(weights, "all" if part == "all" else "dense", opset, batch, checks, threads)
    summary = export_run(run, out, settings, overrides or [], Bars(as_json))
    if as_json:
        print_json(summary.to_json())
    else:
        say(summary.text)


@cache_app.command("info")
def cache_info(uri: Annotated[str, typer.Argument(metavar="URI")], as_json: Json = False) -> None:
    """Say what a cache holds, who wrote it and from what."""
    from pipeline.caches import info

    summary = info(uri)
    if as_json:
        print_json(summary)
        return
    console.out.print(console.facts_table(summary))


@cache_app.command("ls")
def cache_ls(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A cache, or a folder or bucket of caches.")] = ".",
    as_json: Json = False,
) -> None:
    """List the caches of a folder or bucket."""
    from bevkd.cache.catalogue import listing

    entries = listing(uri)
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    if not entries:
        say(f"no caches directly in {uri}")
        return
    console.out.print(console.cache_table(entries))


@cache_app.command("plan")
def cache_plan(
    recipe: Recipe,
    out: Annotated[str | None, typer.Option(metavar="URI", help="Where the cache would go.")] = None,
    overrides: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Plan for the first frames only.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs or processes that would work at once.")] = 1,
    frames: Annotated[int, typer.Option(min=1, max=1024, help="Frames of the trial.")] = 4,
    as_json: Json = False,
) -> None:
    """Say what a cache will take in space and time, from a trial with a few frames."""
    from pipeline.plan import plan_cache
    from pipeline.recipe import load_cache

    plan = plan_cache(load_cache(recipe, overrides or []), out, limit, devices, frames, Bars(as_json))
    if as_json:
        print_json(plan.to_json())
        return
    console.out.print(console.facts_table(dict(plan.rows(size_text))))


@cache_app.command("copy")
def cache_copy(
    source: Annotated[str, typer.Argument(metavar="SRC")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A new folder, or s3://bucket/prefix.")],
    check: Annotated[bool, typer.Option(help="Read the copy back and compare its checksums.")] = True,
    as_json: Json = False,
) -> None:
    """Copy a cache between folders and object stores; run again to finish an interrupted copy."""
    from bevkd.cache.transfer import copy
    from bevkd.cache.verify import verify
    from bevkd.errors import CacheError, report

    bars = Bars(as_json)
    manifest = copy(source, target, bars)
    faults = verify(target, progress=bars) if check else []
    if faults:
        raise report(CacheError, f"{target} is not a whole copy:", faults)
    if as_json:
        print_json({"uri": target, "name": manifest.name, "frames": len(manifest.tokens), "checked": check})
        return
    say(f"{target} holds {manifest.name}")


@cache_app.command("diff")
def cache_diff(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    as_json: Json = False,
) -> None:
    """Say in what two caches differ; exit code 1 if they do."""
    from bevkd.cache.catalogue import differences
    from bevkd.cache.manifest import open_manifest
    from bevkd.cache.store import open_store

    found = differences(open_manifest(open_store(first)), open_manifest(open_store(second)))
    if as_json:
        print_json({"first": first, "second": second, "differences": found})
    else:
        for line in found or ["the same cache"]:
            say(line)
    if found:
        raise typer.Exit(1)


@cache_app.command("rm")
def cache_rm(
    uri: Annotated[str, typer.Argument(metavar="URI")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a cache, after asking; files that are not its own stay."""
    from bevkd.cache.transfer import contents, remove

    files, size = contents(uri)
    if not yes:
        typer.confirm(f"Remove {files} files, {size_text(size)}, of the cache {uri}?", abort=True)
    left = remove(uri)
    say(f"removed {uri}")
    for key in left:
        say(f"left alone: {key}")


@cache_app.command("verify")
def cache_verify(
    uri: Annotated[str, typer.Argument(metavar="URI")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every sample as well.")] = False,
    as_json: Json = False,
) -> None:
    """Compare every file of a cache with its checksum."""
    from bevkd.cache.verify import verify
    from bevkd.errors import CacheError, report

    faults = verify(uri, deep, Bars(as_json))
    if as_json:
        print_json({"uri": uri, "deep": deep, "faults": faults})
        if faults:
            raise typer.Exit(1)
        return
    if faults:
        raise report(CacheError, f"{uri} is not a whole cache:", faults)
    say(f"{uri} is whole")


@cache_app.command("fidelity")
def cache_fidelity(
    recipe: Recipe,
    student: Annotated[str, typer.Option(help="Recipe of a student, for its model and its distillation losses.")],
    frames: Annotated[int, typer.Option(min=1, help="How many frames to look at.")] = 4,
    outputs: Annotated[
        bool, typer.Option("--outputs", help="Gradients of the student's outputs, not parameters: faster, stricter.")
    ] = False,
    overrides: Set = None,
    student_overrides: Annotated[
        list[str] | None, typer.Option("--student-set", metavar="A.B=C", help="Change a value of the student's recipe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what encodings cost in bytes and in gradient, on a few frames; trains nothing, writes nothing.

    RECIPE is that of a cache: its data, teacher and spec.
    """
    from pipeline.fidelity import fidelity
    from pipeline.fidelity_report import fidelity_table, signal_table
    from pipeline.recipe import load_cache, load_student

    cache, learner = load_cache(recipe, overrides or []), load_student(student, student_overrides or [])
    report = fidelity(cache, learner, frames, outputs, Bars(as_json))
    if as_json:
        print_json(report.to_json())
        return
    console.out.print(fidelity_table(report), signal_table(report))


@cache_app.command("equivariance")
def cache_equivariance(
    recipe: Recipe,
    frames: Annotated[int, typer.Option(min=1, help="How many frames to look at.")] = 8,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Say how far warped cached maps are from the teacher run on augmented frames; trains nothing, writes nothing.

    RECIPE is that of a cache: its data and its teacher.
    """
    from pipeline.equivariance import equivariance, equivariance_table
    from pipeline.recipe import load_cache

    report = equivariance(load_cache(recipe, overrides or []), frames, Bars(as_json))
    if as_json:
        print_json(report.to_json())
        return
    console.out.print(equivariance_table(report))
    say(report.sentence)


@cache_app.command("show")
def cache_show(
    uri: Annotated[str, typer.Argument(metavar="URI")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("cache.png"),
    token: Annotated[str | None, typer.Option(help="Sample token; the first frame by default.")] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Draw the teacher's boxes above it.")] = 0.3,
    overrides: Set = None,
) -> None:
    """Draw a frame: cameras and BEV with boxes and points, and the teacher's maps."""
    from pipeline.caches import show

    show(uri, token, score, out, overrides or [])
    say(str(out))


@bench_app.command("store")
def bench_store_command(
    cache: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Of a cache; by default a full-size teacher on a world.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is written and read; kept for the next run.")] = Path(
        "bench"
    ),
    student: Annotated[str, typer.Option(help="Recipe of the student that gradients are of.")] = "nuscenes_student",
    frames: Annotated[int, typer.Option(min=1, help="Frames for bytes and gradients.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of reading.")] = 15,
    only: Annotated[list[str] | None, typer.Option(metavar="SECTION", help="Measure only this; repeatable.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Measure the cache: reading against its limit and other stores, bytes, gradients, stage 1, dask, S3, opening."""
    from pipeline.bench.store import SECTIONS, BenchSettings, bench_store

    sections = tuple(only or SECTIONS)
    settings = BenchSettings(out, cache, student, overrides or [], frames, rounds, sections)
    result = bench_store(settings, Bars(as_json))
    if as_json:
        print_json(result)
        return
    from pipeline.bench.store import result_tables

    console.out.print(*result_tables(result))


@bench_app.command("models")
def bench_models_command(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="With a detector; by default all that ship.")
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Take frames of each recipe's own data set, not made-up ones.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each timing.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU by default if there is one.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Measure detectors: time, memory, parameters and FLOPs of a forward pass; and lift-splat beside its naive form."""
    from pipeline.bench.models import ModelSettings, bench_models, result_tables

    settings = ModelSettings(recipes or (), overrides or (), data, rounds, device)
    result = bench_models(settings, Bars(as_json))
    if as_json:
        print_json(result)
        return
    console.out.print(*result_tables(result))


@bench_app.command("train")
def bench_train_command(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Of a distilled student; by default the demo's on a world.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Of a cache; by default an untrained LiDAR detector of the same cost."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the cache and the plot; kept for the next run.")] = Path(
        "bench"
    ),
    frames: Annotated[int, typer.Option(min=1, help="Frames to train on, again and again.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the three runs.")] = 3,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Measure training: plain, distilled from a cache, and with the teacher within each step; and the loader alone."""
    from bevkd.viz.image import save
    from pipeline.bench.train import TrainSettings, bench_train, result_plot, result_table

    settings = TrainSettings(out, recipe, teacher, overrides or (), frames, steps, rounds)
    result = bench_train(settings, Bars(as_json))
    plot = save(result_plot(result), out / "train.png")
    if as_json:
        print_json(result)
        return
    console.out.print(result_table(result))
    say(str(plot))


@bench_app.command("distill")
def bench_distill_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Of a student.")] = "nuscenes_student",
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Measure only this; repeatable.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames of a step.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all timings.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU by default if there is one.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Measure what each distillation loss adds to a training step of a student, with made-up frames and teacher."""
    from pipeline.bench.distill import DistillSettings, bench_distill, result_table

    settings = DistillSettings(recipe, overrides or (), methods or (), batch, rounds, device=device)
    result = bench_distill(settings, Bars(as_json))
    if as_json:
        print_json(result)
        return
    console.out.print(result_table(result))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine's installation, and say how to mend it."""
    from pipeline.doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            mark = "[green]ok[/green]  " if finding.ok else "[red]fix[/red] "
            line = f"{mark} [bold]{finding.name}[/bold]  {escape(finding.text)}"
            console.out.print(line, highlight=False, soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the world, runs and pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the training runs.")] = 0,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="A few drives and ten steps each: does all of it work here?")
    ] = False,
    as_json: Json = False,
) -> None:
    """Watch a camera student learn from a cached LiDAR teacher, on a generated world."""
    from pipeline.demo import run_demo

    result = run_demo(out, seed, Bars(as_json), rehearse)
    if as_json:
        print_json(result.to_json())
        return
    from pipeline.demo import result_table

    console.out.print(result_table(result))
    for line in result.notes:
        say(line)


def _message(error: Exception) -> str:
    """Return what an error says; torch buries that of a loader process under its traceback."""
    kind, text = type(error), str(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return text.rpartition(f"\n{name}: ")[2].strip() if "in DataLoader worker process" in text else text


_INTERRUPTED = 130
"""Exit code of the command line when the user stops it."""


def main() -> NoReturn:
    """Run the command line: exit code 0 is ok, 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(args=[argument for argument in arguments if argument != "--debug"])
    except BevkdError as error:
        if debug:
            raise
        console.err.print(f"[bold red]{type(error).__name__}[/bold red]", highlight=False)
        console.err.print(escape(_message(error)), highlight=False, soft_wrap=True)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            console.err.print("stopped; to go on, run the same command again (training with --resume)", highlight=False)
        raise
    except OSError as error:
        if debug:
            raise
        console.err.print(f"[bold red]{type(error).__name__}[/bold red]", highlight=False)
        advice = "Check that path, its rights and the free space, then run the same command again; --debug says more."
        console.err.print(escape(f"{_message(error)}\n{advice}"), highlight=False, soft_wrap=True)
    except Exception as error:
        if debug:
            raise
        console.err.print(f"[bold red]a defect of bevkd:[/bold red] {escape(f'{type(error).__name__}: {error}')}")
        console.err.print("Run again with --debug for the traceback, and report it.", highlight=False)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
