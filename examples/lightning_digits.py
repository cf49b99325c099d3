"""AutoWU in Lightning's Trainer, on scikit-learn's digits.

python examples/lightning_digits.py [--epochs 20] [--accumulate 2] [--devices 2]
"""

import argparse
import logging

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 16, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.autowu.observe(loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        # Kept on the module: some callbacks of Lightning replace the Trainer's schedulers.
        self.autowu = AutoWU(optimizer, total_steps=self.trainer.estimated_stepping_batches, model=self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.autowu, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a micro-batch of one process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in an optimizer step")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--accelerator", default="cpu", help="'gpu' where there are as many as processes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    L.seed_everything(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), args.batch_size, shuffle=True, drop_last=True)

    module = Digits()
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)

    if trainer.is_global_zero:
        scheduler = module.autowu
        print(f"peak LR {scheduler.switch.lr:.4g} from step {scheduler.switch.step} of {scheduler.last_epoch}")
        model = module.model.eval()
        with torch.no_grad():
            accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
        print(f"test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
