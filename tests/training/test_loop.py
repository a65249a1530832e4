"""The loop: schedules in closed form, and runs that depend on recipe and seed only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bevkd.data.collate import collate
from bevkd.errors import TrainingError
from bevkd.progress import Silent
from bevkd.training.average import MovingAverage
from bevkd.training.config import TrainingConfig
from bevkd.training.loader import _start_method
from bevkd.training.objective import Objective
from bevkd.training.schedule import learning_rate_factor
from bevkd.training.tracking import read_log
from tests.training.kit import Killed, KilledAt, RemoteFrames, TinyDetector, TinyFrames, trainer, weights


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run)]


# ---------------------------------------------------------------------------------------------- learning rate


def factors(**values: Any) -> list[float]:
    config = TrainingConfig(**{"steps": 100, "warmup": 0.2, **values})
    return [learning_rate_factor(config, step) for step in range(config.steps)]


def test_one_cycle_rises_from_a_25th_along_a_cosine_to_its_peak_at_the_end_of_the_warmup() -> None:
    found = factors(schedule="one_cycle")
    rising = [0.04 + 0.96 * (1 - math.cos(math.pi * (step + 1) / 20)) / 2 for step in range(20)]
    assert found[:20] == pytest.approx(rising)
    assert found[19] == 1.0
    assert found[9] == pytest.approx(0.52)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_after_the_warmup_the_rate_falls_along_a_cosine_towards_nothing(schedule: str) -> None:
    found = factors(schedule=schedule)
    assert found[20:] == pytest.approx([(1 + math.cos(math.pi * step / 80)) / 2 for step in range(80)], abs=1e-4)
    assert found[60] == pytest.approx(0.5)
    assert 0 < found[-1] < 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_other_schedules_warm_up_on_a_line(schedule: str) -> None:
    assert factors(schedule=schedule)[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])


def test_steps_of_the_rate_fall_to_a_tenth_at_each_milestone() -> None:
    found = factors(schedule="step", milestones=(0.5, 0.8))
    assert [found[step] for step in (19, 49, 50, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])


def test_a_constant_rate_stays() -> None:
    assert set(factors(schedule="constant")[19:]) == {1.0}
    assert set(factors(schedule="constant", warmup=0)) == {1.0}


@given(
    st.sampled_from(["one_cycle", "cosine", "constant"]),
    st.integers(1, 300),
    st.floats(0, 1, exclude_max=True, allow_subnormal=False),
)
def test_the_rate_is_always_positive_and_never_above_the_peak(schedule: str, steps: int, warmup: float) -> None:
    found = factors(schedule=schedule, steps=steps, warmup=warmup)
    assert min(found) > 0
    assert max(found) <= 1


def test_the_optimizer_steps_at_the_scheduled_rate(tmp_path: Path) -> None:
    trainer(tmp_path, steps=5, warmup=0.4).train(TinyFrames(), Silent())
    logged = [line["learning_rate"] for line in read_log(tmp_path)]
    assert logged == pytest.approx([0.01 * factor for factor in factors(steps=5, warmup=0.4)])


# ---------------------------------------------------------------------------------------------- moving average


def test_the_average_follows_its_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 4.0)
    average, expected = MovingAverage(model, 0.5), 4.0
    for step, value in enumerate((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0), start=1):
        nn.init.constant_(model.weight, value)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.weights["weight"].item() == pytest.approx(expected)


def test_buffers_are_copied_not_averaged() -> None:
    model = nn.BatchNorm1d(1)
    average = MovingAverage(model, 0.99)
    nn.init.constant_(model.get_buffer("running_mean"), 7.0)
    model.get_buffer("num_batches_tracked").fill_(3)
    average.update(model, 1)
    assert average.weights["running_mean"].item() == 7.0
    assert average.weights["num_batches_tracked"].item() == 3


def test_the_average_owns_its_memory() -> None:
    model = nn.Linear(1, 1)
    average = MovingAverage(model, 0.9)
    nn.init.constant_(model.weight, 100.0)
    assert average.weights["weight"].item() != 100.0


def test_a_run_with_an_average_exports_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, ema=0.9)
    run.train(TinyFrames(), Silent())
    assert run.average is not None
    assert equal(weights(tmp_path), run.average.weights)
    assert not equal(weights(tmp_path), dict(run.objective.detector.state_dict()))


# ---------------------------------------------------------------------------------------------- one run


def test_a_run_learns(tmp_path: Path) -> None:
    trainer(tmp_path, steps=60).train(TinyFrames(), Silent())
    found = losses(tmp_path)
    assert sum(found[-10:]) < 0.7 * sum(found[:10])


def test_the_same_seed_gives_the_same_run_bit_by_bit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trainer(tmp_path / name).train(TinyFrames(), Silent())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_deterministic_run_allows_no_other_operations_and_is_the_same_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    trainer(tmp_path / "plain").train(TinyFrames(), Silent())
    try:
        trainer(tmp_path / "deterministic", deterministic=True).train(TinyFrames(), Silent())
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "deterministic"))


def test_compiled_are_bev_encoder_and_head_and_no_weight_changes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    run = trainer(tmp_path, compile=True)
    assert compiled == [run.objective.model.head]  # the tiny detector has no BEV encoder
    assert "head.shared.0.weight" in run.final_weights()


def test_loader_processes_change_nothing(tmp_path: Path) -> None:
    for workers in (0, 2):
        trainer(tmp_path / str(workers), workers=workers).train(TinyFrames(), Silent())
    assert equal(weights(tmp_path / "0"), weights(tmp_path / "2"))


@pytest.mark.slow
def test_loader_processes_of_a_data_set_that_is_remote_change_nothing(tmp_path: Path) -> None:
    trainer(tmp_path / "here", workers=0).train(TinyFrames(), Silent())
    trainer(tmp_path / "remote", workers=1).train(RemoteFrames(), Silent())
    assert equal(weights(tmp_path / "here"), weights(tmp_path / "remote"))


def test_clients_of_object_stores_are_not_forked() -> None:
    assert (_start_method(TinyFrames()), _start_method(RemoteFrames())) == ("fork", "forkserver")  # type: ignore[arg-type]


def test_every_position_is_used_once_and_in_order(tmp_path: Path) -> None:
    frames = TinyFrames()
    trainer(tmp_path, steps=3, batch_size=2, accumulation=2).train(frames, Silent())
    assert frames.seen == list(range(3 * 2 * 2))


def test_accumulation_averages_the_gradients_of_its_batches(tmp_path: Path) -> None:
    accumulated = trainer(tmp_path / "a", steps=1, batch_size=2, accumulation=3, clip=1e9)
    gradients: list[dict[str, Tensor]] = []
    step = accumulated.optimizer.step

    def keep_gradients() -> None:
        named = accumulated.objective.detector.named_parameters()
        gradients.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})
        step()

    accumulated.optimizer.step = keep_gradients
    accumulated.train(TinyFrames(), Silent())

    by_hand, frames = trainer(tmp_path / "b").objective, TinyFrames()
    for start in (0, 2, 4):
        batch = collate([frames[position] for position in (start, start + 1)])
        (torch.stack([*by_hand(batch).values()]).sum() / 3).backward()
    expected = {name: weight.grad for name, weight in by_hand.detector.named_parameters()}
    torch.testing.assert_close(gradients[0], expected, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_clipped_before_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=1, clip=0.001)
    norms = []
    step = run.optimizer.step

    def keep_norm() -> None:
        grads = [weight.grad for weight in run.objective.parameters() if weight.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        step()

    run.optimizer.step = keep_norm
    run.train(TinyFrames(), Silent())
    assert norms == pytest.approx([0.001], rel=1e-2)


def test_the_result_counts_what_this_process_did(tmp_path: Path) -> None:
    result = trainer(tmp_path, steps=4).train(TinyFrames(), Silent())
    assert result.steps == 4
    assert result.step_seconds > 0
    assert 0 <= result.data_wait_fraction <= 1
    assert result.peak_memory_bytes > 1e6


# ---------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("killed_after", [2, 3, 7])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    tmp_path: Path, killed_after: int, ema: float | None
) -> None:
    settings = {"checkpoint_every": 2, "ema": ema}
    trainer(tmp_path / "whole", **settings).train(TinyFrames(), Silent())
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", **settings).train(TinyFrames(), KilledAt(killed_after))
    resumed = trainer(tmp_path / "killed", **settings)
    torch.manual_seed(12345)  # whatever the new process has drawn so far
    # The kill strikes in the step after, before that step's checkpoint.
    assert resumed.resume() == killed_after // 2 * 2
    resumed.train(TinyFrames(), Silent())
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [line["step"] for line in read_log(tmp_path / "killed")] == list(range(1, 9))


def test_resuming_a_finished_run_leaves_its_weights(tmp_path: Path) -> None:
    trainer(tmp_path).train(TinyFrames(), Silent())
    before = weights(tmp_path)
    again, frames = trainer(tmp_path), TinyFrames()
    assert again.resume() == 8
    assert again.train(frames, Silent()).steps == 0
    assert frames.seen == []
    assert equal(weights(tmp_path), before)


def test_without_a_checkpoint_a_run_starts_at_zero(tmp_path: Path) -> None:
    assert trainer(tmp_path).resume() == 0


def test_only_the_last_checkpoint_is_written_unless_asked(tmp_path: Path) -> None:
    run = trainer(tmp_path, checkpoint_every=0)
    run.train(TinyFrames(), Silent())
    assert run.checkpoints.steps() == [8]


# ---------------------------------------------------------------------------------------------- faults


class Diverges(nn.Module):
    """A distillation loss that is fine until it is not."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        del teacher, batch
        self.calls -= 1
        return {"term": student.bev_low.mean() * (math.nan if self.calls < 0 else 0.0)}


def objective_with(loss: nn.Module, run: Any) -> None:
    """Let ``loss`` join the objective with an empty teacher."""
    run.objective.losses.append(("bad", "teacher", loss))
    original = run.objective.forward

    def forward(batch: Any) -> dict[str, Tensor]:
        kept, run.objective.losses = run.objective.losses, []
        terms: dict[str, Tensor] = original(batch)
        run.objective.losses = kept
        return terms | {"bad/term": loss(run.objective.detector(batch), None, batch)["term"]}

    run.objective.forward = forward


def test_a_loss_that_is_not_finite_names_step_term_frames_and_the_last_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, checkpoint_every=2)
    objective_with(Diverges(calls=5), run)
    with pytest.raises(TrainingError) as caught:
        run.train(TinyFrames(), Silent())
    message = str(caught.value)
    for part in ("step 6", "bad/term", "frame0, frame1", "checkpoint is of step 4", "another --out"):
        assert part in message
    assert "detection" not in message


def test_diverging_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    objective_with(Diverges(calls=0), run)
    with pytest.raises(TrainingError, match="no checkpoint yet"):
        run.train(TinyFrames(), Silent())


# ---------------------------------------------------------------------------------------------- objective


def test_unlabelled_frames_give_no_detection_gradient() -> None:
    torch.manual_seed(0)
    objective, frames = Objective(TinyDetector(), [], {}), TinyFrames(labelled=3)  # type: ignore[arg-type]
    detector: Any = objective.detector
    detector.encoder.eval()  # batch norm would couple the frames
    detector.head.eval()
    batch = collate([frames[position] for position in (2, 7)])
    assert batch.labelled.tolist() == [True, False]
    outputs: list[Any] = []
    detector.register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
    with torch.enable_grad():
        detector.encoder.register_forward_hook(lambda *arguments: arguments[2].retain_grad())
        torch.stack([*objective(batch).values()]).sum().backward()
    gradient = outputs[0].bev_low.grad
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


def test_a_batch_without_labels_gives_a_finite_zero_with_a_gradient() -> None:
    torch.manual_seed(0)
    objective, frames = Objective(TinyDetector(), [], {}), TinyFrames(labelled=0)  # type: ignore[arg-type]
    terms = objective(collate([frames[0], frames[1]]))
    assert {name: value.item() for name, value in terms.items()} == {"detection/heatmap": 0.0, "detection/box": 0.0}
    torch.stack([*terms.values()]).sum().backward()
    assert all(weight.grad is not None for weight in objective.parameters())


def test_adapters_of_losses_are_trained_and_checkpointed_but_not_exported(tmp_path: Path) -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

    objective = Objective(TinyDetector(), [("kd", "teacher", Adapter())], {})  # type: ignore[arg-type, list-item]
    names = [name for name, _ in objective.named_parameters()]
    assert "adapters.0.conv.weight" in names
    assert len(names) == len(set(names))
    assert "adapters.0.conv.weight" in objective.state_dict()
    run = trainer(tmp_path)
    assert not any("adapters" in name for name in run.final_weights())
