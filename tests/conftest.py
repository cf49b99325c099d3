"""Shared by all tests: one thread for each process, reproducible draws, and no deadline a slow machine could miss."""

import os

# The matrices are small: threads that wait for each other on a busy machine cost more than all the arithmetic.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import importlib
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("autowu", deadline=None, derandomize=True)
settings.load_profile("autowu")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")


def pytest_report_header(config):
    return "slow tests: run" if config.getoption("--slow") else "slow tests: left out (--slow runs them)"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a variant of what a quick test holds as well; run with --slow")
    config.option.loadscopereorder = False  # xdist's own order, by the number of tests, has the longest files last
    # Raised by torch when linear_operator, on which gpytorch stands, or torch's own compiler is imported.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script(_method)?` is deprecated")  # of two categories
    # Where there is a GPU: of tests that look for waits, and of those that stay on the CPU.
    config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode is a prototype feature:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:GPU available but not used:UserWarning")


LONG = ("train", "benchmarks", "distributed", "accelerate", "lightning", "transformers", "optim_device", "optim_sharded", "pytorch")


def pytest_collection_modifyitems(config, items):
    """Slow tests are left out unless asked for. The longest files come first, so that all processes are busy to the end."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_ramps(monkeypatch):
    """For a loss that is made up, which does not rise with the LR: no second look at the peak, which would raise it."""
    monkeypatch.setattr("autowu.second_look.next_ramp", lambda *_: None)


@pytest.fixture(autouse=True)
def _levels():
    """What a test, or a script that it runs in this process, turns off in logging is on again for the next."""
    levels, disabled = {name: logging.getLogger(name).level for name in ("root", "autowu")}, logging.root.manager.disable
    yield
    logging.disable(disabled)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def blank_figures():
    """The figures of train.py's runs are left blank."""
    import blank_figures

    with blank_figures.blank():
        yield


@pytest.fixture
def benchmark(monkeypatch):
    """A module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    levels, threads = {name: logging.getLogger(name).level for name in ("autowu", "dadaptation", "root")}, torch.get_num_threads()
    yield importlib.import_module
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    torch.set_num_threads(threads)
