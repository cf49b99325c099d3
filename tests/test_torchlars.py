"""The page for users of torchlars: its blocks run, and what it says of the steps holds."""

import copy
import re

import pytest
import torch
from processes import ROOT
from sklearn.datasets import load_digits

from autowu.optim import LARS

PAGE = (ROOT / "docs" / "torchlars.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def digits():
    data = load_digits()
    return torch.tensor(data.data[:256] / 16, dtype=torch.float32), torch.tensor(data.target[:256])


def mlp():
    torch.manual_seed(0)
    # No batch norm: the gradient of a bias before it is nothing but rounding.
    layers = (torch.nn.Linear(64, 32), torch.nn.LayerNorm(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    return torch.nn.Sequential(*layers)


def backward(model):
    images, labels = digits()
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss.item()


def test_the_blocks_of_the_page_run():
    names = {}
    assert len(BLOCKS) == 3
    exec(BLOCKS[0], names)
    assert names["optimizer"].optim is names["base"]
    assert names["base"].state
    exec(BLOCKS[1], names)
    assert [group["adapt"] for group in names["optimizer"].param_groups] == [True, False]
    exec(BLOCKS[2], names)
    assert [group["adapt"] for group in names["optimizer"].param_groups] == [True]


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_the_steps_are_those_of_torchlars(decay):
    ours, reference = mlp(), mlp()
    optimizer = LARS(
        optimizer=torch.optim.SGD(ours.parameters(), lr=3.0, momentum=0.9, weight_decay=decay), eps=1e-6, trust_coef=0.02
    )
    # What torchlars does, written out: the ratio where both norms are above 0, decay before scaling and none in SGD.
    sgd = torch.optim.SGD(reference.parameters(), lr=3.0, momentum=0.9)
    losses = []
    for _ in range(8):
        losses.append(backward(ours))
        optimizer.step()
        backward(reference)
        with torch.no_grad():
            for p in reference.parameters():
                weight_norm, grad_norm = p.norm(), p.grad.norm()
                ratio = 0.02 * weight_norm / (grad_norm + decay * weight_norm + 1e-6) if weight_norm * grad_norm > 0 else 1.0
                p.grad.add_(p, alpha=decay).mul_(ratio)
        sgd.step()
    for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert losses[-1] < 0.8 * losses[0]


def test_everything_of_torchlars_that_the_page_names_is_there():
    base = torch.optim.SGD(mlp().parameters(), lr=1.0)
    optimizer = LARS(base, 1e-7, 0.002)
    assert (optimizer.optim, optimizer.eps, optimizer.trust_coef) == (base, 1e-7, 0.002)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state_dict() == base.state_dict()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert [group["trust_coef"] for group in base.param_groups] == [0.002, 0.002]
    for name in ("adaptive_lr", "apply_adaptive_lrs", "hide_weight_decays"):
        assert not hasattr(optimizer, name)
        assert f"`{name}`" in PAGE


def test_a_state_that_torchlars_saved_goes_on_here():
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9, weight_decay=1e-3)
    whole = LARS(base, trust_coef=0.02)
    for _ in range(3):
        backward(model)
        whole.step()
    saved = copy.deepcopy(base.state_dict())
    for group in saved["param_groups"]:  # torchlars saves the state of the wrapped optimizer, which knows neither
        del group["trust_coef"], group["adapt"]
    resumed_model = copy.deepcopy(model)
    resumed = LARS(torch.optim.SGD(resumed_model.parameters(), lr=1.0, momentum=0.9), trust_coef=0.02)
    resumed.load_state_dict(saved)
    for one, optimizer in ((model, whole), (resumed_model, resumed)):
        backward(one)
        optimizer.step()
    for mine, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_closure_is_called_before_the_gradients_are_scaled():
    with_closure, without = mlp(), mlp()
    optimizers = [LARS(torch.optim.SGD(m.parameters(), lr=1.0)) for m in (with_closure, without)]
    optimizers[0].step(lambda: backward(with_closure))
    backward(without)
    optimizers[1].step()
    for mine, other in zip(with_closure.parameters(), without.parameters(), strict=True):
        assert torch.equal(mine, other)
