"""Recipes: what a loss of one's own must be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bevkd.config import PluginConfig
from pipeline.recipe import DistillConfig, load_student

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "own-loss.md"


def test_a_loss_whose_config_knows_no_signals_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"loss 'mine' must derive from .*DistillLossConfig"):
        DistillConfig(caches={}, losses=(PluginConfig(name="mine"),))


def test_the_loss_of_the_how_to_is_one_that_a_recipe_takes() -> None:
    found = re.search(
        r"```python title=\"my_bev/attention.py\"\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    module: dict[str, Any] = {"__name__": "attention"}
    exec(compile(found[1], str(HOW_TO), "exec"), module)
    module["Config"].model_rebuild(_types_namespace=module)
    config = DistillConfig(caches={}, losses=(module["Config"](energy=0.5),)).losses[0]
    assert (config.teacher, config.signals(), config.misfits(None)) == ("teacher", ("bev_high",), [])


def test_a_bare_no_for_precision_is_the_word_that_yaml_takes_for_false() -> None:
    assert load_student("demo_student", ["training.precision=no"]).training.precision == "no"
