"""The mean of the losses observed since the last step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autowu.history import MISSING
from autowu.micro_batches import MicroBatches


@given(st.lists(st.floats(-1e6, 1e6), max_size=6), st.none() | st.floats(-1e6, 1e6))
def test_the_loss_of_a_step_is_the_mean_of_all_that_came(observed, loss):
    batches = MicroBatches()
    for value in observed:
        batches.observe(value)
    everything = observed if loss is None else [*observed, loss]
    expected = np.mean(everything) if everything else MISSING
    assert batches.loss_of_step(loss) == pytest.approx(expected, abs=1e-6)
    assert batches.loss_of_step(None) == MISSING  # the next step begins anew


def test_tensors_count_as_their_values_and_keep_no_graph():
    batches = MicroBatches()
    weight = torch.ones((), requires_grad=True)
    batches.observe((2 * weight).reshape(1))
    assert batches.loss_of_step(4 * weight) == 3.0
    assert type(batches.loss_of_step(weight.half())) is float


def test_a_loss_elsewhere_stays_where_it_is():
    loss = torch.ones((), device="meta")
    batches = MicroBatches()
    assert batches.loss_of_step(loss) is loss
    batches.observe(1.0)
    batches.observe(loss)
    mean = batches.loss_of_step(None)
    assert (mean.device.type, mean.dtype, mean.shape) == ("meta", torch.float64, ())


def test_a_wrong_loss_leaves_what_was_observed():
    batches = MicroBatches()
    batches.observe(1.0)
    with pytest.raises(ValueError, match="shape"):
        batches.loss_of_step(torch.ones(2))
    assert batches.loss_of_step(None) == 1.0


def test_a_state_brings_back_what_was_observed():
    batches, other = MicroBatches(), MicroBatches()
    batches.observe(1.0)
    batches.observe(4.0)
    other.load_state_dict(batches.state_dict())
    assert other.loss_of_step(1.0) == 2.0
