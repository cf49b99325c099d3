"""README and pages: their code runs, their links resolve, their sentences are short, their numbers are the measured ones."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU
from autowu.families import LR_RANGES
from autowu.version import __version__

# The order of the rows in the table of LR ranges.
ORDER = ["sgd", "adam", "lars", "lamb", "unknown"]
ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
# Pages whose blocks are run here; each other page with a block has a test file of its own.
RUN_HERE = {"README.md", "docs/arguments.md", "docs/cooldown.md", "docs/layerwise.md"}


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def section(page, title):
    """The part of a page under a heading."""
    return PAGES[page].split(f"## {title}\n")[1].split("\n## ")[0]


def table(text):
    """The cells of the first table in a text, without its head."""
    rows = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE).group().splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


# Code


def digits_loop():
    """What stands around the loops that the pages show."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    layers = (torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    model = torch.nn.Sequential(*layers)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_loader": DataLoader(TensorDataset(images, labels), 128, shuffle=True, drop_last=True),
        "total_epochs": 30,
        "device": torch.device("cpu"),
        "accuracy": lambda: (model(images).argmax(1) == labels).float().mean(),
    }


def side(diff, sign):
    """One side of a diff: the lines that are common to both, and those with the sign."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign))


def test_the_diff_of_the_readme_turns_one_loop_that_trains_into_another():
    (diff,) = blocks("README.md", "diff")
    assert "AutoWU(optimizer, len(train_loader), total_epochs, model=model)" in side(diff, "+")
    for sign in "-+":
        names = digits_loop()
        exec(side(diff, sign), names)
        assert names["accuracy"]() > 0.95
    assert names["scheduler"].phase == "done"
    assert names["scheduler"].switch.by_test


@pytest.mark.parametrize(("index", "argument"), [(0, "immediate_cooldown=True"), (1, "cooldown_fraction=0.2")])
def test_each_schedule_shown_trains(index, argument):
    shown = blocks("docs/arguments.md")
    assert len(shown) == 2
    assert argument in shown[index]
    names = digits_loop()
    exec(shown[index], names)
    assert names["scheduler"].phase == "done"
    assert names["scheduler"].switch.by_test
    assert names["accuracy"]() > 0.95


def test_several_cooldowns_are_trained_as_shown(capsys):
    names = {}
    for block in blocks("docs/cooldown.md"):
        exec(block, names)
    printed = [[float(number) for number in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert sorted(fraction for fraction, _ in printed) == [0.1, 0.2, 0.5]
    assert all(loss < names["y"].var(correction=0) for _, loss in printed)


def test_the_layer_wise_optimizers_train_as_shown():
    (snippet,) = blocks("docs/layerwise.md", "python3")
    for kept in (" LARS(", " LAMB(", " TVLARS("):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
        names = {"model": model}
        lines = [line for line in snippet.splitlines() if not line.startswith("optimizer") or kept in line.split("#")[0]]
        exec("\n".join(lines), names)
        before = [weight.detach().clone() for weight in model.parameters()]
        model(torch.randn(8, 64)).square().mean().backward()
        names["optimizer"].step()
        assert [layer.name for layer in names["optimizer"].layer_stats()] == ["0.weight", "2.weight"]
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_every_page_with_code_has_a_test_that_runs_it():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    with_code = {page for page, text in PAGES.items() if re.search(r"^```(?:python3?|diff)$", text, re.MULTILINE)}
    run_elsewhere = {page for page in PAGES if f'"docs" / "{Path(page).name}"' in tests}
    assert with_code - run_elsewhere == RUN_HERE


def test_the_figure_is_of_a_run_that_went_back_after_a_switch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    figures, page = importlib.import_module("figures"), "docs/how-it-works.md"
    scheduler = figures.train(600)
    back = re.search(r"back at step (\d+)", scheduler.events[0].message)[1]
    said = re.search(r"minimum is at step (\d+), and the switch at step (\d+).*?copy of step (\d+),", " ".join(PAGES[page].split()))
    # Another processor may add up in another order, which moves a verdict by a test or two.
    assert [int(step) for step in said.groups()] == pytest.approx(
        [scheduler.switch.minimum, scheduler.switch.step, int(back)], abs=10
    )


# Links


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_anchor_of_a_page_resolves(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        assert "://" not in link
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_page_is_reached_from_the_index_and_the_index_from_the_readme():
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGES["docs/README.md"])}
    assert {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"} <= linked
    assert "(docs/README.md)" in README


# Tables


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_a_page_has_a_head_and_rows_of_its_width(page):
    for table in re.findall(r"(?:^\|.*\n?)+", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL), re.MULTILINE):
        rows = [re.sub(r"`[^`]*`", "code", line).strip() for line in table.splitlines()]
        assert re.fullmatch(r"\|(?:[ :]*-+[ :]*\|)+", rows[1] if len(rows) > 1 else ""), rows[0]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(re.findall(r"\|", rows[1]))}, rows[0]


# Words


def prose(text):
    """Paragraphs and list items of a page, without code, tables, headings and pictures; inline code counts as one word."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!\[.*?\]\(.*?\)", "", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(?:\||#).*$", "", text, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|^\s*(?:-|\d+\.) ", text, flags=re.MULTILINE) if part.strip()]


def sentences(text):
    """Split at a full stop, question or exclamation mark before a space; neither colon nor semicolon ends a sentence."""
    return [sentence for part in prose(text) for sentence in re.split(r"(?<=[.?!])[*_)\"]*\s+", part)]


def test_sentences_are_split_where_they_end():
    text = (
        "One `a. b. c` two. Three:\nfour; [five. six](x.md#y) seven?\n\n- eight 1.5\n- nine!\n\n| no. | table. |\n\n```\nno.\n```\n"
    )
    assert sentences(text) == ["One code two.", "Three: four; five.", "six seven?", "eight 1.5", "nine!"]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/optimizers.md"])
def test_no_sentence_has_more_than_thirty_words(page):
    assert [sentence for sentence in sentences(PAGES[page]) if len(sentence.split()) > 30] == []


def test_the_readme_is_read_in_a_minute():
    assert len(README.splitlines()) < 120


def test_the_two_commands_stand_in_the_readme():
    assert blocks("README.md", "sh") == [
        f"pip install -r requirements.txt && python {what}\n" for what in ("train.py", "-m pytest")
    ]


# Numbers


def test_every_number_has_its_script():
    scripts = set(re.findall(r"`((?:benchmarks|docs)/\w+\.py)`", "".join(PAGES.values())))
    assert len(scripts) >= 9
    for script in scripts:
        assert (ROOT / script).exists()
        if script.startswith("benchmarks/"):
            assert list((ROOT / "benchmarks" / "results").glob(f"{Path(script).stem}.json*"))


@pytest.mark.parametrize(("of", "heading"), [("", "A test"), ("_cuda", "On a GPU")])
def test_table_of_tests_is_the_measured_one(of, heading):
    for row in results(f"bench_decision{of}")["rows"]:
        closed, gpytorch, ratio = row["test_ms_closed_form"], row["test_ms_gpytorch"], row["test_ratio"]
        assert f"| {row['losses']:,} | {closed:.1f} ms | {gpytorch:.0f} ms | {ratio:.0f}x |" in section("docs/speed.md", heading)


@pytest.mark.parametrize(("of", "heading"), [("", "A step"), ("_cuda", "On a GPU")])
def test_table_of_steps_is_the_measured_one(of, heading):
    measured, shown = results(f"bench_step{of}"), section("docs/speed.md", heading)
    for groups in (1, 8):
        cells = " | ".join(
            f"{row['step_us']:.1f} µs" + (f" ({row['ratio']:.1f}x)" if row["scheduler"] != "cosine" else "")
            for row in measured["rows"]
            if row["groups"] == groups
        )
        assert f"| {groups} | {cells} |" in shown
    loop = measured["loop"]
    assert f"take {loop['added_ms']:.0f} ms together" in shown
    assert f"of {loop['step_ms']:.1f} ms kept {loop['throughput']:.1%} of its throughput" in shown


def test_table_of_the_loop_of_train_is_the_measured_one():
    rows, shown = results("bench_train")["rows"], section("docs/speed.md", "The loop of train.py")
    ratios = [f"{row['ratio']:.2f}" for row in rows]
    assert [line.split(" | ", 1)[1].rstrip(" |").split(" | ") for line in shown.splitlines() if "resnet" in line] == [
        ratios[:2],
        ratios[2:],
    ]
    assert [row["sched"] for row in rows] == 2 * ["autowu", "cosine"]


def test_tables_of_optimizers_and_of_the_loop_on_a_gpu_are_the_measured_ones():
    shown = section("docs/speed.md", "On a GPU")
    of_optimizers, of_loop = (results(f"bench_{name}_cuda") for name in ("optim", "train"))
    assert of_optimizers["machine"] == of_loop["machine"] == results("bench_step_cuda")["machine"]
    for family, base in (("sgd", "fused SGD"), ("adam", "fused AdamW")):
        rows = [row for row in of_optimizers["rows"] if row["family"] == family]
        for key in {row["optimizer"] for row in rows}:
            one, other = (next(r for r in rows if r["optimizer"] == key and r["model"].startswith(m)) for m in ("resnet", "vit"))
            assert f"| {key} | {base} | {one['ratio']:.2f} | {other['ratio']:.2f} | {one['launches']:,} |" in shown
    ratios = [f"{row['ratio']:.2f}" for row in of_loop["rows"]]
    assert f"precision, 256 | {' | '.join(ratios[:2])} |" in shown
    assert f"precision, 256 | {' | '.join(ratios[2:])} |" in shown
    pairs = [ratio for row in of_loop["rows"] for ratio in row["ratios"]]
    assert f"between {min(pairs):.1f} and {max(pairs):.1f}" in shown


@pytest.fixture
def regret(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("regret")


UNSEEN = (18, 19, 20)


def shown_rows(regret):
    """Of seeds that chose nothing."""
    rows = regret.read(ROOT / "benchmarks" / "results" / "regret_unseen.jsonl")
    ran = [(row["case"], row["method"], row["lr"], row["seed"]) for row in rows]
    assert sorted(map(str, ran)) == sorted(map(str, regret.jobs(regret.CASES["cpu"], ["grid", *regret.METHODS], UNSEEN)))
    return rows


def test_tables_of_regret_are_the_measured_ones(regret):
    rows, page = shown_rows(regret), " ".join(PAGES["docs/results.md"].split())
    summary, cases = regret.report(rows).split("\n\n")
    assert summary in PAGES["docs/results.md"]
    assert cases in PAGES["docs/decision.md"]
    scores = regret.scores(rows, "test_loss")
    means = [regret.geometric_mean(ratio for (_, of), ratio in scores["autowu"].ratios.items() if of == seed) for seed in UNSEEN]
    assert "seeds come to {:.2f}, {:.2f} and {:.2f}".format(*means) in page
    assert f"Behind the sweep it is by {100 * (scores['autowu'].mean / scores['sweep'].mean - 1):.0f} %" in page
    assert scores["autowu"].mean < min(score.mean for method, score in scores.items() if method not in ("autowu", "sweep"))
    assert None not in scores["autowu"].ratios.values()


def test_what_is_said_of_the_seeds_that_chose_is_measured(regret):
    rows = regret.read(ROOT / "benchmarks" / "results" / "regret.jsonl")
    rows = [row for row in rows if row["method"] in ("grid", "autowu") and row["seed"] in regret.SEEDS]
    scores = regret.scores(rows, "test_loss")
    assert not {*UNSEEN} & {*regret.SEEDS}
    own, sweep = scores["autowu"], scores["sweep"]
    told = f"come to {own.mean:.2f}, {own.worst:.2f} in the worst case; the sweep there to {sweep.mean:.2f}."
    assert told in " ".join(PAGES["docs/results.md"].split())


def test_the_table_of_fine_tuning_is_the_measured_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    finetune = importlib.import_module("finetune")
    rows = [json.loads(line) for line in finetune.RESULTS.read_text().splitlines()[1:]]
    ran = {(row["case"], row["method"], row["seed"]) for row in rows}
    assert ran == {
        (case, method, seed) for case in finetune.CASES for method in ("grid", *finetune.METHODS) for seed in finetune.SEEDS
    }
    assert finetune.report(rows) in PAGES["docs/results.md"]


def test_five_rows_of_results_and_their_limit_are_the_measured_ones(regret):
    rows = shown_rows(regret)
    measured = {row[0]: row for row in table(regret.report(rows))}
    names = {
        "AutoWU": "autowu",
        "a sweep of the nine LRs on other seeds": "sweep",
        "Schedule-Free": "schedule-free",
        "OneCycleLR after a range test": "onecycle",
        "ReduceLROnPlateau after a range test": "plateau",
    }
    shown = table(section("README.md", "Results"))
    assert [row[0] for row in shown] == list(names)
    for name, *cells in shown:
        of = measured[names[name]]
        assert cells == [of[1], of[2], of[3], of[-1]]
    longest = max(int(case.split()[-1]) for case in regret.CASES["cpu"])
    assert f"at most {longest:,} steps" in README


def test_table_of_optimizer_steps_is_the_measured_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_optim")
    result, shown = results("bench_optim"), section("docs/speed.md", "A step of the optimizers")
    assert bench.table(result) in shown
    assert f"bench_optim.py`, {result['machine']['device']}, {result['machine']['threads']} threads" in shown


@pytest.mark.parametrize(("of", "heading"), [("", "Copies"), ("_cuda", "On a GPU")])
def test_table_of_copies_is_the_measured_one(of, heading):
    for row in results(f"bench_snapshot{of}")["rows"]:
        times = " | ".join(f"{row[f'{what}_over_step']:.1%}" for what in ("take", "sound", "restore"))
        held = {"": "", "cuda": "the GPU | ", "cpu": "the host | "}[row["held"] if of else ""]
        line = f"| {row['model']}, {row['optimizer']} | {row['batch']} | {row['copy_mib']:.0f} MiB | {held}{times} |"
        assert line in section("docs/speed.md", heading)


def test_table_of_optimizers_is_the_measured_one():
    for row in results("digits"):
        found = "hand-set" if row["switch_step"] is None else f"step {row['switch_step']}"
        lr, accuracy, loss = f"{row['peak_lr']:.3g}", f"{row['test_accuracy']:.1%}", f"{row['test_loss']:.3f}"
        assert f"| {row['opt']} | {row['sched']} | {found} | {lr} | {accuracy} | {loss} |" in PAGES["docs/results.md"]


def test_the_run_shown_is_the_measured_one():
    row, page = results("digits")[0], PAGES["docs/train.md"]
    assert f"switched at step {row['switch_step']} of {row['total_steps']}: LR {row['peak_lr']:.4g}" in page
    assert f"the loss was lowest at step {row['minimum_step']:.0f} " in page
    assert f"ends by itself at step {row['switch_step']}." in " ".join(README.split())
    assert row["wall_s"] < 60


def test_share_of_the_paper_is_the_measured_one():
    agree = sum(row["agree"] for row in results("paper_decisions"))
    of = sum(row["of"] for row in results("paper_decisions"))
    assert f"on {agree / of:.0%} of the curves" in PAGES["docs/paper.md"]


# Arguments


def test_table_of_arguments_is_the_signature():
    parameters = inspect.signature(AutoWU.__init__).parameters
    rows = table(PAGES["docs/arguments.md"])
    assert [name.strip("`") for name, *_ in rows] == list(parameters)[1:]
    for name, default, *_ in rows:
        value = parameters[name.strip("`")].default
        shown = f'"{value}"' if isinstance(value, str) else str(value)
        assert default == ("" if value is inspect.Parameter.empty else f"`{shown}`"), name


def test_table_of_ranges_is_the_one_in_use():
    rows = table(section("docs/arguments.md", "LR ranges"))
    assert [(float(low), float(high)) for _, low, high in rows] == [LR_RANGES[name] for name in ORDER]


# Habits


def yaml_of(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_names_the_paper():
    citation = yaml_of("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "10.48550/arXiv.2107.05855"
    assert citation["preferred-citation"]["title"] in README


def test_the_changelog_has_a_dated_section_for_the_version():
    heads = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    assert __version__ in dict(heads)
    assert all(date for _, date in heads[1:])


def test_the_hooks_check_what_ci_checks():
    (repository,) = yaml_of(".pre-commit-config.yaml")["repos"]
    checks = (ROOT / ".ci" / "run").read_text().splitlines()
    for hook in repository["hooks"]:
        assert f"python -m {hook['id'].replace('-', ' ')}" in hook["entry"]
        assert any(line.split(" > ")[0] == hook["entry"] for line in checks)


def test_the_workflows_run_ci_on_both_ends_and_publish_tags_only():
    ci, release = yaml_of(".github/workflows/ci.yml"), yaml_of(".github/workflows/release.yml")
    assert ci["jobs"]["ci"]["strategy"]["matrix"]["python"] == ["3.10", "3.13"]
    run = ci["jobs"]["ci"]["steps"][-1]["run"]
    assert ".ci/run" in run
    assert "event_name == 'schedule' && '--slow'" in run
    assert ci[True].keys() == {"push", "pull_request", "schedule"}
    *_, types, tests, outcome = (ROOT / ".ci" / "run").read_text().splitlines()
    assert (types, tests) == ("mypy=$!", 'python -m pytest "$@"')
    assert outcome.startswith('wait "$mypy" || ')
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    assert release["jobs"]["publish"]["needs"] == "build"
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml_of(template.relative_to(ROOT))
