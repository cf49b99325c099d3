"""The example and the page on plain PyTorch."""

import re

import pytest
import torch
from processes import ROOT, launch


def test_the_example_learns():
    done = launch("examples/pytorch_digits.py", "--backend", "aot_eager", "--epochs", 5)
    assert "before `optimizer.step()`" not in done.stderr
    assert "AutoWU switched at step" in done.stderr
    assert float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1]) > 90


@pytest.mark.slow  # the example is quick
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pytorch.md").read_text(), re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(block, names)
    assert names["longer"].last_epoch == 20
    torch._dynamo.reset()
