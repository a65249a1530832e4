"""Examine an installation: every finding says what is there and how to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

_ROOT_NAMES = ("bevkd", "pipeline", "cache_specs", "cli")
_SPCONV = ("spconv-cu120", "spconv-cu126", "spconv-cu124", "spconv-cu121", "spconv-cu118", "spconv-cu117")


@dataclass(frozen=True)
class Finding:
    """One thing that was examined."""

    name: str
    ok: bool
    text: str


def examine() -> list[Finding]:
    """Return all findings; nothing is changed."""
    return [_python(), *_names(), _torch(), *_packages(), _spconv(), _torchvision(), _zfpy()]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)")


def _names() -> list[Finding]:
    """Check that the root packages are ours: `pipeline` and `cli` are names that others use too."""
    root = Path(__file__).resolve().parents[1]
    findings = []
    for name in _ROOT_NAMES:
        spec = importlib.util.find_spec(name)
        place = Path(spec.origin).parent if spec is not None and spec.origin else None
        ours = place is not None and (place == root or place.parent == root)
        advice = "" if ours else f" hides bevkd's own in {root}: remove it, or use an environment of its own"
        findings.append(Finding(f"package {name}", ours, f"{place}{advice}"))
    return findings


def _torch() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("torch", True, f"{torch.__version__}, {torch.cuda.get_device_name(0)}")
    return Finding("torch", True, f"{torch.__version__}, CPU only: everything runs, full-size models slowly")


def _packages() -> list[Finding]:
    findings = []
    for name, fix in (
        ("numpy", ""),
        ("zarr", ""),
        ("numcodecs", ""),
        ("nuscenes-devkit", ""),
        ("transformers", ""),
        ("accelerate", ""),
        ("dask", ""),
    ):
        version = _version(name)
        findings.append(Finding(name, version is not None, version or f"missing; pip install '{name}'{fix}"))
    zarr = _version("zarr") or "0"
    if not zarr.startswith("3."):
        findings.append(Finding("zarr version", False, f"{zarr}; pip install 'zarr>=3.1.5,<4'"))
    return findings


def _spconv() -> Finding:
    """Check for spconv, which LiDAR encoders need, and for the plain CPU wheel, which computes wrong results."""
    if _version("spconv"):
        text = "the plain CPU wheel races with several threads; pip uninstall spconv, then pip install 'bevkd[teacher]'"
        return Finding("spconv", False, text)
    installed = [f"{name} {_version(name)}" for name in _SPCONV if _version(name)]
    if len(installed) > 1:
        return Finding("spconv", False, f"{' and '.join(installed)} exclude each other; uninstall all but one")
    if not installed:
        return Finding("spconv", True, "not installed: camera students train, LiDAR needs pip install 'bevkd[teacher]'")
    from bevkd.models.sparse import load_spconv

    try:
        load_spconv()
    except Exception as error:  # whatever a broken binary raises is what we are here to report
        return Finding("spconv", False, f"{installed[0]} does not load: {error}; pip install --force-reinstall it")
    return Finding("spconv", True, installed[0])


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", True, "not installed, not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # as above
        text = f"does not load beside this torch ({error}) and breaks transformers; pip uninstall torchvision"
        return Finding("torchvision", False, text)
    return Finding("torchvision", True, f"{_version('torchvision')}, loads, not needed")


def _zfpy() -> Finding:
    if _version("zfpy"):
        return Finding("zfpy", False, "its metadata makes `import zarr` fail; pip uninstall zfpy")
    return Finding("zfpy", True, "not installed, as it should be")
