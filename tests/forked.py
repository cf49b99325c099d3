"""Ranks as forks of one process: imports, which take seconds, are made once."""

import os
import signal
import socket
import sys
import traceback


def run_ranks(size, work, *arguments):
    """Call `work(*arguments)` in as many forks of this process, told what torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = set()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "localhost"}
            _run(work, arguments)
        ranks.add(child)
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status:  # the others would wait for it
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"a rank ended with status {status}")


def _run(work, arguments):
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # gloo's threads now and then abort an interpreter that takes itself down
