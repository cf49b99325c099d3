"""Start Python in processes of its own."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
_ENV = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Imports take most of the time of a short run: a server has them done, and each process is forked off it.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytest", "torch._dynamo", "timm", "sklearn.datasets", "sklearn.model_selection", "matplotlib.figure", "autowu.training.main"]
)


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


class Forked:
    """`python script arguments` from the root of the checkout, in a forked process that leads a process group of its own.

    Its output is in files of `folder`. The script "-c" is the code that follows.
    """

    def __init__(self, folder, script, *arguments, **env):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "stdout", folder / "stderr"]
        for file in self.files:
            file.write_text("")
        command = [script if script == "-c" else str(ROOT / script), *map(str, arguments)]
        self.process = _SERVER.Process(target=_run, args=(command, self.files, env), daemon=False)
        self.process.start()

    @property
    def stdout(self):
        return self.files[0].read_text()

    @property
    def stderr(self):
        return self.files[1].read_text()

    def wait_for_line(self, start):
        """Wait until it has printed a line that begins so."""
        while not any(line.startswith(start) for line in self.stdout.splitlines()):
            assert self.process.is_alive(), self.stdout + self.stderr
            time.sleep(0.01)

    def end(self, timeout=300):
        """Wait for its end; the exit code, negative for a signal."""
        self.process.join(timeout)
        return self.process.exitcode


def _run(command, files, env):
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # loader processes start as they do in any other process
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(_ENV | env)
    os.chdir(ROOT)
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


@contextmanager
def ranks_started(folder, processes, script, *arguments):
    """As many processes of one group, each forked, with their output in a folder each; at the end none is left."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one for its processes
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    env |= {"TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(processes)}
    started = []
    try:
        for rank in map(str, range(processes)):
            started.append(Forked(folder / f"rank-{rank}", script, *arguments, **env, RANK=rank, LOCAL_RANK=rank))
        yield started
    finally:
        for one in started:
            one.process.kill()
            one.process.join()


def ranks(folder, processes, script, *arguments):
    """Run `python script arguments` in as many forked processes of one group to a good end; `folder` is for their output."""
    with ranks_started(folder, processes, script, *arguments) as started:
        for one in started:
            assert one.end() == 0, one.stdout[-4000:] + "".join(other.stderr[-4000:] for other in started)
