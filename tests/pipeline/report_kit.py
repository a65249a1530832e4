"""Runs whose scores are known, for the page of ``bevkd report``, and questions to ask a page in a browser."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from bevkd.data.sources.nuscenes import NuScenesSource
from bevkd.evaluation import nuscenes
from bevkd.types import Boxes
from pipeline.parts import open_source
from pipeline.recipe import StudentRecipe
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2'
"""Name of a folder that would run code if the page took it for markup."""

SHARE = {"plain": 2, "distilled": 1}
"""Every how many-th annotated object a run of the kit finds."""


@dataclass(frozen=True)
class Runs:
    """Runs of a plain student, a distilled one and their teacher.

    Attributes:
        places: arguments of ``bevkd report``.
    """

    folder: Path
    teacher: Path

    @property
    def places(self) -> list[str]:
        return [str(self.folder), str(self.teacher)]

    def results(self) -> dict[str, dict[str, Any]]:
        """Return the content of ``result.json`` by the name of the run's folder."""
        return {path.parent.name: json.loads(path.read_bytes()) for path in sorted(self.folder.glob("*/result.json"))}


def make_runs(bevkd: Bevkd, folder: Path, world: Path, cache: Path, teacher: Path) -> Runs:
    """Train a plain and a distilled student for a moment, and give each a second seed and detections of our choice."""
    plain = kit.evaluated(kit.train_recipe(world, kit.STUDENT, distill=None), world)
    recipes = {"plain": plain, "distilled": kit.distilled(plain, cache)}
    for name, recipe in recipes.items():
        first, second = folder / f"{name}-0", folder / (f"{name}-1" if name == "plain" else HOSTILE)
        path = kit.write(folder.parent / f"{name}.yaml", recipe)
        bevkd.well("train-student", path, "--out", first)
        shutil.copytree(first, second)
        values = yaml.safe_load((second / "recipe.yaml").read_text(encoding="utf-8"))
        values["training"]["seed"] = 1
        kit.write(second / "recipe.yaml", values)
        with (second / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": 3, "<script>document.title=3</script>": 1.5}) + "\n")
        source = open_source(StudentRecipe.model_validate(values).evaluation.data, frozenset())
        for seed, run in enumerate((first, second)):
            give_detections(run, source, SHARE[name], seed)
    return Runs(folder, teacher)


def give_detections(run: Path, source: NuScenesSource, every: int, seed: int) -> None:
    """Replace what a run found by every ``every``-th annotated object and a false box per frame, and score it."""
    chance = torch.Generator().manual_seed(10 * every + seed)
    found = {}
    for token in source.tokens:
        truth = source.annotations(token)[::every]
        values = torch.cat([truth.values.nan_to_num(), torch.tensor([[3.0, 3, 0, 4, 2, 1.5, 0, 0, 0]])])
        values[:, :2] += torch.randn(len(values), 2, generator=chance) * 0.05
        scores = torch.cat([torch.rand(len(truth), generator=chance) / 4 + 0.7, torch.tensor([0.75])])
        found[token] = Boxes(values, torch.cat([truth.labels, torch.tensor([0])]), scores)
    nuscenes.save_detections(run / "detections", source, found)
    result = json.loads((run / "result.json").read_bytes())
    result["metrics"] = nuscenes.evaluate(source, found).to_json()
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")


CONTRAST = """
() => {
  const parse = text => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    return {rgb: parts.slice(0, 3), a: parts.length > 3 ? parts[3] : 1};
  };
  const over = (top, below) => top.rgb.map((c, i) => c * top.a + below[i] * (1 - top.a));
  const light = rgb => {
    const [r, g, b] = rgb.map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const backdrop = node => {
    if (!node) return [255, 255, 255];
    if (node.classList.contains("view")) return [255, 255, 255];
    return over(parse(getComputedStyle(node).backgroundColor), backdrop(node.parentElement));
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest("script, title, .hidden, .skip")) continue;
    if (!node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const color = parse(node.closest("svg") ? style.fill : style.color);
    for (let each = node; each; each = each.parentElement) color.a *= Number(getComputedStyle(each).opacity);
    const behind = backdrop(node.closest("svg") ? node.closest("svg") : node);
    const [a, b] = [light(over(color, behind)), light(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.push(`${walker.currentNode.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}
"""
"""Returns the texts that do not stand out from what is behind them as WCAG 2.2 AA asks."""

UNDECODED = """
async () => {
  const pictures = [...document.querySelectorAll("img")].map(each => each.src);
  pictures.push(...[...document.querySelectorAll("svg image")].map(each => each.getAttribute("href")));
  const poor = [];
  for (const source of pictures) {
    const picture = new Image();
    picture.src = source;
    try { await picture.decode(); } catch { poor.push(source.slice(0, 60)); }
  }
  return [pictures.length, poor];
}
"""
"""Returns how many pictures there are, and those that are none."""
