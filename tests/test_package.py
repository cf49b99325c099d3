"""The package as its users get it: metadata, what `import autowu` costs, wheel and sdist, and types."""

import ast
import json
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from processes import ROOT, Forked, launch

from autowu.version import __version__

PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "package.yml").read_text())
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


# Metadata


@pytest.fixture(scope="module")
def shown_on_the_index():
    """The long description, as setup.py gives it."""
    given, patched = {}, pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    assert given["long_description_content_type"] == "text/markdown"
    return given["long_description"]


def test_the_readme_as_an_index_shows_it_has_no_relative_link(shown_on_the_index):
    readme = (ROOT / "README.md").read_text()
    link = r"(!?)\[[^\]]*\]\(([^)\s]+)\)"
    shown, written = re.findall(link, shown_on_the_index), re.findall(link, readme)
    assert len(shown) == len(written) > 20
    source = re.search(r'^Source = "(https://.*)"$', PYPROJECT, re.MULTILINE)[1]
    for (picture, led), (_, path) in zip(shown, written, strict=True):
        assert led == f"{source}/{'raw' if picture else 'blob'}/v{__version__}/{path}"
        assert (ROOT / path.partition("#")[0]).exists()
    assert re.sub(link, "", shown_on_the_index) == re.sub(link, "", readme)
    assert "](#" not in readme


def test_the_metadata_says_what_it_is_for_whom_and_where():
    for line in (
        'license = "Apache-2.0"',
        'authors = [{ name = "The autowu developers" }]',
        'dynamic = ["version", "readme"]',
        'version = { attr = "autowu.version.__version__" }',
    ):
        assert line in PYPROJECT
    led = dict(re.findall(r'^(\w+) = "(https://.*)"$', PYPROJECT, re.MULTILINE))
    source = led.pop("Source")
    assert {name for name, address in led.items() if address.startswith(f"{source}/")} == {"Documentation", "Changelog", "Issues"}
    for name in ("Documentation", "Changelog"):
        assert (ROOT / led[name].removeprefix(f"{source}/blob/main/")).exists()
    low, below = map(int, re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PYPROJECT).groups())
    named = {int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PYPROJECT)}
    assert named == set(range(low, below))
    assert len(re.search(r"^keywords = \[(.*)\]", PYPROJECT, re.MULTILINE)[1].split(",")) >= 5


def test_the_version_stands_in_one_place():
    said = re.compile(rf'version.*["\']{re.escape(__version__)}["\']')
    files = [
        ROOT / "pyproject.toml",
        ROOT / "setup.py",
        ROOT / "CITATION.cff",
        ROOT / "docs" / "conf.py",
        *ROOT.glob("autowu/**/*.py"),
    ]
    assert [path.name for path in files if said.search(path.read_text())] == ["version.py"]


def test_the_workflow_installs_every_extra_and_both_ends_of_torch():
    extras = re.findall(r"^(\w+) = \[", PYPROJECT.split("[project.optional-dependencies]\n")[1].split("\n\n")[0], re.MULTILINE)
    jobs = WORKFLOW["jobs"]
    assert jobs["extras"]["strategy"]["matrix"]["extra"] == extras
    script = ast.parse((ROOT / ".ci" / "extras.py").read_text())
    assert {*extras} < {node.name for node in script.body if isinstance(node, ast.FunctionDef)}
    oldest = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
    for job, between in (("bare", set()), ("torch", {"torch==2.11.0"})):
        installed = {entry["torch"] for entry in jobs[job]["strategy"]["matrix"]["include"]}
        assert installed == {f"torch=={oldest}.0", *between, "torch"}
    for path in re.findall(r"tests/\w+\.py", (ROOT / ".github" / "workflows" / "package.yml").read_text()):
        assert (ROOT / path).exists()


def test_a_release_is_of_the_repository_that_the_metadata_names():
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert 'grep -F "Source = \\"https://github.com/$GITHUB_REPOSITORY\\"" pyproject.toml' in release


# Start-up


def test_import_adds_the_package_and_the_standard_library_to_torch_alone():
    code = """
import sys, torch
before = set(sys.modules)
import autowu
for name in sorted(set(sys.modules) - before):
    print(name)
"""
    added = launch("-c", code).stdout.split()
    foreign = {name.partition(".")[0] for name in added} - {"autowu"} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "numpy"}
    assert "autowu.scheduler" in added
    # Numpy itself comes with torch; none of its larger parts, and no dataset or model of torch's, comes with autowu.
    heavy = ("numpy.random", "numpy.testing", "numpy.f2py", "numpy.polynomial", "torch._dynamo", "torch._inductor", "torch.onnx")
    assert [name for name in added if name.startswith(heavy)] == []
    assert [name for name in added if name.split(".")[1:2] in (["training"], ["optim"], ["integrations"])] == []


def test_what_import_takes_is_the_measured_share_of_torchs():
    measured = json.loads((ROOT / "benchmarks" / "results" / "start_up.json").read_text())
    assert measured["share"] <= 0.05
    assert f"takes {measured['share']:.1%} of the time of `import torch`" in (ROOT / "docs" / "speed.md").read_text()


# Wheel and sdist


def requirements(*names):
    """The distributions that those of the names need, themselves too."""
    found, todo = {}, list(names)
    while todo:
        name = re.match(r"[\w.-]+", todo.pop())[0].lower().replace("_", "-")
        if name not in found:
            try:
                found[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:  # of another platform
                continue
            todo += [need for need in found[name].requires or () if "extra ==" not in need]
    return found


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with an sdist, and with the wheel that was built of it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    launch("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def bare(dist, tmp_path_factory):
    """The Python of an environment that has torch, numpy and the wheel alone."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in requirements("torch", "numpy").values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    (wheel,) = dist.glob("*.whl")
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, cwd=folder, env=CLEAN, check=True, capture_output=True)
    return python


@pytest.mark.slow
def test_the_sdist_has_what_a_checkout_has(dist):
    import tarfile

    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert {name for name in tracked.stdout.splitlines() if name not in names and (ROOT / name).exists()} <= {".gitignore"}
    for path in ("train.py", "docs/README.md", "examples/pytorch_digits.py", "assets/digits.png", "tests/conftest.py", ".ci/run"):
        assert path in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("docs/_build")]


@pytest.mark.slow
def test_the_wheel_works_next_to_torch_alone(bare, tmp_path):
    def said(*command):
        return subprocess.run([bare, *command], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=300)

    absent = "import importlib.util as u; print([n for n in ('scipy', 'matplotlib', 'gpytorch', 'timm') if u.find_spec(n)])"
    assert said("-c", absent).stdout == "[]\n"
    smoke = said(str(ROOT / ".ci" / "smoke.py"))
    assert smoke.returncode == 0, smoke.stderr
    assert f"autowu {__version__} with torch" in smoke.stdout
    shown = metadata.Distribution.at(next(bare.parent.parent.glob("lib/python*/site-packages/autowu-*.dist-info")))
    assert shown.version == __version__
    assert shown.metadata["License-Expression"] == "Apache-2.0"
    assert "](docs/" not in shown.metadata.get_payload()
    assert not [file for file in shown.files if file.parts[0] in ("tests", "docs", "benchmarks", "experiments")]


# Types


def test_a_project_of_a_user_runs(tmp_path):
    code = "import runpy, sys, warnings; warnings.simplefilter('error'); runpy.run_path(sys.argv[1], run_name='__main__')"
    project = Forked(tmp_path, "-c", code, ROOT / "tests" / "user_project.py")
    assert project.end() == 0, project.stderr
    assert project.stdout == "done\n"


@pytest.fixture
def pyright(bare, tmp_path):
    """Pyright in the project of a user who has activated the bare environment."""
    package = pytest.importorskip("pyright", exc_type=ImportError)
    (tmp_path / "main.py").write_text((ROOT / "tests" / "user_project.py").read_text())
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "basic"}')
    env = CLEAN | {"PATH": f"{bare.parent}{os.pathsep}{os.environ['PATH']}"}
    return lambda *arguments: package.run(*arguments, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_pyright_finds_no_error_in_a_project_of_a_user(pyright):
    done = pyright("main.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_pyright_knows_the_type_of_all_that_the_reference_has(pyright):
    reference = (ROOT / "docs" / "api.rst").read_text()
    modules = re.findall(r"automodule:: (autowu\b(?!\.integrations\.(?!trackers)).*)", reference)  # hosts are not installed there
    found = json.loads(pyright("--verifytypes", "autowu", "--ignoreexternal", "--outputjson").stdout)
    symbols = found["typeCompleteness"]["symbols"]
    public = re.compile(rf"({'|'.join(map(re.escape, modules))})\.([A-Z]\w*\.)?[A-Za-z]\w*")
    unclear = {each["name"]: not each["isTypeKnown"] or each["isTypeAmbiguous"] for each in symbols if each["isExported"]}
    assert unclear["autowu.AutoWU"] is False
    assert [name for name, is_unclear in unclear.items() if is_unclear and public.fullmatch(name)] == []
