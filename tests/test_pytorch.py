"""The example and the page on plain PyTorch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_the_example_learns():
    command = [sys.executable, "examples/pytorch_digits.py", "--backend", "aot_eager"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "before `optimizer.step()`" not in done.stderr
    assert "AutoWU switched at step" in done.stderr
    assert float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1]) > 90


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pytorch.md").read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(block, names)
    assert names["longer"].last_epoch == 20
    torch._dynamo.reset()
