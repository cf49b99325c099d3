"""The operators of compiled steps: registered by the first optimizer, once, whatever threads and interruptions do."""

import subprocess
import sys

import pytest
import torch

needs_operators = pytest.mark.skipif(torch.__version__ < (2, 6), reason="a torch whose compiler takes no such operators")

# Each part is a fork of a process that has imported the package and made no optimizer.
PROGRAM = """
import os, sys, threading
import torch
from autowu.optim import LAMB

print(hasattr(torch.ops.autowu, "lamb_"), hasattr(torch.ops.autowu, "lars_"), "torch._inductor" in sys.modules, flush=True)
if sys.argv[1:]: import torch._dynamo  # takes seconds, and longer in threads that take turns

def by_threads():
    sys.setswitchinterval(1e-6)
    gate, made, raised = threading.Barrier(8), [], []
    def make():
        gate.wait()
        try:
            made.append(LAMB([torch.nn.Parameter(torch.ones(2))]))
        except Exception as error:
            raised.append(error)
    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not raised, raised
    print(len(made), hasattr(torch.ops.autowu, "lamb_"), flush=True)

def cut_short():
    weight = torch.nn.Parameter(torch.ones(2))
    def cut(part, calls):
        whole = getattr(torch.library, part)
        def until(*args, **named):
            nonlocal calls
            whole(*args, **named)
            calls -= 1
            if not calls:
                raise KeyboardInterrupt
        setattr(torch.library, part, until)
        try:
            LAMB([weight])
        except KeyboardInterrupt:
            print("cut")
        setattr(torch.library, part, whole)

    for part in ("define", "impl", "register_fake"):
        cut(part, 1)
        cut(part, 2)
    optimizer = LAMB([weight], lr=torch.tensor(0.1))
    weight.grad = torch.ones(2)
    torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    print(float(weight[0]) < 1, flush=True)

for part in (by_threads, cut_short) if sys.argv[1:] else ():
    if os.fork() == 0:
        part()
        break
    assert os.wait()[1] == 0
"""


def lines(*parts):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *parts], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def said():
    """Lines: of the import, of threads, of registrations cut short."""
    return lines("all")


def test_an_import_registers_and_compiles_nothing():
    assert lines()[0] == "False False False"


@pytest.mark.slow  # a race that is made on purpose
@needs_operators
def test_threads_may_make_their_optimizers_at_once(said):
    assert said[1] == "8 True"


@pytest.mark.slow  # likewise
@needs_operators
def test_a_registration_cut_short_begins_anew(said):
    assert said[2:] == ["cut"] * 6 + ["True"]
