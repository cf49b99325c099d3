"""State: the losses of the warm-up and what was made of them: curve, posterior, decision, verdict.

In a process group one collective carries both the losses since the test before, to be averaged, and the first rank's verdict on all
losses before those. A verdict therefore takes effect one test later than in a run of one process, at the same step and with the
same bits everywhere, however the ranks' arithmetic differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Final

import numpy as np
import torch

from autowu.config import UNMEASURED, Config
from autowu.events import EventLog
from autowu.gp import MIN_LENGTHSCALE, ClosedFormGP, CurvePosterior, LossCurveGP
from autowu.gpytorch_engine import GPyTorchGP, PublishedGP
from autowu.history import MISSING, LossHistory
from autowu.phases import BEFORE, State, Verdict, verdict, verdict_of
from autowu.ranks import Heard, Ranks
from autowu.switching import MIN_LOSSES, SwitchDecision, decide

__all__ = ["Judge", "engine"]

_WIDTH: Final = len(fields(Verdict)) - 1
"""Numbers of a verdict on one optimizer; each other one adds its LR."""


class Judge:
    """Tests whether the minimum is past.

    Attributes:
        gp: the engine.
        device: where it does its sums; None for that of the losses.
        history: the losses of the warm-up.
        decision, posterior: of the last test; None before it and on all ranks but the first.
        last: the last verdict, None as long as no curve could be fitted.
        before: the verdicts before that one, four at most, the oldest first.
    """

    def __init__(self, config: Config, gp: LossCurveGP, device: torch.device | None, ranks: Ranks, log: EventLog) -> None:
        self.gp, self.device = gp, device
        # What is staged when a test comes must still be there, for the mean over the ranks.
        self.history = LossHistory(gp.max_points, config.test_interval + MIN_LOSSES)
        self.decision: SwitchDecision | None = None
        self.posterior: CurvePosterior | None = None
        self.last: Verdict | None = None
        self.before: tuple[Verdict, ...] = ()
        self._next: Verdict | None = None  # of the first rank of several, to travel with the next test
        self._previous = torch.tensor(math.nan, dtype=torch.float64)  # the last loss of the interval before
        self._varied = torch.tensor(False)  # whether two losses in a row have differed
        self._repeated = torch.tensor(0)  # losses that were left out because they repeat the one before
        self._ranks, self._log = ranks, log

    def begin(self, config: Config, before: Config) -> None:
        """Forget the curve: another begins by `config`, after one by `before`."""
        scale = before.warmup_steps / config.warmup_steps
        if config.warmup_steps == before.warmup_steps and config.decades:  # other LRs in the same steps
            scale = before.decades / config.decades
        if before.warmup_origin == UNMEASURED:  # the same LRs in other steps
            scale = 1.0
        gp, ranks, log = self.gp, self._ranks, self._log
        if isinstance(gp, ClosedFormGP | GPyTorchGP):  # as long in steps, and in decades of LR
            gp.lengthscale = max(gp.lengthscale * scale, MIN_LENGTHSCALE)
        vars(self).update(vars(Judge(config, gp, self.device, ranks, log)))

    def test(
        self, config: Config, state: State, step: int, *, sound: torch.Tensor | None, flag: bool
    ) -> tuple[Verdict | None, Heard]:
        """The verdict of all ranks on the first `step` losses, None for none, and what else the ranks had to say.

        `sound` and `flag` are what this rank tells the others, see :meth:`~autowu.ranks.Ranks.exchange`.
        """
        if self._ranks.alone:
            self._drop_repeats()
            self._next = self._verdict(config, state, step)
        words = None if self._next is None else self._next.numbers
        heard = self._ranks.exchange(self.history.staged, words, _WIDTH + len(config.others), sound, flag)
        self._drop_repeats()
        self.history.fold()
        if heard.missing and self._ranks.is_first:
            few = f"{heard.missing} losses of the {self._ranks.size} ranks were missing or not finite"
            self._log.once("rank", step, f"{few}; the mean is over the others")
        self._next, found = None, None
        if heard.words:
            if self.last is not None:
                self.before = (*self.before, self.last)[-BEFORE:]
            found = self.last = Verdict.of(heard.words)
        return found, heard

    def _drop_repeats(self) -> None:
        """Take a loss that equals the one before for missing: a metric that is logged now and then is passed again in between."""
        staged = self.history.staged
        if len(staged) == 0:
            return
        before = torch.cat([self._previous.to(staged)[None], staged[:-1]])
        same = staged.isfinite() & (staged == before)
        # Losses that are all equal so far are what they are.
        self._varied = self._varied.to(staged.device) | (staged.isfinite() & before.isfinite() & ~same).any()
        repeated = same & self._varied
        self._previous, self._repeated = staged[-1].clone(), self._repeated.to(staged.device) + repeated.sum()
        staged.masked_fill_(repeated, MISSING)

    def prepare(self, config: Config, state: State, step: int) -> None:
        """Of several ranks, have the first come to its verdict on the losses that the last test has averaged."""
        if not self._ranks.alone and self._ranks.is_first:
            self._next = self._verdict(config, state, step)

    def _verdict(self, config: Config, state: State, step: int) -> Verdict | None:
        """A verdict on the losses so far; None where the curve could not be fitted."""
        try:
            posterior, decision = self._decide(config, state)
        except Exception as error:  # a test must not end a run, whatever an engine raises
            if self._waits_for_losses():
                if 10 * self.history.steps >= config.warmup_limit and not float(self.history.total()[1]):
                    cure = "pass it to scheduler.step(loss), or to scheduler.observe(loss) for each micro-batch"
                    self._log.once("loss", step, f"no loss came with the first {step} steps; {cure}")
                return None
            self._log.once(
                "fit",
                step,
                f"the loss curve could not be fitted ({error}); such a test is no evidence to switch, and the run goes on",
            )
            return None
        steps = self.history.steps
        if posterior.num_losses < steps and (number := steps - posterior.num_losses - int(self._repeated)):
            missing = f"{number} of {steps} losses were missing or not finite"
            self._log.once("loss", step, f"{missing}; they are left out of the fit")
        self.posterior, self.decision = posterior, decision
        return verdict(config, step, decision)

    def _decide(self, config: Config, state: State) -> tuple[CurvePosterior, SwitchDecision]:
        span = config.decades
        curve = self.history.curve(config.warmup_steps)
        device = self.device or curve.sums.device
        posterior = self.gp.posterior(curve.to("cpu" if device.type == "mps" else device))  # MPS has no float64
        # An interval without a finite loss leaves the fitted curve that much behind.
        behind = (curve.end - posterior.end) * config.warmup_steps > config.test_interval - 0.5
        silent = behind and self.history.blown
        decision = decide(
            posterior,
            state.votes,
            confidence=config.confidence,
            patience=config.patience,
            min_contrast=config.min_contrast,
            min_rise=config.min_rise,
            reach=1 / span if span else math.inf,  # a decade of LR
            # One that is begun anew starts near the minimum, as a linear one does.
            waves=span > 0 and config.min_rise > 0 and not state.again,
            silent=silent,
        )
        if behind and not silent:  # no loss came: neither a vote nor the end of the votes in a row
            decision = replace(decision, switch=False, votes=state.votes)
        return posterior, decision

    def _waits_for_losses(self) -> bool:
        """Whether so few losses have come that there is nothing to fit yet."""
        return not self.history.blown and float(self.history.total()[1]) < MIN_LOSSES

    def state_dict(self) -> dict[str, Any]:
        engine_state: dict[str, Any] = getattr(self.gp, "state_dict", dict)()
        return {
            "gp": {"class": type(self.gp).__name__, "state": engine_state},
            "history": self.history.state_dict(),
            "previous": float(self._previous),
            "repeated": int(self._repeated),
            "varied": bool(self._varied),
            "last": None if self.last is None else asdict(self.last),
            "before": [asdict(verdict) for verdict in self.before],
            "next": None if self._next is None else asdict(self._next),
            "decision": None if self.decision is None else asdict(self.decision),
            "posterior": None if self.posterior is None else {k: torch.as_tensor(v) for k, v in vars(self.posterior).items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: if it is of an engine that was not given and that cannot be built.
        """
        self.gp = _loaded_engine(self.gp, state["gp"])
        self.history = LossHistory.from_state_dict(state["history"])
        self.last, self._next = (None if state[key] is None else verdict_of(state[key]) for key in ("last", "next"))
        self.before = tuple(map(verdict_of, state["before"]))
        self._previous = torch.tensor(state["previous"], dtype=torch.float64)
        self._repeated, self._varied = torch.tensor(state["repeated"]), torch.tensor(state["varied"])
        decision, posterior = state["decision"], state["posterior"]
        self.decision = None
        if decision is not None:
            places = {name: tuple(decision[name]) for name in ("minima", "edges")}
            self.decision = SwitchDecision(**(decision | places))
        self.posterior = None
        if posterior is not None:
            arrays: dict[str, Any] = {k: np.asarray(v.cpu()) for k, v in posterior.items()}
            numbers = {"end": float(arrays["end"]), "num_losses": int(arrays["num_losses"])}
            self.posterior = CurvePosterior(**(arrays | numbers))


def engine(gp: str | LossCurveGP, config: Config, seed: int) -> LossCurveGP:
    """The engine that is named, or the one that is given."""
    if not isinstance(gp, str):
        return gp
    lengthscale = 0.2
    if span := config.decades:
        lengthscale = min(lengthscale, max(0.5 / span, MIN_LENGTHSCALE))  # half a decade
    return ClosedFormGP(lengthscale) if gp == "closed-form" else GPyTorchGP(lengthscale=lengthscale, seed=seed)


def _loaded_engine(gp: LossCurveGP, saved: Mapping[str, Any]) -> LossCurveGP:
    """The engine of a saved state: `gp` if it is of the same class, else one of ours."""
    ours: dict[str, type[LossCurveGP]] = {cls.__name__: cls for cls in (ClosedFormGP, GPyTorchGP, PublishedGP)}
    if type(gp).__name__ != (name := saved["class"]):
        if name not in ours:
            raise ValueError(f"gp={gp!r}: the state is of an engine {name}; pass one like it as gp=")
        gp = ours[name]()
    if hasattr(gp, "load_state_dict"):
        gp.load_state_dict(saved["state"])
    return gp
