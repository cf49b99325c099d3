"""Muon for the matrices, AdamW for the rest, one schedule for both: in Lightning's Trainer, on scikit-learn's digits.

python examples/muon_lightning.py [--epochs 20]
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
        self.body = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, inputs):
        return self.head(self.body(inputs))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self(inputs), labels)
        self.autowu.observe(loss)
        return loss

    def configure_optimizers(self):
        matrices = [p for p in self.body.parameters() if p.ndim == 2]
        rest = [*(p for p in self.body.parameters() if p.ndim < 2), *self.head.parameters()]
        muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)
        adamw = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01)
        self.autowu = AutoWU([muon, adamw], total_steps=self.trainer.estimated_stepping_batches, model=self)
        # Lightning steps one optimizer by itself: this one is both.
        return {"optimizer": self.autowu.optimizer, "lr_scheduler": {"scheduler": self.autowu, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    L.seed_everything(0)

    digits = load_digits()
    inputs, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(inputs[:1400], labels[:1400]), 64, shuffle=True, drop_last=True)
    module = Digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", max_epochs=args.epochs, **quiet).fit(module, loader)

    of_muon, of_adamw = module.autowu.switch.lrs
    print(f"peak LRs {of_muon:.4g} and {of_adamw:.4g} from step {module.autowu.switch.step} of {module.autowu.last_epoch}")
    with torch.no_grad():
        accuracy = (module.eval()(inputs[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    print(f"test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
