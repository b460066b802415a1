"""The cached perturbation of ``SAM(every=k, beta=β)``, against the pure step, in every phase of its cycle."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samlib import SAM
from samlib.optim import EPSILON, graphsam_step

from .conftest import problem
from .test_optim import BASES, network, training


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def counted(optimizer, closure):
    """The closure, and a list that grows with every call."""
    calls = []

    def both():
        calls.append(optimizer.perturbed)
        return closure()

    return both, calls


def quadratic(seed=0, size=6):
    """∇(½ wᵀA w + bᵀw) with a random positive A, and a start."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    b, w = torch.randn(2, size, generator=generator, dtype=torch.float64)
    a = a @ a.T / size
    return (lambda w: a @ w + b), w


def walk(gradient, start, steps, base=torch.optim.SGD, **more):
    """The points of SAM's path on one vector, and the optimizer."""
    p = nn.Parameter(start.clone())
    optimizer = SAM([p], base, **more)

    def closure():
        p.grad = gradient(p.detach())
        return p.grad.norm()

    path = []
    for _ in range(steps):
        optimizer.step(closure)
        path.append(p.detach().clone())
    return path, optimizer


@given(
    every=st.integers(1, 5),
    beta=st.sampled_from([0.0, 0.3, 0.99, 1.0]) | st.floats(0, 1),
    rho=st.floats(1e-3, 1.0),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_the_cached_step_is_its_pure_twin(every, beta, rho, seed):
    gradient, w = quadratic(seed)
    path, optimizer = walk(gradient, w, 11, lr=0.05, rho=rho, every=every, beta=beta)
    direction = None
    for step, point in enumerate(path):
        w, direction = graphsam_step(gradient, w, 0.05, rho, beta, None if step % every == 0 else direction)
        torch.testing.assert_close(point, w, rtol=1e-9, atol=1e-11)
    if every > 1:
        cached = optimizer.state[optimizer.param_groups[0]["params"][0]]["cached_direction"]
        torch.testing.assert_close(cached, direction, rtol=1e-8, atol=1e-10)
    assert optimizer.param_groups[0]["age"] == 11 % every


@pytest.mark.parametrize("every", [2, 4])
def test_norms_are_of_all_parameters_together(every):
    """A module's many tensors take the path of one flat vector."""
    objective, params = problem("mlp")
    nn.utils.vector_to_parameters(params.clone(), objective.model.parameters())
    optimizer = SAM(objective.model.parameters(), rho=0.2, lr=0.1, every=every, beta=0.7)
    direction = None

    def closure():
        optimizer.zero_grad()
        objective.loss(objective.model(objective.inputs), objective.targets).backward()

    for step in range(7):
        optimizer.step(closure)
        params, direction = graphsam_step(
            objective.gradient, params, 0.1, 0.2, 0.7, None if step % every == 0 else direction
        )
    torch.testing.assert_close(flat(objective.model.parameters()), params, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("base", BASES)
def test_period_one_is_sam_bit_for_bit(base, beta):
    kind, options = BASES[base]
    first, second = network(), network()
    plain = SAM(first.parameters(), kind, rho=0.3, **options)
    cached = SAM(second.parameters(), kind, rho=0.3, every=1, beta=beta, **options)
    assert torch.equal(training(first, plain), training(second, cached))
    assert not any("cached_direction" in cached.state[p] for p in second.parameters())


@pytest.mark.parametrize("every", [1, 2, 3, 7, 50])
def test_evaluations_and_losses(every):
    """T + ⌈T/k⌉ evaluations; the loss at w where it is known, else at w + e."""
    model = network()
    optimizer = SAM(model.parameters(), rho=0.3, lr=0.1, every=every)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    both, calls = counted(optimizer, closure)
    for step in range(20):
        at_w = (model(x) - 1).square().mean().item()
        fresh = step % every == 0
        assert optimizer.needs_gradient == fresh
        loss = optimizer.step(both).item()
        assert (loss == at_w) == fresh
        assert optimizer.evaluations == (2 if fresh else 1)
    assert len(calls) == 20 + math.ceil(20 / every)
    assert sum(calls) == 20


@pytest.mark.parametrize("kind", ["sgd", "momentum", "nesterov", "adam"])
def test_between_true_gradients_the_perturbed_point_follows_the_base_optimizer(kind):
    """With β = 1 and no decay, w + ρ d/‖d‖ is the base optimizer's path: nothing is flattened in between."""
    base, options = BASES[kind]
    options = {k: v for k, v in options.items() if k != "weight_decay"}
    gradient, w = quadratic(3)
    every, rho = 5, 0.3
    p = nn.Parameter(w.clone())
    optimizer = SAM([p], base, rho=rho, every=every, beta=1.0, **options)

    def closure():
        p.grad = gradient(p.detach())

    for step in range(4 * every):
        if step % every == 0:
            grad = gradient(p.detach())
            moved = rho * grad / (grad.norm() + EPSILON)
            q = nn.Parameter(p.detach() + moved)
            reference = base([q], **options)
            reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(closure)
        q.grad = gradient(q.detach())
        reference.step()
        torch.testing.assert_close(p.detach() + moved, q.detach(), rtol=1e-12, atol=1e-12)


def test_that_identity_does_not_hold_with_weight_decay():
    gradient, w = quadratic(3)
    path, _ = walk(gradient, w, 3, rho=0.3, lr=0.05, weight_decay=0.1, every=3, beta=1.0)
    grad = gradient(w)
    moved = 0.3 * grad / (grad.norm() + EPSILON)
    q = nn.Parameter(w + moved)
    reference = torch.optim.SGD([q], lr=0.05, weight_decay=0.1)
    for _ in range(3):
        q.grad = gradient(q.detach())
        reference.step()
    assert float((path[-1] + moved - q.detach()).norm()) > 1e-4


def through_a_file(model, optimizer, fresh):
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = network(seed=9)
    model.load_state_dict(saved[0])
    optimizer = fresh(model)
    optimizer.load_state_dict(saved[1])
    return model, optimizer


RESUMES = {
    "state_dict": through_a_file,
    "pickle": lambda model, optimizer, _: pickle.loads(pickle.dumps((model, optimizer))),
    "deepcopy": lambda model, optimizer, _: copy.deepcopy((model, optimizer)),
}


@pytest.mark.parametrize("way", RESUMES)
@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adadelta"])
def test_resuming_at_every_phase_is_bit_identical(kind, beta, way):
    base, options = BASES[kind]

    def fresh(model):
        return SAM(model.parameters(), base, rho=0.2, every=3, beta=beta, **options)

    for phase in range(5):
        model = network()
        optimizer = fresh(model)
        training(model, optimizer, steps=phase)
        other = RESUMES[way](model, optimizer, fresh)
        straight = training(model, optimizer, steps=4, seed=1)
        assert torch.equal(training(*other, steps=4, seed=1), straight)
        assert other[1].param_groups[0]["age"] == (phase + 4) % 3


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("plain", [True, False])
def test_states_of_sam_and_of_plain_optimizers_load(kind, plain):
    """A run that was begun without a cache goes on with one; the next step takes a true gradient."""
    base, options = BASES[kind]
    model = network()
    before = base(model.parameters(), **options) if plain else SAM(model.parameters(), base, rho=0.1, **options)
    training(model, before, steps=2)
    state = before.state_dict()
    optimizer = SAM(model.parameters(), base, rho=0.2, every=3, beta=0.9, **options)
    training(model, optimizer, steps=2)
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert (group["rho"], group["every"], group["beta"], group["age"]) == (
        0.2 if plain else 0.1,
        3 if plain else 1,
        *((0.9, 0) if plain else (0.99, 0)),
    )
    group["every"] = 3
    for evaluations in (2, 1, 1, 2):
        training(model, optimizer, steps=1)
        assert optimizer.evaluations == evaluations
    assert group["lr"] == options["lr"]


def test_a_state_loads_back_into_a_plain_optimizer():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.1, lr=0.01, every=3)
    training(model, optimizer, steps=2)
    plain = torch.optim.Adam(model.parameters(), lr=0.5)
    plain.load_state_dict(optimizer.state_dict())
    training(model, plain, steps=1)
    assert plain.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_loading_copies_the_state(kind):
    base, options = BASES[kind]
    models = network(), network()
    optimizers = [SAM(m.parameters(), base, rho=0.1, every=3, **options) for m in models]
    training(models[0], optimizers[0], steps=2)
    state = optimizers[0].state_dict()
    before = copy.deepcopy(state)
    optimizers[1].load_state_dict(state)
    training(models[1], optimizers[1], steps=4)
    training(models[1], optimizers[1], steps=4)
    for index, entries in before["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][index][name])), name


def test_the_gradient_vanishes():
    """At u = 0 the direction stays as it is, at d = 0 it is u's; nothing becomes a NaN."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SAM([p], rho=0.1, lr=0.0, every=10, beta=0.5)
    slopes = torch.tensor([[3.0, 0, 4], [0, 0, 0], [0, 0, 0], [0, 2, 0]], dtype=torch.float64)
    expected = [[3.0, 0, 4], [3.0, 0, 4], [0.3, 0.5, 0.4]]
    given = iter(slopes)

    def closure():
        p.grad = next(given).clone()

    for direction in expected:
        optimizer.step(closure)
        torch.testing.assert_close(optimizer.state[p]["cached_direction"], torch.tensor(direction, dtype=torch.float64))

    zero = SAM([p], rho=0.1, lr=0.0, every=10, beta=0.5)
    given = iter([slopes[1], slopes[1], slopes[3]])
    zero.step(closure)
    assert not zero.state[p]["cached_direction"].any()
    zero.step(closure)
    torch.testing.assert_close(zero.state[p]["cached_direction"], torch.tensor([0, 0.5, 0], dtype=torch.float64))
    assert p.isfinite().all()


@pytest.mark.parametrize("norm", [1e-6, 1.0])
def test_a_held_raw_direction_keeps_the_perturbation(norm):
    """‖d‖ + 1e-5 with the raw d: at ‖g‖ = 1e-6 the cached perturbation is as small as the true one, ρ/11."""
    slope = norm * torch.tensor([0.6, 0.8], dtype=torch.float64)
    p, seen = nn.Parameter(torch.zeros(2, dtype=torch.float64)), []
    optimizer = SAM([p], rho=0.5, lr=0.0, every=4, beta=1.0)

    def closure():
        if optimizer.perturbed:
            seen.append(p.detach().clone())
        p.grad = slope.clone()

    for _ in range(5):
        optimizer.step(closure)
    expected = 0.5 * slope / (norm + 1e-5)
    for point in seen:
        torch.testing.assert_close(point, expected, rtol=1e-12, atol=0)


def test_unnormalised_directions_are_averaged_as_they_are():
    gradient, w = quadratic(1)
    path, _ = walk(gradient, w, 4, rho=0.2, lr=0.05, every=4, beta=0.75, normalize=False)
    direction = gradient(w)
    for point in path:
        descent = gradient(w + 0.2 * direction)
        w, direction = w - 0.05 * descent, 0.75 * direction + 0.25 * descent
        torch.testing.assert_close(point, w, rtol=1e-12, atol=1e-13)


def test_an_adaptive_direction_is_scaled_by_the_weights_of_now():
    gradient, w = quadratic(1)
    path, _ = walk(gradient, w, 4, rho=0.2, lr=0.05, every=4, beta=1.0, adaptive=True)
    direction = gradient(w)
    for point in path:
        t = w.abs() + 0.01
        w = w - 0.05 * gradient(w + 0.2 * t * t * direction / ((t * direction).norm() + EPSILON))
        torch.testing.assert_close(point, w, rtol=1e-12, atol=1e-13)


def test_rho_that_comes_and_goes():
    """At ρ = 0 a step is the base optimizer's own; afterwards the cycle begins anew, not with an old direction."""
    model, plain = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.3, lr=0.01, every=4)
    group = optimizer.param_groups[0]
    counts = []
    for rho in (0.3, 0.3, 0.0, 0.0, 0.3, 0.3):
        group["rho"] = rho
        training(model, optimizer, steps=1)
        counts.append(optimizer.evaluations)
    assert counts == [2, 1, 1, 1, 2, 1]
    # From the start on: bit for bit.
    optimizer = SAM(plain.parameters(), torch.optim.Adam, rho=0.0, lr=0.01, every=4)
    reference = network()
    straight = training(reference, torch.optim.Adam(reference.parameters(), lr=0.01))
    assert torch.equal(training(plain, optimizer), straight)
    assert optimizer.param_groups[0]["age"] == 0


def test_a_group_that_joins_begins_a_new_cycle():
    model = network()
    optimizer = SAM(model[0].parameters(), torch.optim.Adam, rho=0.3, lr=0.01, every=4)
    training(model, optimizer, steps=2)
    model.zero_grad()
    optimizer.add_param_group({"params": model[2].parameters(), "beta": 1.0})
    assert [g["every"] for g in optimizer.param_groups] == [4, 4]
    for age in (1, 2):
        training(model, optimizer, steps=1)
        assert [g["age"] for g in optimizer.param_groups] == [age, age]
    assert all("cached_direction" in optimizer.state[p] for p in model.parameters())


def test_parameters_without_gradients_have_no_direction_and_the_base_initialises_its_state():
    """Adam initialises a state that is empty only: parameters that come into play later still train."""
    torch.manual_seed(0)
    used, late, never = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3))
    optimizer = SAM([used, late, never], torch.optim.Adam, rho=0.1, lr=0.01, every=3, beta=0.5)
    for step in range(6):

        def closure(step=step):
            optimizer.zero_grad()
            loss = used.square().sum() + (late.square().sum() if step >= 2 else 0)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert {"exp_avg", "cached_direction"} <= set(optimizer.state[late])
    assert never not in optimizer.state
    assert all(p.isfinite().all() for p in (used, late))


def test_parameters_with_a_gradient_at_one_point_only():
    """No direction is put into a state that the base optimizer has yet to initialise."""
    torch.manual_seed(0)
    used, first = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    optimizer = SAM([used, first], torch.optim.Adam, rho=0.1, lr=0.01, every=2, beta=0.5)
    for step in range(6):

        def closure(step=step):
            optimizer.zero_grad()
            both = step >= 2 or not optimizer.perturbed
            (used.square().sum() + (first.square().sum() if both else 0)).backward()

        optimizer.step(closure)
        assert (first in optimizer.state) == (step >= 2)
    assert optimizer.state[first]["step"] == 4


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_direction_is_no_alias_of_a_gradient(beta):
    """Gradients zeroed in place, as between two calls, leave it alone."""

    def run(to_none):
        gradient, w = quadratic(2)
        p = nn.Parameter(w.clone())
        optimizer = SAM([p], rho=0.3, lr=0.05, every=3, beta=beta)

        def backward():
            optimizer.zero_grad(set_to_none=to_none)
            grad = gradient(p.detach())
            p.grad = grad if p.grad is None else p.grad.add_(grad)

        for _ in range(5):
            backward()
            optimizer.first_step()
            backward()
            optimizer.second_step()
        return p.detach()

    assert torch.equal(run(True), run(False))


def test_a_group_that_maximizes_keeps_going_downhill():
    p, seen = nn.Parameter(torch.tensor([3.0], dtype=torch.float64)), []
    optimizer = SAM([p], rho=0.5, lr=0.0, maximize=True, every=3, beta=1.0)

    def closure():
        seen.append(p.item())
        p.grad = p.detach().clone()

    for _ in range(3):
        optimizer.step(closure)
    assert seen == pytest.approx([3, 2.5, 2.5, 2.5], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_resumes_bit_identically(dtype):
    """The direction is kept in the parameters' type, which is what loading a state converts to."""

    def make(weights):
        p = nn.Parameter(weights.clone())
        return p, SAM([p], rho=0.5, lr=0.1, momentum=0.9, every=4, beta=0.7)

    def steps(p, optimizer, count):
        for _ in range(count):

            def closure():
                optimizer.zero_grad()
                (p.float().square() * torch.arange(1, 9)).sum().mul(0.05).backward()

            optimizer.step(closure)

    first, optimizer = make(torch.linspace(-1, 1, 8).to(dtype))
    steps(first, optimizer, 2)
    assert optimizer.state[first]["cached_direction"].dtype == dtype
    second, other = make(first.detach())
    other.load_state_dict(optimizer.state_dict())
    steps(first, optimizer, 5)
    steps(second, other, 5)
    assert torch.equal(first, second)
