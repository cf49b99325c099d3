"""A small timm model on scikit-learn's digits, in a loop that calls its scheduler as timm's training script does.

python examples/timm_digits.py [--epochs 15]
"""

import argparse
import logging

import torch
from sklearn.datasets import load_digits
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU
from autowu.integrations.timm import AutoWUScheduler


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images of 16 x 16 pixels and their labels, 1,500 to train with and 297 to test."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.tensor(data.target)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def train_one_epoch(epoch, model, loader, optimizer, loss_fn, lr_scheduler) -> float:
    losses_m = AverageMeter()
    num_updates = epoch * len(loader)
    model.train()
    for input, target in loader:
        loss = loss_fn(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses_m.update(loss.item(), input.size(0))
        num_updates += 1
        lr_scheduler.step_update(num_updates=num_updates, metric=losses_m.avg)
    return losses_m.avg


@torch.no_grad()
def accuracy(model, data) -> float:
    model.eval()
    images, labels = data.tensors
    return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("autowu").setLevel(logging.INFO)
    torch.manual_seed(0)
    train_data, test_data = digits()
    loader = DataLoader(train_data, 64, shuffle=True, drop_last=True)
    model = create_model("test_efficientnet", in_chans=1, num_classes=10)
    optimizer = create_optimizer_v2(model, opt="lamb", weight_decay=0.02)
    lr_scheduler = AutoWUScheduler(AutoWU(optimizer, len(loader), args.epochs, model=model))
    loss_fn = torch.nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        loss = train_one_epoch(epoch, model, loader, optimizer, loss_fn, lr_scheduler)
        eval_metric = accuracy(model, test_data)
        lr_scheduler.step(epoch + 1, eval_metric)
        print(f"epoch {epoch + 1:2}: loss {loss:.3f}, test accuracy {eval_metric:.1%}, LR {optimizer.param_groups[0]['lr']:.3g}")
    switch = lr_scheduler.scheduler.switch
    print(f"warm-up ended at update {switch.step}; peak LR {switch.lr:.3g}")


if __name__ == "__main__":
    main()
