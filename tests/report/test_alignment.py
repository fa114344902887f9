from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.report.scenes import REGIONS, THINGS, GuessingModel, IndifferentModel, OracleModel
from vlscale.config import WraSection
from vlscale.report.alignment import alignment, detector_names, transport_plan_of
from vlscale.report.heldout import HeldOut
from vlscale.report.outcome import UnmeasurableError


@pytest.mark.parametrize("tokens", ["all", "words"])
def test_alignment(scenes: HeldOut, tokens: str) -> None:
    section = WraSection(tokens=tokens)  # type: ignore[arg-type]
    knows = alignment(OracleModel(), scenes, section)["alignment_accuracy"]
    guesses = alignment(GuessingModel(), scenes, section)["alignment_accuracy"]
    assert len(knows) == len(scenes.mentions)
    assert knows.mean > 0.99
    assert guesses.mean == pytest.approx(1 / REGIONS, abs=0.08)
    assert knows.chance == pytest.approx(1 / REGIONS)


def test_a_plan_that_favours_nothing_is_at_chance(scenes: HeldOut) -> None:
    same = alignment(IndifferentModel(), scenes, WraSection())["alignment_accuracy"]
    assert same.mean == pytest.approx(same.chance, abs=0.08)


def test_a_trained_loss_is_not_needed_to_take_a_plan(scenes: HeldOut) -> None:
    assert alignment(OracleModel(), scenes, WraSection(loss="off"))["alignment_accuracy"].mean > 0.99


def test_detector_names(scenes: HeldOut) -> None:
    found = detector_names(scenes, scenes.mentions)
    assert found is not None
    by_thing = {thing: found[scenes.mentions.thing == i].mean() for i, thing in enumerate(scenes.things)}
    # "teacup" does not hold the word "cup", nor "goldfish" "fish", nor "dogwood" "dog": all regions tie.
    expected = {thing: 1 / REGIONS if thing in ("cup", "fish", "dog") else 1.0 for thing in THINGS}
    assert by_thing == pytest.approx(expected)
    outcome = alignment(GuessingModel(), scenes, WraSection())["alignment_accuracy"]
    assert outcome.baseline == pytest.approx(found.mean())


def test_no_detector_no_baseline(scenes: HeldOut, bare: HeldOut) -> None:
    stores = {name: store for name, store in scenes.dataset.stores.items() if name != "classes"}
    dataset = type(scenes.dataset)("x", scenes.dataset.root, stores)
    outcome = alignment(OracleModel(), dataclasses.replace(scenes, dataset=dataset), WraSection())
    assert outcome["alignment_accuracy"].baseline is None
    with pytest.raises(UnmeasurableError, match="spans"):
        alignment(OracleModel(), bare, WraSection())


@pytest.mark.parametrize(("tokens", "first"), [("all", -1), ("words", 0)])
def test_plan_of_one_text(scenes: HeldOut, tokens: str, first: int) -> None:
    text = int(scenes.captions()[0])
    section = WraSection(tokens=tokens)  # type: ignore[arg-type]
    plan_TR, positions = transport_plan_of(OracleModel(), scenes, text, section)
    length = int(scenes.dataset.texts.lengths[text])
    assert positions.tolist() == list(range(first, length - first))
    assert plan_TR.shape == (len(positions), REGIONS)
    assert plan_TR.sum(1) == pytest.approx(np.ones(len(positions)))
    own = scenes.mentions.where(scenes.mentions.text == text)
    assert plan_TR[own.start - first].argmax(1).tolist() == own.region.tolist()
