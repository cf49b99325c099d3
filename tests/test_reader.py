"""Losses on their way to the watch: read in blocks, and on the host as if each had been followed at its step."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autowu import AutoWU
from autowu.history import MISSING, LossHistory
from autowu.ranks import Ranks
from autowu.reader import Reader
from autowu.watch import BLOCK, LossWatch


@st.composite
def losses_of_a_run(draw):
    """Losses that fall by a share of the noise or by far more, with holes, and that may come apart from some step on."""
    steps = np.arange(draw(st.integers(20, 150)))
    noise = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])) * np.random.default_rng(draw(st.integers(0, 99))).normal(size=len(steps))
    losses = draw(st.floats(0.0, 3.0)) * np.exp(-steps / draw(st.integers(2, 80))) + noise
    at, slope = draw(st.integers(5, 150)), draw(st.sampled_from([0.0, 0.01, 0.3, 5.0]))
    losses = losses + slope * np.maximum(0, steps - at)
    for step, value in draw(
        st.dictionaries(st.integers(0, 149), st.sampled_from([math.nan, math.inf, MISSING, 1e155, -1e155, -20.0]), max_size=12)
    ).items():
        losses[step % len(losses)] = value
    return losses.tolist()


def flags(watch):
    return watch.exploded, watch.diverged


def assert_same(watch, other):
    ours, others = watch.state_dict(), other.state_dict()
    assert ours == others or ours == pytest.approx(others, rel=0, abs=0, nan_ok=True)  # the first is faster, and NaN is not itself


@given(losses_of_a_run(), st.sampled_from([3, 7, 10]), st.sampled_from([None, 0.1]), st.integers(1, 150))
# Put back to a loss above the start, from where it rises: far above the start before it is far from its best.
@example([0.0] * 6 + [k / 100 for k in range(1, 15)], 3, 0.1, 10)
@settings(max_examples=300, deadline=None)
def test_on_the_host_the_watch_says_what_it_would_at_every_step(losses, every, level, begins):
    """Where it has an explosion or a divergence to tell it tells it at the very step; what it knows is the same to the bit."""
    reader, plain = Reader(Ranks()), LossWatch()
    for step, loss in enumerate(losses, 1):
        look = step % every == 0
        since = reader.follow(step, loss, look=look)
        plain.push(loss)
        if since is None:
            assert (plain.high, plain.above, plain.silent) == (0, 0, 0)
            assert flags(plain) == (False, False)
            assert not look
            continue
        assert since == step - 1
        assert_same(reader.watch, plain)
        if any(flags(plain)):
            reader.go_back(level)
            plain.go_back(level, trial=True)
        elif step >= begins:
            reader.begin(step, level)
            plain.go_back(level, settling=0)
            begins = math.inf


def test_losses_that_wait_move_the_bound_for_those_after_them():
    """The mean falls with them, and what was near the best before is not any longer."""
    reader, plain = Reader(Ranks()), LossWatch()
    losses = [2.0] * 10 + [1.0] * 100 + [0.0] * 6 + [1.25]
    waits = []
    for step, loss in enumerate(losses, 1):
        plain.push(loss)
        waits.append(reader.follow(step, loss) is None)
    assert plain.high == reader.watch.high == 1
    assert waits[-7:] == [True] * 6 + [False]


def test_on_the_host_a_run_that_goes_well_is_read_ten_losses_at_a_time():
    reader = Reader(Ranks())
    losses = [2 * math.exp(-step / 50) + 0.01 * math.sin(7 * step) for step in range(1, 201)]
    read = [step for step, loss in enumerate(losses, 1) if reader.follow(step, loss) is not None]
    assert len([step for step in read if step > 50]) == 15


def test_a_saved_reader_goes_on_in_the_middle_of_a_block():
    reader, again = Reader(Ranks()), Reader(Ranks())
    losses = [2 - 0.01 * k for k in range(40)]
    for step, loss in enumerate(losses[:33], 1):
        reader.follow(step, loss)
    assert reader.watch.count < 33
    again.load_state_dict(copy.deepcopy(reader.state_dict()))
    for which in (reader, again):
        for step, loss in enumerate(losses[33:], 34):
            which.follow(step, loss)
        which.catch_up()
    assert_same(again.watch, reader.watch)
    assert reader.watch.count == 40


def test_a_loss_of_no_step_comes_after_those_that_wait():
    reader, plain = Reader(Ranks()), LossWatch()
    for step in range(1, 34):
        reader.follow(step, 2 - 0.01 * step)
        plain.push(2 - 0.01 * step)
    for loss in (math.nan, 1.7):
        reader.follow_skipped(loss)
        plain.push(loss)
        assert_same(reader.watch, plain)


class TwoRanks(Ranks):
    """Stands for two ranks with the same losses on this host: what is read is read late."""

    alone = False
    size = 2
    number = 0

    def sum(self, values):
        return 2 * values


def test_losses_of_several_ranks_are_followed_when_the_next_block_is_full():
    reader, history = Reader(TwoRanks()), LossHistory()
    followed = []
    for step in range(1, 36):
        history.append(float(step))
        assert not reader.follows_at_once(float(step), history)
        reader.read_block(step, history, flag=step == 20, due=step == 23)
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
        reader.read_block(step, history, flag=True)
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
    assert torch.equal(history.staged, torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_a_group_that_starts_in_the_middle_of_a_block_finds_all_ranks_alike():
    """What waited is followed at once, and the next block begins with the step that is not alone, whatever waited where."""
    blocks = []
    for waits in (0, 4):
        reader, history = Reader(Ranks()), LossHistory()
        for step in range(1, 38):
            history.append(1.0)
            reader.follow(step, 1.0, look=step == 37 - waits)
        reader._ranks = TwoRanks()
        for step in range(38, 60):
            history.append(1.0)
            if reader.read_block(step, history, flag=False) is not None:
                blocks.append(step)
        assert reader.watch.count == 47
    assert blocks == [47, 57] * 2


@pytest.mark.parametrize("times", [3, 10, 25])
def test_losses_that_are_passed_again_are_one_in_blocks_and_of_several_ranks_too(times):
    values = [loss for k in range(40) for loss in [9.0 if k in (20, 30) else 2 - 0.02 * k] * times]
    at_once, in_blocks, plain, history = Reader(Ranks()), Reader(TwoRanks()), LossWatch(), LossHistory()
    for step, loss in enumerate(values, 1):
        at_once.follow(step, loss)
        history.append(loss)
        in_blocks.read_block(step, history, flag=False)
        plain.push(loss)
        assert not any(flag for watch in (at_once.watch, in_blocks.watch, plain) for flag in flags(watch))
    at_once.catch_up()
    in_blocks.catch_up()
    assert_same(at_once.watch, plain)
    assert in_blocks.watch.count == plain.count == 39 + times


@pytest.mark.parametrize("again", [lambda reader: reader, copy.deepcopy])
@pytest.mark.parametrize("flag", [False, True])
def test_a_block_of_one_rank_brings_all_its_losses_and_its_flag(flag, again):
    reader, losses = Reader(Ranks()), LossHistory()
    for step in range(1, 11):
        losses.append(float(step))
    assert reader.read_block(10, losses, flag=flag) == 0
    reader = again(reader)
    assert not reader.flagged
    reader.catch_up()
    assert (reader.watch.count, reader.watch.last, reader.flagged) == (10, 10.0, flag)


def test_losses_that_are_read_in_blocks_are_folded_before_their_room_is_full(monkeypatch):
    monkeypatch.setattr(Reader, "follows_at_once", lambda *_: False)
    scheduler = AutoWU(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), total_steps=1900, rollback=False)
    staged = [0]
    for loss in np.geomspace(2, 0.1, 1899):
        scheduler.optimizer.step()
        scheduler.step(float(loss))
        if scheduler.switch is not None and scheduler._state.watched:  # else nothing reads them
            staged.append(len(scheduler._stage._losses.staged))
    assert 500 < max(staged) < 512 + 2 * BLOCK
