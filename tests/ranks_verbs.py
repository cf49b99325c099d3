"""What tests/test_ranks.py runs on each of two ranks: `python tests/ranks_verbs.py FOLDER`."""

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from autowu.history import MISSING
from autowu.ranks import Ranks

LOSSES = ([1.0, math.nan, math.inf, MISSING, MISSING], [3.0, 2.0, math.nan, MISSING, 5.0])
FLAGS = (False, True)
SAID = ([1.0, 0.5], [7.0, 7.0])


def main(folder):
    dist.init_process_group("gloo")
    ranks, rank = Ranks(), dist.get_rank()
    losses = torch.tensor(LOSSES[rank], dtype=torch.float64)
    average = ranks.average(losses, FLAGS[rank]).tolist()
    exchanged = losses.clone()
    first = ranks.exchange(exchanged, SAID[rank], 2, None, False)
    second = ranks.exchange(losses.clone(), None, 2, torch.tensor([float(rank)]), FLAGS[rank])
    result = {
        "alone": ranks.alone,
        "number": ranks.number,
        "size": ranks.size,
        "sum": ranks.sum(torch.tensor([1.0, 10.0]) * (rank + 1)).tolist(),
        "agree": [ranks.all_agree(torch.tensor([float(rank)])), ranks.all_agree(torch.ones(1))],
        "average": average,
        "exchanged": exchanged.tolist(),
        "missing": first.missing,
        "said": first.words,
        "silent": second.words,
        "sound": [first.sound, second.sound],
        "flagged": [first.flagged, second.flagged],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes itself down


if __name__ == "__main__":
    main(sys.argv[1])
