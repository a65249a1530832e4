"""Every error that bevkd raises on purpose.

A message says what is wrong, where, and how to fix it. The command line prints it as one block and exits with 1;
anything that is not a :class:`BevkdError` is a defect of bevkd.
"""

from __future__ import annotations

from collections.abc import Sequence


class BevkdError(Exception):
    """Base class of all errors with a message meant for the user."""


class ConfigError(BevkdError):
    """A recipe, a cache spec or a ``--set`` override is wrong."""


class RegistryError(BevkdError):
    """A plug-in name is unknown, or its module misses ``Config`` or ``build``."""


class DataError(BevkdError):
    """A data set's tables or sensor files are missing, damaged or do not fit together."""


class WorldError(BevkdError):
    """The embedded world cannot be written as asked."""


class CacheError(BevkdError):
    """A cache is unreadable, incomplete, damaged, or does not fit what it is used for."""


class CacheSpecError(CacheError):
    """A cache spec asks for something that the teacher does not write."""


class CheckpointError(BevkdError):
    """A checkpoint or weight file does not fit the model it is loaded into."""


class ContractError(BevkdError):
    """Recipe, caches, data set, model and losses do not fit together; found before the first batch."""


class TrainingError(BevkdError):
    """Training cannot go on (diverged, nothing to train on, run folder in use)."""


def report(kind: type[BevkdError], headline: str, faults: Sequence[str]) -> BevkdError:
    """Return one error of ``kind`` that lists all ``faults`` under ``headline``."""
    return kind("\n".join([headline, *(f"  - {fault}" for fault in faults)]))
