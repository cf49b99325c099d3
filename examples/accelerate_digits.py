"""AutoWU with Hugging Face Accelerate, on scikit-learn's digits.

python examples/accelerate_digits.py [--epochs 20] [--accumulate 2]
torchrun --nproc-per-node 2 examples/accelerate_digits.py [--epochs 20] [--accumulate 2]
"""

import argparse
import logging
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a micro-batch of one process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in an optimizer step")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Without cpu=True Accelerate does not join processes that have no GPU.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=args.accumulate)
    set_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), args.batch_size, shuffle=True)

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The prepared loader has this process' batches: its length is the number of micro-batches in an epoch.
    autowu = AutoWU(optimizer, math.ceil(len(loader) / args.accumulate), args.epochs, model=accelerator.unwrap_model(model))
    scheduler = accelerator.prepare(autowu)

    for _ in range(args.epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                autowu.observe(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    if accelerator.is_main_process:
        print(f"peak LR {autowu.switch.lr:.4g} from step {autowu.switch.step} of {autowu.last_epoch}")
        model = accelerator.unwrap_model(model).eval()
        with torch.no_grad():
            predicted = model(images[1400:].to(accelerator.device)).argmax(1).cpu()
        print(f"test accuracy {(predicted == labels[1400:]).float().mean().item():.2%}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
