"""Sharded parameters (FSDP2, hybrid sharding): norms are of the whole tensor, so four processes train as one does."""

import pytest
import torch
from processes import Forked
from sharded_runs import OPTIMIZERS, tensor_parallel, train


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of four processes; hybrid sharding has shards on two of them."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = Forked(folder / "out", "tests/sharded_runs.py", folder)
    assert runs.end(400) == 0, runs.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_are_stepped_as_the_whole(ranks, name):
    alone = train(OPTIMIZERS[name], 0, 1)
    for results in ranks:
        kinds = [kind for other, kind in results if other == name and kind in ("fsdp", "hsdp")]
        assert kinds == ["fsdp", "hsdp"]
        for kind in kinds:
            sharded = results[name, kind]
            for key, weight in alone["weights"].items():
                torch.testing.assert_close(sharded["weights"][key], weight, rtol=1e-3, atol=1e-4)
            assert [layer[0] for layer in sharded["layers"]] == ["0.weight", "3.weight", "5.weight"]
            for layer, expected in zip(sharded["layers"], alone["layers"], strict=True):
                assert layer[1:] == pytest.approx(expected[1:], rel=2e-3)


@pytest.mark.parametrize("name", ["lamb", "tvlars", "muon"])
def test_a_state_gathered_and_spread_again_goes_on_alike(ranks, name):
    for results in ranks:
        for key, weight in results[name, "fsdp"]["weights"].items():
            assert torch.equal(results[name, "resumed"]["weights"][key], weight)


@pytest.mark.parametrize("name", ["lars", "lamb", "lans", "muon"])
def test_norms_go_over_both_axes_of_tensor_parallelism_and_sharding(ranks, name):
    alone = tensor_parallel(OPTIMIZERS[name], None)
    for results in ranks:
        for layer, expected in zip(results[name, "tensor parallel"]["layers"], alone, strict=True):
            assert layer[0] == expected[0]
            assert layer[1:] == pytest.approx(expected[1:], rel=1e-4)
