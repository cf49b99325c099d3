"""The GPU's kernels: interpreted on the CPU, compiled for GPUs that are not there, and run where there is one."""

import pytest
import torch
from processes import launch

pytest.importorskip("triton")
RUNS = "tests/device_runs.py"
FILES = (RUNS, "tests/test_optim_engines.py")
# Of the rules' runs those with options that device_runs.py has not, or with most of a kernel.
INTERPRETED = (
    "device_runs or (gpu and float32 and (max_norm or nesterov or dampening or bias_correction or max_trust_ratio or adamw))"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU, on which they run")
def test_interpreted():
    launch("-m", "pytest", "-n0", "-q", RUNS, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_interpreted_with_every_option_and_dtype():
    launch("-m", "pytest", "-n0", "-q", "--slow", *FILES, "-k", INTERPRETED, TRITON_INTERPRET="1")


def test_compiled_for_gpus_that_are_not_there():
    launch("tests/device_kernels.py")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    launch("-m", "pytest", "-n0", "-q", "--slow", *FILES)
