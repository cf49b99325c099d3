"""Losses on their way to the watch: read in blocks, and on the host as if each had been followed at its step."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autowu.history import MISSING, LossHistory
from autowu.ranks import Ranks
from autowu.reader import BLOCK, Reader
from autowu.watch import LossWatch


@st.composite
def losses_of_a_run(draw):
    """Losses that fall by a share of the noise or by far more, with holes, and that may come apart from some step on."""
    steps = np.arange(draw(st.integers(20, 150)))
    noise = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])) * np.random.default_rng(draw(st.integers(0, 99))).normal(size=len(steps))
    losses = draw(st.floats(0.0, 3.0)) * np.exp(-steps / draw(st.integers(2, 80))) + noise
    at, slope = draw(st.integers(5, 150)), draw(st.sampled_from([0.0, 0.01, 0.3, 5.0]))
    losses = losses + slope * np.maximum(0, steps - at)
    for step, value in draw(
        st.dictionaries(st.integers(0, 149), st.sampled_from([math.nan, math.inf, MISSING]), max_size=12)
    ).items():
        losses[step % len(losses)] = value
    return losses.tolist()


def flags(watch):
    return watch.exploded, watch.diverged


@given(losses_of_a_run(), st.sampled_from([3, 7, 10]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_on_the_host_the_watch_says_what_it_would_at_every_step(losses, every, drops):
    """Where it has an explosion or a divergence to tell it tells it at the very step; what it knows is the same to the bit."""
    reader, plain, history = Reader(Ranks()), LossWatch(), LossHistory()
    looks = 0
    for step, loss in enumerate(losses, 1):
        history.append(loss)
        look = step % every == 0
        since = reader.read(step, loss, history, flag=False, look=look)
        plain.push(loss)
        if since is None:
            assert flags(plain) == (False, False)
            assert not look
            continue
        looks += 1
        assert reader.watch.state_dict() == pytest.approx(plain.state_dict(), rel=0, abs=0, nan_ok=True)
        if any(flags(plain)):
            for watch in (reader, plain):
                watch.go_back(0.1 if drops else None)
    assert looks >= len(losses) // BLOCK


def test_on_the_host_a_run_that_goes_well_is_read_ten_losses_at_a_time():
    reader, history = Reader(Ranks()), LossHistory()
    read = []
    for step in range(1, 201):
        loss = 2 * math.exp(-step / 50) + 0.01 * math.sin(7 * step)
        history.append(loss)
        if reader.read(step, loss, history, flag=False) is not None:
            read.append(step)
    assert len([step for step in read if step > 50]) == 15


def test_a_saved_reader_goes_on_in_the_middle_of_a_block():
    reader, history = Reader(Ranks()), LossHistory()
    losses = [2 - 0.01 * k for k in range(40)]
    for step, loss in enumerate(losses[:33], 1):
        history.append(loss)
        reader.read(step, loss, history, flag=False)
    again = Reader(Ranks())
    again.load_state_dict(copy.deepcopy(reader.state_dict()))
    kept = LossHistory.from_state_dict(history.state_dict())
    for step, loss in enumerate(losses[33:], 34):
        for which, into in ((reader, history), (again, kept)):
            into.append(loss)
            which.read(step, loss, into, flag=False)
    reader.read(40, losses[-1], history, flag=False, look=True)
    again.read(40, losses[-1], kept, flag=False, look=True)
    assert again.watch.state_dict() == reader.watch.state_dict()
    assert reader.watch.count == 40


class TwoRanks(Ranks):
    """Stands for two ranks with the same losses on this host: what is read is read late."""

    size = 2
    number = 0

    def sum(self, values):
        return 2 * values


def test_losses_of_several_ranks_are_followed_when_the_next_block_is_full():
    reader, history = Reader(TwoRanks()), LossHistory()
    followed = []
    for step in range(1, 36):
        history.append(float(step))
        reader.read(step, float(step), history, flag=step == 20, due=step == 23)
        followed.append(reader.watch.count)
    # Blocks end at 10 and 20, at 23 where one is due, and at 33.
    assert [followed[step - 1] for step in (19, 20, 22, 23, 32, 33)] == [0, 10, 10, 20, 20, 23]
    assert reader.flagged
    reader.catch_up()
    assert reader.watch.count == 33


def test_a_block_in_flight_is_saved_with_the_flags_of_the_ranks():
    reader, again, history = Reader(TwoRanks()), Reader(TwoRanks()), LossHistory()
    for step in range(1, 11):
        history.append(float(step))
        reader.read(step, float(step), history, flag=True)
    again.load_state_dict(reader.state_dict())
    assert not again.flagged
    again.catch_up()
    assert again.flagged
    assert (again.watch.count, again.watch.last) == (10, 10.0)


def test_a_copy_of_a_history_stages_in_memory_of_its_own():
    history = LossHistory()
    history.append(1.0)
    other = copy.deepcopy(history)
    other.append(2.0)
    history.append(3.0)
    assert (history.staged.tolist(), other.staged.tolist()) == ([1.0, 3.0], [1.0, 2.0])
    assert (history.last(1), other.last(2)) == ([3.0], [1.0, 2.0])
    assert torch.equal(history.staged, torch.tensor([1.0, 3.0], dtype=torch.float64))
