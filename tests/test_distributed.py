"""Ranks that agree: real gloo processes, each with losses of its own. What they run is in rank_runs.py."""

import json
import re

import numpy as np
import pytest
import torch
from processes import Forked
from rank_runs import CASES, LOWEST, OF_FOUR, SLOW, STEPS, curve, run, scheduler_of

from autowu.ranks import Ranks

NEAR_THE_LOWEST = (0.8 * LOWEST, 1.2 * LOWEST)


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """What each rank found, of two and of four."""
    folder = tmp_path_factory.mktemp("ranks")
    slow = ["--slow"] if request.config.getoption("--slow") else []
    runs = Forked(folder / "out", "tests/rank_runs.py", folder, *slow)
    assert runs.end(400) == 0, runs.stderr
    return {size: [json.loads((folder / f"{rank}_of_{size}.json").read_text()) for rank in range(size)] for size in (2, 4)}


@pytest.fixture(scope="module")
def ranks(results):
    """All cases, of two ranks."""
    return results[2]


@pytest.fixture(scope="module")
def four(results):
    """Those that depend on how many ranks there are, of four."""
    return results[4]


@pytest.fixture(params=["ranks", "four"])
def two_or_four(request):
    return request.getfixturevalue(request.param)


def assert_agree(ranks, case):
    first = ranks[0][case]
    for other in (rank[case] for rank in ranks[1:]):
        assert other["lrs"] == first["lrs"]
        assert other["switch"] == first["switch"]
        assert other["history"] == first["history"]
    return first


def assert_agree_and_switch(ranks, case):
    first = assert_agree(ranks, case)
    assert first["switch"] is not None
    assert first["phase"] == "done"


def quick_or_slow(*cases):
    return pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in cases])


@quick_or_slow(*sorted(set(CASES) - {"groups_of_one", "groups_of_two", "a_rank_that_stops_copying_after_three_setbacks"}))
def test_ranks_run_at_the_same_lr_at_every_step(ranks, case):
    assert_agree_and_switch(ranks, case)


def test_each_of_two_optimizers_has_its_peak_on_all_ranks_and_ranks_with_other_ranges_are_refused(ranks):
    for rank in ranks:
        run = rank["two_optimizers"]
        (first, second), (low, high) = zip(*run["lrs"], strict=True), (run["switch"]["lr"], run["switch"]["others"][0])
        assert (first[run["switch"]["step"]], second[run["switch"]["step"]]) == (low, high)
        assert first[0] == pytest.approx(10 * second[0])
        assert "others=((1e-06, 1.0, 0.4),) on rank 0, ((2e-06, 1.0, 0.4),) on rank 1" in re.sub(
            r"0\.\d+\)", "0.4)", run["refused"]
        )


@pytest.mark.parametrize("case", sorted(set(OF_FOUR) - {"groups_of_two"}))
def test_four_ranks_run_at_the_same_lr_at_every_step(four, case):
    assert_agree_and_switch(four, case)


def test_a_test_makes_one_collective_and_no_other_step_but_the_first_any_where_nothing_is_copied(two_or_four):
    for rank in two_or_four:
        made, interval = rank["different_losses"]["collectives"], rank["different_losses"]["interval"]
        switch = rank["different_losses"]["switch"]["step"]
        # The first compares the ranks' arguments.
        expected = {1: 1} | {step: 1 for step in range(interval, switch, interval) if step >= 10} | {switch: 1}
        assert {step + 1: count for step, count in enumerate(made) if count} == expected


def test_a_cooldown_that_one_rank_was_asked_for_begins_on_all_one_step_later(ranks):
    for rank in ranks:
        run = rank["asked_on_one_rank"]
        assert run["events"] == [["switch", run["switch"]["step"], False], ["cooldown", 402, False], ["end", 452 + 101, False]]
        assert run["lrs"][401] == run["lrs"][402] > run["lrs"][403]
        assert run["lrs"][452] == run["lrs"][-1] == min(run["lrs"][402:]) == pytest.approx(run["switch"]["lr"] / 50)
        # One a step until the run is over, and the first compares the ranks' arguments.
        assert run["collectives"] == [2] + [1] * 49 + [0] * (STEPS - 451)


def test_a_loss_that_rests_in_the_mean_of_the_ranks_ends_the_run_on_all_of_them_at_the_same_step(ranks):
    first, second = (rank["settles"] for rank in ranks)
    assert first["lrs"] == second["lrs"]
    assert first["events"] == second["events"]
    assert first["events"][:2] == [["switch", first["switch"]["step"], False], ["cooldown", first["start"], False]]
    assert first["switch"]["step"] + 100 < first["start"] < 450
    assert first["lrs"][-1] < 0.05 * first["switch"]["lr"]


def test_a_budget_is_that_of_all_ranks_together(ranks):
    for rank in ranks:
        run = rank["budget_of_tokens"]
        assert run["steps"] == pytest.approx(500, abs=2)
        assert run["used"] == pytest.approx(500 * 60, rel=0.01)
        assert run["warmup"] == pytest.approx(250, abs=10)
        assert_falls_to_the_last(run)
    seconds = [rank["budget_of_seconds"]["seconds"] for rank in ranks]
    assert sum(seconds) / 2 == pytest.approx(400, rel=0.01)
    assert_falls_to_the_last(ranks[0]["budget_of_seconds"])


def assert_falls_to_the_last(run):
    lrs, switch = run["lrs"][: run["steps"]], run["switch"]
    cooldown = [lr for lr in lrs[switch["step"] :] if lr < switch["lr"]]
    assert len(cooldown) > 100
    assert cooldown == sorted(cooldown, reverse=True)
    assert lrs[-1] == min(cooldown) < 0.05 * switch["lr"]
    assert set(run["lrs"][run["steps"] :]) == {lrs[-1]}


def test_the_watch_makes_one_collective_a_block_until_the_cooldown_has_halved_the_lr(ranks):
    for rank in ranks:
        made, lrs = rank["watched"]["collectives"], rank["watched"]["lrs"]
        switch, interval = rank["watched"]["switch"]["step"], rank["watched"]["interval"]
        # A block ends with a test, which here comes before it has 10 losses; after the switch it has 10.
        tests = {step: 1 + (step >= 10) for step in range(interval, switch, interval)}
        assert [count for step, count in enumerate(made[: switch - 1], 1) if step % interval == 0] == list(tests.values())
        assert not any(count for step, count in enumerate(made[1 : switch - 1], 2) if step % interval)
        assert made[switch - 1] == 2
        half = next(step for step in range(switch, STEPS) if lrs[step] < lrs[switch] / 2)
        blocks = [step for step, count in enumerate(made, 1) if step > switch and count]
        assert blocks == list(range(switch + 10, blocks[-1] + 1, 10))
        assert half <= blocks[-1] < half + 20
        assert {made[step - 1] for step in blocks} == {1}
        assert [kind for kind, *_ in rank["watched"]["events"]] == ["switch"]


def test_an_explosion_and_a_divergence_are_acted_on_by_all_ranks_at_once(ranks):
    first = assert_agree(ranks, "explodes_and_diverges")
    events = [event for event in first["events"] if event[0] not in ("loss", "rank")]
    assert [kind for kind, *_ in events[:4]] == ["not_finite", "explosion", "switch", "divergence"]
    (_, borne, _), (_, exploded, _), (_, switched, back), (_, diverged, back_again) = events[:4]
    # The loss is NaN from steps 72 and 92 on; the third is in a block of 2, which is read when the next is full.
    assert 74 <= borne <= 78
    assert 94 <= exploded == switched <= 98
    assert switched + 25 < diverged <= switched + 55
    assert back
    assert back_again
    peak = first["lrs"][switched]
    assert first["lrs"][diverged - 1] == peak
    assert first["lrs"][diverged] == pytest.approx(peak / 2)
    for rank in ranks:
        found = rank["explodes_and_diverges"]
        assert [step for step, _ in found["restored"][:3]] == [borne, switched, diverged]
        assert found["restored"] == first["restored"]
        assert found["events"][-len(events) :] == events
        assert found["weights"][switched - 1 :] == first["weights"][switched - 1 :]
        assert torch.tensor(found["last"]).isfinite().all()
        assert found["last"] == first["last"]


def test_one_divergence_of_all_ranks_is_one(ranks):
    assert [kind for kind, *_ in ranks[0]["explodes_and_diverges"]["events"]].count("divergence") == 1


def test_a_divergence_that_is_found_late_goes_back_to_a_copy_from_before_it_shows(ranks):
    found = ranks[0]["goes_uphill"]
    wrong = found["switch"]["step"] + 25
    assert found["restored"][-1][1] <= wrong + 10  # before the loss shows it


@quick_or_slow("a_rank_that_never_copies", "a_rank_that_stops_copying")
def test_where_one_rank_cannot_copy_its_model_all_go_on_without(ranks, case):
    first = assert_agree(ranks, case)
    told = ("explosion", "divergence", "lost")  # weights that go uphill for long are lost
    events = [event for event in first["events"] if event[0] in told]
    assert events
    for rank in ranks:
        found = rank[case]
        assert [event for event in found["events"] if event[0] in told] == events
        assert not any(back for kind, _, back in found["events"] if kind == "divergence")
        np.testing.assert_array_equal(found["weights"], first["weights"])  # NaN or not
        assert found["gave_up_copying"]
    assert [sum(kind == "snapshot" for kind, *_ in rank[case]["events"]) for rank in ranks] == [0, 1] + [0] * (len(ranks) - 2)


def test_ranks_watch_on_together_where_one_stops_copying_after_three_setbacks(ranks):
    found = [rank["a_rank_that_stops_copying_after_three_setbacks"] for rank in ranks]
    assert {(each["watched"], each["setbacks"], each["gave_up"]) for each in found} == {(True, 3, True)}


def test_the_losses_are_averaged_and_the_verdict_comes_one_test_later(two_or_four):
    ranks = two_or_four
    size = len(ranks)
    mean = np.mean([curve(rank) for rank in range(size)], axis=0).tolist()
    alone = scheduler_of()
    run(alone, mean)
    assert alone.switch.by_test
    interval = alone.config.test_interval
    switch = ranks[0]["different_losses"]["switch"]
    assert switch["by_test"]
    assert switch["step"] == alone.switch.step + interval
    for key in ("lr", "minimum", "probability"):
        assert switch[key] == pytest.approx(getattr(alone.switch, key), rel=1e-6)


def test_nans_and_silence_of_some_ranks_leave_the_others_mean(two_or_four):
    ranks = two_or_four
    first = ranks[0]["a_rank_of_nans_and_a_silent_one"]
    assert first["switch"]["by_test"]
    assert NEAR_THE_LOWEST[0] < first["switch"]["minimum"] < NEAR_THE_LOWEST[1]
    assert len([line for line in first["reports"] if "ranks were missing or not finite" in line]) == 1
    assert all(not rank["a_rank_of_nans_and_a_silent_one"]["reports"] for rank in ranks[1:])


def test_the_first_ranks_arithmetic_decides(ranks):
    switch = ranks[0]["ranks_that_round_otherwise"]["switch"]
    assert switch["by_test"]
    assert NEAR_THE_LOWEST[0] < switch["minimum"] < NEAR_THE_LOWEST[1]


def test_a_warmup_at_its_limit_goes_back_to_the_common_minimum(ranks):
    switch = ranks[0]["no_switch_by_test"]["switch"]
    assert (switch["step"], switch["by_test"]) == (STEPS // 2, False)
    assert NEAR_THE_LOWEST[0] < switch["minimum"] < NEAR_THE_LOWEST[1]


def test_ranks_in_groups_of_their_own_run_apart_without_a_collective(ranks):
    for number, rank in enumerate(ranks):
        alone = scheduler_of()
        lrs = run(alone, curve(number).tolist())
        assert rank["groups_of_one"]["lrs"] == lrs
        assert not any(rank["groups_of_one"]["collectives"])


def test_process_group_chooses_who_decides_together(two_or_four):
    ranks = two_or_four
    for pair in zip(ranks[::2], ranks[1::2], strict=True):
        assert pair[0]["groups_of_two"]["lrs"] == pair[1]["groups_of_two"]["lrs"]
    if len(ranks) == 4:
        assert ranks[0]["groups_of_two"]["history"] != ranks[2]["groups_of_two"]["history"]
        assert all("process_group=" in rank["groups_of_two"]["refused"] for rank in ranks)


def test_the_plateau_rule_makes_one_collective_an_epoch(ranks):
    first = ranks[0]["plateau"]
    stable = [count for step, count in enumerate(first["collectives"]) if first["switch"]["step"] <= step < 539]
    assert sum(stable) == len(stable) // 10
    assert min(first["lrs"][500:530]) < 0.6 * first["switch"]["lr"]


def test_held_out_losses_of_all_ranks_set_all_back_to_the_best_weights_together(ranks):
    first, other = (rank["held_out_losses"] for rank in ranks)
    assert first["events"] == other["events"]
    assert first["weights"] == other["weights"]
    event = next(event for event in first["events"] if event["kind"] == "overfitting")
    assert 400 < event["step"] < 480
    assert 390 <= first["weights"][event["step"] - 1] <= 420
    assert first["lrs"][event["step"]] == pytest.approx(first["lrs"][event["step"] - 1] / 2, rel=0.02)  # in the cooldown


def test_each_rank_goes_on_exactly_from_its_own_state(ranks):
    for rank in ranks:
        assert rank["resumed_from_own"]["lrs"] == rank["resumed_from_own"]["expected"]


def test_from_the_first_ranks_state_all_go_on_and_switch(ranks):
    for rank in ranks:
        resumed = rank["resumed_from_first"]
        assert resumed["lrs"][:103] == resumed["expected"][:103]
        assert resumed["switch"]["by_test"]


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_a_model_is_trained_and_stays_the_same_on_all_ranks(ranks, case):
    assert ranks[0][case]["switch"]["by_test"]
    for rank in ranks:
        losses = rank[case]["losses"]
        assert np.mean(losses[-10:]) < 0.2 * losses[0]
        assert torch.equal(torch.tensor(rank[case]["weights"]), torch.tensor(ranks[0][case]["weights"]))
    assert ranks[0][case]["losses"] != ranks[1][case]["losses"]


def test_sharded_and_replicated_models_start_alike(ranks):
    sharded, replicated = (ranks[0][case] for case in ("fsdp2", "ddp"))
    assert sharded["losses"][:20] == pytest.approx(replicated["losses"][:20], rel=1e-4)


def test_a_run_of_one_process_has_no_group():
    ranks = Ranks()
    assert (ranks.alone, ranks.is_first, ranks.number, ranks.size) == (True, True, 0, 1)


def test_a_process_group_of_another_type_is_refused():
    with pytest.raises(TypeError, match="process_group='nccl'"):
        scheduler_of(process_group="nccl")
