"""The training loop: one for teachers, plain students, distilled students and segmenters."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bevkd.data.collate import Batch
from bevkd.data.instances import ImageBatch, InstanceDataset
from bevkd.data.join import TrainingDataset
from bevkd.data.sampler import PositionSampler
from bevkd.errors import TrainingError
from bevkd.models.detector import channels_last
from bevkd.models.weights import save_weights
from bevkd.progress import Progress
from bevkd.training.checkpoint import Checkpoints
from bevkd.training.config import TrainingConfig
from bevkd.training.objective import Objective, SegmenterObjective
from bevkd.training.tracking import Tracker


@dataclass(frozen=True)
class TrainingResult:
    """What a run cost, over the steps that this process ran (medians, so a slow first step does not count).

    Attributes:
        step_seconds: wall time per optimizer step.
        data_wait_fraction: share of it spent waiting for the loader.
        peak_memory_bytes: of the device; on a CPU the process's largest resident set.
    """

    steps: int
    step_seconds: float
    data_wait_fraction: float
    peak_memory_bytes: int


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of ``step`` (from 0) relative to the peak."""
    warmup = config.warmup * config.steps
    if step < warmup:
        rising = min((step + 1) / max(warmup, 1), 1.0)
        return 0.04 + 0.96 * (1 - math.cos(math.pi * rising)) / 2 if config.schedule == "one_cycle" else rising
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        passed = sum(step >= milestone * config.steps for milestone in config.milestones)
        return float(0.1**passed)
    falling = (step - warmup) / max(config.steps - warmup, 1)
    return max((1 + math.cos(math.pi * falling)) / 2, 1e-4)


class MovingAverage:
    """Exponential moving average of a model's parameters; buffers are copied as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._parameters = {name for name, _ in model.named_parameters()}

    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model``; early steps count more, so that the random start is forgotten."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in self._parameters:
                    self.weights[name].lerp_(value.detach(), weight)
                else:
                    self.weights[name].copy_(value)


class Trainer:
    """Trains an objective in a run folder and can go on where a killed run stopped.

    A run's losses depend on recipe and seed only: samples are a function of (seed, position), and a checkpoint holds
    weights, optimizer, moving average, step and random state.
    """

    def __init__(
        self,
        objective: Objective | SegmenterObjective,
        config: TrainingConfig,
        run: Path,
        device: str | None,
        metadata: Mapping[str, str],
    ) -> None:
        self.config, self.run, self.metadata = config, run, dict(metadata)
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=device == "cpu")
        self.objective = objective
        channels_last(objective)
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.average = MovingAverage(objective.model, config.ema) if config.ema else None
        self.checkpoints = Checkpoints(run / "checkpoints", config.keep)
        self.step = 0

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return the step to go on from."""
        found = self.checkpoints.load_latest(self.accelerator.device)
        if found is None:
            return 0
        self.step, state = found
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.weights = state["average"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([each.cpu() for each in state["random"]["cuda"]])
        return self.step

    def train(self, dataset: TrainingDataset | InstanceDataset, progress: Progress) -> TrainingResult:
        """Run the remaining steps, write ``model.safetensors`` and return what they cost."""
        main = self.accelerator.is_main_process
        tracker = Tracker(self.run, self.step) if main else None
        seconds: list[float] = []
        waits: list[float] = []
        batches = self._batches(dataset)
        self.model.train()
        try:
            with progress.task("training", self.config.steps, "step", done=self.step) as task:
                while self.step < self.config.steps:
                    started = time.perf_counter()
                    terms, waited = self._step(batches)
                    seconds.append(time.perf_counter() - started)
                    waits.append(waited)
                    loss = sum(terms.values())
                    task.advance(loss=loss, data_wait=waited / seconds[-1])
                    if tracker and (self.step % self.config.log_every == 0 or self.step == self.config.steps):
                        rate = self.optimizer.param_groups[0]["lr"]
                        tracker.log(self.step, {"loss": loss, **terms, "learning_rate": rate, "seconds": seconds[-1]})
                    every = self.config.checkpoint_every
                    if main and (self.step == self.config.steps or (every and self.step % every == 0)):
                        self.checkpoints.save(self.step, self._state())
        finally:
            if tracker:
                tracker.close()
        if main:
            save_weights(self.run / "model.safetensors", self.final_weights(), self.metadata)
        self.accelerator.wait_for_everyone()
        return self._result(seconds, waits)

    def final_weights(self) -> dict[str, Tensor]:
        """Return the model's weights, averaged if the run averages; no distillation module is among them."""
        return self.average.weights if self.average else self.objective.model.state_dict()

    def _step(self, batches: Iterator[Batch | ImageBatch]) -> tuple[dict[str, float], float]:
        """Take one optimizer step; return its loss terms and the seconds spent waiting for data."""
        config, waited = self.config, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, self.step)
        sums: dict[str, float] = {}
        for micro in range(config.accumulation):
            started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - started
            batch = batch.to(self.accelerator.device)
            last = micro == config.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    terms: dict[str, Tensor] = self.model(batch)
                loss = torch.stack([*terms.values()]).sum()
                self._refuse_non_finite(terms, loss, batch)
                self.accelerator.backward(loss / config.accumulation)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / config.accumulation
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update(self.objective.model, self.step)
        return sums, waited

    def _refuse_non_finite(self, terms: Mapping[str, Tensor], loss: Tensor, batch: Batch | ImageBatch) -> None:
        if bool(torch.isfinite(loss)):
            return
        bad = ", ".join(name for name, value in terms.items() if not bool(torch.isfinite(value)))
        steps = self.checkpoints.steps()
        good = f"The last good checkpoint is of step {steps[-1]}." if steps else "There is no checkpoint yet."
        raise TrainingError(
            f"loss is not finite at step {self.step + 1} (terms: {bad}; frames: {', '.join(batch.tokens)}). {good} "
            "Train again in another --out with a lower training.learning_rate or a lower weight of that term."
        )

    def _batches(self, dataset: TrainingDataset | InstanceDataset) -> Iterator[Batch | ImageBatch]:
        config, accelerator = self.config, self.accelerator
        per_step = config.batch_size * config.accumulation * accelerator.num_processes
        sampler = PositionSampler(
            self.step * per_step,
            config.steps * per_step,
            config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=config.batch_size,
            sampler=sampler,
            num_workers=config.workers,
            collate_fn=self.objective.collate,
            # Its own, so that starting to load draws nothing from the random state that a checkpoint restores.
            generator=torch.Generator(),
            pin_memory=accelerator.device.type == "cuda",
            worker_init_fn=_one_thread,
            multiprocessing_context="fork" if config.workers else None,
        )
        return iter(loader)

    def _state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        scaler = self.accelerator.scaler
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights if self.average else {},
            "scaler": scaler.state_dict() if scaler is not None else {},
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "metadata": self.metadata,
        }

    def _result(self, seconds: list[float], waits: list[float]) -> TrainingResult:
        device = self.accelerator.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        middle = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
        return TrainingResult(len(seconds), middle, sum(waits) / sum(seconds) if seconds else 0.0, peak)


def _one_thread(worker: int) -> None:
    """Keep a loader process from competing with the training process for cores."""
    del worker
    torch.set_num_threads(1)
