"""Prediction by one process and by several."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from bevkd.config import parse
from bevkd.evaluation.predict import predict
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorConfig
from bevkd.progress import Silent
from bevkd.testing import MadeUpFrames
from bevkd.types import Boxes
from tests.pipeline import kit

CLASSES = kit.CLASSES
SOURCE = MadeUpFrames(CLASSES, BEVGrid(x_m=(-25.6, 25.6), y_m=(-25.6, 25.6), z_m=(-5, 3), cell_m=1.6), frames=7)


def detector() -> Detector:
    """Return a camera student that finds something everywhere."""
    torch.manual_seed(0)
    config = {**kit.STUDENT, "head": {**kit.HEAD, "heatmap_bias": 0.0}}
    made = Detector(parse(DetectorConfig, config, "a test"), CLASSES)
    for buffer in made.buffers():
        if buffer.is_floating_point() and buffer.dim() == 1:
            buffer += 0.1 * torch.rand_like(buffer)
    return made


def packed(found: dict[str, Boxes]) -> dict[str, torch.Tensor]:
    return {token: boxes.pack() for token, boxes in found.items()}


def work(rank: int, processes: int, folder: Path, batch_size: int) -> None:
    """Predict as one of several processes and leave what was found; batch norms of later ones have gone astray."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=processes)
    own = detector()
    if rank > 0:
        for buffer in own.buffers():
            buffer.mul_(2)
    found = predict(own, SOURCE, SOURCE.tokens, Silent(), batch_size)
    (folder / f"{rank}.pickle").write_bytes(
        pickle.dumps({token: boxes.numpy() for token, boxes in packed(found).items()})
    )
    distributed.destroy_process_group()


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (3, 4)])
def test_several_processes_find_at_the_first_one_what_one_process_finds_bit_for_bit(
    tmp_path: Path, processes: int, batch_size: int
) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank, processes, tmp_path, batch_size)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * processes
    first, *others = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(processes))
    alone = packed(predict(detector(), SOURCE, SOURCE.tokens, Silent(), batch_size))
    assert list(first) == list(alone) == list(SOURCE.tokens)
    assert sum(map(len, alone.values())) > 50
    assert all(torch.equal(torch.from_numpy(first[token]), alone[token]) for token in alone)
    assert others == [{}] * (processes - 1)


def test_loader_processes_change_nothing() -> None:
    tokens = SOURCE.tokens[:3]
    alone = packed(predict(detector(), SOURCE, tokens, Silent(), 2))
    loaded = packed(predict(detector(), SOURCE, tokens, Silent(), 2, workers=2))
    assert all(torch.equal(loaded[token], alone[token]) for token in tokens)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_around_it_keeps_its_random_state_and_its_frozen_parts(workers: int) -> None:
    own: Any = detector().train()
    own.encoder.backbone.eval()
    modes = {name: module.training for name, module in own.named_modules()}
    before = torch.get_rng_state()
    predict(own, SOURCE, SOURCE.tokens[:2], Silent(), 1, workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in own.named_modules()} == modes
    assert len(set(modes.values())) == 2
