"""The GPU's kernels: interpreted on the CPU, compiled for GPUs that are not there, and run where there is one."""

import pytest
import torch
from processes import launch

pytest.importorskip("triton")
FILES = ("tests/device_runs.py", "tests/test_optim_engines.py")


def test_interpreted():
    launch("-m", "pytest", "-n0", "-q", *FILES, "-k", "device_runs or gpu", TRITON_INTERPRET="1")


def test_compiled_for_gpus_that_are_not_there():
    launch("tests/device_kernels.py")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    launch("-m", "pytest", "-n0", "-q", *FILES)
