"""Reading and checking of YAML files: every fault of a file is reported at once, with its path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError

from bevkd import registry
from bevkd.errors import ConfigError, RegistryError, report

Model = TypeVar("Model", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of every config: immutable, and unknown keys are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PluginConfig(StrictModel):
    """Base of every plug-in's ``Config``; ``name`` is the module that builds it."""

    name: str


def plugin(package: str) -> Any:
    """Return the pydantic type of a field that holds the config of any plug-in of ``package``."""

    def resolve(value: object) -> object:
        if isinstance(value, PluginConfig) or not isinstance(value, dict):
            return value
        if "name" not in value:
            raise ValueError(f"needs 'name', one of: {', '.join(registry.names(package))}")
        try:
            module = registry.load(package, value["name"])
        except RegistryError as error:
            raise ValueError(str(error)) from error
        return module.Config.model_validate(value)

    return Annotated[SerializeAsAny[PluginConfig], BeforeValidator(resolve)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds no mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {path}. Check the path, or run from the folder that holds it.") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, it holds {type(loaded).__name__}.")
    return loaded


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with each ``a.b=c`` of ``overrides`` applied; ``c`` is read as YAML.

    A number in the path indexes a list. Raises ConfigError naming every override that cannot be applied.
    """
    # Through JSON, so that YAML aliases become values of their own; dates become the text that they were.
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    faults = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            faults.append(f"'{override}' is not of the form key.path=value")
            continue
        try:
            _assign(result, path.split("."), yaml.safe_load(text))
        except (LookupError, TypeError, ValueError) as error:
            faults.append(f"'{override}': {error}")
        except yaml.YAMLError:
            faults.append(f"'{override}': the value is not YAML")
    if faults:
        raise report(ConfigError, "--set cannot be applied:", faults)
    return result


def _assign(node: Any, keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        here = ".".join(keys[:depth]) or "the top level"
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise LookupError(f"{here} is a list of {len(node)} entries, '{key}' is not an index into it")
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
            if not last:
                node.setdefault(key, {})
        else:
            raise TypeError(f"{here} is the value {node!r}, which has no key '{key}'")
        if last:
            node[index] = value
        elif node[index] is None:
            node[index] = {}
        node = node[index]


def parse(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Return ``values`` checked against ``model``.

    Raises:
        ConfigError: lists every fault with its path in the file.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise report(ConfigError, f"{where} has {error.error_count()} fault(s):", _faults(error)) from error


def _faults(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"]) or "(top level)"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown key; remove it or correct its spelling"
        elif fault["type"] == "missing":
            message = "missing; this key is required"
        elif not fault["msg"].startswith("Value error"):
            message += f", got {fault['input']!r}"
        lines.append(f"{path}: {message}")
    return lines


def load(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Return the config in ``path`` with ``overrides`` applied."""
    return parse(model, apply_overrides(read_yaml(path), overrides), str(path))


def digest(value: BaseModel | dict[str, Any] | list[Any]) -> str:
    """Return the SHA-256 of a config's canonical JSON."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
