"""Of one rank every verb is the identity; of several, a reference with plain lists. For whole runs see test_distributed.py."""

import json
import math

import pytest
import torch
from processes import ranks
from ranks_verbs import FLAGS, LOSSES, SAID

from autowu.history import MISSING
from autowu.ranks import Ranks


def test_of_one_rank_every_verb_is_the_identity():
    ranks, losses = Ranks(), torch.tensor([1.0, math.nan, MISSING], dtype=torch.float64)
    assert ranks.sum(losses) is losses
    assert ranks.all_agree(torch.ones(1)) is True
    assert ranks.all_agree(torch.zeros(1)) is False
    torch.testing.assert_close(ranks.average(losses, True)[:3], losses, equal_nan=True)
    assert [ranks.average(losses, flag)[3].item() for flag in (True, False)] == [1.0, 0.0]
    before = losses.clone()
    assert ranks.exchange(losses, [1.0, 2.0], 2, None, False) == (0, [1.0, 2.0], True, False)
    assert ranks.exchange(losses, None, 2, torch.zeros(1), True) == (0, [], False, True)
    torch.testing.assert_close(losses, before, equal_nan=True)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    ranks(folder / "out", 2, "tests/ranks_verbs.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def mean_of(values):
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        return sum(finite) / len(finite)
    return math.nan if any(value != MISSING for value in values) else MISSING


def test_of_two_ranks_all_hear_the_same(of_two):
    for rank, heard in enumerate(of_two):
        assert (heard["alone"], heard["number"], heard["size"]) == (False, rank, 2)
        assert heard["sum"] == [3.0, 30.0]
        assert heard["agree"] == [False, True]


def test_of_two_ranks_losses_are_averaged_over_those_that_are_finite(of_two):
    expected = [mean_of(values) for values in zip(*LOSSES, strict=True)]
    for heard in of_two:
        assert heard["average"] == pytest.approx([*expected, sum(FLAGS)], nan_ok=True)
        assert heard["exchanged"] == pytest.approx(expected, nan_ok=True)
        assert heard["missing"] == sum(not math.isfinite(value) for values in LOSSES for value in values)


def test_of_two_ranks_only_the_first_is_heard_and_one_that_is_not_sound_or_raises_its_flag_counts(of_two):
    for heard in of_two:
        assert heard["said"] == SAID[0]
        assert heard["silent"] == []
        assert heard["sound"] == [True, False]
        assert heard["flagged"] == [False, True]
