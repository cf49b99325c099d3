"""An average of the weights for any time: over the last share of the constant phase, however long that is."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from autowu import AutoWU
from autowu.anytime import AnytimeAverage


def averaged(values, share):
    """What an average says after a model of one weight has had these values in a constant phase."""
    model, scheduler = nn.Linear(1, 1, bias=False), Phase("stable")
    average = AnytimeAverage(model, share)
    for value in values:
        nn.init.constant_(model.weight, value)
        average.update(model, scheduler)
    return average.module.weight.item()


class Phase:
    events = ()
    in_ramp = False

    def __init__(self, phase):
        self.phase = phase


@pytest.mark.parametrize(
    ("steps", "share"),
    [
        *((400, share) for share in (0.05, 0.2, 0.5, 0.99)),
        *((4000, share) for share in (0.05, 0.99)),
        *(pytest.param(4000, share, marks=pytest.mark.slow) for share in (0.2, 0.5)),
    ],
)
def test_the_mean_age_is_half_of_the_share_at_any_length(steps, share):
    age = steps - averaged(range(1, steps + 1), share)
    assert age == pytest.approx(share / 2 * steps, rel=0.02, abs=1.5)


def test_it_begins_anew_with_a_warmup_and_rests_in_the_cooldown():
    model = nn.Linear(1, 1, bias=False)
    average = AnytimeAverage(model)
    for phase, value, expected in (("warmup", 1, 1), ("warmup", 5, 5), ("stable", 7, 7), ("cooldown", 9, 7), ("done", 9, 7)):
        nn.init.constant_(model.weight, value)
        average.update(model, Phase(phase))
        assert average.module.weight.item() == expected
    average.update(model, Phase("stable"))
    assert 7 < average.module.weight.item() < 9


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


def test_on_a_real_run_it_is_better_than_the_trunk_goes_on_from_a_file_and_has_statistics_of_its_own():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :1] * x[:, 1:2] + x[:, 2:3].square() + 0.5 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    batches = [x[first : first + 100] for first in range(0, 1600, 100)]

    def train(model, optimizer, scheduler, average, until):
        while scheduler.last_epoch < until:
            picked = torch.randint(1600, (16,), generator=torch.Generator().manual_seed(scheduler.last_epoch))
            loss = (model(x[picked]) - y[picked]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            average.update(model, scheduler)

    def tested(model):
        model = copy.deepcopy(model)
        update_bn(batches, model)
        model.eval()
        with torch.no_grad():
            return (model(x[1600:]) - y[1600:]).square().mean().item()

    def built():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, AutoWU(optimizer, model=model, max_warmup_steps=150), AnytimeAverage(model)

    run = built()
    train(*run, 400)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    again = built()
    for part, state in zip(again, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
        part.load_state_dict(state)
    for parts in (run, again):
        train(*parts, 800)
    assert all(torch.equal(value, again[3].state_dict()[name]) for name, value in run[3].state_dict().items())
    model, average = run[0], run[3]
    assert tested(average) < 0.97 * tested(model)
    before = average.module[1].running_mean.clone()
    update_bn(batches, average)
    with torch.no_grad():
        assert torch.allclose(average.module[1].running_mean, average.module[0](x[:1600]).mean(0), atol=1e-4)
    assert not torch.equal(before, average.module[1].running_mean)


@pytest.mark.parametrize(
    ("share", "error"), [(0, ValueError), (1, ValueError), (1.5, ValueError), ("0.2", TypeError), (True, TypeError)]
)
def test_a_share_that_is_none_is_refused(share, error):
    with pytest.raises(error, match=f"share={share!r}: must be"):
        AnytimeAverage(nn.Linear(1, 1), share)
