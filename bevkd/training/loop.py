"""The training loop: one for teachers, plain students, distilled students and segmenters."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor

from bevkd.data.collate import Batch
from bevkd.data.instances import ImageBatch, InstanceDataset
from bevkd.data.join import TrainingDataset
from bevkd.data.sampler import mix
from bevkd.errors import CheckpointError, TrainingError, report
from bevkd.models.detector import channels_last
from bevkd.models.weights import save_weights
from bevkd.progress import Progress
from bevkd.training.average import MovingAverage
from bevkd.training.batch_norm import synchronise
from bevkd.training.chance import be_deterministic, random_state, set_random_state
from bevkd.training.checkpoint import Checkpoints, Snapshot
from bevkd.training.config import TrainingConfig
from bevkd.training.gradients import gradient_norms, shared_weights
from bevkd.training.loader import batches
from bevkd.training.objective import Objective, SegmenterObjective
from bevkd.training.recompute import recompute_backbone
from bevkd.training.result import TrainingResult, Validation, peak_memory
from bevkd.training.schedule import learning_rate_factor
from bevkd.training.stages import freeze, optimizer_of
from bevkd.training.terms import Terms
from bevkd.training.tracking import Tracker
from bevkd.training.watch import LossWatch, Reading

_TIMEOUT = timedelta(hours=1)
"""That a process waits for another: longer than the first one may take to score an evaluation alone. A process that has
died is noticed at once."""
BEST_WEIGHTS = "best.safetensors"


class Trainer:
    """Trains an objective in a run folder and can go on where a killed run stopped.

    A run's losses depend on recipe and seed only: samples are a function of (seed, position), and a checkpoint holds
    weights, optimizer, moving average, step and the random state of every process.

    Args:
        device: ``cpu`` keeps to the CPU where there is a GPU.
        metadata: of the weight files.
        facts: what a checkpoint says about its run, as JSON values; but for ``recipe``, a run that resumes it must
            have the same.
        validate: evaluates the model at a step and returns what it found, on the first process at least; called on
            all of them, with the weights in place that the run would leave.
        terms: what holds the terms of distillation; None leaves them as they are.
    """

    def __init__(
        self,
        objective: Objective | SegmenterObjective,
        config: TrainingConfig,
        run: Path,
        device: str | None,
        metadata: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
        validate: Callable[[int], Validation | None] | None = None,
        terms: Terms | None = None,
    ) -> None:
        self.config, self.run, self.metadata = config, run, dict(metadata)
        if config.deterministic:
            be_deterministic()
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=device == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
        )
        # DDP and channels_last disagree about the strides of 1x1 kernels, which are the same memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        self.facts = {**(facts or {}), "processes": self.accelerator.num_processes}
        self.objective, self.validate, self.terms = objective, validate, terms or Terms()
        channels_last(objective)
        if config.sync_batch_norm:
            synchronise(objective)
        if config.gradient_checkpointing:
            recompute_backbone(objective.model)
        self._frozen_norms = freeze(objective, config.frozen)
        optimizer, self._factors = optimizer_of(objective, config)
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)
        for part in ("bev_encoder", "head") if config.compile else ():
            if hasattr(objective.model, part):
                getattr(objective.model, part).compile()
        self.average = MovingAverage(objective.model, config.ema) if config.ema else None
        self.checkpoints = Checkpoints(run / "checkpoints", config.keep)
        self.watch, self.best = LossWatch(config.diverged), (0, -math.inf)
        self.step = 0
        self._parent = os.getppid()
        if self.accelerator.process_index:  # else all processes would drop out the same units
            torch.manual_seed(mix(config.seed, self.accelerator.process_index))

    # -------------------------------------------------------------------------------------------- checkpoints

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return the step to go on from.

        Raises:
            CheckpointError: it is damaged, of another run, or of another version of bevkd.
        """
        found = self.checkpoints.load_latest()
        if found is None:
            return 0
        step, state = found
        try:
            self._refuse_foreign(step, state["facts"])
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                for name, value in self.average.weights.items():
                    value.copy_(state["average"][name])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.watch.recent.extend(state["losses"]["recent"])
            self.watch.above = state["losses"]["above"]
            if "terms" in state:  # checkpoints of older versions have none
                self.terms.load_state(state["terms"])
            self.best = (state["best"]["step"], state["best"]["score"])
            set_random_state(state["random"][self.accelerator.process_index])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {self.checkpoints.path(step)} does not fit this run: {error}. It is of another recipe or "
                "of an older bevkd. Train again in another --out, or resume with the version that wrote it."
            ) from error
        self.step = step
        return step

    def _refuse_foreign(self, step: int, there: Mapping[str, Any]) -> None:
        different = [
            f"{key}: {there.get(key)} there, {here} here"
            for key, here in self.facts.items()
            if key != "recipe" and there.get(key) != here
        ]
        if different:
            headline = f"checkpoint {self.checkpoints.path(step)} is of another run; choose another --out:"
            raise report(CheckpointError, headline, different)

    def _snapshot(self) -> Snapshot:
        """Return what a checkpoint holds; all processes take part."""
        scaler = self.accelerator.scaler
        state = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights if self.average else {},
            "scaler": scaler.state_dict() if scaler is not None else {},
            "random": gather_object([random_state()]),
            "losses": {"recent": list(self.watch.recent), "above": self.watch.above},
            "terms": self.terms.state(),
            "best": {"step": self.best[0], "score": self.best[1]},
            "facts": self.facts,
        }
        return Snapshot(self.final_weights(), self.metadata, state, self.facts)

    # -------------------------------------------------------------------------------------------- the loop

    def train(self, dataset: TrainingDataset | InstanceDataset, progress: Progress) -> TrainingResult:
        """Run the remaining steps, write ``model.safetensors`` and return what they cost.

        Raises:
            TrainingError: the loss or its gradient is not finite, or the loss diverges.
        """
        config, accelerator = self.config, self.accelerator
        main = accelerator.is_main_process
        if main:
            self.checkpoints.clear()
        tracker = Tracker(self.run, self.step) if main else None
        seconds: list[float] = []
        waits: list[float] = []
        loaded = batches(
            dataset,
            self.objective,
            config,
            self.step,
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self._train_mode()
        self._warn(progress)
        try:
            with progress.task("training", config.steps, "step", done=self.step) as task:
                while self.step < config.steps:
                    started = time.perf_counter()
                    figures, waited = self._step(loaded)
                    seconds.append(time.perf_counter() - started)
                    waits.append(waited)
                    task.advance(loss=figures["loss"], data_wait=waited / seconds[-1])
                    self._warn(progress)
                    found = self._validate() if self._due(config.evaluate_every) and self.validate else {}
                    logged = self._due(config.log_every) or any(name.startswith("gradient/") for name in figures)
                    if tracker and (found or logged):
                        tracker.log(self.step, {**figures, "seconds": seconds[-1], **found})
                    if self._due(config.checkpoint_every) or self.step == config.steps:
                        snapshot = self._snapshot()
                        if main:
                            self.checkpoints.save(self.step, snapshot)
        finally:
            if tracker:
                tracker.close()
        if main:
            save_weights(self.run / "model.safetensors", self.final_weights(), self.metadata)
        accelerator.wait_for_everyone()
        return self._result(seconds, waits)

    def final_weights(self) -> dict[str, Tensor]:
        """Return the model's weights, averaged if the run averages; no distillation module is among them."""
        return self.average.weights if self.average else self.objective.model.state_dict()

    def _due(self, every: int) -> bool:
        """Return whether this step is one of every so many; the last one always is."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _warn(self, progress: Progress) -> None:
        for message in self.terms.unsaid():
            if self.accelerator.is_main_process:
                progress.note(f"warning: {message}")

    def _train_mode(self) -> None:
        self.model.train()
        for norm in self._frozen_norms:
            norm.eval()

    def _step(self, loaded: Iterator[Batch | ImageBatch]) -> tuple[dict[str, float], float]:
        """Take one optimizer step; return its figures and the seconds spent waiting for data."""
        config, waited = self.config, 0.0
        if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
            raise TrainingError("torchrun has ended without its processes. Start it again with --resume.")
        factor = learning_rate_factor(config, self.step)
        for group, own in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = config.learning_rate * factor * own
        passes: list[Tensor] = []
        tokens: list[Sequence[str]] = []
        names: tuple[str, ...] = ()
        factors: list[float] = []
        pulls: dict[str, float] = {}
        for micro in range(config.accumulation):
            started = time.perf_counter()
            batch = next(loaded)
            waited += time.perf_counter() - started
            last = micro == config.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    terms: dict[str, Tensor] = self.model(batch)
                names = tuple(terms)
                factors = self.terms.factors(names, self.step)
                joined = {name: _times(terms[name], factor) for name, factor in zip(names, factors, strict=True)}
                if last and config.gradient_norms and (self.step + 1) % config.gradient_norms == 0:
                    pulls = self._pulls(joined)
                self.accelerator.backward(torch.stack([*joined.values()]).sum() / config.accumulation)
            passes.append(torch.stack([value.detach().float() for value in terms.values()]))
            tokens.append(batch.tokens)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update(self.objective.model, self.step)
        reading = self._read(names, passes, norm)
        means = reading.means()
        terms_now = {name: means[name] * own for name, own in zip(names, factors, strict=True)}
        self._refuse_to_go_on(reading, sum(terms_now.values()), tokens)
        figures = {"loss": sum(terms_now.values()), **terms_now, "learning_rate": config.learning_rate * factor}
        if math.isfinite(reading.gradient_norm):  # with fp16 it may not be, and the step was left out
            figures["gradient_norm"] = reading.gradient_norm
        controlled = {**self.terms.take(means, self.step - 1), **self.terms.take_gradients(pulls, self.step - 1)}
        return {**figures, **controlled}, waited

    def _pulls(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the norm of the gradient of each part of the loss on this batch, meaned over processes."""
        parts, scaler = self.terms.parts(terms), self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        device = self.accelerator.device
        # All processes go through the same backward passes: synchronised batch norms meet in them.
        able = torch.tensor([float(value.requires_grad) for value in parts.values()], device=device)
        everywhere = self.accelerator.gather(able[None]).amin(dim=0).tolist()
        losses = {part: value for (part, value), each in zip(parts.items(), everywhere, strict=True) if each}
        norms = gradient_norms(losses, shared_weights(self.objective.model), scale)
        return dict(zip(losses, self.accelerator.gather(norms[None]).mean(dim=0).tolist(), strict=True))

    def _read(self, names: tuple[str, ...], passes: Sequence[Tensor], norm: Tensor) -> Reading:
        """Return what all processes found, fetched from the device at once: the only wait for it in a step."""
        here = torch.cat([*passes, norm.detach().float().reshape(1)])
        everywhere = self.accelerator.gather(here[None]).tolist()
        count = len(names)
        values = [[own[start : start + count] for start in range(0, len(own) - 1, count)] for own in everywhere]
        return Reading(names, values, everywhere[0][-1])

    def _refuse_to_go_on(self, reading: Reading, loss: float, tokens: Sequence[Sequence[str]]) -> None:
        """Stop on every process with the same error, before anything of this step is kept."""
        advice = "Train again in another --out with a lower training.learning_rate"
        if bad := reading.not_finite():
            frames = gather_object([tokens])
            terms = ", ".join(dict.fromkeys(name for names in bad.values() for name in names))
            where = ", ".join(token for process, micro in bad for token in frames[process][micro])
            raise TrainingError(
                f"loss is not finite at step {self.step} (terms: {terms}; frames: {where}). {self._last_good()} "
                f"{advice} or a lower weight of that term."
            )
        if not math.isfinite(reading.gradient_norm) and self.accelerator.scaler is None:
            where = ", ".join(token for own in gather_object([tokens]) for batch in own for token in batch)
            raise TrainingError(
                f"the gradient is not finite at step {self.step}, though the loss is (frames: {where}). "
                f"{self._last_good()} {advice} or in another training.precision."
            )
        if self.watch.diverges(loss):
            where = ", ".join(token for own in gather_object([tokens]) for batch in own for token in batch)
            raise TrainingError(
                f"loss diverges: {loss:.4g} at step {self.step}, for {self.watch.above} steps above "
                f"{self.config.diverged:g} times its median (frames of the last: {where}). {self._last_good()} "
                f"{advice}, or raise training.diverged."
            )

    def _last_good(self) -> str:
        steps = self.checkpoints.steps()
        return f"The last good checkpoint is of step {steps[-1]}." if steps else "There is no checkpoint yet."

    # -------------------------------------------------------------------------------------------- evaluation

    def _validate(self) -> dict[str, float]:
        """Return the figures of an evaluation, and keep the weights if they are the best so far."""
        assert self.validate is not None
        random = random_state()
        with self._final_weights_in_place():
            found = self.validate(self.step)
        set_random_state(random)
        self._train_mode()
        (score,) = broadcast_object_list([found.score if found else None])
        if score is not None and score > self.best[1]:
            self.best = (self.step, score)
            snapshot = self._snapshot()
            if self.accelerator.is_main_process:
                self.checkpoints.save(self.step, snapshot, best=True)
                save_weights(self.run / BEST_WEIGHTS, snapshot.weights, self.metadata)
        return dict(found.figures) if found else {}

    @contextlib.contextmanager
    def _final_weights_in_place(self) -> Iterator[None]:
        """Give the model the weights that the run would leave now, for a while."""
        if self.average is None:
            yield
            return
        model = self.objective.model
        training = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average.weights)
        try:
            yield
        finally:
            model.load_state_dict(training)

    def _result(self, seconds: list[float], waits: list[float]) -> TrainingResult:
        middle = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
        waiting = sum(waits) / sum(seconds) if seconds else 0.0
        step, score = self.best if self.best[0] else (None, None)
        memory, warned = peak_memory(self.accelerator.device), tuple(self.terms.warnings.values())
        return TrainingResult(len(seconds), middle, waiting, memory, step, score, warned)


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value * factor
