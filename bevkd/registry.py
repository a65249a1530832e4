"""Plug-ins: the folder is the registry.

A plug-in named ``foo`` of a package is the file ``foo.py`` in it, with a pydantic ``Config`` and a function ``build``.
Other distributions add plug-ins with an entry point in the group named after the package, e.g.
``[project.entry-points."bevkd.distill"] mine = "my_package.mine"``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from types import ModuleType

from bevkd.errors import RegistryError


def names(package: str) -> list[str]:
    """Return the names of all plug-ins of ``package`` without importing any of them."""
    foreign = {point.name for point in importlib.metadata.entry_points(group=package)}
    return sorted({name for name in _own(package) | foreign if not name.startswith("_") and name != "base"})


def _own(package: str) -> set[str]:
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return {module.name for module in modules if not module.ispkg}


def load(package: str, name: str) -> ModuleType:
    """Return the module of plug-in ``name`` in ``package``.

    Raises:
        RegistryError: no such plug-in, two of this name, it cannot be imported, or its module has no ``Config`` or
            no ``build``.
    """
    points = {point.name: point.value for point in importlib.metadata.entry_points(group=package)}
    known = names(package)
    if name not in known:
        raise RegistryError(f"unknown plug-in '{name}' of {package}. Known: {', '.join(known)}.")
    if name in points and name in _own(package):
        raise RegistryError(
            f"plug-in '{name}' of {package} ships with bevkd and is offered by {points[name]} too. Rename that one's "
            "entry point, or uninstall its distribution."
        )
    try:
        module = importlib.import_module(points.get(name, f"{package}.{name}"))
    except ImportError as error:
        if name not in points:
            raise
        raise RegistryError(f"plug-in '{name}' of {package} ({points[name]}) cannot be imported: {error}.") from error
    missing = [part for part in ("Config", "build") if not hasattr(module, part)]
    if missing:
        raise RegistryError(f"plug-in '{name}' of {package} ({module.__name__}) has no {' and no '.join(missing)}.")
    return module
