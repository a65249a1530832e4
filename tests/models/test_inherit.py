"""A narrow model starts from evenly spread channels of a wide one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bevkd.errors import CheckpointError
from bevkd.models.inherit import inherit, narrowed


class Model(nn.Module):
    """Two branches that are concatenated before a third layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"a": nn.Conv2d(3, width, 1), "b": nn.Conv2d(3, width, 1)})
        self.head = nn.Conv2d(2 * width, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(torch.cat([self.encoder["a"](images), self.encoder["b"](images)], dim=1))
        return output


def test_channels_are_kept_at_even_distances() -> None:
    value = torch.arange(24.0)[:, None].expand(24, 3)
    kept = narrowed(value, (16, 3))
    assert kept is not None
    assert kept[:, 0].tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22]


@pytest.mark.parametrize("shape", [(32, 3), (24, 2), (4, 3), (24,)])
def test_wider_tensors_and_dimensions_that_hold_no_channels_are_left_alone(shape: tuple[int, ...]) -> None:
    assert narrowed(torch.zeros(24, 3), shape) is None


def test_a_model_of_the_same_width_inherits_everything() -> None:
    torch.manual_seed(0)
    wide, copy = Model(16), Model(16)
    outcome = inherit(wide.state_dict(), copy, ("encoder", "head"), "here")
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(copy(images), wide(images))
    assert (len(outcome.same), outcome.narrowed, outcome.fresh) == (6, (), ())


def test_layers_behind_a_concatenation_read_the_channels_that_were_kept() -> None:
    """A wide model whose channels come in equal pairs loses nothing but half of each sum."""
    torch.manual_seed(0)
    wide, narrow = Model(16), Model(8)
    with torch.no_grad():
        for layer in wide.encoder.values():
            layer.weight.copy_(layer.weight[::2].repeat_interleave(2, dim=0))
            layer.bias.copy_(layer.bias[::2].repeat_interleave(2, dim=0))
        wide.head.weight.copy_(wide.head.weight[:, ::2].repeat_interleave(2, dim=1))
        wide.head.bias.zero_()
    outcome = inherit(wide.state_dict(), narrow, ("encoder", "head"), "here")
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(narrow(images), wide(images) / 2)
    assert set(outcome.narrowed) == {
        "encoder.a.weight",
        "encoder.a.bias",
        "encoder.b.weight",
        "encoder.b.bias",
        "head.weight",
    }


def test_other_parts_stay_as_they_were() -> None:
    torch.manual_seed(0)
    wide, narrow = Model(16), Model(8)
    before = narrow.head.weight.clone()
    inherit(wide.state_dict(), narrow, ("encoder",), "here")
    assert torch.equal(narrow.head.weight, before)


def test_tensors_that_the_source_lacks_are_named() -> None:
    source = Model(16).state_dict()
    del source["encoder.b.bias"]
    outcome = inherit(source, Model(8), ("encoder",), "here")
    assert outcome.fresh == ("encoder.b.bias",)
    assert "1 start anew: encoder.b.bias" in str(outcome)


def test_a_part_of_which_nothing_fits_is_refused_and_the_model_left_alone() -> None:
    torch.manual_seed(0)
    model = Model(16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="nothing that fits the part 'encoder'"):
        inherit(Model(8).state_dict(), model, ("head", "encoder"), "here")
    torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0)
