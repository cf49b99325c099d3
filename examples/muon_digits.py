"""Muon for the matrices, AdamW for the rest, one schedule for both: a plain PyTorch loop on scikit-learn's digits.

python examples/muon_digits.py [--epochs 20]
"""

import argparse
import logging

import torch
from sklearn.datasets import load_digits
from torch import nn

from autowu import AutoWU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)

    digits = load_digits()
    inputs, targets = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = slice(0, 1400), slice(1400, None)
    layers = (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    model = nn.Sequential(*layers)

    # Muon's authors leave the output layer to AdamW, as biases and norms.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("6.")]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)
    adamw = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01)
    steps_per_epoch = 1400 // args.batch_size
    scheduler = AutoWU([muon, adamw], steps_per_epoch, args.epochs, model=model)

    for _ in range(args.epochs):
        for index in torch.randperm(1400).split(args.batch_size)[:steps_per_epoch]:
            loss = nn.functional.cross_entropy(model(inputs[train][index]), targets[train][index])
            muon.zero_grad()
            adamw.zero_grad()
            loss.backward()
            muon.step()
            adamw.step()
            scheduler.step(loss)

    with torch.no_grad():
        accuracy = (model.eval()(inputs[test]).argmax(1) == targets[test]).float().mean().item()
    of_muon, of_adamw = scheduler.switch.lrs
    print(f"peak LRs {of_muon:.4g} and {of_adamw:.4g} from step {scheduler.switch.step} of {scheduler.last_epoch}")
    print(f"test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
