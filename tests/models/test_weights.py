"""Weights are loaded strictly and completely, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from bevkd.errors import CheckpointError
from bevkd.models.weights import load_weights, save_weights


def model(out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, out), nn.BatchNorm1d(out))


def test_weights_survive_a_round_trip_with_their_metadata(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = model(), model()
    save_weights(tmp_path / "w.safetensors", first.state_dict(), {"classes": "car"})
    load_weights(tmp_path / "w.safetensors", second)
    torch.testing.assert_close(dict(second.state_dict()), dict(first.state_dict()), atol=0, rtol=0)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"classes": "car"}
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_every_missing_extra_and_misshapen_tensor_is_named(tmp_path: Path) -> None:
    weights = model().state_dict()
    weights["0.weight"] = torch.zeros(5, 2)
    weights["2.scale"] = torch.zeros(1)
    del weights["1.bias"]
    save_weights(tmp_path / "w.safetensors", weights, {})
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path / "w.safetensors", model())
    message = str(caught.value)
    assert "missing: 1.bias [3]" in message
    assert "not in the model: 2.scale [1]" in message
    assert "shape of 0.weight: file [5, 2], model [3, 2]" in message


def test_refused_weights_leave_the_model_as_it_was(tmp_path: Path) -> None:
    target = model()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    save_weights(tmp_path / "w.safetensors", model(4).state_dict(), {})
    with pytest.raises(CheckpointError):
        load_weights(tmp_path / "w.safetensors", target)
    torch.testing.assert_close(dict(target.state_dict()), before, atol=0, rtol=0)


def test_a_long_list_of_faults_is_cut_with_a_count(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", {f"x{i}": torch.zeros(1) for i in range(20)}, {})
    with pytest.raises(CheckpointError, match=r"and 15 more"):
        load_weights(tmp_path / "w.safetensors", model())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights at"):
        load_weights(tmp_path / "w.safetensors", model())


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_a_truncated_file_is_called_damaged(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, model().state_dict(), {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(path, model())
