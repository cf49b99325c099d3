"""What loads what: `import autowu` stays light, and imports inside the package point downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import autowu

PACKAGE = Path(autowu.__file__).parent
MODULES = {
    ".".join(("autowu", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


HOSTS = ("transformers", "accelerate", "lightning")


def imports(path):
    """Full names of all that a file imports, inside functions too. `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports in this package are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_used(module):
    """The modules of the package that a module imports."""
    return imports(MODULES[module]) & MODULES.keys()


def importers(top_level_package):
    return {name for name, path in MODULES.items() if any(i.split(".")[0] == top_level_package for i in imports(path))}


def test_import_loads_no_heavy_package():
    heavy = ("gpytorch", "timm", "matplotlib", "torchvision", "sklearn", "scipy", "tqdm", "triton", *HOSTS)
    code = f"""
import sys, torch
before = set(sys.modules)  # torch itself may load tqdm
import autowu, autowu.optim
print(sorted(set({heavy}) & (set(sys.modules) - before)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("module", "may_use"),
    [
        ("autowu.schedules", set()),
        ("autowu.gp", set()),
        ("autowu.families", set()),
        ("autowu.watch", set()),
        ("autowu.distributed", {"autowu.history"}),
        ("autowu.snapshot", {"autowu.families"}),
        ("autowu.gpytorch_engine", {"autowu.gp"}),
        ("autowu.history", {"autowu.gp"}),
        ("autowu.switching", {"autowu.gp"}),
        ("autowu.phases", {"autowu.schedules", "autowu.switching"}),
        (
            "autowu.arguments",
            {"autowu.distributed", "autowu.gp", "autowu.gpytorch_engine", "autowu.phases", "autowu.schedules"},
        ),
    ],
)
def test_core_modules_use_only_what_lies_below_them(module, may_use):
    assert modules_used(module) <= may_use


def test_optim_uses_nothing_outside_itself():
    optim = {name for name in MODULES if name.startswith("autowu.optim")}
    assert len(optim) >= 2
    assert set.union(*(modules_used(name) for name in optim)) <= optim


def test_scheduler_uses_no_optimizer_and_nothing_above_it():
    above = ("autowu.optim", "autowu.training", "autowu.plotting", "autowu.integrations")
    above = {name for name in MODULES if name.startswith(above)}
    assert not modules_used("autowu.scheduler") & above
    assert modules_used("autowu.scheduler")


@pytest.mark.parametrize("package", ["timm", "torchvision", "sklearn", "tqdm"])
def test_only_training_imports_its_packages(package):
    assert all(name.startswith("autowu.training") for name in importers(package) - {"autowu.integrations.timm"})


def test_an_integration_imports_its_own_framework_the_scheduler_and_the_optimizers():
    integrations = [name for name in MODULES if name.startswith("autowu.integrations.")]
    assert set(integrations) == {"autowu.integrations.timm", "autowu.integrations.transformers"}
    assert all(modules_used(name) <= {"autowu", "autowu.scheduler", "autowu.optim"} for name in integrations)
    assert "autowu.integrations.timm" in importers("timm")
    assert "autowu.integrations.timm" not in importers("torchvision") | importers("sklearn") | importers("tqdm")
    assert importers("transformers") == {"autowu.integrations.transformers"}
    assert importers("accelerate") == importers("lightning") == set()


def test_only_plotting_and_training_import_matplotlib():
    assert all(name.startswith(("autowu.plotting", "autowu.training")) for name in importers("matplotlib"))


def test_only_its_engine_imports_gpytorch():
    assert importers("gpytorch") == {"autowu.gpytorch_engine"}


def test_only_the_kernels_import_triton():
    assert importers("triton") == {"autowu.optim._triton"}


def test_public_names():
    assert {"AutoWU", "ClosedFormGP", "GPyTorchGP", "__version__"} <= set(autowu.__all__)
    assert all(hasattr(autowu, name) for name in autowu.__all__)
