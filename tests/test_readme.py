"""What the README shows works as it stands there."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU
from autowu.families import LR_RANGES

# The order of the rows in the README.
ORDER = ["sgd", "adam", "lars", "lamb", "unknown"]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_two_snippets():
    assert ["immediate_cooldown=True" in SNIPPETS[0], "cooldown_fraction=0.2" in SNIPPETS[1]] == [True, True]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=("immediate", "constant"))
def test_snippet_trains(snippet):
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    layers = (torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    model = torch.nn.Sequential(*layers)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_loader": DataLoader(TensorDataset(images, labels), 128, shuffle=True, drop_last=True),
        "total_epochs": 30,
        "device": torch.device("cpu"),
    }
    exec(snippet, names)
    assert names["scheduler"].phase == "done"
    assert names["scheduler"].switch.by_test
    assert (model(images).argmax(1) == labels).float().mean() > 0.95


def test_every_number_has_its_script():
    scripts = set(re.findall(r"`(benchmarks/\w+\.py)`", README))
    assert len(scripts) == 7
    for script in scripts:
        assert (ROOT / script).exists()
        assert list((ROOT / "benchmarks" / "results").glob(f"{Path(script).stem}.json*"))


def test_pictures_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).exists() for picture in pictures)


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_layer_wise_optimizers_train_as_shown():
    snippet = re.search(r"```python3\n([^`]*param_groups.*?)```", README, re.DOTALL).group(1)
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


def test_table_of_tests_is_the_measured_one():
    for row in results("bench_decision")["rows"]:
        closed, gpytorch, ratio = row["test_ms_closed_form"], row["test_ms_gpytorch"], row["test_ratio"]
        assert f"| {row['losses']:,} | {closed:.1f} ms | {gpytorch:.0f} ms | {ratio:.0f}x |" in README


def test_table_of_steps_is_the_measured_one():
    measured = results("bench_step")
    for groups in (1, 8):
        cells = " | ".join(
            f"{row['step_us']:.1f} µs" + (f" ({row['ratio']:.1f}x)" if row["scheduler"] != "cosine" else "")
            for row in measured["rows"]
            if row["groups"] == groups
        )
        assert f"| {groups} | {cells} |" in README
    loop = measured["loop"]
    assert f"take {loop['added_ms']:.0f} ms together" in README
    assert f"of {loop['step_ms']:.1f} ms kept {loop['throughput']:.1%} of its throughput" in README


def test_table_of_regret_is_the_measured_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    regret = importlib.import_module("regret")
    rows = regret.read(ROOT / "benchmarks" / "results" / "regret.jsonl")
    shown = [r for r in rows if r["method"] in ("grid", *regret.METHODS) and r["seed"] in regret.SEEDS]
    summary, cases = regret.report(shown).split("\n\n")
    assert summary in README
    assert cases in (ROOT / "docs" / "decision.md").read_text()
    assert {r["case"] for r in shown} == set(regret.CASES["cpu"])


def test_table_of_optimizer_steps_is_the_measured_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_optim")
    result = json.loads((ROOT / "benchmarks" / "results" / "bench_optim.json").read_text())
    assert bench.table(result) in README
    assert f"bench_optim.py`, {result['machine']['device']}, {result['machine']['threads']} threads" in README


def test_table_of_copies_is_the_measured_one():
    for row in results("bench_snapshot")["rows"]:
        times = " | ".join(f"{row[f'{what}_over_step']:.1%}" for what in ("take", "sound", "restore"))
        assert f"| {row['model']}, {row['optimizer']} | {row['batch']} | {row['copy_mib']:.0f} MiB | {times} |" in README


def test_every_page_and_script_of_the_stack_exists():
    table = README.split("## In your stack")[1].split("## Arguments")[0]
    linked = set(re.findall(r"\]\((.*?)\)", table))
    assert len(linked) == 10
    assert all((ROOT / link).exists() for link in linked)


def test_table_of_optimizers_is_the_measured_one():
    for row in results("digits"):
        found = "hand-set" if row["switch_step"] is None else f"step {row['switch_step']}"
        lr, accuracy, loss = f"{row['peak_lr']:.3g}", f"{row['test_accuracy']:.1%}", f"{row['test_loss']:.3f}"
        assert f"| {row['opt']} | {row['sched']} | {found} | {lr} | {accuracy} | {loss} |" in README


def test_the_run_shown_is_the_measured_one():
    row = results("digits")[0]
    assert f"switched at step {row['switch_step']} of {row['total_steps']}: LR {row['peak_lr']:.4g}" in README
    assert f"the loss was lowest at step {row['minimum_step']:.0f} " in README
    assert f"ends by itself at step {row['switch_step']};" in " ".join(README.split())
    assert row["wall_s"] < 60


def test_table_of_arguments_is_complete():
    table = README.split("## Arguments")[1].split("The LR range by")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE))))
    parameters = inspect.signature(AutoWU).parameters
    assert named == set(parameters)
    for name, parameter in parameters.items():
        if parameter.default not in (None, parameter.empty):
            shown = f'"{parameter.default}"' if isinstance(parameter.default, str) else str(parameter.default)
            assert re.search(rf"^\| `{name}` \| `{re.escape(shown)}` \|", table, re.MULTILINE), name


def test_table_of_ranges_is_the_one_in_use():
    table = README.split("The LR range by")[1].split("## LARS")[0]
    rows = re.findall(r"^\| [^|]+ \| (\d\S*) \| (\d\S*) \|$", table, re.MULTILINE)
    assert [(float(low), float(high)) for low, high in rows] == [LR_RANGES[name] for name in ORDER]


def test_share_of_the_paper_is_the_measured_one():
    agree = sum(row["agree"] for row in results("paper_decisions"))
    of = sum(row["of"] for row in results("paper_decisions"))
    assert f"on {agree / of:.0%} of the curves" in README
