"""What is read at every step, against the same path taken by the rules' pure functions."""

import math

import pytest
import torch

from samlib import train
from samlib.experiments.task import Task
from samlib.optim import SAM, graphsam_step
from samlib.rules import optimizer
from samlib.stepping import Closure, take

from .conftest import small_config, small_language_config

READ = ["loss", "cache_age", "uphill", "uphill_cosine"]
MAKE = {"full batch": small_config, "mini-batches": small_language_config}


def by_hand(config):
    """(loss rises, cosines) of each step: cached SAM as a pure function, and the loss and gradient at both points."""
    task = Task(config)
    w, direction, found = task.initial_parameters(), None, []
    for step in range(config.steps):
        objective = task.objective(step)
        if step % config.every == 0:
            direction = objective.gradient(w)
        e = config.rho * direction / (direction.norm() + 1e-5)
        at_w, gradient = objective.value_and_gradient(w)
        cosine = torch.nn.functional.cosine_similarity(e, gradient, 0)
        found.append((float(objective.value(w + e) - at_w), float(cosine)))
        w, direction = graphsam_step(
            objective.gradient, w, config.learning_rate, config.rho, config.cache_beta, direction
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("beta", [1.0, 0.99, 0.0])
@pytest.mark.parametrize("batches", MAKE)
def test_whether_the_perturbation_goes_uphill(batches, beta):
    config = MAKE[batches](rule="graphsam", every=5, cache_beta=beta, steps=12, dtype="float64", path=READ)
    run = train(config)
    expected = by_hand(config)
    read = torch.tensor(run.path[["uphill", "uphill_cosine"]].to_numpy(), dtype=torch.float64)
    torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-7)  # the record is float32
    assert run.path.cache_age.tolist() == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    assert run.provenance["gradients"] == 12 + math.ceil(12 / 5)  # looking is not counted


def test_looking_does_not_change_the_run():
    config = small_config(rule="graphsam", every=4, cache_beta=0.9, steps=10)
    looked_at = train(config.model_copy(update={"path": tuple(READ)}))
    without = train(config)
    assert (looked_at.measurements.loss == without.measurements.loss).all()


def test_sam_goes_straight_uphill_at_no_cost_and_the_base_alone_has_no_way():
    sam = train(small_config(path=["uphill", "uphill_cosine"], dtype="float64"))
    assert sam.path.uphill_cosine.to_numpy() == pytest.approx(1, abs=1e-6)
    assert (sam.path.uphill > 0).all()
    alone = train(small_config(rho=0.0, path=["uphill", "uphill_cosine"]))
    assert alone.path[["uphill", "uphill_cosine"]].isna().all(axis=None)


@pytest.mark.parametrize("every", [1, 7])
def test_the_start_is_evaluated_only_where_the_optimizer_was_not(every, monkeypatch):
    from samlib.stepping import Step

    config = small_config(rule="graphsam", every=every, dtype="float64")
    task = Task(config)
    params = torch.nn.Parameter(task.initial_parameters())
    stepper = optimizer(config, params)
    assert isinstance(stepper, SAM)
    looks = []
    for step in range(3):
        closure = Closure(task.objective(step), params, step=step, places=True)
        before = params.detach().clone()
        descent = take(stepper, closure)
        taken = Step(stepper, before, closure.losses, closure.gradients, descent, None, closure)
        look = closure.look
        monkeypatch.setattr(closure, "look", lambda w, look=look: looks.append(w) or look(w))
        loss, gradient = taken.start
        expected = task.objective(step).value_and_gradient(before)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(gradient, expected[1])
    assert len(looks) == (0 if every == 1 else 2)
