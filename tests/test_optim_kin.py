"""What an optimizer is by the names of its classes, and what LARS says of those to which a scale of the gradient means nothing."""

import copy
import logging

import pytest
import timm.optim
import torch
from torch import nn

from autowu.kin import FAMILIES, family_of, scale_free
from autowu.optim import LAMB, LANS, LARS, TVLARS, Muon


class AdamW_of_my_own(torch.optim.AdamW):
    """Known by what it derives from."""


class Lion(torch.optim.SGD):
    """Known by its name before it is known by what it derives from."""


def weights():
    return [nn.Parameter(torch.ones(2, 2))]


def test_ours_that_scale_updates_are_of_the_family_of_lamb_and_other_muons_of_none():
    assert {family_of(kind) for kind in (LAMB, LANS, Muon)} == {"lamb"}
    assert {family_of(kind) for kind in (LARS, TVLARS)} == {"lars"}
    assert family_of(timm.optim.Muon) is None
    assert not hasattr(torch.optim, "Muon") or family_of(torch.optim.Muon) is None
    assert (family_of(AdamW_of_my_own), family_of(Lion), family_of(torch.optim.SGD)) == ("adam", "adam", "sgd")


def test_no_name_is_of_two_families():
    names = [name for several in FAMILIES.values() for name in several]
    assert len(names) == len(set(names))
    assert all(name == name.lower().replace("_", "") for name in names)


@pytest.mark.parametrize(
    ("make", "instead"),
    [
        (torch.optim.AdamW, "LAMB"),
        (torch.optim.NAdam, "LAMB"),
        (torch.optim.RMSprop, "LAMB"),
        (torch.optim.Adadelta, "LAMB"),
        (torch.optim.Rprop, "LAMB"),
        (torch.optim.Adagrad, "LAMB"),
        (timm.optim.AdafactorBigVision, "LAMB"),
        (timm.optim.Lion, "LAMB"),
        (timm.optim.Adafactor, "LAMB"),
        (timm.optim.Lamb, "LAMB"),
        (timm.optim.Muon, "Muon"),
        (Muon, "Muon"),
        (AdamW_of_my_own, "LAMB"),
    ],
)
def test_lars_says_once_what_to_take_instead(make, instead, caplog):
    optimizer = make(weights(), lr=0.1)
    with caplog.at_level(logging.WARNING, logger="autowu"):
        lars = LARS(optimizer)
        for parameter in lars.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        lars.step()
        again = copy.deepcopy(lars)
        for parameter in again.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)  # some step without gradients, some raise
        again.step()
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "autowu")
    assert record.getMessage() == (
        f"LARS around {make.__name__}: a scale of the gradient means nothing to it, so trust ratios do next to nothing; "
        f"autowu.optim.{instead} scales the update instead"
    )
    assert scale_free(make) == instead


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: another optimizer under the name `optimizer`."""

    def __init__(self, optimizer):
        self.optimizer, self.defaults, self.state = optimizer, optimizer.defaults, optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups


@pytest.mark.parametrize("wrap", [timm.optim.Lookahead, Wrapper, lambda inside: Wrapper(timm.optim.Lookahead(inside))])
def test_lars_looks_through_wrappers(wrap, caplog):
    LARS(wrap(torch.optim.SGD(weights(), lr=0.1)))
    assert caplog.records == []
    LARS(wrap(torch.optim.AdamW(weights(), lr=0.1)))
    (record,) = caplog.records
    assert record.getMessage().startswith("LARS around AdamW: ")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.ASGD, timm.optim.SGDP])
def test_lars_around_what_minds_a_scale_says_nothing(make, caplog):
    with caplog.at_level(logging.INFO, logger="autowu"):
        LARS(make(weights(), lr=0.1))
        TVLARS(weights(), 0.1)
    assert caplog.records == []


def test_adahessian_which_wants_a_graph_to_step_is_known_too(caplog):
    LARS(timm.optim.Adahessian(weights(), lr=0.1))
    assert [record.getMessage()[:22] for record in caplog.records] == ["LARS around Adahessian"]


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.Adagrad])
def test_a_scale_of_the_gradient_means_nothing_to_them(make):
    steps = []
    for scale in (1.0, 1000.0):
        weight = nn.Parameter(torch.ones(3))
        optimizer = make([weight], lr=0.01)
        for step in range(4):
            weight.grad = scale * torch.randn(3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        steps.append(weight.detach())
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
