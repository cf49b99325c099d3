"""The pages as a site: a reference of all that is public, notebooks and figures that are what they say, and no warning."""

import importlib
import inspect
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT, launch

REFERENCE = (ROOT / "docs" / "api.rst").read_text()
MODULES = re.findall(r"^\.\. automodule:: (\S+)$", REFERENCE, re.MULTILINE)
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
TROUBLES = ROOT / "docs" / "troubleshooting.md"


# Reference


def public(module):
    """Names and objects of a module of the reference, and of the methods and properties of its classes that are its own."""
    chosen = re.search(rf"automodule:: {re.escape(module)}\n   :members:(.*)\n", REFERENCE)[1]
    namespace = importlib.import_module(module)
    for name in chosen.replace(" ", "").split(",") if chosen else namespace.__all__:
        thing = getattr(namespace, name)
        yield f"{module}.{name}", thing
        if inspect.isclass(thing):
            for owner in (each for each in thing.__mro__ if each.__module__.startswith("autowu")):
                for part, value in vars(owner).items():
                    if not part.startswith("_") and (callable(value) or isinstance(value, (property, classmethod, staticmethod))):
                        yield f"{module}.{name}.{part}", getattr(thing, part)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_in_the_reference_is_without_a_docstring(module):
    things = dict(public(module))
    assert things
    for name, thing in things.items():
        if callable(thing) or isinstance(thing, property):
            assert inspect.getdoc(thing), name
        elif name.rpartition(".")[2] != "__version__":  # data: a string below it
            assert re.search(
                rf'^{name.rpartition(".")[2]}\b.*?^"""', Path(importlib.import_module(module).__file__).read_text(), re.M | re.S
            ), name


def test_the_reference_has_each_module_that_a_page_names():
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md")) + (ROOT / "README.md").read_text()
    imported = set(re.findall(r"^from (autowu[\w.]*) import", pages, re.MULTILINE))
    assert "autowu.plotting" in imported
    assert imported <= {"autowu.scheduler"} | set(MODULES)
    assert len(MODULES) == len(set(MODULES))


# Notebooks


def cells(notebook, kind):
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_from_top_to_bottom(notebook, capsys):
    names = {}
    for cell in cells(notebook, "code"):
        exec(cell, names)
    assert names["scheduler"].phase == "done"
    assert names["scheduler"].switch.by_test
    if notebook.stem == "first-run":
        assert names["accuracy"] > 0.9
    else:
        assert names["found"] < 2 * min(names["sweep"].values())
        assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_its_output_and_its_links_lead_somewhere(notebook):
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in json.loads(notebook.read_text())["cells"])
    links = re.findall(r"\]\(([^)\s]+)\)", "".join(cells(notebook, "markdown")))
    assert links
    assert all((notebook.parent / link.partition("#")[0]).exists() for link in links)


# Symptoms


@pytest.fixture(scope="module")
def symptoms():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("symptoms")


def sections():
    """The sections of the page of symptoms that have a figure, by the name of the figure."""
    parts = re.split(r"^## ", TROUBLES.read_text(), flags=re.MULTILINE)[1:]
    return {re.search(r"symptoms/(\w+)\.png", part)[1]: part for part in parts if "symptoms/" in part}


def test_each_symptom_has_its_figure_its_words_and_what_to_do(symptoms):
    said = json.loads(symptoms.RESULTS.read_text())
    assert sections().keys() == said.keys() == symptoms.SYMPTOMS.keys()
    for name, section in sections().items():
        assert (ROOT / "assets" / "symptoms" / f"{name}.png").exists()
        assert "**What to do.**" in section
        for run, words in said[name].items():
            assert f"| {run} | {words} |" in section


NAMES = ("never", "at_once", "jump", "too_low", "every_n", "two_optimizers", "gan", "reinforcement")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "never" else pytest.mark.slow) for name in NAMES])
def test_a_symptom_is_that_of_a_run_that_can_be_had_again(symptoms, name):
    assert tuple(symptoms.SYMPTOMS) == NAMES
    said = json.loads(symptoms.RESULTS.read_text())[name]
    for run, scheduler in symptoms.run(name).items():
        step, by_test = re.match(r"step (\d+)(, not by test)?", said[run]).groups()
        assert scheduler.switch.by_test == (by_test is None)
        assert scheduler.switch.step == pytest.approx(int(step), abs=10)  # another processor may move a verdict by a test or two


# Film


def test_the_film_is_small_enough_for_a_readme_and_ends_with_the_switch():
    film = ROOT / "assets" / "film.gif"
    assert film.stat().st_size < 500_000
    with Image.open(film) as frames:
        assert frames.n_frames > 10
        assert frames.width >= 600
    assert (ROOT / "assets" / "film.png").exists()


@pytest.mark.slow
def test_the_film_is_made_of_the_tests_of_a_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    film = importlib.import_module("film")
    kept = film.reports()
    assert kept[-1].state.switch.by_test
    searching = [report for report in kept if report.state.switch is None]
    assert len(searching) > 20
    assert all(report.band is not None for report in kept)
    assert kept[-1].step - kept[-1].state.switch.step == film.AFTER[-1]
    film.film(kept[-6:], tmp_path / "film.gif")
    film.still(kept, tmp_path / "film.png")
    assert (tmp_path / "film.gif").stat().st_size > 10_000
    assert (tmp_path / "film.png").stat().st_size > 10_000


# Migration


def test_what_takes_the_place_of_another_package_trains():
    page = (ROOT / "docs" / "migration.md").read_text()
    start, *blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python3") == 4
    for number, block in enumerate(blocks):
        names = {}
        exec(start, names)
        before = [weight.detach().clone() for weight in names["model"].parameters()]
        exec(block, names)
        if number in (0, 3):
            assert names["scheduler"].last_epoch in (8, 240)
        else:
            names["criterion"](names["model"](names["x"][:, :8]), names["x"][:, :1]).backward()
            names["optimizer"].step()
        assert any(not (old == new).all() for old, new in zip(before, names["model"].parameters(), strict=True))


# Site


def test_every_page_and_notebook_has_its_place_in_the_site():
    placed = re.findall(r"^   ([\w/-]+)$", (ROOT / "docs" / "index.rst").read_text(), re.MULTILINE)
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    assert set(placed) == pages | {f"notebooks/{path.stem}" for path in NOTEBOOKS} | {"api"}
    assert len(placed) == len(set(placed))


@pytest.mark.slow
def test_the_pages_build_as_a_site_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    launch("-m", "sphinx", "-W", "--keep-going", "-d", tmp_path / "trees", "docs", tmp_path / "site", timeout=600)
    site = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert "how-it-works.html" in site["index.html"]
    for name in ("AutoWU.step", "AutoWU.plot", "optim.LARS.step", "plotting.draw_state"):
        assert f'id="autowu.{name}"' in site["api.html"]
    for notebook, figures in (("first-run", 1), ("sweep", 2)):
        shown = re.findall(r'<img [^>]*src="(\.\./_images/\w+\.png)"', site[f"notebooks/{notebook}.html"])
        assert len(shown) == figures
    for page, text in site.items():
        for link in re.findall(r'href="([^":?]+)"', text):
            path, _, anchor = link.partition("#")
            target = os.path.normpath(Path(page).parent / path) if path else page
            assert (tmp_path / "site" / target).exists(), f"{page}: {link}"
            assert not anchor or target not in site or f'id="{anchor}"' in site[target], f"{page}: {link}"
