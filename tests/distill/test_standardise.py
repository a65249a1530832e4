"""Features of a teacher at mean 0 and standard deviation 1, by the statistics of its cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bevkd.cache.statistics import ChannelStatistics
from bevkd.distill import unidistill, x3kd
from bevkd.distill.base import DistillContext, Standardise, TeacherBatch
from bevkd.distill.x3kd import FeatureDistillation
from bevkd.geometry.sampling import points_of
from bevkd.types import Signals
from tests.distill import kit

MEAN, STD = (1.0, -2.0, 0.0, 0.5, 3.0, 0.0), (2.0, 0.5, 1.0, 4.0, 1.0, 1.0)
OBJECTS = kit.boxes((1.3, -2.1, 4, 2, 0.3, 0), (-4, 3, 1, 1, 0, 1))
STATISTICS = ChannelStatistics(vectors=9, share=1.0, mean=MEAN, std=STD)


def context() -> DistillContext:
    names = ("bev_low", "bev_high", "points_low", "points_high")
    return dataclasses.replace(kit.context(), statistics=dict.fromkeys(names, STATISTICS))


def maps(seed: int) -> Tensor:
    return torch.randn(1, kit.THEIRS, 16, 16, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_maps_and_points_are_standardised_channel_by_channel() -> None:
    standardise, features = Standardise(STATISTICS), maps(0)
    wanted = (features - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(standardise(features), wanted)
    points = features.flatten(2).mT[0, :18].view(2, 9, kit.THEIRS)
    torch.testing.assert_close(standardise(points), wanted.flatten(2).mT[0, :18].view(2, 9, kit.THEIRS))


def test_channels_that_hardly_vary_do_not_become_noise() -> None:
    flat = STATISTICS.model_copy(update={"std": (1.0, 1.0, 1.0, 1.0, 1.0, 1e-9)})
    assert Standardise(flat)(torch.ones(1, 9, 6))[0, 0, 5].item() == pytest.approx(1 / (0.05 * 5 / 6))
    dead = STATISTICS.model_copy(update={"mean": (0.0,) * 6, "std": (0.0,) * 6})
    assert Standardise(dead)(torch.zeros(1, 9, 6)).abs().sum() == 0


def feature_term(source: str, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return UniDistill's feature term, and the maps of student and teacher."""
    config = unidistill.Config(feature=1, relation=0, response=0, source=source, adapter=True, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    loss = unidistill.build(config, context())
    own, theirs = kit.maps(1, kit.CHANNELS, batch=1), maps(2)
    held = {"bev_low": theirs} if source == "maps" else {"points_low": (points_of(theirs[0], OBJECTS, kit.GRID),)}
    teacher = TeacherBatch(Signals(**held), (kit.IDENTITY,), kit.GRID)
    term = loss(kit.output(own), teacher, kit.batch_of(OBJECTS))["feature"]
    return term, loss.adapters["bev_low"](own["bev_low"]), theirs  # type: ignore[attr-defined]


def test_the_feature_term_compares_the_students_adapter_with_standardised_points() -> None:
    found, own, theirs = feature_term("maps", standardise=True)
    wanted = (theirs - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    at = [points_of(each[0], OBJECTS, kit.GRID).values for each in (own, wanted)]
    torch.testing.assert_close(found, unidistill.feature_loss(*at))
    assert found != feature_term("maps")[0]


def test_points_beyond_the_edge_of_the_map_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.distill.test_standardise.OBJECTS", kit.boxes((20, 20, 4, 2, 0.3, 0), (-4, 3, 1, 1, 0, 1))
    )
    with_one_outside = feature_term("maps", standardise=True)[0]
    monkeypatch.setattr("tests.distill.test_standardise.OBJECTS", kit.boxes((-4, 3, 1, 1, 0, 1)))
    torch.testing.assert_close(with_one_outside, feature_term("maps", standardise=True)[0] / 2, rtol=1e-3, atol=0)


def test_points_give_the_same_term_as_maps() -> None:
    torch.testing.assert_close(feature_term("points", standardise=True)[0], feature_term("maps", standardise=True)[0])


def test_cells_that_hold_something_are_told_by_the_features_as_they_are() -> None:
    theirs = torch.zeros(1, kit.THEIRS, 16, 16)
    theirs[0, :, 3, 4] = torch.tensor(MEAN)  # standardised it is all zero
    config = x3kd.Config(feature=1, standardise=True, decoder_channels=4)
    part = FeatureDistillation(config, kit.CHANNELS, kit.THEIRS, context().standardise("bev_low")).eval()
    own = kit.maps(1, kit.CHANNELS, batch=1)
    term = part(kit.output(own), TeacherBatch(Signals(bev_low=theirs), (kit.IDENTITY,), kit.GRID))["feature"]
    torch.testing.assert_close(term, part.decoder(own["bev_low"])[0, :, 3, 4].abs().mean())


def test_an_adapter_that_cannot_be_negative_is_refused() -> None:
    with pytest.raises(ValidationError, match="set adapter: true"):
        unidistill.Config(adapter="conv", standardise=True)


@pytest.mark.parametrize(("statistics", "words"), [(None, "at work online"), ({}, "write it again")])
def test_a_teacher_without_statistics_is_a_misfit(statistics: Any, words: str) -> None:
    without = dataclasses.replace(kit.context(), statistics=statistics)
    (fault,) = without.no_statistics("points_low")
    assert words in fault
    assert "set standardise: false" in fault
    assert context().no_statistics("points_low") == []
