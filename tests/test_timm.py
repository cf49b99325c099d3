"""AutoWU behind timm's scheduler protocol, driven as timm's training script drives it, with timm's own meters and savers."""

import argparse
import re

import pytest
import timm
import torch
from processes import ROOT, launch
from sklearn.datasets import load_digits
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, CheckpointSaver, NativeScaler

from autowu import AutoWU
from autowu.integrations.timm import AutoWUScheduler

EPOCHS = 12
BATCH = 64
UPDATES = 28  # of an epoch, 1792 of the 1797 digits


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


IMAGES, LABELS = digits()
loss_fn = torch.nn.CrossEntropyLoss()


def mlp():
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    return torch.nn.Sequential(*layers)


def adamw(model):
    return create_optimizer_v2(model, opt="adamw", weight_decay=0.05)


def batches(epoch, size=BATCH):
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(epoch))
    return [(IMAGES[rows], LABELS[rows]) for rows in order[: UPDATES * BATCH].split(size)]


def train(model, optimizer, lr_scheduler, epochs=range(EPOCHS), accum_steps=1, saver=None):
    """The calls of timm's script: the LR and the loss of every update."""
    lrs, losses = [], []
    for epoch in epochs:
        model.train()
        losses_m = AverageMeter()
        loader = batches(epoch, BATCH // accum_steps)
        num_updates = epoch * UPDATES
        optimizer.zero_grad()
        parts = []
        for batch_idx, (input, target) in enumerate(loader):
            loss = loss_fn(model(input), target) / accum_steps
            loss.backward()
            losses_m.update(loss.item() * accum_steps, input.size(0))
            parts.append(loss.item())
            if (batch_idx + 1) % accum_steps:
                continue
            lrs.append(optimizer.param_groups[0]["lr"])
            losses.append(sum(parts))
            parts = []
            optimizer.step()
            num_updates += 1
            optimizer.zero_grad()
            lr_scheduler.step_update(num_updates=num_updates, metric=losses_m.avg)
        latest_metric = (model.eval()(IMAGES).argmax(1) == LABELS).float().mean().item()
        if saver is not None:
            saver.save_checkpoint(epoch, metric=latest_metric)
        lr_scheduler.step(epoch + 1, latest_metric)
    return lrs, losses


def train_plainly(model, optimizer, scheduler, accum_steps=1):
    lrs = []
    for epoch in range(EPOCHS):
        model.train()
        for batch_idx, (input, target) in enumerate(batches(epoch, BATCH // accum_steps)):
            loss = loss_fn(model(input), target)
            (loss / accum_steps).backward()
            scheduler.observe(loss)
            if (batch_idx + 1) % accum_steps == 0:
                lrs.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return lrs


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


def drive(lr_scheduler, metrics):
    for metric in metrics:
        lr_scheduler.optimizer.step()
        lr_scheduler.step_update(lr_scheduler.num_updates + 1, metric)


def seen(lr_scheduler):
    """The losses of the warm-up as AutoWU has them; NaN for a missing one."""
    scheduler = lr_scheduler.scheduler
    curve = scheduler.history.curve(scheduler.config.warmup_steps)
    return torch.where(curve.counts == 1, curve.sums + curve.anchor, torch.nan).tolist()


def running_means(losses):
    meter = AverageMeter()
    means = []
    for loss in losses:
        meter.update(loss, BATCH)
        means.append(meter.avg)
    return means


# ---------------------------------------------------------------- the same run as with a plain loop


@pytest.mark.parametrize("accum_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_run_is_that_of_a_plain_loop(accum_steps):
    model = mlp()
    optimizer = adamw(model)
    lr_scheduler = AutoWUScheduler(AutoWU(optimizer, UPDATES, EPOCHS))
    lrs, losses = train(model, optimizer, lr_scheduler, accum_steps=accum_steps)

    model = mlp()
    optimizer = adamw(model)
    scheduler = AutoWU(optimizer, UPDATES, EPOCHS)
    expected = train_plainly(model, optimizer, scheduler, accum_steps)

    assert scheduler.switch.by_test
    assert lr_scheduler.scheduler.switch.step == scheduler.switch.step
    assert lrs == pytest.approx(expected, rel=1e-6)
    assert lr_scheduler.scheduler.phase == "done"
    assert seen(lr_scheduler) == pytest.approx(losses[: scheduler.switch.step], rel=1e-9)


@pytest.mark.parametrize("as_metric", [float, torch.tensor], ids=["float", "tensor"])
def test_the_loss_itself_is_taken_as_it_is(as_metric):
    losses = torch.rand(60).tolist()
    optimizer = sgd()
    lr_scheduler = AutoWUScheduler(AutoWU(optimizer, total_steps=200), metric="loss")
    drive(lr_scheduler, [as_metric(loss) for loss in losses])
    assert seen(lr_scheduler) == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize(
    "as_metric",
    [pytest.param(float, marks=pytest.mark.slow), lambda m: torch.tensor(m, dtype=torch.float64)],
    ids=["float", "tensor"],
)
def test_losses_are_recovered_from_the_means_of_long_epochs(as_metric):
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100_000, max_warmup_fraction=0.32, gp=Never()))
    losses = (1 + torch.rand(3, 5000, dtype=torch.float64)).tolist()
    for epoch, of_epoch in enumerate(losses):
        drive(lr_scheduler, [as_metric(mean) for mean in running_means(of_epoch)])
        lr_scheduler.step(epoch + 1)
    assert seen(lr_scheduler) == pytest.approx([loss for of_epoch in losses for loss in of_epoch], rel=1e-10)


class Never:
    """An engine that finds nothing and lets every loss keep a bin of its own."""

    max_points = None

    def posterior(self, curve):
        raise RuntimeError("no curve")


def test_a_short_last_accumulation_comes_out_closer_to_the_mean():
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    meter = AverageMeter()
    for loss, size in [(1.0, 64), (1.0, 64), (1.0, 64), (2.0, 32)]:
        meter.update(loss, size)
        drive(lr_scheduler, [meter.avg])
    assert seen(lr_scheduler)[:3] == pytest.approx([1, 1, 1])
    assert 1 < seen(lr_scheduler)[3] < 2


def test_the_eval_metric_of_an_epoch_is_ignored():
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    drive(lr_scheduler, [1.0, 1.5])
    lrs = lr_scheduler.get_last_lr()
    lr_scheduler.step(1, 1e9)
    assert lr_scheduler.get_last_lr() == lrs
    drive(lr_scheduler, [3.0, 2.0])
    assert seen(lr_scheduler) == pytest.approx([1, 2, 3, 1])


def test_a_missing_mean_leaves_its_loss_to_the_next_one():
    losses = [1.0, 2.0, 3.0, 5.0, 4.0]
    means = running_means(losses)
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    drive(lr_scheduler, [means[0], None, None, means[3], means[4]])
    assert seen(lr_scheduler) == pytest.approx([1, float("nan"), float("nan"), (2 + 3 + 5) / 3, 4], nan_ok=True)


def test_a_loss_that_is_not_finite_hides_the_rest_of_its_epoch_only():
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    drive(lr_scheduler, running_means([1.0, float("nan"), 1.0]))
    lr_scheduler.step(1)
    drive(lr_scheduler, running_means([2.0, 3.0]))
    nan = float("nan")
    assert seen(lr_scheduler) == pytest.approx([1, nan, nan, 2, 3], nan_ok=True)


def test_lr_scale_is_kept():
    model = timm.create_model("test_vit", in_chans=1, num_classes=10, img_size=32)
    optimizer = create_optimizer_v2(model, opt="adamw", layer_decay=0.5)
    lr_scheduler = AutoWUScheduler(AutoWU(optimizer, total_steps=100))
    drive(lr_scheduler, [1.0] * 5)
    mine = [group["lr"] for group in optimizer.param_groups]

    model = timm.create_model("test_vit", in_chans=1, num_classes=10, img_size=32)
    optimizer = create_optimizer_v2(model, opt="adamw", layer_decay=0.5)
    timms = CosineLRScheduler(optimizer, t_initial=100, t_in_epochs=False)
    timms.step_update(5)
    theirs = [group["lr"] for group in optimizer.param_groups]

    assert len(set(theirs)) > 3
    assert [lr / max(mine) for lr in mine] == pytest.approx([lr / max(theirs) for lr in theirs])
    assert max(mine) == pytest.approx(lr_scheduler.scheduler.lr_at(5))


def test_updates_that_the_gradient_scaler_skips_do_not_count():
    model = mlp()
    optimizer = adamw(model)
    lr_scheduler = AutoWUScheduler(AutoWU(optimizer, total_steps=100), metric="loss")
    loss_scaler = NativeScaler(device="cpu")
    for num_updates in range(1, 7):
        loss = loss_fn(model(IMAGES[:64]), LABELS[:64]) * (float("inf") if num_updates == 4 else 1)
        loss_scaler(loss, optimizer)
        optimizer.zero_grad()
        lr_scheduler.step_update(num_updates, loss)
    assert lr_scheduler.num_updates == 6
    assert lr_scheduler.scheduler.last_epoch == 5
    assert len(seen(lr_scheduler)) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_mean_on_a_gpu_is_not_waited_for():
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=1000, test_interval=50))
    means = torch.rand(5, device="cuda").unbind()
    drive(lr_scheduler, means[:1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        drive(lr_scheduler, means[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert lr_scheduler.scheduler.history.device.type == "cuda"


# ---------------------------------------------------------------- resuming


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "timm.md").read_text(), re.DOTALL)


def script(folder, resume=""):
    """What timm's script has when it makes its scheduler."""
    model = mlp()
    optimizer = adamw(model)
    args = argparse.Namespace(epochs=EPOCHS, resume=resume, model="mlp")
    start_epoch = resume_checkpoint(model, resume, optimizer=optimizer) if resume else 0
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(folder), max_history=EPOCHS)
    return {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "start_epoch": start_epoch,
        "saver": saver,
        "torch": torch,
        "updates_per_epoch": UPDATES,
    }


def run_script(folder, resume="", on_updates=True):
    names = script(folder, resume)
    make, _, save, load, _ = SNIPPETS
    for snippet in (make, save, load):
        exec(snippet, names)
    start, lr_scheduler = names["start_epoch"], names["lr_scheduler"]
    if start > 0:
        lr_scheduler.step_update(start * UPDATES) if on_updates else lr_scheduler.step(start)
    lrs, _ = train(names["model"], names["optimizer"], lr_scheduler, range(start, EPOCHS), saver=names["saver"])
    return lr_scheduler.scheduler, lrs, names["model"].state_dict()


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    return folder, *run_script(folder)


@pytest.mark.parametrize("on_updates", [True, False], ids=["step_update", "step"])
@pytest.mark.parametrize("epochs", [2, 8])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, uncut, epochs, on_updates):
    folder, scheduler, lrs, weights = uncut
    assert 2 * UPDATES < scheduler.switch.step < 8 * UPDATES
    resumed, resumed_lrs, resumed_weights = run_script(tmp_path, f"{folder}/checkpoint-{epochs - 1}.pth.tar", on_updates)
    assert resumed_lrs == lrs[epochs * UPDATES :]
    assert resumed.switch == scheduler.switch
    assert all(torch.equal(value, weights[name]) for name, value in resumed_weights.items())


@pytest.mark.parametrize("call", [lambda s: s.step_update(3 * UPDATES), lambda s: s.step(3) or s.step_update(3 * UPDATES + 1, 1.0)])
def test_resuming_without_the_state_raises(call):
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), UPDATES, EPOCHS))
    with pytest.raises(ValueError, match=r"num_updates=8\d: must be 1, .* load the scheduler's state"):
        call(lr_scheduler)


def test_a_state_is_loaded_from_a_file_of_weights_only(tmp_path):
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    drive(lr_scheduler, running_means([2.0, 1.0, 3.0]))
    torch.save(lr_scheduler.state_dict(), tmp_path / "state.pt")
    other = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    drive(other, [9.0])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.num_updates == 3
    assert other.get_last_lr() == lr_scheduler.get_last_lr()
    drive(other, running_means([5.0, 7.0]))
    assert seen(other) == pytest.approx([2, 1, 3, 5, 7])


# ---------------------------------------------------------------- errors


def test_the_number_of_the_last_call_does_nothing():
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    drive(lr_scheduler, [1.0, 1.0])
    lrs = lr_scheduler.get_last_lr()
    lr_scheduler.step_update(2)
    assert lr_scheduler.get_last_lr() == lrs
    assert len(seen(lr_scheduler)) == 2


@pytest.mark.parametrize("num_updates", [1, 4])
def test_a_number_out_of_turn_raises(num_updates):
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100))
    drive(lr_scheduler, [1.0, 1.0])
    with pytest.raises(ValueError, match=f"num_updates={num_updates}: must be 3"):
        lr_scheduler.step_update(num_updates, 1.0)


@pytest.mark.parametrize("mode", ["running_mean", "loss"])
@pytest.mark.parametrize(("metric", "error"), [("1.0", TypeError), (torch.ones(2), ValueError), ([1.0], TypeError)])
def test_a_metric_that_is_no_number_raises_and_changes_nothing(mode, metric, error):
    lr_scheduler = AutoWUScheduler(AutoWU(sgd(), total_steps=100), metric=mode)
    drive(lr_scheduler, [1.0])
    with pytest.raises(error):
        lr_scheduler.step_update(2, metric)
    drive(lr_scheduler, [2.0])
    assert lr_scheduler.num_updates == 2
    assert seen(lr_scheduler) == pytest.approx([1, 3] if mode == "running_mean" else [1, 2])


def test_bad_arguments_raise():
    scheduler = AutoWU(sgd(), total_steps=100)
    with pytest.raises(ValueError, match="metric='mean': must be 'running_mean' or 'loss'"):
        AutoWUScheduler(scheduler, metric="mean")
    with pytest.raises(TypeError, match="must be an AutoWU"):
        AutoWUScheduler(CosineLRScheduler(sgd(), t_initial=10))


# ---------------------------------------------------------------- what is written about it


def test_the_page_works_as_it_stands(tmp_path):
    assert len(SNIPPETS) == 5
    make, loop, _, _, loop_with_loss = SNIPPETS
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), BATCH, shuffle=True, drop_last=True)
    names = script(tmp_path) | {"loader_train": loader, "loss_fn": loss_fn, "AverageMeter": AverageMeter, "validate": lambda _: 0.0}
    exec(make, names)
    exec(loop, names)
    first = names["lr_scheduler"].scheduler
    assert first.phase == "done"
    assert first.switch.by_test

    names |= script(tmp_path)
    exec(loop_with_loss, names)
    second = names["lr_scheduler"].scheduler
    assert second is not first
    assert second.phase == "done"
    assert second.switch.by_test


def test_lookahead_saves_its_state_by_the_optimizer_inside():
    optimizer = create_optimizer_v2(mlp(), opt="lookahead_adamw")
    lr_scheduler = AutoWUScheduler(AutoWU(optimizer, total_steps=100))
    inside = optimizer._base_optimizer
    inside.register_state_dict_post_hook(lambda _, state: state.update(autowu=lr_scheduler.state_dict()))
    drive(lr_scheduler, [1.0, 1.0])
    assert optimizer.state_dict()["autowu"]["num_updates"] == 2


def test_the_example_finds_its_lr():
    done = launch("examples/timm_digits.py", "--epochs", 6)
    step, lr = re.search(r"warm-up ended at update (\d+); peak LR (\S+)", done.stdout).groups()
    assert 10 < int(step) < 69
    assert 1e-4 < float(lr) < 1
    assert f"AutoWU switched at step {step} of 138" in done.stderr
    assert [float(a) for a in re.findall(r"test accuracy (\S+)%", done.stdout)][-1] > 90
