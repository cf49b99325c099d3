"""AutoWU in the Transformers Trainer: a tiny GPT-2 on the bytes of the standard library's modules."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from processes import ROOT, launch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from autowu import AutoWU
from autowu.integrations.transformers import AutoWUMixin, AutoWUTrainer

LENGTH = 16
STEPS = 80


def blocks():
    text = (Path(os.__file__).parent / "argparse.py").read_bytes()
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


DATA = blocks()


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


class MeanLoss(torch.nn.Module):
    """A model that knows nothing of accumulation: the Trainer divides its losses."""

    def __init__(self):
        super().__init__()
        self.inner = gpt2()

    def forward(self, input_ids, labels):
        return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}


def arguments(folder, cls=TrainingArguments, **changed):
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return cls(**(given | changed))


def trainer_of(folder, cls=AutoWUTrainer, model=None, data=DATA, optimizers=(None, None), **changed):
    return cls(model=model or gpt2(), args=arguments(folder, **changed), train_dataset=data, optimizers=optimizers)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def events_logged(trainer):
    history = trainer.state.log_history
    return [(entry["autowu_event"], entry["message"], entry["step"]) for entry in history if "autowu_event" in entry]


def seen(scheduler):
    """The losses of the warm-up, one a step, as AutoWU has them."""
    curve = scheduler.history.curve(scheduler.config.warmup_steps)
    assert curve.counts.tolist() == [1] * len(curve.counts)
    return (curve.sums + curve.anchor).tolist()


def replayed(losses, **options):
    """The LRs of a plain loop that passes the same losses."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    scheduler = AutoWU(optimizer, **({"total_steps": len(losses)} | options))
    lrs = []
    for loss in losses:
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(loss)
    return lrs


@pytest.fixture(scope="module", params=[1, 2], ids=["no accumulation", "accumulation"])
def trained(request, tmp_path_factory):
    """The Trainer after a run, each step of it logged."""
    trainer = trainer_of(tmp_path_factory.mktemp("run"), gradient_accumulation_steps=request.param)
    trainer.train()
    return trainer


def test_the_warm_up_ends_past_the_minimum_and_the_model_learns(trained):
    scheduler = trained.lr_scheduler
    assert type(scheduler) is AutoWU
    assert scheduler.switch.probability > 0.95
    assert scheduler.phase == "done"
    assert logged(trained, "loss")[-1] < 0.7 * logged(trained, "loss")[0]


def test_the_losses_seen_are_those_logged(trained):
    losses = seen(trained.lr_scheduler)
    assert len(losses) == trained.lr_scheduler.switch.step
    assert losses == pytest.approx(logged(trained, "loss")[: len(losses)], rel=1e-12)


def test_the_lrs_are_those_of_a_plain_loop_with_the_losses_logged(trained):
    assert logged(trained, "learning_rate") == replayed(logged(trained, "loss"))


def test_the_range_is_that_of_the_optimizer_inside_accelerates_own(trained):
    assert isinstance(trained.lr_scheduler.optimizer, AcceleratedOptimizer)
    assert isinstance(trained.optimizer.optimizer, torch.optim.AdamW)
    assert (trained.lr_scheduler.config.min_lr, trained.lr_scheduler.config.max_lr) == (1e-5, 1.0)


# An epoch has five batches: accumulations of 2, 2 and 1.
SHORT = {"data": DATA[:80], "max_steps": -1, "num_train_epochs": 6, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("model", [gpt2, MeanLoss], ids=["divided by the model", "divided by the Trainer"])
def test_an_incomplete_accumulation_counts_as_what_is_logged(tmp_path, model):
    frozen = {"min_lr": 1e-30, "max_lr": 1e-29, "patience": 1000, "max_warmup_fraction": 0.9, "immediate_cooldown": True}
    trainer = trainer_of(tmp_path, model=model(), lr_scheduler_kwargs=frozen, **SHORT)
    assert trainer.model_accepts_loss_kwargs == (model is gpt2)
    trainer.train()
    losses = seen(trainer.lr_scheduler)
    assert trainer.state.global_step == 18
    assert len(losses) == 16
    assert losses == pytest.approx(logged(trainer, "loss")[:16], rel=1e-12)
    # Nothing was learned: a sum or a mean of the wrong number of micro-batches would be off by a factor of 2.
    assert max(losses) / min(losses) < 1.05


def test_losses_of_an_evaluation_are_not_seen(tmp_path):
    trainer = AutoWUTrainer(
        model=gpt2(),
        args=arguments(tmp_path, max_steps=20, eval_strategy="steps", eval_steps=2),
        train_dataset=DATA,
        eval_dataset=DATA[:64],
    )
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 10
    assert seen(trainer.lr_scheduler) == pytest.approx(logged(trainer, "loss")[:6], rel=1e-12)


SAVING = {"save_strategy": "steps", "save_steps": 15, "gradient_accumulation_steps": 2, "max_steps": 60}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("uncut"), **SAVING)
    trainer.train()
    return trainer


@pytest.mark.parametrize("cut", [15, 45])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, uncut, cut):
    assert 15 < uncut.lr_scheduler.switch.step < 45
    torch.manual_seed(1)
    trainer = trainer_of(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=f"{uncut.args.output_dir}/checkpoint-{cut}")
    # The log of a checkpoint is part of it.
    assert logged(trainer, "learning_rate") == logged(uncut, "learning_rate")
    assert logged(trainer, "loss") == logged(uncut, "loss")
    assert trainer.lr_scheduler.switch == uncut.lr_scheduler.switch
    assert events_logged(trainer) == events_logged(uncut) != []
    weights = uncut.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def test_a_larger_max_steps_extends_a_resumed_run(tmp_path, uncut):
    trainer = trainer_of(tmp_path, **(SAVING | {"max_steps": 75}))
    trainer.train(resume_from_checkpoint=f"{uncut.args.output_dir}/checkpoint-45")
    assert trainer.lr_scheduler.config.total_steps == 75
    assert trainer.lr_scheduler.switch == uncut.lr_scheduler.switch
    assert logged(trainer, "learning_rate")[45] > logged(uncut, "learning_rate")[45]
    assert trainer.lr_scheduler.phase == "done"


def test_training_again_starts_a_new_warm_up(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=20)
    trainer.train()
    first, lrs = trainer.lr_scheduler, logged(trainer, "learning_rate")
    trainer.train()
    assert trainer.lr_scheduler is not first
    assert logged(trainer, "learning_rate")[:6] == lrs[:6]


def test_what_is_left_of_an_accumulation_that_was_cut_is_forgotten(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = trainer_of(tmp_path, max_steps=10, gradient_accumulation_steps=2)
    trainer.add_callback(Stop)
    trainer.train()
    assert trainer.state.global_step == 3
    trainer.remove_callback(Stop)
    trainer.train()
    assert seen(trainer.lr_scheduler) == pytest.approx(logged(trainer, "loss")[:3], rel=1e-12)


def test_a_scheduler_of_the_users_own_is_given_the_losses(tmp_path):
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"total_steps": None, "steps_per_epoch": 30, "total_epochs": 4, "test_interval": 2}
    scheduler = AutoWU(optimizer, **options)
    trainer = trainer_of(tmp_path, model=model, optimizers=(optimizer, scheduler))
    trainer.train()
    assert trainer.lr_scheduler is scheduler
    assert scheduler.switch is not None
    assert seen(scheduler) == pytest.approx(logged(trainer, "loss")[: scheduler.switch.step], rel=1e-12)
    assert logged(trainer, "learning_rate") == replayed(logged(trainer, "loss"), **options)


def test_a_scheduler_of_another_kind_is_left_alone(tmp_path):
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    trainer = trainer_of(tmp_path, model=model, optimizers=(optimizer, scheduler), max_steps=12)
    trainer.train()
    assert trainer.lr_scheduler is scheduler
    assert logged(trainer, "learning_rate") == [1e-3] * 5 + [5e-4] * 5 + [2.5e-4] * 2


def test_the_mixin_serves_other_trainers(tmp_path):
    class MyTrainer(AutoWUMixin, Seq2SeqTrainer):
        pass

    args = arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=20)
    trainer = MyTrainer(model=gpt2(), args=args, train_dataset=DATA)
    trainer.train()
    assert seen(trainer.lr_scheduler) == pytest.approx(logged(trainer, "loss")[:6], rel=1e-12)


def test_options_reach_the_scheduler(tmp_path):
    options = {"immediate_cooldown": False, "cooldown_type": "sqrt", "min_lr": 1e-5, "max_lr": 0.1, "max_warmup_fraction": 0.25}
    options["stable_type"] = "inverse_sqrt"
    trainer = trainer_of(tmp_path, max_steps=40, lr_scheduler_kwargs=options, learning_rate=3.0)
    trainer.train()
    config = trainer.lr_scheduler.config
    assert {name: getattr(config, name) for name in options if name != "max_warmup_fraction"}.items() <= options.items()
    assert (config.total_steps, config.warmup_steps) == (40, 10)
    assert logged(trainer, "learning_rate")[0] == 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience=0"),
        ({"cooldown_type": "step"}, ValueError, "cooldown_type='step'"),
        ({"test_interval": "epoch"}, ValueError, "needs steps_per_epoch"),
        ({"warmup": 3}, TypeError, "unexpected keyword argument 'warmup'"),
    ],
)
def test_bad_options_raise_before_the_first_step(tmp_path, options, error, message):
    trainer = trainer_of(tmp_path, lr_scheduler_kwargs=options)
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_deepspeed_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.create_optimizer()
    trainer.is_deepspeed_enabled = True
    with pytest.raises(NotImplementedError, match="DeepSpeed"):
        trainer.create_scheduler(10)


# What is logged, and trainers of others


def test_numbers_and_events_are_in_the_log(trained):
    history, scheduler = trained.state.log_history, trained.lr_scheduler
    assert logged(trained, "autowu/phase") == sorted(logged(trained, "autowu/phase"))
    assert {*logged(trained, "autowu/phase")} == {0.0, 1.0, 2.0, 3.0}
    assert max(entry.get("autowu/probability", 0) for entry in history) > 0.95
    told = events_logged(trained)
    assert told == [(event.kind, event.message, event.step) for event in scheduler.events]
    assert "switch" in [kind for kind, _, _ in told]


@pytest.mark.parametrize(("kwargs", "has_one"), [({}, True), ({"model": None}, False)])
def test_the_model_is_passed_unless_it_is_left_out(tmp_path, kwargs, has_one):
    trainer = trainer_of(tmp_path, lr_scheduler_kwargs=kwargs)
    trainer.create_optimizer_and_scheduler(20)
    assert (trainer.lr_scheduler._rooms.rollback._live.model is trainer.model) == has_one


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_by_trl_has_the_losses_that_it_logs(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class Tuner(AutoWUMixin, trl.SFTTrainer):
        """TRL's fine-tuning."""

    words = {chr(code): code for code in range(254)} | {"<pad>": 254, "<end>": 255}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    data = datasets.Dataset.from_list([{"input_ids": (row["input_ids"] % 250).tolist()} for row in DATA])
    args = arguments(tmp_path, trl.SFTConfig, max_length=LENGTH, bf16=False, gradient_checkpointing=False)
    trainer = Tuner(model=gpt2(), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    scheduler = trainer.lr_scheduler
    assert type(scheduler) is AutoWU
    assert scheduler.switch.probability > 0.95
    losses = seen(scheduler)
    assert losses == pytest.approx(logged(trainer, "loss")[: len(losses)], rel=1e-4)
    assert "autowu/phase" in trainer.state.log_history[0]


# What every rank runs: a run with a checkpoint between two tests of its warm-up, and that run resumed.
RANK = """
import json, sys
sys.path.insert(0, {tests!r})
from forked import run_ranks
from test_transformers import logged, seen, trainer_of

def work(folder):
    results = []
    for checkpoint in (None, f"{{folder}}/checkpoint-16"):
        saving = {{"max_steps": 60, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 16}}
        options = {{"test_interval": 5, "min_lr": 1e-6}}
        trainer = trainer_of(folder, lr_scheduler_kwargs=options, per_device_train_batch_size=8, **saving)
        trainer.train(resume_from_checkpoint=checkpoint)
        scheduler = trainer.lr_scheduler
        results.append({{
            "switch": vars(scheduler.switch),
            "seen": seen(scheduler),
            "losses": logged(trainer, "loss"),
            "lrs": logged(trainer, "learning_rate"),
        }})
    with open(f"{{folder}}/{{trainer.args.process_index}}.json", "w") as file:
        json.dump([trainer.args.world_size, results], file)

run_ranks(2, work, sys.argv[1])
"""


@pytest.mark.slow  # ranks are held together without a host, too
def test_ranks_switch_alike_and_resume_alike(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(tests=str(Path(__file__).parent)))
    launch(script, tmp_path)
    (size, first), (_, second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert size == 2
    assert len(first) == 2
    assert first == second
    uncut, resumed = first
    assert uncut["switch"]["step"] > 16
    assert uncut["lrs"][:17] == resumed["lrs"][:17]
    # The Trainer logs the mean over the ranks.
    assert uncut["seen"] == pytest.approx(uncut["losses"][: len(uncut["seen"])], rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_handing_over_the_loss_waits_for_nothing(tmp_path):
    class Before(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("error")
            return loss

    class After(AutoWUMixin, Before):
        def training_step(self, *args, **kwargs):
            try:
                return super().training_step(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    trainer = After(model=gpt2(), args=arguments(tmp_path, use_cpu=False, max_steps=20), train_dataset=DATA)
    trainer.train()
    assert trainer.lr_scheduler.history.device.type == "cuda"


# ---------------------------------------------------------------- what is written about it

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "transformers.md").read_text(), re.DOTALL)


@pytest.mark.slow  # the example is quick
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_page_works_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == 6
    usage, options, own, timed, others, resume = SNIPPETS
    names = {"model": gpt2(), "train_dataset": DATA}

    exec(usage, names)
    uncut = names["trainer"]
    assert uncut.lr_scheduler.switch is not None
    assert uncut.state.global_step == 100

    exec(options, names)
    trainer = AutoWUTrainer(model=gpt2(), args=names["args"], train_dataset=DATA)
    trainer.create_optimizer()
    assert trainer.create_scheduler(100).config.max_lr == 0.1
    assert trainer.lr_scheduler.config.cooldown_type == "sqrt"

    names["model"] = gpt2()
    exec(own, names)
    names["trainer"].train()
    assert names["scheduler"].phase == "done"
    assert len(seen(names["scheduler"])) == names["scheduler"].switch.step

    names["model"] = gpt2()
    exec(timed.replace("3600", "3"), names)
    scheduler = names["trainer"].lr_scheduler
    assert (scheduler.phase, scheduler.progress) == ("done", 1.0)
    assert names["trainer"].state.global_step == scheduler.last_epoch
    assert scheduler.lr_at(scheduler.last_epoch) < 0.2 * scheduler.switch.lr

    exec(others, names)
    names["trainer"].train()
    assert len(seen(names["trainer"].lr_scheduler)) == names["trainer"].lr_scheduler.switch.step

    names["model"] = gpt2()
    exec(resume, names)
    weights = uncut.model.state_dict()
    assert names["trainer"].lr_scheduler.switch == uncut.lr_scheduler.switch
    assert all(torch.equal(value, weights[name]) for name, value in names["trainer"].model.state_dict().items())


def test_the_example_finds_its_lr():
    done = launch("examples/transformers_text.py", "--steps", 150)  # the text is that of the Python that runs
    step, lr = re.search(r"warm-up ended at step (\d+); peak LR (\S+)", done.stdout).groups()
    assert 10 < int(step) < 50
    assert 1e-4 < float(lr) < 1
    assert f"AutoWU switched at step {step} of 150" in done.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '(\S+)'", done.stdout)]
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]
