"""Two real gloo processes: ranks that were given different arguments, and runs that go on with another number of ranks."""

import json

import pytest
from processes import ranks as started
from rank_states import CUTS, UNLIKE


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    started(folder / "out", 2, "tests/rank_states.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", UNLIKE)
def test_ranks_with_different_arguments_all_raise_the_same_error_that_names_them(name, ranks):
    first, second = (rank["unlike"][name] for rank in ranks)
    assert first == second
    assert first.startswith("the ranks were given different arguments: ")
    assert f"{name}" in first
    assert "\n" not in first
    if name in ("max_lr", "test_interval", "watch", "cooldown_type"):
        values = {"max_lr": (1.0, 2.0), "test_interval": (7, 3), "watch": (True, False), "cooldown_type": ("linear", "sqrt")}
        one, other = values[name]
        assert f" {name}={one!r} on rank 0, {other!r} on rank 1" in first


def test_states_of_different_steps_are_noticed(ranks):
    assert ranks[0]["other steps"] == ranks[1]["other steps"]
    assert "last_epoch=3 on rank 0, 4 on rank 1" in ranks[0]["other steps"]


def test_comparing_costs_one_collective_of_the_first_step(ranks):
    assert [rank["alike"] for rank in ranks] == [[1, 0, 0, 0, 0, 0, 1, 0, 0]] * 2


@pytest.mark.parametrize("cut", range(len(CUTS)))
@pytest.mark.parametrize("way", ["one to two", "two to one"])
def test_a_run_goes_on_with_another_number_of_ranks(way, cut, ranks):
    first, second = (rank[way][cut] for rank in ranks)
    for found in (first, second):
        assert found["phase"] == "done"
        assert 15 < found["switch"]["minimum"] < 35
        assert min(found["watch"]) > 0.9  # no loss of 0 was ever pushed
        assert not found["flagged"]
        assert found["held"] == [found["saved"], True]
        assert "explosion" not in found["events"]
        assert (found["collectives"] > 0) == (way == "one to two")
    if way == "one to two":
        assert second["lrs"] == first["lrs"]
        assert second["switch"] == first["switch"]


def test_the_blocks_that_were_to_be_read_are_there(ranks):
    assert any(found["pending"] is not None for found in ranks[0]["two to one"])
