"""The figures of docs/troubleshooting.md: small real runs that show a symptom each, and what there is to say of them.

OMP_NUM_THREADS=1 python docs/symptoms.py [NAME ...] [--out assets/symptoms]; the words go to benchmarks/results/symptoms.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # how sums are split over threads is enough to move a test's verdict

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from autowu import AutoWU
from autowu.report import Report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "symptoms.json"
STEPS = 600

Runs = dict[str, AutoWU]
Told = Callable[[int, Tensor], Tensor | None]
"""What a scheduler is told, given the step and its loss."""


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(
    *schedulers: AutoWU, model: nn.Module, steps: int = STEPS, told: Told = lambda step, loss: loss, scale: float = 1.0
) -> AutoWU:
    """Train on the digits, their pixels times `scale`; the first of the schedulers, all of which are told of the loss."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16 * scale, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    for step in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        for scheduler in schedulers:
            scheduler.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for scheduler in schedulers:
            scheduler.optimizer.step()
            scheduler.step(told(step, loss))
    return schedulers[0]


def digits_run(steps: int = STEPS, told: Told = lambda step, loss: loss, scale: float = 1.0, **arguments: Any) -> AutoWU:
    """A run from the same weights, on the same batches as any other."""
    torch.manual_seed(0)
    model = perceptron()
    scheduler = AutoWU(sgd(model.parameters()), total_steps=steps, model=model, **arguments)
    return train(scheduler, model=model, steps=steps, told=told, scale=scale)


def never() -> Runs:
    """A range whose upper end is too low for the loss to rise."""
    return {"max_lr=0.01": digits_run(max_lr=0.01)}


def at_once() -> Runs:
    """A regression whose inputs were not scaled: the lowest LR, which was given, is too high already."""
    return {"pixels of 0 to 255": regression(255.0), "pixels of 0 to 1": regression(1.0)}


def regression(scale: float) -> AutoWU:
    """A linear model of the lower half of each digit, given the upper."""
    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    inputs, targets = scale * pixels[:, :32], pixels[:, 32:]
    model = nn.Linear(32, 32)
    scheduler = AutoWU(sgd(model.parameters()), total_steps=STEPS, model=model, min_lr=1e-4)
    for _ in range(STEPS):
        batch = torch.randint(len(inputs), (64,))
        advance(scheduler, functional.mse_loss(model(inputs[batch]), targets[batch]))
    return scheduler


def jump() -> Runs:
    """An ordinary switch, with the copy put back and without."""
    return {"the default": digits_run(), "rollback=False": digits_run(rollback=False)}


def too_low() -> Runs:
    """Weights that are trained already: the loss can fall by little, and rises early."""
    return {"trained weights": trained_run(), "peak_factor=1": trained_run(peak_factor=1.0)}


def trained_run(**arguments: Any) -> AutoWU:
    """Train on from weights that were trained for 400 steps."""
    torch.manual_seed(0)
    model = perceptron()
    known = AutoWU(sgd(model.parameters()), total_steps=400, max_lr=0.05, peak_factor=1.0, model=model)
    train(known, model=model, steps=400)
    return train(AutoWU(sgd(model.parameters()), total_steps=STEPS, model=model, **arguments), model=model)


def every_n() -> Runs:
    """A loss that comes every 10 steps: None in between, or the last one again."""
    last: list[Tensor] = []

    def again(step: int, loss: Tensor) -> Tensor:
        last[:] = [loss.detach()] if step % 10 == 0 else last
        return last[0]

    return {
        "None in between": digits_run(told=lambda step, loss: loss if step % 10 == 0 else None),
        "repeated": digits_run(told=again),
    }


def two_optimizers() -> Runs:
    """One loss and two optimizers: each has a search of its own, and the loss cannot tell whose LR it rises by."""
    model = perceptron()
    body, head = model[:4], model[4:]
    first = AutoWU(torch.optim.AdamW(body.parameters()), total_steps=STEPS)
    second = AutoWU(sgd(head.parameters()), total_steps=STEPS)
    train(first, second, model=model)
    return {"body, AdamW": first, "head, SGD": second}


def advance(scheduler: AutoWU, loss: Tensor, told: Tensor | None = None) -> None:
    scheduler.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    scheduler.optimizer.step()
    scheduler.step(loss if told is None else told)


def gan() -> Runs:
    """A GAN on points of a ring: the loss of each network depends on the other."""
    generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    schedulers = [AutoWU(torch.optim.Adam(net.parameters(), betas=(0.5, 0.999)), total_steps=STEPS) for net in (generator, critic)]
    for _ in range(STEPS):
        angle = 2 * torch.pi * torch.rand(128)
        real, fake = torch.stack((angle.cos(), angle.sin()), 1), generator(torch.randn(128, 4)).detach()
        advance(schedulers[1], functional.softplus(-critic(real)).mean() + functional.softplus(critic(fake)).mean())
        advance(schedulers[0], functional.softplus(-critic(generator(torch.randn(128, 4)))).mean())
    return {"generator": schedulers[0], "discriminator": schedulers[1]}


def reinforcement() -> Runs:
    """REINFORCE on a contextual bandit: told its surrogate loss, and told the mean reward with its sign turned."""
    return {"the surrogate": bandit(told_reward=False), "minus the reward": bandit(told_reward=True)}


def bandit(told_reward: bool) -> AutoWU:
    """Ten arms, of which the one whose digit is seen pays 1."""
    torch.manual_seed(0)
    model = perceptron()
    scheduler = AutoWU(sgd(model.parameters()), total_steps=STEPS, model=model)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (64,))
        policy = torch.distributions.Categorical(logits=model(images[batch]))
        arm = policy.sample()  # type: ignore[no-untyped-call]
        reward = (arm == labels[batch]).float()
        loss = -((reward - reward.mean()) * policy.log_prob(arm)).mean()  # type: ignore[no-untyped-call]
        advance(scheduler, loss, told=-reward.mean() if told_reward else None)
    return scheduler


SYMPTOMS: dict[str, Callable[[], Runs]] = {
    function.__name__: function for function in (never, at_once, jump, too_low, every_n, two_optimizers, gan, reinforcement)
}


def run(name: str) -> Runs:
    torch.manual_seed(0)
    return SYMPTOMS[name]()


def draw(runs: Runs) -> Figure:
    """The figures of the runs side by side."""
    figure = Figure(figsize=(4.6 * len(runs) + 1.2 * (len(runs) == 1), 5.4), layout="constrained")
    for (name, scheduler), part in zip(runs.items(), figure.subfigures(1, len(runs), squeeze=False)[0], strict=True):
        scheduler.plot(part.subplots(3, 1, sharex=True, height_ratios=(3, 1.5, 2)))
        part.suptitle(name, fontsize=10)
    return figure


def words(runs: Runs) -> dict[str, str]:
    """Cells of a table: the switch, its LR, the mean loss of the last 50 steps, events other than the switch."""
    found = {}
    for name, scheduler in runs.items():
        switch, kinds = scheduler.switch, sorted({event.kind for event in scheduler.events} - {"switch"})
        assert switch is not None
        report = Report.of(scheduler.state_dict())
        end = report.losses[report.loss_steps >= report.step - 50].mean()
        where = f"step {switch.step}{'' if switch.by_test else ', not by test'} | {switch.lr:.2g} | {end:.2g}"
        found[name] = f"{where} | {', '.join(f'`{kind}`' for kind in kinds)}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SYMPTOMS), metavar="NAME", help=", ".join(SYMPTOMS))
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "symptoms")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    said = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.names:
        runs = run(name)
        draw(runs).savefig(args.out / f"{name}.png", dpi=90)
        said[name] = words(runs)
        RESULTS.write_text(json.dumps(said, indent=1) + "\n")
        print(name, said[name])


if __name__ == "__main__":
    main()
