"""A small language model on Python's own source, byte by byte, with the Transformers Trainer and no learning rate.

The Trainer prints the losses: python examples/transformers_text.py [--steps 200]
"""

import argparse
import logging
import os
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from autowu.integrations.transformers import AutoWUTrainer

LENGTH = 64


def source_blocks() -> list[dict[str, torch.Tensor]]:
    """The standard library's modules, cut into blocks of LENGTH bytes."""
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    logging.basicConfig(format="%(message)s")
    logging.getLogger("autowu").setLevel(logging.INFO)
    torch.manual_seed(0)
    sizes = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = AutoWUTrainer(model=model, args=args, train_dataset=source_blocks())
        trainer.train()
    switch = trainer.lr_scheduler.switch
    print(f"warm-up ended at step {switch.step}; peak LR {switch.lr:.3g}")


if __name__ == "__main__":
    main()
