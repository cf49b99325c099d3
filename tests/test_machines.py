"""train.py on several machines, each an agent with a loopback address of its own: the commands of the docs, in real processes."""

import json
import os
import re
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

SMALL = ["--model", "test_vit", "--img-size", "16", "--epochs", "8", "--device", "cpu", "--batch-size", "64"]
SMALL += ["--checkpoint-steps", "3", "--max-warmup-fraction", "0.5"]
ENV = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LOGLEVEL": "INFO"}
FIRST, SECOND = "127.0.0.1", "127.0.0.2"  # in the order of their ranks


def meeting_point():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Machine:
    """A launcher with a command, its output in a file."""

    def __init__(self, out, *command, **env):
        self.out = out
        with out.open("w") as file:
            command = [sys.executable, "-m", *map(str, command)]
            self.process = psutil.Popen(command, cwd=ROOT, env=os.environ | ENV | env, stdout=file, stderr=subprocess.STDOUT)

    @property
    def output(self):
        return self.out.read_text()

    @property
    def worker(self):
        """Its process that trains."""
        (worker,) = self.process.children()
        return worker

    def wait_for(self, text):
        wait_until(lambda: text in self.output, self)

    def power_off(self):
        """All at once: the launcher, then its processes, which have groups of their own."""
        psutil.wait_procs(self._signal(signal.SIGKILL), 10)

    def unplug(self):
        """It answers no more, and no connection is closed."""
        self._signal(signal.SIGSTOP)

    def end(self):
        return self.process.wait(100)

    def _signal(self, number):
        processes = [self.process, *self.process.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return processes


def wait_until(condition, *waited_for):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "".join(machine.output for machine in waited_for)
        time.sleep(0.01)


@contextmanager
def machines(folder, *commands):
    started = [Machine(folder / f"out-{number}", *command) for number, command in enumerate(commands)]
    try:
        yield started
    finally:
        for machine in started:
            if machine.process.is_running():
                machine.power_off()


class Job:
    """One run of train.py: the same command on each machine, but for its address. They meet at the first, or at `port`."""

    def __init__(self, folder, started, nodes="2", port=None):
        self.run, self._folder, self._started, self._has_own_port = folder / "run", folder, started, port is None
        self._launcher = ["torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=3"]
        self._launcher += [f"--rdzv-endpoint=127.0.0.1:{port or meeting_point().port}", "--rdzv-id=job", "--rdzv-backend=c10d"]
        self._launcher += ["--rdzv-conf=keep_alive_interval=2"]

    def start(self, address):
        command = [*self._launcher, f"--local-addr={address}", "train.py", *SMALL, "--run-dir", self.run, "--resume", "auto"]
        machine = Machine(self._folder / f"out-{len(self._started)}", *command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        self._started.append(machine)
        return machine

    def begin(self, *addresses):
        """Start machines; all train then, and a checkpoint is there."""
        first = self.start(addresses[0])
        if self._has_own_port:
            first.wait_for("Rendezvous'ing")  # it holds the store by then
        all_of_them = [first, *map(self.start, addresses[1:])]
        wait_until((self.run / "checkpoint.pt").exists, *all_of_them)
        return all_of_them


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """The folder of a run of two processes from beginning to end."""
    folder = tmp_path_factory.mktemp("uncut")
    ranks(folder / "out", 2, "train.py", *SMALL, "--run-dir", folder / "run")
    return folder / "run"


def assert_went_on(run, uncut):
    assert (run / "metrics.csv").read_text() == (uncut / "metrics.csv").read_text()
    whole, other = (torch.load(path / "checkpoint.pt", weights_only=True)["model"] for path in (uncut, run))
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_machine_that_is_lost_joins_again_when_it_is_back(tmp_path, uncut):
    with machines(tmp_path) as started:
        job = Job(tmp_path, started)
        stays, goes = job.begin(FIRST, SECOND)
        goes.power_off()
        assert not (job.run / "summary.json").exists()
        comes = job.start(SECOND)
        assert [machine.end() for machine in (stays, comes)] == [0, 0], stays.output + comes.output
    assert "another process is gone" in stays.output
    assert_went_on(job.run, uncut)


def test_a_machine_that_no_longer_answers_is_given_up_when_it_is_back(tmp_path, uncut):
    with machines(tmp_path) as started:
        job = Job(tmp_path, started)
        stays, goes = job.begin(FIRST, SECOND)
        goes.unplug()
        assert not (job.run / "summary.json").exists()
        comes = job.start(SECOND)
        assert [machine.end() for machine in (stays, comes)] == [0, 0], stays.output + comes.output
    assert_went_on(job.run, uncut)


def test_a_spare_machine_takes_the_place_of_one_that_is_lost(tmp_path, uncut):
    with machines(tmp_path) as started:
        job = Job(tmp_path, started)
        stays, goes = job.begin(FIRST, SECOND)
        goes.worker.suspend()  # the run is not over before the spare one is there
        spare = job.start("127.0.0.3")
        spare.wait_for("Rendezvous'ing")
        time.sleep(2)
        goes.power_off()
        assert [machine.end() for machine in (stays, spare)] == [0, 0], stays.output + spare.output
    assert_went_on(job.run, uncut)


def test_any_machine_may_be_lost_where_they_meet_in_a_process_of_its_own(tmp_path, uncut):
    (code,) = re.findall(r'^python -c "(.*)"$', (ROOT / "docs" / "several-machines.md").read_text(), re.MULTILINE)
    port = meeting_point().port
    with machines(tmp_path) as started:
        apart = subprocess.Popen([sys.executable, "-c", code.replace("29400", str(port))])
        try:
            TCPStore("127.0.0.1", port, wait_for_workers=False)  # it is open
            job = Job(tmp_path, started, port=port)
            goes, stays = job.begin(FIRST, SECOND)
            goes.power_off()
            assert not (job.run / "summary.json").exists()
            comes = job.start(FIRST)
            assert [machine.end() for machine in (stays, comes)] == [0, 0], stays.output + comes.output
        finally:
            apart.kill()
            apart.wait()
    assert_went_on(job.run, uncut)


def test_a_job_whose_meeting_point_is_lost_ends_and_goes_on_when_it_is_started_again(tmp_path, uncut):
    with machines(tmp_path) as started:
        job = Job(tmp_path, started)
        goes, stays = job.begin(FIRST, SECOND)
        goes.power_off()
        assert stays.end() != 0
        assert not (job.run / "summary.json").exists()
        both = job.begin(SECOND, FIRST)
        assert [machine.end() for machine in both] == [0, 0], both[0].output + both[1].output
    assert_went_on(job.run, uncut)


def test_a_job_of_one_machine_or_two_goes_on_alone_and_takes_the_other_one_in_again(tmp_path, uncut):
    with machines(tmp_path) as started:
        job = Job(tmp_path, started, nodes="1:2")
        stays, goes = job.begin(FIRST, SECOND)
        goes.power_off()
        stays.wait_for("on 1 x cpu")
        alone = stays.worker
        alone.suspend()  # until the other one is back, however fast this one is
        assert not (job.run / "summary.json").exists()
        comes = job.start(SECOND)
        stays.wait_for("new nodes from group_rank")
        alone.resume()
        assert [machine.end() for machine in (stays, comes)] == [0, 0], stays.output + comes.output
    summary = json.loads((job.run / "summary.json").read_text())
    assert (summary["world_size"], summary["batch_size"], summary["total_steps"]) == (2, 128, 80)


@pytest.mark.parametrize(("options", "model"), [([], "resnet50"), (["--model", "efficientnet_b0"], "efficientnet_b0")])
def test_the_published_command_trains_to_the_end_on_two_machines(tmp_path, options, model):
    for part, count in (("train", 4), ("val", 2)):
        for label in "ab":
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (48, 40), (60 * k, 0, 255 * (label == "b"))).save(folder / f"{k}.png")
    port = meeting_point().port
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
