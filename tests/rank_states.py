"""What tests/test_rank_states.py runs on two ranks: `python tests/rank_states.py FOLDER`."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from autowu import AutoWU

ARGUMENTS = {"steps_per_epoch": 10, "total_epochs": 20, "min_lr": 1e-4, "max_lr": 1.0, "test_interval": 7}
UNLIKE = {
    "max_lr": {"max_lr": 2.0},
    "total_steps": {"steps_per_epoch": 11},
    "test_interval": {"test_interval": 3},
    "watch": {"watch": False},
    "decay_phase_stat": {"decay_phase_stat": "loss", "decay_phase_factor": 0.5},
    "cooldown_type": {"cooldown_type": "sqrt"},
    "stable_type": {"stable_type": "inverse_sqrt"},
    "max_warmup_fraction": {"max_warmup_fraction": 0.2},
    "gp": {"gp": "gpytorch"},
    "rollback": {"rollback": False},
}
CUTS = (13, 25, 45)
"""In a block that has not been sent, with one that is to be read, with votes."""


def made(**arguments):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return AutoWU(optimizer, **({"model": model} | ARGUMENTS | arguments))


def losses(rank, start, stop):
    return [1 + abs(k / 25 - 1) + 0.1 * rank + 0.01 * ((7 * k) % 5) for k in range(start, stop)]


def run(scheduler, values):
    """The LRs, and the collectives of each step."""
    lrs, made = [], []
    for value in values:
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        with CommDebugMode() as mode:
            scheduler.step(value)
        made.append(mode.get_total_counts())
    return lrs, made


def refused(scheduler):
    scheduler.optimizer.step()
    try:
        scheduler.step(1.0)
    except ValueError as error:
        return str(error)
    return None


def other_steps(rank, alone):
    """States of runs that stand at different steps."""
    ahead = made(process_group=alone)
    run(ahead, losses(0, 0, 3 + rank))
    resumed = made()
    resumed.load_state_dict(ahead.state_dict())
    return refused(resumed)


def resumed(rank, cut, saved_by, loaded_by):
    """A run that is cut after `cut` steps and goes on in another group, by the first rank's state."""
    first = made(process_group=saved_by)
    run(first, losses(rank, 0, cut))
    state = [first.state_dict()]
    dist.broadcast_object_list(state)
    again = made(process_group=loaded_by, total_epochs=1)
    again.load_state_dict(copy.deepcopy(state[0]))
    held = again._rooms.rollback.held
    lrs, collectives = run(again, losses(rank, cut, 200))
    reader = again._rooms.reader
    return {
        "pending": state[0]["reader"]["pending"],
        "lrs": lrs,
        "collectives": sum(collectives),
        "switch": vars(again.switch),
        "phase": again.phase,
        "watch": [reader.watch.start, reader.watch.best if again._state.watched else 1.0],
        "flagged": reader.flagged,
        "held": [held is None, again._rooms.rollback.able],
        "saved": state[0]["snapshot"] is None,
        "events": [event.kind for event in again.events],
    }


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    result = {
        "unlike": {name: refused(made(**(other if rank else {}))) for name, other in UNLIKE.items()},
        "other steps": other_steps(rank, alone),
        "alike": run(made(), losses(rank, 0, 9))[1],
        "one to two": [resumed(rank, cut, alone, None) for cut in CUTS],
        "two to one": [resumed(rank, cut, None, alone) for cut in CUTS],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes itself down


if __name__ == "__main__":
    main(sys.argv[1])
