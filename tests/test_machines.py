"""train.py on several machines, each an agent with a loopback address of its own: the commands of the docs, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch
from PIL import Image
from processes import ROOT, ranks
from torch.distributed import TCPStore

pytestmark = pytest.mark.slow  # the quick ones: torchrun and launch in test_train.py, a killed process in test_faults.py

SMALL = ["--model", "test_vit", "--img-size", "16", "--epochs", "12", "--device", "cpu", "--batch-size", "64"]
SMALL += ["--checkpoint-steps", "3", "--max-warmup-fraction", "0.5"]


def free_port():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port


class Machine:
    """A launcher with a command, its output in a file."""

    def __init__(self, out, *command):
        self.out = out
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with out.open("w") as file:
            command = [sys.executable, "-m", *map(str, command)]
            self.process = psutil.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)

    def power_off(self):
        """All at once: the launcher, then its processes, which have groups of their own."""
        gone = [self.process, *self.process.children(recursive=True)]
        for process in gone:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(gone, 10)

    def end(self):
        return self.process.wait(200)


@contextmanager
def machines(folder, *commands):
    started = [Machine(folder / f"out-{number}", *command) for number, command in enumerate(commands)]
    try:
        yield started
    finally:
        for machine in started:
            if machine.process.is_running():
                machine.power_off()


@pytest.mark.parametrize("number", ["2", "1:2"])
def test_a_machine_that_is_lost_and_comes_back_joins_or_the_other_goes_on_alone(tmp_path, number):
    ranks(tmp_path / "out", 2, "train.py", *SMALL, "--run-dir", tmp_path / "uncut")
    run = tmp_path / "run"

    def command(address):
        launcher = ["torch.distributed.run", f"--nnodes={number}", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
        launcher += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", f"--local-addr={address}"]
        launcher += ["--rdzv-conf=keep_alive_interval=1"]
        return [*launcher, "train.py", *SMALL, "--run-dir", run, "--resume", "auto"]

    port = free_port()
    with machines(tmp_path, command("127.0.0.1")) as started:
        time.sleep(2)  # the first of them holds the meeting point
        started.append(Machine(tmp_path / "out-1", *command("127.0.0.2")))
        until = time.monotonic() + 120
        while not (run / "checkpoint.pt").exists():
            assert time.monotonic() < until, started[0].out.read_text() + started[1].out.read_text()
            time.sleep(0.01)
        started[1].power_off()
        assert not (run / "summary.json").exists()
        if number == "2":
            started.append(Machine(tmp_path / "out-2", *command("127.0.0.2")))
        for machine in (started[0], *started[2:]):
            assert machine.end() == 0, machine.out.read_text()
    assert "another process is gone" in started[0].out.read_text()
    if number == "1:2":
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["world_size"], summary["batch_size"], summary["total_steps"]) == (1, 128, 120)
        return
    assert (run / "metrics.csv").read_text() == (tmp_path / "uncut" / "metrics.csv").read_text()
    whole, other = (torch.load(path / "checkpoint.pt", weights_only=True)["model"] for path in (tmp_path / "uncut", run))
    assert all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize(("options", "model"), [([], "resnet50"), (["--model", "efficientnet_b0"], "efficientnet_b0")])
def test_the_published_command_trains_to_the_end_on_two_machines(tmp_path, options, model):
    for part, count in (("train", 4), ("val", 2)):
        for label in "ab":
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (48, 40), (60 * k, 0, 255 * (label == "b"))).save(folder / f"{k}.png")
    port = free_port()
    own = ["--epochs", "1", "--batch-size", "2", "--img-size", "64", "--workers", "1", "--device", "cpu"]

    def command(rank):
        launcher = ["torch.distributed.launch", "--nproc_per_node=1", "--nnodes=2", f"--node_rank={rank}"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={port}", "train.py"]
        return [*launcher, "--data-root", tmp_path / "images", "--amp", *options, *own, "--run-dir", tmp_path / "run"]

    with machines(tmp_path, command(0), command(1)) as started:
        assert [machine.end() for machine in started] == [0, 0], [machine.out.read_text()[-3000:] for machine in started]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["model"], saved["recipe"], saved["opt"], saved["sched"]) == (model, f"{model}-imagenet", "adamp", "paper")
    assert saved["world_size"] == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["total_steps"] == 2
