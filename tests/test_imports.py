"""What loads what: `import autowu` stays light, and imports inside the package point downwards only, in no circle."""

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import autowu

PACKAGE = Path(autowu.__file__).parent
MODULES = {
    ".".join(("autowu", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

HOSTS = ("transformers", "accelerate", "lightning")

# Of the scheduler's side, from below upwards: what a module may use of the package. Nothing else is used.
ROOMS = {
    "version": (),
    "kin": (),
    "multi_optimizer": (),
    "schedules": (),
    "gp": (),
    "watch": (),
    "checks": (),
    "families": ("kin",),
    "gpytorch_engine": ("gp",),
    "history": ("gp",),
    "switching": ("gp",),
    "live": ("kin",),
    "snapshot": ("live",),
    "ranks": ("history",),
    "plateau": ("gp", "history", "ranks", "watch"),
    "micro_batches": ("checks", "history"),
    "group_lrs": (),
    "held_out": ("micro_batches", "ranks", "watch"),
    "config": ("checks", "families", "gp", "kin", "multi_optimizer", "schedules"),
    "phases": ("config", "schedules", "switching"),
    "ramp": ("config", "phases", "watch"),
    "reader": ("history", "ramp", "ranks", "watch"),
    "events": ("config", "phases", "ranks"),
    "record": ("config", "phases"),
    "optimizer_calls": ("events", "kin"),
    "rollback": ("events", "live", "ranks", "snapshot"),
    "judge": ("config", "events", "gp", "gpytorch_engine", "history", "phases", "ranks", "switching"),
    "plans": ("checks", "config", "phases"),
    "first_step": ("config", "events", "families", "kin", "plans", "ranks", "rollback"),
    "stages": (
        *("config", "events", "first_step", "held_out", "history", "judge", "live", "phases", "ranks", "reader", "record"),
        *("rollback", "watch"),
    ),
    "second_look": ("config", "events", "history", "phases", "ramp", "stages"),
    "after_switch": ("config", "events", "history", "phases", "plateau", "ramp", "second_look", "stages", "watch"),
    "warm_up": (*("after_switch", "config", "events", "history", "phases", "plateau", "rollback", "stages", "switching", "watch"),),
    "budget": ("config", "ranks"),
    "horizon": ("budget", "checks", "config", "events", "phases", "plans", "ranks", "reader"),
    "open_ended": ("after_switch", "checks", "config", "events", "horizon", "phases", "plans", "stages", "warm_up"),
    "schema": ("budget", "checks", "config", "gp", "held_out", "phases", "ramp", "record", "watch"),
    "states": ("config", "history", "phases", "record", "schema", "watch"),
    "shown": ("config", "events", "gp", "history", "phases", "stages", "switching"),
    "rescale": ("config", "history", "switching"),
    "report": ("config", "events", "gp", "history", "phases", "record", "states"),
    "plotting": ("gp", "report"),
    "scheduler": (
        *("checks", "config", "gp", "gpytorch_engine", "group_lrs", "horizon", "kin", "micro_batches", "open_ended"),
        *("optimizer_calls", "phases", "plotting", "rescale", "shown", "stages", "states", "warm_up"),
    ),
    "kept": ("kin", "live", "snapshot"),
    "range_test": (*("checks", "config", "gp", "kept", "kin", "multi_optimizer", "phases", "plotting", "scheduler", "switching"),),
    "anytime": ("checks", "scheduler"),
    "curves": ("report",),
    "cli": ("config", "curves", "families", "history", "phases", "plotting", "range_test", "scheduler", "switching", "version"),
    "__main__": ("cli",),
}

OPTIM = {
    "checks": (),
    "param_groups": ("checks",),
    "batches": (),
    "rules": ("batches",),
    "engines.triton": (),
    "engines.fused": ("rules",),
    "engines.eager": ("batches", "checks", "engines.fused", "rules"),
    "engines.cpu": ("batches", "checks", "engines.fused", "rules"),
    "engines.cpu_loops": ("batches", "engines.cpu", "rules"),
    "engines.gpu": ("batches", "engines.cpu", "engines.triton", "rules"),
    "engines": ("batches", "engines.cpu", "engines.cpu_loops", "engines.gpu", "rules"),
    "layerwise": ("batches", "checks", "engines", "engines.cpu_loops", "engines.eager", "engines.gpu", "rules"),
    "lamb": ("layerwise", "rules"),
    "lans": ("batches", "engines.eager", "layerwise", "rules"),
    "muon": ("batches", "layerwise", "rules"),
    "lars": ("batches", "checks", "engines", "engines.eager", "engines.gpu", "layerwise", "rules"),
    "tvlars": ("checks", "lars", "layerwise"),
}


@functools.cache
def imports(path):
    """Full names of all that a file imports, inside functions too. `from a import b` is b where that is a module, else a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports in this package are absolute"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names.values()}
    return found


def modules_used(module):
    """The modules of the package that a module imports."""
    return imports(MODULES[module]) & MODULES.keys()


def importers(top_level_package):
    return {name for name, path in MODULES.items() if any(i.split(".")[0] == top_level_package for i in imports(path))}


def under(prefix):
    return {name for name in MODULES if name == prefix or name.startswith(f"{prefix}.")}


@pytest.fixture(scope="module")
def said():
    """What a process says that imports the package, and then goes on as where gpytorch is not installed."""
    heavy = ("gpytorch", "timm", "matplotlib", "torchvision", "sklearn", "scipy", "tqdm", "triton", *HOSTS)
    code = f"""
import sys, torch
before = set(sys.modules)  # torch itself may load tqdm
import autowu, autowu.optim
print(sorted(set({heavy}) & (set(sys.modules) - before)))
sys.modules["gpytorch"] = None  # nothing has imported it yet
from autowu import AutoWU
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
scheduler = AutoWU(optimizer, total_steps=40)
for step in range(40):
    optimizer.step()
    scheduler.step(abs(step - 8) / 10)
print(scheduler.phase)
for ask in (lambda: AutoWU.paper(optimizer, 10, 10), lambda: AutoWU(optimizer, total_steps=40, gp="gpytorch")):
    try:
        ask()
    except ImportError as error:
        print("autowu[gpytorch]" in str(error))
"""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()


def test_import_loads_no_heavy_package(said):
    assert said[0] == "[]"


def test_no_import_goes_in_a_circle():
    order = TopologicalSorter({name: modules_used(name) for name in MODULES}).static_order()
    assert set(order) == MODULES.keys()


@pytest.mark.parametrize("module", ROOMS)
def test_a_room_uses_only_what_lies_below_it(module):
    assert modules_used(f"autowu.{module}") == {f"autowu.{name}" for name in ROOMS[module]}


@pytest.mark.parametrize("module", OPTIM)
def test_a_part_of_optim_uses_only_what_lies_below_it(module):
    below = {f"autowu.optim.{name}" for name in OPTIM[module]}
    assert modules_used(f"autowu.optim.{module}") == below | ({"autowu.kin"} if module == "lars" else set())


def test_every_module_has_its_place():
    placed = {f"autowu.{name}" for name in ROOMS} | {f"autowu.optim.{name}" for name in OPTIM}
    placed |= {"autowu", "autowu.optim"} | under("autowu.training") | under("autowu.integrations")
    assert placed == MODULES.keys()


def test_what_may_be_used_lies_below_by_the_order_of_the_lists():
    for places in (ROOMS, OPTIM):
        names = list(places)
        assert all(names.index(used) < names.index(name) for name in names for used in places[name])


def test_scheduler_and_optim_do_not_know_each_other():
    optim = under("autowu.optim")
    assert set.union(*(modules_used(name) for name in optim)) <= optim | {"autowu.kin"}
    assert not any(modules_used(f"autowu.{name}") & optim for name in ROOMS)


@pytest.mark.parametrize("package", ["timm", "torchvision", "sklearn", "tqdm"])
def test_only_training_imports_its_packages(package):
    assert all(name.startswith("autowu.training") for name in importers(package) - {"autowu.integrations.timm"})


def test_an_integration_imports_its_own_framework_the_scheduler_and_the_optimizers():
    integrations = under("autowu.integrations") - {"autowu.integrations"}
    assert integrations == {f"autowu.integrations.{name}" for name in ("lightning", "timm", "trackers", "transformers")}
    below = {"autowu", "autowu.scheduler", "autowu.optim", "autowu.range_test", "autowu.integrations.trackers"}
    assert all(modules_used(name) - {"autowu.integrations"} <= below for name in integrations)
    assert "autowu.integrations.timm" in importers("timm")
    assert "autowu.integrations.timm" not in importers("torchvision") | importers("sklearn") | importers("tqdm")
    assert importers("transformers") == {"autowu.integrations.transformers"}
    assert importers("lightning") == {"autowu.integrations.lightning"}
    assert importers("accelerate") == set()
    assert not any(importers(package) for package in ("wandb", "mlflow", "trackio"))


def test_only_plotting_and_training_import_matplotlib():
    assert all(name.startswith(("autowu.plotting", "autowu.training")) for name in importers("matplotlib"))


def test_only_its_engine_imports_gpytorch():
    assert importers("gpytorch") == {"autowu.gpytorch_engine"}


def test_without_gpytorch_all_works_but_what_asks_for_it_which_names_the_extra(said):
    assert said[1:] == ["done", "True", "True"]


def test_only_the_kernels_import_triton():
    assert importers("triton") == {"autowu.optim.engines.triton"}


def test_only_one_room_knows_torchs_private_flag():
    assert {name for name, path in MODULES.items() if "_opt_called" in path.read_text()} == {"autowu.optimizer_calls"}


def test_public_names():
    assert {"AutoWU", "ClosedFormGP", "FoundLR", "GPyTorchGP", "__version__", "find_lr"} <= set(autowu.__all__)
    assert all(hasattr(autowu, name) for name in autowu.__all__)
    assert autowu.phases.Config is autowu.config.Config  # which was defined there


# ---------------------------------------------------------------- how long things are

LONG = {
    "autowu.gp.fit_closed_form": "one derivation, whose names are those of the module's docstring",
    "autowu.plotting.draw_cooldowns": "one picture",
    "autowu.plotting.draw_layers": "one picture",
    "autowu.watch.LossWatch": "one recurrence, whose parts share their numbers",
    "autowu.watch.LossWatch._go_on": "one loop, through which every loss of a run goes",
    "autowu.switching.decide": "30 lines for its users, then one vote",
    "autowu.range_test.find_lr": "a signature and a docstring of 13 arguments",
    "autowu.optim.param_groups.param_groups": "30 lines of rules for its users, then one loop over the parameters",
    "autowu.scheduler.AutoWU": "a docstring of 34 arguments",
    "autowu.scheduler.AutoWU.__init__": "a signature of 34 arguments",
}
"""Functions of more than 40 lines and classes of more than 300 that a reader would not want split, and why."""


def long_ones(name, path):
    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                lines, own = child.end_lineno - child.lineno + 1, f"{prefix}.{child.name}"
                if lines > (40 if isinstance(child, ast.FunctionDef) else 300):
                    yield own
                yield from walk(child, own)

    return set(walk(ast.parse(path.read_text()), name))


def test_what_is_long_is_listed_with_a_reason():
    assert set.union(*(long_ones(name, path) for name, path in MODULES.items())) == LONG.keys()
    assert len((PACKAGE / "scheduler.py").read_text().splitlines()) < 360
