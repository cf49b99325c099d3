"""Start Python in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ENV = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def launch(*command, timeout=300, **env):
    """Run `python command` from the root of the checkout to a good end."""
    for _ in range(4):
        arguments = [sys.executable, *map(str, command)]
        done = subprocess.run(arguments, cwd=ROOT, env=os.environ | _ENV | env, capture_output=True, text=True, timeout=timeout)
        # Torch itself aborts now and then where a process that used gloo and DDP exits.
        if done.returncode == 0 or "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def torchrun(processes, *command, timeout=300):
    """Run `python command` in as many processes of one group."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return launch(*launcher, *command, timeout=timeout)
