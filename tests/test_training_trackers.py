"""--log-wandb and --log-trackio: the packages themselves, offline, where they are installed."""

import csv
import sys

import pytest
from processes import launch
from test_training import configured

from autowu.training.main import main
from autowu.training.progress import StepRow
from autowu.training.trackers import open_trackers

RUN = ["--model", "test_vit", "--img-size", "16", "--batch-size", "256", "--device", "cpu", "--max-warmup-fraction", "0.5"]
STEPS = [StepRow(k, 1, 0.1 * k, 2.0 - k, "warmup", None if k == 0 else 0.5, "switch" if k == 2 else "") for k in range(3)]
EPOCH = {"step": 2, "test_loss": 1.5, "test_accuracy": 0.5, "train_loss": 1.0, "images_per_s": 100.0}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of this name, as it would be installed, that keeps what it is told."""

    def installed(name, text=""):
        (tmp_path / "installed").mkdir(exist_ok=True)
        calls = "def init(**arguments):\n    told.append(arguments)\n"
        calls += "def log(values, step):\n    told.append((step, values))\ndef finish():\n    told.append('finished')\n"
        (tmp_path / "installed" / f"{name}.py").write_text(f"told = []\n{calls}{text}")
        monkeypatch.syspath_prepend(tmp_path / "installed")
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield installed
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def test_a_tracker_has_every_step_once_and_a_run_that_goes_on_is_the_same_one(tmp_path, package):
    package("wandb")
    config = configured(tmp_path / "run", "--log-wandb", "--wandb-project", "mine", "--opt", "lamb")
    (tmp_path / "run").mkdir()
    for _ in range(2):
        (tracker,) = open_trackers(config, tmp_path / "run")
    tracker.epoch(STEPS, EPOCH)
    tracker.close()
    first, again, *logged, last = sys.modules["wandb"].told
    assert first == again
    assert (first["project"], first["config"]["opt"], first["resume"]) == ("mine", "lamb", "allow")
    assert first["name"] == f"run-{first['id']}"
    assert [step for step, _ in logged] == [0, 1, 2]
    assert logged[0][1] == {"train/loss": 2.0, "train/lr": 0.0, "train/phase": 1.0}
    assert logged[2][1]["events"] == "switch"
    assert logged[2][1]["epoch/test_accuracy"] == logged[2][1]["train/probability"] == 0.5
    assert last == "finished"


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(tmp_path, package, capsys, fails):
    package("trackio", f"def {fails}(*_, **__):\n    raise ConnectionError('no network')\n")
    assert main([*RUN, "--epochs", "2", "--run-dir", str(tmp_path / "run"), "--log-trackio"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "trackio" in line]
    assert said == ["--log-trackio: no network; the run goes on without it"]
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 10


def test_a_tracker_that_is_not_installed_is_said_before_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "trackio"):
        assert main([*RUN, "--run-dir", str(tmp_path / "run"), f"--log-{name}"]) == 2
        assert capsys.readouterr().err == f"train.py: error: --log-{name}: needs {name}: pip install {name}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_tracked_by_the_package_itself_without_a_network(tmp_path, name):
    pytest.importorskip(name)
    # A process of its own: the packages read their variables once.
    offline = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = launch("train.py", *RUN, "--epochs", "1", "--run-dir", tmp_path / "run", f"--log-{name}", **offline)
    assert "goes on without" not in done.stderr
    if name == "wandb":
        (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    else:
        file = next((tmp_path / "trackio").rglob("*.db"))
    assert file.stat().st_size > 1000
