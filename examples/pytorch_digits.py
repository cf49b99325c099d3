"""A plain PyTorch loop with mixed precision, gradient accumulation and torch.compile, on scikit-learn's digits.

python examples/pytorch_digits.py [--epochs 20] [--accumulate 2] [--backend inductor]
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
    parser.add_argument("--batch-size", type=int, default=64, help="images in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in an optimizer step")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; 'inductor' needs a C++ compiler")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    digits = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 16
    targets = torch.tensor(digits.target, device=device)
    train, test = slice(0, 1400), slice(1400, None)

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    ).to(device)  # fmt: skip
    forward = torch.compile(model, backend=args.backend)
    # A tensor LR: the compiled step reads it, and is not compiled anew when AutoWU writes it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device=device), weight_decay=0.01)
    steps_per_epoch = 1400 // (args.batch_size * args.accumulate)
    scheduler = AutoWU(optimizer, steps_per_epoch, args.epochs, model=model)
    # After AutoWU is made, as with every scheduler of torch: it notes in optimizer.step that the optimizer was called.
    optimizer_step = torch.compile(optimizer.step, backend=args.backend)

    # float16 on a GPU needs its gradients scaled; bfloat16 on a CPU does not.
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    for _ in range(args.epochs):
        micro_batches = torch.randperm(1400, device=device).split(args.batch_size)
        for step in range(steps_per_epoch):
            optimizer.zero_grad()
            for index in micro_batches[step * args.accumulate : (step + 1) * args.accumulate]:
                with torch.autocast(device, dtype):
                    loss = nn.functional.cross_entropy(forward(inputs[train][index]), targets[train][index])
                scaler.scale(loss / args.accumulate).backward()
                scheduler.observe(loss)
            if scaler.is_enabled():
                scaler.step(optimizer)  # may skip the optimizer, and AutoWU then does not count the step
                scaler.update()
            else:
                optimizer_step()
            scheduler.step()

    with torch.no_grad():
        accuracy = (model.eval()(inputs[test]).argmax(1) == targets[test]).float().mean().item()
    print(f"peak LR {scheduler.switch.lr:.4g} from step {scheduler.switch.step} of {scheduler.last_epoch}")
    print(f"test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
