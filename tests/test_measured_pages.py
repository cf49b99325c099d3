"""The pages say what the files of results have: each table, and each number in a sentence that hangs on one."""

import json
import math
import statistics
from itertools import product

import pytest
from processes import ROOT


def test_the_page_of_several_optimizers_has_the_measured_table(benchmark):
    pairs = benchmark("pairs")
    table = pairs.report([json.loads(line) for line in pairs.RESULTS.read_text().splitlines()])
    page = (ROOT / "docs" / "several-optimizers.md").read_text()
    assert len(table) >= 6
    assert all(line in page for line in table if line.startswith("|"))


def test_the_page_of_open_ends_has_the_measured_table(benchmark):
    anytime = benchmark("anytime")
    tables = anytime.report(anytime.read()).split("\n\n")
    assert {table.count("\n") for table in tables} == {1 + len(anytime.HORIZONS)}
    assert all(table in (ROOT / "docs" / "horizon.md").read_text() for table in tables)


def test_the_table_of_the_second_look_is_the_measured_one(benchmark):
    second_look = benchmark("second_look")
    tables = second_look.report(second_look.read(second_look.RESULTS)).split("\n\n")
    assert [table.count("\n") for table in tables] == [1 + len(second_look.SHARES) * len(second_look.LOOKS)] * 2
    assert all(table in (ROOT / "docs" / "decision.md").read_text() for table in tables)


def test_the_table_of_runs_passed_by_is_the_measured_one(benchmark):
    passed_by = benchmark("passed_by")
    rows = benchmark("regret").read(passed_by.RESULTS)
    assert {row["seed"] for row in rows} == {*passed_by.SEEDS}
    assert passed_by.report(rows) in (ROOT / "docs" / "decision.md").read_text()


def test_the_tables_of_updates_and_of_scales_are_the_measured_ones(benchmark):
    page = (ROOT / "docs" / "decision.md").read_text()
    sizes, scales = benchmark("update_sizes"), benchmark("loss_scales")
    rows = benchmark("regret").read(sizes.RESULTS)
    assert {row["case"] for row in rows} == sizes.best_lrs().keys()
    assert sizes.report(rows) in page
    rows = benchmark("regret").read(scales.RESULTS)
    assert sorted((row["case"], row["seed"]) for row in rows) == sorted(product((*scales.LOSSES, *scales.INPUTS), scales.SEEDS))
    assert scales.report(rows) in page


def test_the_table_of_peaks_and_decays_is_the_measured_one(benchmark):
    peaks = benchmark("peaks")
    rows = benchmark("regret").read(peaks.RESULTS)
    assert len({row["case"] for row in rows}) == 48
    assert sorted((row["case"], row["seed"]) for row in rows) == sorted(product({row["case"] for row in rows}, (0, 1)))
    assert peaks.report(rows) in (ROOT / "docs" / "decision.md").read_text()


def test_a_thousand_runs_and_their_false_set_backs_are_the_measured_ones(benchmark):
    false_setbacks = benchmark("false_setbacks")
    rows = benchmark("regret").read(false_setbacks.RESULTS)
    assert sorted((row["case"], row["seed"]) for row in rows) == sorted(product(false_setbacks.FAST, false_setbacks.SEEDS))
    assert len(rows) >= 1000
    assert all((row["twin"] is not None) == ("divergence" in row["watched"]["events"]) for row in rows)
    page = (ROOT / "docs" / "decision.md").read_text()
    *of_set_backs, ramps = false_setbacks.report(rows).split("\n\n")
    assert "\n\n".join(of_set_backs) in page
    assert ramps in page
    assert all((row.get("flat") is not None) == ("ramp" in row["watched"]["events"]) for row in rows)
    looked = [row for row in rows if "raised" in row["watched"] and row["seed"] in false_setbacks.OF_RAMPS]
    raised = [row["watched"]["test"] / row["flat"]["test"] for row in looked]
    lower, higher = sum(ratio < 0.98 for ratio in raised), sum(ratio > 1.02 for ratio in raised)
    assert f"Of the {len(raised)} runs that are raised {lower} end lower by more than 2 %, and {higher} higher" in page
    looked = [row["watched"] | {"flat": row["flat"]} for row in rows if row.get("flat") is not None]
    smooth = sum("raised" not in row and row["test"] == row["flat"]["test"] for row in looked)  # not a step was spent
    assert f"{smooth} of {len(looked)} of the thousand below" in " ".join(page.split())


def test_the_table_of_the_language_model_is_the_measured_one(benchmark):
    smollm2 = benchmark("smollm2")
    head, *rows = [json.loads(line) for line in smollm2.SETTINGS["cpu"].results.read_text().splitlines()]
    ran = [(row["case"], row["method"], row["lr"], row["seed"]) for row in rows]
    assert len(set(ran)) == len(ran)
    assert set(ran) <= set(smollm2.wanted([*smollm2.CASES], [*smollm2.SEEDS]))
    assert {(case, "autowu", None, 0) for case in smollm2.CASES} < set(ran)
    assert all(len(row["losses"]) == smollm2.STEPS for row in rows)
    page = (ROOT / "docs" / "results.md").read_text()
    assert smollm2.report(rows, head["untrained"]) in page
    gpu = {}
    head_there, *there = [json.loads(line) for line in smollm2.SETTINGS["cuda"].results.read_text().splitlines()]
    assert smollm2.report(there, head_there["untrained"]) in page
    for row in there:
        gpu[row["case"], row["method"], row["lr"], row["seed"]] = f"{row['test_loss']:.3f}"
    found = [statistics.stdev(row["losses"][:12]) for row in there if row["method"] == "autowu"]
    assert f"scatters by {max(found):.2f} at most" in page
    grid = " and ".join(gpu["lora 8", "grid", lr, 1] for lr in (3.162e-4, 1e-3))
    assert f"rank 8 come to {gpu['lora 8', 'autowu', None, 1]} at" in page
    assert f"come to {grid}" in page
    assert (
        f"rank 64 come to {gpu['lora 64', 'autowu', None, 1]}, and the norms with seed 2 to {gpu['norms', 'autowu', None, 2]}"
        in page
    )
    losses = {key[:3]: row["losses"] for key, row in zip(ran, rows, strict=True)}
    found, still = losses["lora 8", "autowu", None], losses["norms", "grid", 3.162e-4]
    gains = [least - loss for loss, least in zip(found[:32], still, strict=False)]
    assert f"scatters by {statistics.stdev(found[:18]):.1f}, and training gains {max(gains):.1f} at most" in page
    assert f"is lowest at step {gains.index(max(gains))}" in page


def test_the_table_of_long_runs_is_the_measured_one(benchmark):
    cases, folder = benchmark("hard_tasks").LONG, ROOT / "benchmarks" / "results" / "long"

    def losses(name):
        rows = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
        return {(row["case"], row["seed"]): row["test_loss"] for row in rows}

    now, before = losses("without_ramps"), losses("before")
    assert now.keys() == before.keys() >= {(case, seed) for case in cases for seed in (3, 4)}
    page = (ROOT / "docs" / "decision.md").read_text()
    for case in cases:
        ratios = {seed: f"{now[case, seed] / before[case, seed]:.2f}" for seed in range(5) if (case, seed) in now}
        cells = [", ".join(ratios[seed] for seed in seeds if seed in ratios) for seeds in ((0, 1, 2), (3, 4))]
        assert f"| {case} | {' | '.join(cells)} |" in page
    ratios = [now[key] / before[key] for key in now if key[1] < 5]
    assert f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}" in page


def test_the_grid_of_the_hard_suite_is_kept_whole_and_its_page_says_what_was_measured(benchmark):
    regret, measures = benchmark("regret"), benchmark("measures")
    folder = ROOT / "benchmarks" / "results" / "hard"
    grid = regret.read(folder / "grid.jsonl")
    assert len({(row["case"], row["lr"], row["seed"]) for row in grid}) == len(grid)
    assert {row["seed"] for row in grid} == {0, 1, 2, 3, 4, 5}
    assert {row["case"] for row in grid} <= set(regret.HARD)
    best = measures.best_of_grid(grid)
    for (case, seed), found in best.items():
        lrs = {row["lr"] for row in grid if (row["case"], row["seed"]) == (case, seed)}
        assert min(lrs) < 0.2 * found.lr < 5 * found.lr < max(lrs), f"{case}, seed {seed}: the grid ends at its best LR"
    page = (ROOT / "docs" / "results.md").read_text()
    rows = table_rows(regret, measures, "hard", (3, 4, 5))
    ratio, error = map(float, rows["default"][4].split(" ± "))
    told = f"default is at {ratio:.2f} of 0.1.0, with a standard error of {error:.2f} over the cases. So it is ahead by"
    said = " ".join(page.split())
    assert f"{told} {(1 - ratio) / error:.1f} of them" in said
    default, before = (outcomes_of(regret, measures, "hard", name, (3, 4, 5)) for name in ("default", "0.1.0"))
    rest, others = ([run for run in runs if not run.case.startswith("friedman")] for runs in (default, before))
    ratio, error = map(float, measures._paired(rest, others).split(" ± "))
    assert f"Without `friedman` it is at {ratio:.2f}, ahead by {(1 - ratio) / error:.1f}" in said
    off = [run for run in default if abs(run.decades) > 0.5]
    assert f"Of the {len(off)} LRs {sum(run.decades > 0 for run in off)} are too high" in said
    ends = [sum(run.steps == end for run in default) for end in (regret.LENGTHS[0], regret.LENGTHS[-1])]
    assert f"{ends[0]} and {ends[1]} of AutoWU's {len(default)} runs are there" in said


@pytest.mark.parametrize("suite", ["hard", "kinds"])
def test_no_tuned_run_is_far_below_the_best_of_the_grid_on_its_seed(benchmark, suite):
    regret, measures = benchmark("regret"), benchmark("measures")
    folder = ROOT / "benchmarks" / "results" / suite
    best = measures.best_of_grid(regret.read(folder / "grid.jsonl"))
    tuned = [row for row in regret.read(folder / "tuned.jsonl") if row["method"] == "tuned 1.0" and row["finite"]]
    assert all(max(row["test_loss"], measures.FLOOR) > 0.95 * best[row["case"], row["seed"]].loss for row in tuned)


def outcomes_of(regret, measures, suite, method, seeds):
    folder = ROOT / "benchmarks" / "results" / suite
    best, tuned = measures.best_of_grid(regret.read(folder / "grid.jsonl")), regret.read(folder / "tuned.jsonl")
    return [run for run in measures.outcomes(regret.read(folder / f"{method}.jsonl"), best, tuned) if run.seed in seeds]


@pytest.mark.parametrize(
    ("suite", "seeds", "heading"),
    [
        ("hard", (3, 4, 5), "A suite of hard cases"),
        ("kinds", (0, 1, 2), "Kinds of training on which nothing was chosen"),
        ("plateaus", (3, 4), "Losses that rest"),
    ],
)
def test_the_page_of_results_has_what_the_rule_and_that_before_reach(benchmark, suite, seeds, heading):
    rows = table_rows(benchmark("regret"), benchmark("measures"), suite, seeds)
    cases, runs = rows["default"][1:3]
    assert (cases, runs) == {"hard": ("17", "51"), "kinds": ("23", "69"), "plateaus": ("11", "22")}[suite]
    of_suite = (ROOT / "docs" / "results.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    for column, what in (
        (3, "standard error over the seeds"),
        (5, "worst case"),
        (7, f"of {runs}"),
        (8, "a decade off"),
        (10, "warm-up"),
    ):
        cells = [rows[method][column] for method in ("0.1.0", "default", "sweep")]
        assert f"{what} | {' | '.join(cells)} |" in of_suite


def test_how_many_peaks_a_second_look_raises_is_measured(benchmark):
    rows = benchmark("regret").read(ROOT / "benchmarks" / "results" / "plateaus" / "default.jsonl")
    raised = sum(row["cooldown_lr"] > 1.01 * row["found_lr"] for row in rows)
    told = f"raises the peak in {raised} of the {len(rows)} runs of all five seeds"
    assert told in " ".join((ROOT / "docs" / "results.md").read_text().split())


def test_what_is_said_of_the_suite_of_other_kinds_is_measured(benchmark):
    regret, measures = benchmark("regret"), benchmark("measures")
    names = ("default", "0.1.0", "onecycle", "plateau", "greedy", "schedule-free", "prodigy", "d-adaptation")
    runs = {name: outcomes_of(regret, measures, "kinds", name, (0, 1, 2)) for name in names}
    default, page = runs["default"], " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert {run.case for run in default} == {*benchmark("other_tasks").KINDS}
    assert f"{sum(run.decades < 0 for run in default)} of {len(default)} lie below the best of the grid" in page

    def mean(name, without=""):
        logs = measures._logs([run for run in runs[name] if not (without and without in run.case)], "case")
        return math.exp(statistics.fmean(logs))

    own = measures.table(default, "").splitlines()[2].split(" | ")
    assert f"**The default is at {float(own[3].split()[0]):.2f} on kinds" in page
    highest = [math.ceil(10 * value) / 10 for value in (float(own[5]), max(run.ratio for run in default))]
    assert "no case above {} in the mean, and no run above {}.".format(*highest) in page
    assert mean("default") > mean("0.1.0")
    swept = measures.sweep(regret.read(ROOT / "benchmarks" / "results" / "kinds" / "grid.jsonl"), (0, 1, 2))
    runs["sweep"] = swept
    assert f"Without it the sweep is at {mean('sweep', 'physics'):.2f} and AutoWU at {mean('default', 'physics'):.2f}." in page
    told = f"OneCycleLR is at {mean('onecycle', 'madgrad'):.2f} and AutoWU at {mean('default', 'madgrad'):.2f}"
    assert told in page
    rest = [f"{mean(name, 'physics'):.2f}" for name in ("greedy", "schedule-free", "prodigy")]
    assert "Without it GreedyLR is at {}, Schedule-Free at {} and Prodigy at {}".format(*rest) in page
    assert sum(math.isinf(run.ratio) for run in runs["d-adaptation"]) == 2
    physics = {name: [run.ratio for run in runs[name] if run.case.startswith("physics")] for name in names}
    bad = {name for name, ratios in physics.items() if statistics.fmean(map(math.log, ratios)) > math.log(100)}
    assert bad == {"greedy", "schedule-free", "prodigy", "d-adaptation"}
    told = f"AutoWU is at {float(own[3].split()[0]):.2f}, and at {own[5]} in the worst case."
    assert told in " ".join((ROOT / "README.md").read_text().split())


def table_rows(regret, measures, suite, seeds):
    """Cells of the table of a suite, 0.1.0, the default, and a sweep on the same cases."""
    folder = ROOT / "benchmarks" / "results" / suite
    grid = regret.read(folder / "grid.jsonl")
    rows = [row for name in ("0.1.0", "default") for row in regret.read(folder / f"{name}.jsonl") if row["seed"] in seeds]
    found = measures.outcomes(rows, measures.best_of_grid(grid))
    cases = {run.case for run in found}
    found += measures.sweep((row for row in grid if row["case"] in cases), seeds)
    lines = measures.table(found, "0.1.0").splitlines()[2:5]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {own[0]: [own[0], *(cell.split(" (")[0] for cell in own[1:])] for own in cells}


@pytest.mark.parametrize(("suite", "seeds"), [("hard", (3, 4, 5)), ("kinds", (0, 1, 2))])
def test_the_page_of_results_has_what_peers_reach(benchmark, suite, seeds):
    regret, measures = benchmark("regret"), benchmark("measures")
    folder = ROOT / "benchmarks" / "results" / suite
    files = [folder / f"{name}.jsonl" for name in (*measures.NAMES, "tuned")]
    rows = [row for file in files for row in regret.read(file) if row["seed"] in seeds]
    cases = sorted({row["case"] for row in rows if row["method"] == "onecycle"})
    ran = {(row["case"], row["method"], row["seed"]) for row in rows}
    methods = ("default", *regret.PEERS, *(f"tuned {length}" for length in regret.LENGTHS))
    assert ran >= {job[:2] + job[3:] for job in regret.jobs(cases, methods, seeds)}
    best = measures.best_of_grid(regret.read(folder / "grid.jsonl"))
    rows = [row for row in rows if row["case"] in cases]
    outcomes = measures.outcomes(rows, best, [row for row in rows if row["method"].startswith("tuned")])
    page = (ROOT / "docs" / "results.md").read_text()
    shown = measures.beside_peers(outcomes, rows, json.loads((folder / "targets.json").read_text()))
    assert shown in page
    leads = {cells[1].strip(): cells[8].split(" ± ") for cells in (line.split("|") for line in shown.splitlines()[3:-2])}
    for name, (below, error) in leads.items() if suite == "hard" else ():
        lead = float(below) / float(error)
        assert 0.95 <= lead < 1.65 if name in ("Schedule-Free", "Prodigy", "GreedyLR") else lead >= 2


def test_the_page_of_the_decision_has_what_probes_of_long_runs_told(benchmark):
    probes = benchmark("probes_long")
    rows = probes.read(probes.RESULTS)
    table = [*probes.report_of_choices(probes.by_run(rows, (0,))), *probes.report_of_climbs(rows)]
    page = (ROOT / "docs" / "decision.md").read_text().splitlines()
    assert len(table) == 27
    assert all(line in page for line in table)


def test_what_is_said_of_ninety_four_optimizers_is_measured(benchmark):
    regret, measures = benchmark("regret"), benchmark("measures")
    folder = ROOT / "benchmarks" / "results" / "optimizers"
    grid = regret.read(folder / "grid.jsonl")
    best = measures.best_of_grid(grid)
    found = {
        what: {run.case: run for run in measures.outcomes(rows, best)}
        for what, rows in (("AutoWU", regret.read(folder / "default.jsonl")), ("usual", regret.usual(grid)))
    }
    assert all({*runs} == {*regret.CASES["optimizers"]} for runs in found.values())
    assert len(benchmark("tasks").PACKAGED) == 94
    page = (ROOT / "docs" / "results.md").read_text()
    means = {}
    for (task, name), (what, other) in product(
        (("mlp", "digits"), ("gru", "source code")), (("AutoWU", "usual"), ("usual", "AutoWU"))
    ):
        runs = [run for case, run in found[what].items() if case.startswith(f"{task} ")]
        ratios, off = [run.ratio for run in runs], [abs(run.decades) for run in runs]
        means[name, what] = f"{measures.geometric_mean(ratios):.2f}"
        lower = sum(run.ratio < found[other][run.case].ratio for run in runs)
        cells = (name, what, means[name, what], f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}")
        counts = (sum(d > 0.5 for d in off), sum(d > 1 for d in off), f"{lower} of {len(runs)}")
        assert f"| {' | '.join(map(str, (*cells, *counts)))} |" in page
    bad = {case.rsplit(" ", 2)[0]: run.ratio for case, run in found["AutoWU"].items() if run.ratio > 2.5}
    assert {*bad} == {"mlp NovoGrad", "mlp Adai", "mlp SCION", "mlp EXAdam", "mlp Gravity", "gru Gravity", "gru FTRL"}
    assert [f"{bad[case]:.2g}" for case in ("mlp Gravity", "gru Gravity", "mlp EXAdam", "gru FTRL")] == ["31", "2.6", "18", "45"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    told = "it is at {} on one task and at {} on another, the LRs that these come with at {} and {}"
    assert told.format(*(means[name, what] for what in ("AutoWU", "usual") for name in ("digits", "source code"))) in readme


def test_what_is_said_of_runs_that_are_cut_is_measured(benchmark):
    resumed = benchmark("resumed")
    rows = resumed.read(resumed.RESULTS)
    assert {row["case"] for row in rows} == {*resumed.TRIED}
    told = resumed.report(rows)
    assert told == "94 of 94 optimizers go on bit for bit from all four cuts."
    assert f"(`benchmarks/resumed.py`, {told[:8]})" in (ROOT / "docs" / "results.md").read_text()
