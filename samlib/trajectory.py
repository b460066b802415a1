"""A run being trained: where it is, what it has measured, how it steps on, and how it comes back after a kill."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from .config import RunConfig
from .experiments.task import Task
from .hessian import HessianOperator
from .journal import note
from .laws import EdgeLaw
from .observables import PATHS, PLACES, Point, observe
from .provenance import provenance
from .rules import law_of
from .rules import optimizer as make_optimizer
from .rules import schedule as make_schedule
from .runs import Outcome, Run, RunStore
from .stepping import Closure, Step, base_alone, descent_from, take

__all__ = ["OutOfTime", "Trajectory"]

CHECKPOINT_SECONDS = float(os.environ.get("SAMLIB_CHECKPOINT_SECONDS", 5))
CHECK_EVERY = {"cpu": 1, "cuda": 50}  # steps between looks at the loss: on a GPU each waits for the device
DIVERGED = 1e3  # a loss this many times the initial one never came back in any run we saw
EVALUATE_EVERY = 4  # mini-batch runs repeat each fourth measurement on the larger evaluation batch


class OutOfTime(Exception):
    """The deadline passed; the run's checkpoint is in the store."""


class Trajectory:
    """A run on its way.

    At a step that is measured, the optimizer steps first, from gradients that the Hessian's graph gave already, and
    the spectrum is looked at afterwards, on a copy of w: the step's gradients are those of the row.

    Args:
        run_id: of the run.
        task: what it trains.
        store: where its checkpoint is looked for and kept; without one nothing is kept.
    """

    def __init__(self, run_id: str, task: Task, store: RunStore | None = None) -> None:
        self.run_id, self.task, self.store = run_id, task, store
        self.config = config = task.config
        self.params = nn.Parameter(task.initial_parameters())
        self.optimizer = make_optimizer(config, self.params, task.epoch)
        self.schedule = make_schedule(config, self.optimizer)
        self.step = self.evaluations = 0
        self.rows: list[dict[str, float]] = []
        self.path: list[list[float]] = []
        self.memory: dict[str, Any] = {"": {}, "eval_": {}}
        self.direction: tuple[Tensor, Tensor] | None = None
        self.levels = list(config.measure_at_losses)
        self.outcome: Outcome = "finished"
        self._losses: list[Tensor] = []  # of the last steps, not yet looked at
        state = store.load_checkpoint(run_id, config.device) if store else None
        if state:
            self._restore(state)
        self._started = time.monotonic() - (state["seconds"] if state else 0.0)
        self._saved = time.monotonic()

    # What a checkpoint holds, by name: all that the next step hangs on.
    _PLAIN = ("step", "evaluations", "rows", "path", "memory", "direction", "levels")

    def _state(self) -> dict[str, Any]:
        training = self.task.training
        return {
            **{name: getattr(self, name) for name in self._PLAIN},
            "params": self.params.detach(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "buffers": training.buffers if training else None,
            "seconds": self.seconds,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.params.data.copy_(state["params"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        if self.task.training:
            self.task.training.buffers = state["buffers"]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def complete(
        self, progress: Callable[[RunConfig, dict[str, float]], None] | None = None, deadline: float = math.inf
    ) -> Run:
        """Go on to the end.

        Raises:
            OutOfTime: if the deadline passed; a checkpoint is in the store.
        """
        note("start", run=self.run_id, step=self.step, steps=self.config.steps)
        last = False
        while not last:
            reasons = self._reasons_to_measure()
            last = "last" in reasons
            if (reasons and self._diverged()) or self.advance(reasons, stay=last):
                self.outcome = "diverged"
                break
            if reasons and progress:
                progress(self.config, self.rows[-1])
            if last:
                break
            late = time.time() > deadline
            due = late or time.monotonic() - self._saved > CHECKPOINT_SECONDS
            if (due or len(self._losses) >= CHECK_EVERY[self.config.device]) and self._diverged():
                self.outcome = "diverged"
                break
            if self.store and due:
                self._checkpoint()
            if late:
                raise OutOfTime(f"run {self.run_id} stopped after step {self.step} of {self.config.steps}")
        return self._run()

    def _reasons_to_measure(self) -> dict[str, float]:
        """Why to measure here, if at all: "every" so many steps, a "level" of the loss, the "last" point."""
        config, reasons = self.config, {}
        if self.step % config.measure_every == 0:
            reasons["every"] = 0.0
        looked_at = bool(self.levels) or config.stop_at_loss is not None
        if looked_at and (self.step % config.loss_every == 0 or self.step == config.steps):
            self.task.sync()  # else the statistics of BatchNorm would be those of a step before, or of no step
            loss = float(self.task.everything().value(self.params.detach()))
            while self.levels and loss <= self.levels[0]:
                reasons["level"] = self.levels.pop(0)
            if config.stop_at_loss is not None and loss <= config.stop_at_loss:
                reasons["last"] = 0.0
        if self.step == config.steps:
            reasons["last"] = 0.0
        return reasons

    def advance(self, reasons: dict[str, float], stay: bool = False) -> bool:
        """Take a step, and measure where it started if there is a reason to; whether the run diverged.

        At the end (``stay``) parameters and buffers come back: the step was taken for its gradients only.
        """
        task, step, config = self.task, self.step, self.config
        task.sync()
        tested = [self._test(step)] if config.test_every and step % config.test_every == 0 else []
        objective = task.objective(step)
        measured = task.measured(step, objective) if reasons else None
        keep = None if "edge" in config.observables else False  # a graph is for many products
        operator = HessianOperator(measured, self.params.detach(), retain_graph=keep) if measured else None
        # The gradient of the measured loss is the step's own, to the bit, where both descend the same loss.
        shared = measured is objective and not task.training
        known = operator if shared and not objective.kernel else None
        places = not PLACES.isdisjoint(config.path)
        closure = Closure(objective, self.params, known, task.training, step, places)
        rate = float(self.optimizer.param_groups[0]["lr"])
        before = self.params.detach().clone() if stay or places else self.params.detach()
        buffers = task.training.buffers if task.training else {}
        diverged = False
        with base_alone(self.optimizer) if step < config.warmup_steps else nullcontext():
            # Of the state before the step; only a measurement asks for it.
            law = law_of(self.config, self.optimizer) if operator else None
            try:
                descent = take(self.optimizer, closure)
                if operator and law:
                    row = self._measure(operator, law, rate, descent if shared else None)
            except FloatingPointError:
                row = {"loss": math.inf}
                diverged = True
        if operator or diverged:
            diverged = self._record(row, reasons)
        if stay:
            self.params.data.copy_(before)
            if task.training:
                task.training.buffers = buffers
        elif not diverged:
            evaluated = closure.losses, closure.gradients
            self._took(Step(self.optimizer, before, *evaluated, descent, self.direction, closure), tested)
        return diverged

    def _took(self, step: Step, tested: list[float]) -> None:
        """Book a step."""
        names = self.config.path
        if names or tested:
            self.path.append([self.step, *(PATHS[name](step) for name in names), *(tested or [math.nan])])
        self.evaluations += len(step.losses)
        self._losses.append(step.losses[0])
        if self.schedule:
            self.schedule.step()
        self.step += 1

    def _measure(
        self, operator: HessianOperator, law: EdgeLaw, rate: float, descent: Tensor | None
    ) -> dict[str, float]:
        """The row of this point; with mini-batches also, every now and then, of a larger fixed batch."""
        task, step, memory = self.task, self.step, self.memory

        def at(operator: HessianOperator) -> Tensor:
            warming_up = step < self.config.warmup_steps
            return operator.gradient if warming_up else descent_from(operator, self.config)

        gradient = at(operator) if descent is None else descent
        point = Point(task, step, operator, gradient, law, rate, memory[""])
        row = {"loss": float(operator.value)} | observe(point)
        if point.principal is not None:
            self.direction = (operator.params, point.principal)
        evaluation = task.evaluation_objective()
        every = EVALUATE_EVERY * self.config.measure_every
        if evaluation and "edge" in self.config.observables and step % every == 0:
            wider = HessianOperator(evaluation, operator.params)
            more = observe(Point(task, step, wider, at(wider), law, rate, memory["eval_"], ("edge",)))
            row |= {f"eval_{name}": value for name, value in more.items()}
        return row

    def _record(self, row: dict[str, float], reasons: dict[str, float]) -> bool:
        """Keep a row; whether it says that the run diverged."""
        level = {"loss_level": reasons["level"]} if "level" in reasons else {}
        self.rows.append({"seconds": self.seconds, "step": self.step, **row, **level})
        if not row["loss"] <= DIVERGED * self.rows[0]["loss"]:
            return True
        shown = {"loss": row["loss"], "edge_ratio": row.get("edge_ratio", math.nan)}
        note("step", run=self.run_id, step=self.step, steps=self.config.steps, **shown)
        return False

    def _diverged(self) -> bool:
        """Look at the last steps' losses; if one was beyond recovery, the first of them is the last row."""
        bound = DIVERGED * self.rows[0]["loss"] if self._losses else math.inf
        values = torch.stack(self._losses).tolist() if self._losses else []
        bad = [i for i, value in enumerate(values) if not value <= bound]
        if bad:
            self.rows.append({"seconds": self.seconds, "step": self.step - len(values) + bad[0], "loss": math.inf})
        self._losses.clear()
        return bool(bad)

    def _test(self, step: int) -> float:
        return self.task.test_metric(self.params.detach())

    def _checkpoint(self) -> None:
        assert self.store
        self.store.save_checkpoint(self.run_id, self._state())
        note("checkpoint", run=self.run_id, step=self.step)
        self._saved = time.monotonic()

    def _run(self) -> Run:
        """The completed run."""
        config, frame = self.config, pd.DataFrame(self.rows)
        if self.outcome == "finished":
            self.task.sync()
            frame.loc[frame.index[-1], "test_metric"] = self.task.test_metric(self.params.detach())
        else:
            frame["test_metric"] = math.nan
        about = provenance(self.task) | {
            "seconds": self.seconds,
            "gradients": self.evaluations,
            "matvecs": int(frame.matvecs.sum()) if "matvecs" in frame else 0,
        }
        if config.measure_at_losses:
            about["levels_not_reached"] = self.levels
        path = None
        if self.path:
            path = pd.DataFrame(self.path, columns=["step", *config.path, "test_metric"])
            path = path.astype({"step": "int32"} | dict.fromkeys(path.columns[1:], "float32"))
        return Run(self.run_id, config, frame, self.outcome, about, path)
