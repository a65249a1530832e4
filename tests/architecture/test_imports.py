"""Who may import whom (docs/design): read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("bevkd.errors", "bevkd.signals", "bevkd.types", "bevkd.grid", "bevkd.config", "bevkd.registry", "bevkd.progress"),
    ("bevkd.geometry",),
    ("bevkd.data", "bevkd.teachers", "bevkd.distill", "bevkd.cache", "bevkd.models"),
    (
        *("bevkd.training", "bevkd.evaluation", "bevkd.viz", "bevkd.world", "bevkd.testing"),
        *("bevkd.distiller", "bevkd.export"),
    ),
    ("pipeline", "cache_specs", "bevkd.console"),
    ("cli",),
)
"""From the ground up; a module imports from its own layer and from those below."""


@cache
def sources() -> dict[str, Path]:
    """Return the path of every module that the wheel installs, by dotted name."""
    packages = (ROOT / name for name in ("bevkd", "pipeline", "cache_specs"))
    files = [ROOT / "cli.py", *(path for package in packages for path in package.rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def imports(module: str) -> frozenset[str]:
    """Return the dotted names that a module imports anywhere in its source."""
    path = sources()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return frozenset(_imports(ast.parse(path.read_text(encoding="utf-8")), package))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], node.module or ""]) if node.level else node.module
            yield from (f"{(base or '').rstrip('.')}.{name.name}" for name in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer(name: str) -> int | None:
    """Return the layer of a module of ours; None for the root package and for other distributions."""
    return next((index for index, packages in enumerate(LAYERS) if within(name, *packages)), None)


def importers(*packages: str) -> set[str]:
    return {module for module in sources() if any(within(name, *packages) for name in imports(module))}


def run(code: str) -> str:
    """Return what ``code`` prints in a fresh interpreter at the root of the repository."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------- the scan itself


def test_the_scan_sees_imports_of_every_form() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d\ndef f():\n    from ..e import g\n    from . import h\nif x:\n    import i"
    )
    assert set(_imports(tree, "p.q")) == {"a.b", "c.d", "p.e.g", "p.q.h", "i"}


def test_every_module_of_the_wheel_has_a_layer() -> None:
    assert len(sources()) > 60
    assert [module for module in sources() if layer(module) is None] == ["bevkd"]


# ---------------------------------------------------------------------------------------------- our own layers


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_point_down(module: str) -> None:
    own = layer(module)
    upwards = {name for name in imports(module) if own is not None and (layer(name) or 0) > own}
    assert upwards == set()


def test_bevkd_itself_imports_none_of_its_parts() -> None:
    listed = "[name for name in sys.modules if name.startswith('bevkd.') or name in ('torch', 'numpy', 'pydantic')]"
    assert run(f"import bevkd, sys; print({listed})") == "[]\n"


def test_only_the_pipeline_the_suites_and_the_registry_know_teachers() -> None:
    allowed = ("bevkd.teachers", "bevkd.testing", "pipeline")
    assert {module for module in importers("bevkd.teachers") if not within(module, *allowed)} == set()
    assert importers("bevkd.teachers") & {module for module in sources() if within(module, "pipeline")} == {
        "pipeline.cache_teacher",
        "pipeline.online",
    }


def test_the_story_of_the_student_leads_to_no_teacher() -> None:
    reached, left = set[str](), ["pipeline.train_student"]
    while left:
        module = left.pop()
        if module in reached or module not in sources():
            continue
        reached.add(module)
        left += [*imports(module), *(name.rpartition(".")[0] for name in imports(module))]
    assert "bevkd.training.loop" in reached
    assert {module for module in reached if within(module, "bevkd.teachers")} == set()


def test_the_world_is_an_island() -> None:
    assert {module for module in importers("bevkd.world") if not within(module, "bevkd.world")} == {"pipeline.world"}


# ---------------------------------------------------------------------------------------------- other distributions


@pytest.mark.parametrize(
    ("packages", "allowed"),
    [
        (("spconv", "cumm"), ("bevkd.models.sparse",)),
        (("zarr", "numcodecs"), ("bevkd.cache", "pipeline.bench")),  # the latter compares with other readers
        (("obstore",), ("bevkd.cache",)),
        (("moto", "werkzeug"), ("pipeline.bench",)),
        (("dask", "distributed"), ("pipeline.schedule",)),
        (("accelerate",), ("bevkd.training",)),
        (("onnx", "onnxruntime", "onnxscript"), ("bevkd.export",)),
        (("transformers",), ("bevkd.models.backbone", "bevkd.teachers")),
        (("matplotlib",), ("bevkd.viz",)),
        (("typer",), ("cli",)),
        (("tests", "pytest", "hypothesis", "beartype"), ()),
        (("torchvision", "torchmetrics", "lightning", "timm", "mmcv", "mmdet", "mmengine", "hydra", "omegaconf"), ()),
    ],
)
def test_a_dependency_is_imported_where_it_belongs(packages: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    assert {module for module in importers(*packages) if not within(module, *allowed)} == set()


def test_only_nuscenes_modules_import_its_devkit() -> None:
    def allowed(module: str) -> bool:
        sources_or_metrics = within(module, "bevkd.data.sources", "bevkd.evaluation")
        return within(module, "bevkd.world") or (sources_or_metrics and "nuscenes" in module.rpartition(".")[2])

    assert {module for module in importers("nuscenes", "pyquaternion") if not allowed(module)} == set()


def test_no_source_line_picks_a_device_for_the_user() -> None:
    calls = {
        f"{module}:{node.lineno}"
        for module, path in sources().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
    }
    assert calls == set()


def test_nothing_is_unpickled() -> None:
    def executes(call: ast.Call) -> bool:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        match ast.unparse(call.func):
            case "torch.load":
                return options.get("weights_only") != "True"
            case "np.load" | "numpy.load":
                return options.get("allow_pickle", "False") != "False"
            case name:
                return name in {"pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec"}

    loads = {
        f"{module}:{node.lineno}"
        for module, path in sources().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and executes(node)
    }
    assert loads == set()


# ---------------------------------------------------------------------------------------------- at run time


def test_the_command_line_starts_without_torch() -> None:
    heavy = ("torch", "numpy", "pydantic", "zarr", "dask", "distributed", "transformers", "matplotlib", "pipeline")
    assert run(f"import cli, sys; print([name for name in {heavy} if name in sys.modules])") == "[]\n"


def test_describing_a_cache_takes_no_torch() -> None:
    names = "bevkd.signals, bevkd.cache.spec, bevkd.cache.arrays, bevkd.cache.quantise"
    assert run(f"import {names}, sys; print('torch' in sys.modules)") == "False\n"


CAMERA_STUDENT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("spconv", "cumm") or name.startswith("bevkd.teachers"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
import pipeline.train_student
from pipeline.recipe import load_student
from pipeline.training import seeded_detector
recipe = load_student("demo_student_distilled", [])
detector = seeded_detector(recipe)
assert recipe.distill.losses, "nothing to distil"
from bevkd import registry
from bevkd.distill.base import DistillContext
for loss in recipe.distill.losses:
    registry.load("bevkd.distill", loss.name).build(loss, DistillContext(detector, {}))
print([name for name in sys.modules if name.split(".")[0] in ("spconv", "cumm") or "bevkd.teachers" in name])
"""


def test_a_camera_student_is_built_without_teachers_and_without_spconv() -> None:
    assert run(CAMERA_STUDENT) == "[]\n"


def test_the_refusal_of_the_test_above_works() -> None:
    code = CAMERA_STUDENT.replace("import pipeline.train_student\n", "import bevkd.teachers\n")
    with pytest.raises(AssertionError, match=r"bevkd\.teachers was imported"):
        run(code)
