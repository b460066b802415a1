"""The optimizer: against its pure twin, and in the hands of people with models of their own."""

import contextlib
import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from samlib import UniversalSAM, determinant, frobenius, frozen_batch_statistics, integral, trace, universal_step

from .conftest import PROBLEMS, WithBatchNorm, problem

SHARPNESS = {
    "trace": trace,
    "frobenius": frobenius,
    "determinant": determinant(),
    "integral": integral(torch.log, lambda d: 1 + d.square()),
}


def spread(changes):
    """A sharpness of one's own."""
    return changes.std(0)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def training(model, optimizer, steps=3, seed=0, scale=1.0):
    """A few steps on random regression data; gradients may carry a loss scale."""
    generator = torch.Generator().manual_seed(seed)
    calls = 0
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 2, generator=generator, dtype=torch.float64)

        def closure(x=x, y=y):
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            (scale * loss).backward()
            return loss

        optimizer.step(closure)
    training.calls = calls
    return flat(model)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def bowl(p, optimizer, record=None, sign=1.0):
    """A closure on a loss without symmetry, (p₁p₂ − 1)²/2 + 0.1 p₁³."""

    def closure():
        optimizer.zero_grad()
        if record is not None:
            record.append(p.detach().clone())
        loss = sign * ((p[0] * p[1] - 1).square() / 2 + 0.1 * p[0] ** 3)
        loss.backward()
        return loss

    return closure


def parameter(*values):
    return nn.Parameter(torch.tensor(values or (2.0, 0.7), dtype=torch.float64))


@pytest.mark.parametrize("directions", ["normal", ("cube", 0.5)])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", SHARPNESS)
@pytest.mark.parametrize("kind", PROBLEMS[:2])
def test_the_optimizer_and_its_pure_twin_agree(name, paired, directions, kind):
    objective, params = problem(kind)
    torch.nn.utils.vector_to_parameters(params.clone(), objective.model.parameters())
    settings = {"rho": 0.05, "strength": 0.7, "samples": 3, "paired": paired, "directions": directions}
    optimizer = UniversalSAM(objective.model.parameters(), sharpness=SHARPNESS[name], lr=0.1, **settings)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append((optimizer.perturbed, flat(objective.model)))
        loss = objective.loss(objective.model(objective.inputs), objective.targets)
        loss.backward()
        return loss

    for _ in range(3):
        seen.clear()
        optimizer.step(closure)
        assert [p for p, _ in seen] == [False] + [True] * (optimizer.evaluations - 1)
        assert optimizer.evaluations == len(seen) == (7 if paired else 4)
        x = torch.stack([(w - params) / 0.05 for _, w in seen[1 :: 2 if paired else 1]])
        params = universal_step(objective.value_and_gradient, params, 0.1, x, 0.05, 0.7, SHARPNESS[name], paired)
        if paired:
            torch.testing.assert_close(seen[1][1] + seen[2][1], 2 * seen[0][1], rtol=1e-14, atol=1e-15)
        if directions != "normal":
            assert float(x.abs().max()) <= 0.5 + 1e-12
            assert float(x.std()) == pytest.approx(0.5 / 3**0.5, rel=0.15)
        else:
            assert float(x.std()) == pytest.approx(1, rel=0.15)
    torch.testing.assert_close(flat(objective.model), params)


@pytest.mark.parametrize(
    ("base", "settings"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.01}), (torch.optim.AdamW, {})],
)
@pytest.mark.parametrize("name", SHARPNESS)
def test_strength_zero_is_the_base_optimizer_bit_for_bit_at_one_call(name, base, settings):
    first, second = network(), network()
    straight = training(first, base(first.parameters(), **settings))
    optimizer = UniversalSAM(second.parameters(), base, SHARPNESS[name], strength=0.0, samples=4, **settings)
    assert torch.equal(training(second, optimizer), straight)
    assert training.calls == 3
    assert optimizer.evaluations == 1


@pytest.mark.parametrize("name", SHARPNESS)
def test_paired_variants_are_gradient_descent_on_a_quadratic(name):
    torch.manual_seed(0)
    x, y = torch.randn(20, 6).double(), torch.randn(20, 1).double()
    ends = []
    for kind in (torch.optim.SGD, UniversalSAM):
        model = nn.Linear(6, 1).double()
        with torch.no_grad():
            model.weight.fill_(0.5), model.bias.fill_(0.1)
        more = {"sharpness": SHARPNESS[name], "samples": 5, "rho": 0.2} if kind is UniversalSAM else {}
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.5, **more)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SHARPNESS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_resumed_run_repeats_its_directions_bit_for_bit(name, base):
    settings = {"lr": 0.05} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    sharpness = determinant(0.9) if name == "determinant" else SHARPNESS[name]
    sampling = {"samples": 3, "paired": False, "directions": ("cube", 0.3)}
    model = network()
    optimizer = UniversalSAM(model.parameters(), base, sharpness, 0.02, 0.5, seed=5, **sampling, **settings)
    training(model, optimizer)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    straight = training(model, optimizer, seed=1)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model = network(seed=9)
    model.load_state_dict(weights)
    started_as = sharpness if name == "integral" else "trace"
    optimizer = UniversalSAM(model.parameters(), base, started_as, rho=0.7, strength=0.0, lr=9.0)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["rho"] == 0.02
    assert optimizer.sharpness == sharpness
    assert optimizer.directions == ("cube", 0.3)
    assert optimizer.evaluations == 4
    assert torch.equal(training(model, optimizer, seed=1), straight)


def test_seeds_are_different_runs_and_the_same_seed_is_the_same():
    ends = []
    for seed in (0, 0, 1):
        model = network()
        ends.append(training(model, UniversalSAM(model.parameters(), rho=0.3, seed=seed, lr=0.1)))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_states_of_other_kinds():
    model = network()
    optimizer = UniversalSAM(model.parameters(), sharpness=spread, samples=3, rho=0.1, lr=0.05, momentum=0.9)
    training(model, optimizer)
    twin = copy.deepcopy((model, optimizer))
    third = pickle.loads(pickle.dumps((model, optimizer)))
    straight = training(model, optimizer, seed=2)
    assert torch.equal(training(*twin, seed=2), straight)
    assert torch.equal(training(*third, seed=2), straight)
    with pytest.raises(ValueError, match="saved with the function 'spread'"):
        UniversalSAM(model.parameters(), lr=0.1).load_state_dict(optimizer.state_dict())
    other = UniversalSAM(model.parameters(), sharpness=spread, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.samples == 3
    log = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: log.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda *_: log.append("after"))
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9).state_dict())
    assert log == ["before", "after"]
    assert optimizer.param_groups[0] is optimizer.base_optimizer.param_groups[0]
    assert optimizer.param_groups[0]["rho"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.3
    training(model, optimizer)
    assert optimizer.samples == 3


def test_weights_return_bit_for_bit_even_if_the_closure_fails():
    model = network()
    optimizer = UniversalSAM(model.parameters(), rho=1e6, lr=0.0)
    before = copy.deepcopy(model.state_dict())
    training(model, optimizer, steps=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def failing():
        if optimizer.perturbed:
            raise RuntimeError("out of memory")
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3, dtype=torch.float64)).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert not optimizer.perturbed
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_losses_that_are_not_finite_name_the_step_and_leave_the_weights():
    p = parameter()
    optimizer = UniversalSAM([p], rho=0.1, lr=0.1)
    optimizer.step(bowl(p, optimizer))
    before = p.detach().clone()

    def overflowing():
        optimizer.zero_grad()
        loss = p.sum() * (math.inf if optimizer.perturbed else 1.0)
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError, match="loss changes of step 2 are not finite"):
        optimizer.step(overflowing)
    assert torch.equal(p, before)


def test_a_group_without_strength_is_neither_perturbed_nor_changed_by_the_others():
    p, q = parameter(), parameter(3.0, -1.0)
    optimizer = UniversalSAM([{"params": [p]}, {"params": [q], "strength": 0.0}], rho=0.5, lr=0.1)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append((p.detach().clone(), q.detach().clone()))
        loss = (p * q).square().sum() + q.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(seen[1][0], seen[0][0])
    assert torch.equal(seen[1][1], seen[0][1])
    torch.testing.assert_close(q.detach(), seen[0][1] - 0.1 * (2 * seen[0][0].square() * seen[0][1] + 1))
    optimizer.add_param_group({"params": [parameter()], "strength": 0.0})
    optimizer.param_groups[1].update(strength=1.0, rho=0.2)
    with pytest.raises(ValueError, match="must have the same rho"):
        optimizer.step(closure)


@pytest.mark.parametrize("name", SHARPNESS)
def test_to_maximize_is_to_minimize_the_negative(name):
    ends = []
    for maximize in (False, True):
        p = parameter()
        optimizer = UniversalSAM([p], sharpness=SHARPNESS[name], samples=3, rho=0.1, lr=0.01, maximize=maximize)
        for _ in range(3):
            optimizer.step(bowl(p, optimizer, sign=-1.0 if maximize else 1.0))
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-14, atol=0)


def test_gradients_that_are_zeroed_in_place_or_carry_a_scale():
    reference = network()
    straight = training(reference, UniversalSAM(reference.parameters(), sharpness="frobenius", samples=2, lr=0.1))
    kept = network()
    optimizer = UniversalSAM(kept.parameters(), sharpness="frobenius", samples=2, lr=0.1)
    whole = optimizer.zero_grad
    optimizer.zero_grad = lambda: whole(set_to_none=False)
    assert torch.equal(training(kept, optimizer), straight)
    scaled = network()
    optimizer = UniversalSAM(scaled.parameters(), sharpness="frobenius", samples=2, lr=0.1 / 1024)
    torch.testing.assert_close(training(scaled, optimizer, scale=1024.0), straight, rtol=1e-12, atol=1e-14)


def test_schedulers_drive_rate_and_strength():
    model = network()
    optimizer = UniversalSAM(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    training(model, optimizer, steps=1)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["strength"] = 0.0
    training(model, optimizer, steps=1)
    assert training.calls == 1


def test_batch_statistics_move_once_with_frozen_batch_statistics():
    def run(freeze):
        torch.manual_seed(0)
        model = WithBatchNorm().double()
        optimizer = UniversalSAM(model.parameters(), rho=0.5, samples=2, lr=0.0)
        x = torch.randn(16, 3, dtype=torch.float64)

        def closure():
            optimizer.zero_grad()
            with frozen_batch_statistics(model, freeze and optimizer.perturbed):
                loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return model[1].num_batches_tracked.item(), model[1].running_mean.clone()

    torch.manual_seed(0)
    reference = WithBatchNorm().double()
    reference(torch.randn(16, 3, dtype=torch.float64))
    assert run(freeze=False)[0] == 5
    count, mean = run(freeze=True)
    assert count == 1
    assert torch.equal(mean, reference[1].running_mean)


def test_one_autocast_context_round_the_step_sees_the_perturbed_weights():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 32), torch.randn(64, 8)
    optimizer, losses = UniversalSAM(model.parameters(), rho=1.0, lr=0.0), []

    def closure():
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure)
    assert min(abs(loss - losses[0]) for loss in losses[1:]) > 1


def test_sparse_gradients():
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2))
        optimizer = UniversalSAM(model.parameters(), rho=0.1, lr=0.5)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.tensor([0, 2, 2, 4])).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        ends.append(flat(model))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharpness": "hessian"}, "must be one of trace, frobenius, determinant or a function of the loss changes"),
        ({"sharpness": determinant}, "must be one of trace, frobenius, determinant or a function of the loss changes"),
        ({"rho": 0.0}, "rho must be positive and finite, got 0.0"),
        ({"rho": math.inf}, "rho must be positive and finite"),
        ({"rho": math.nan}, "rho must be positive and finite"),
        ({"strength": -0.1}, "strength must be non-negative and finite, got -0.1"),
        ({"strength": math.nan}, "strength must be non-negative and finite"),
        ({"sharpness": "frobenius"}, "samples must be a whole number, at least 2 .* got 1"),
        ({"sharpness": "determinant", "samples": 1}, "at least 2"),
        ({"sharpness": determinant(2.0), "samples": 1}, "at least 2"),
        ({"samples": 0}, "at least 1"),
        ({"samples": 1.5}, "a whole number"),
        ({"directions": "sphere"}, r"directions must be 'normal' or \('cube', half-width\)"),
        ({"directions": ("cube", -1.0)}, "half-width of the cube must be positive"),
        ({"base_optimizer": torch.optim.Adadelta}, "Adadelta has a setting 'rho' of its own"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UniversalSAM([parameter()], lr=0.1, **settings)


def test_one_sample_is_enough_for_the_general_form():
    p = parameter()
    optimizer = UniversalSAM([p], sharpness=integral(lambda m: m**-2, lambda d: torch.exp(-d / 2)), rho=1e-3, lr=0.01)
    optimizer.step(bowl(p, optimizer))
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [parameter()], "rho": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("returned", [None, "loss", torch.ones(2)])
def test_closures_that_do_not_say_the_loss(returned):
    p = parameter()
    optimizer = UniversalSAM([p], lr=0.1)
    with pytest.raises(TypeError, match=r"UniversalSAM\.step needs a closure"):
        optimizer.step()

    def closure():
        optimizer.zero_grad()
        p.sum().backward()
        return returned

    before = p.detach().clone()
    with pytest.raises(TypeError, match="the closure must return the loss as a number"):
        optimizer.step(closure)
    assert torch.equal(p, before)


@pytest.mark.parametrize("paired", [True, False])
def test_a_closure_that_does_not_zero_is_right_or_refused(paired):
    """Gradients from before the step are noticed, those of the step's other evaluations are kept apart."""

    def stepped(zeroes, before=False):
        model = network()
        optimizer = UniversalSAM(model.parameters(), rho=0.1, lr=0.1, paired=paired, samples=3)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)

        def closure():
            if zeroes:
                optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if before:
            closure()
        optimizer.step(closure)
        return flat(model)

    assert torch.equal(stepped(False), stepped(True))
    assert torch.equal(stepped(True, before=True), stepped(True))
    with pytest.raises(RuntimeError, match="added to gradients from before"):
        stepped(False, before=True)


def test_a_base_that_evaluates_the_closure_itself_is_refused():
    with pytest.raises(ValueError, match="LBFGS evaluates a closure itself"):
        UniversalSAM(network().parameters(), torch.optim.LBFGS)


def test_the_callers_inference_mode_and_default_device_do_not_matter():
    x = torch.ones(2, 3, dtype=torch.float64)

    def stepped(*contexts):
        model = network()
        optimizer = UniversalSAM(model.parameters(), lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            optimizer.step(closure)
        return flat(model)

    assert torch.equal(stepped(torch.inference_mode(), torch.device("meta")), stepped())
