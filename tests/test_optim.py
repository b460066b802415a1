import copy
import math

import pytest
import torch
from torch import nn

from samlib import SAM, frozen_batch_statistics, gd_step, sam_step
from samlib.optim import EPSILON, asam_perturb, sam_perturb, usam_step

from .conftest import PROBLEMS, WithBatchNorm, problem


def training(model, optimizer, steps=5, seed=0, batches=1):
    """A few steps on random regression data; gradients accumulate over ``batches`` micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 2, generator=generator, dtype=torch.float64)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            losses = []
            for part, target in zip(x.chunk(batches), y.chunk(batches), strict=True):
                loss = (model(part) - target).square().mean() / batches
                loss.backward()
                losses.append(loss.detach())
            return sum(losses)

        optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def test_one_step_by_hand():
    # ℓ(w) = ½ Σ aᵢ wᵢ², so every gradient is a·w.
    a, w = torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    eta, rho = 0.1, 0.5
    g = a * w
    norm = (9.0 + 4.0) ** 0.5
    expected = w - eta * a * (w + rho * g / (norm + EPSILON))
    torch.testing.assert_close(sam_step(lambda w: a * w, w, eta, rho), expected, rtol=1e-15, atol=0)
    p = nn.Parameter(w.clone())
    optimizer = SAM([p], rho=rho, lr=eta)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (a * p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(0.5 * (3 + 4))
    torch.testing.assert_close(p.detach(), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_optimizer_and_the_pure_step_agree(name):
    objective, params = problem(name)
    torch.nn.utils.vector_to_parameters(params.clone(), objective.model.parameters())
    optimizer = SAM(objective.model.parameters(), rho=0.2, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = objective.loss(objective.model(objective.inputs), objective.targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        params = sam_step(objective.gradient, params, 0.1, 0.2)
    after = torch.cat([p.detach().reshape(-1) for p in objective.model.parameters()])
    torch.testing.assert_close(after, params)


@pytest.mark.parametrize(
    ("base", "settings"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.01}), (torch.optim.AdamW, {})],
)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base, settings):
    first, second = network(), network()
    plain = training(first, base(first.parameters(), **settings))
    sam = training(second, SAM(second.parameters(), base, rho=0.0, **settings))
    assert torch.equal(plain, sam)


def test_pure_step_with_rho_zero_is_gradient_descent():
    objective, params = problem("mlp")
    assert torch.equal(sam_step(objective.gradient, params, 0.3, 0.0), gd_step(objective.gradient, params, 0.3))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_state_dict_round_trip_keeps_the_base_optimizers_state(base):
    settings = {"lr": 0.05} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    model = network()
    optimizer = SAM(model.parameters(), base, rho=0.1, **settings)
    training(model, optimizer, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    straight = training(model, optimizer, steps=2, seed=1)

    model = network(seed=9)
    model.load_state_dict(saved[0])
    optimizer = SAM(model.parameters(), base, rho=0.7, lr=9.0)
    optimizer.load_state_dict(saved[1])
    assert optimizer.param_groups[0]["rho"] == 0.1
    assert torch.equal(training(model, optimizer, steps=2, seed=1), straight)


def test_copies_and_plain_states():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
    training(model, optimizer, steps=2)
    both = copy.deepcopy((model, optimizer))
    assert torch.equal(training(*both), training(model, optimizer))
    plain = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.3
    training(model, optimizer, steps=1)
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": -1.0})
    assert len(optimizer.param_groups) == 1


def test_a_group_that_maximizes_is_perturbed_downhill():
    p = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = SAM([p], rho=0.5, lr=0.1, maximize=True)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(p.item())
        (0.5 * p * p).sum().backward()

    optimizer.step(closure)
    assert seen[1] == pytest.approx(3 - 0.5 * 3 / (3 + EPSILON))


def test_schedulers_drive_the_base_optimizer():
    model = network()
    optimizer = SAM(model.parameters(), rho=0.1, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    training(model, optimizer, steps=1)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.25


def test_accumulating_micro_batches_in_the_closure_equals_one_large_batch():
    first, second = network(), network()
    whole = training(first, SAM(first.parameters(), rho=0.1, lr=0.1))
    parts = training(second, SAM(second.parameters(), rho=0.1, lr=0.1), batches=4)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-14)


def test_weights_return_bit_for_bit_even_if_the_closure_fails():
    model = network()
    optimizer = SAM(model.parameters(), rho=1e6, lr=0.0)
    before = copy.deepcopy(model.state_dict())
    training(model, optimizer, steps=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def failing():
        if optimizer.perturbed:
            raise RuntimeError("out of memory")
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert not optimizer.perturbed
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_groups_have_their_own_rho_and_share_one_norm():
    p, q = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (3.0, 4.0))
    optimizer = SAM([{"params": [p]}, {"params": [q], "rho": 0.0}], rho=0.5, lr=0.1)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append((p.item(), q.item()))
        (0.5 * (p * p + q * q)).sum().backward()

    optimizer.step(closure)
    assert seen[1][0] == pytest.approx(3 + 0.5 * 3 / (5 + EPSILON), rel=1e-14)
    assert seen[1][1] == 4.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, dtype=torch.float64))]})
    assert optimizer.base_optimizer.param_groups[2]["rho"] == 0.5


def test_batch_statistics_move_twice_unless_frozen():
    def run(freeze):
        torch.manual_seed(0)
        model = WithBatchNorm().double()
        optimizer = SAM(model.parameters(), rho=0.5, lr=0.0)
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
    assert run(freeze=False)[0] == 2
    count, mean = run(freeze=True)
    assert count == 1
    assert torch.equal(mean, reference[1].running_mean)


def test_misuse_is_explained():
    model = network()
    with pytest.raises(TypeError, match=r"SAM\.step needs a closure that zeroes the gradients"):
        SAM(model.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match="rho must be a non-negative finite number, got -1"):
        SAM(model.parameters(), rho=-1, lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        SAM([{"params": model.parameters(), "rho": float("nan")}], lr=0.1)


def asam_step(gradient, params, learning_rate, rho):
    return params - learning_rate * gradient(asam_perturb(params, gradient(params), rho))


VARIANTS = {
    "sam": ({}, sam_step),
    "unnormalised": ({"normalize": False}, usam_step),
    "adaptive": ({"adaptive": True}, asam_step),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_variant_is_its_pure_step(name, variant, whole):
    """On one flat vector, as the laboratory trains, and on a module's many tensors."""
    objective, params = problem(name)
    settings, step = VARIANTS[variant]
    if whole:
        weights = [nn.Parameter(params.clone())]
    else:
        nn.utils.vector_to_parameters(params.clone(), objective.model.parameters())
        weights = list(objective.model.parameters())
    optimizer = SAM(weights, rho=0.2, lr=0.1, **settings)

    def closure():
        optimizer.zero_grad()
        if whole:
            loss, weights[0].grad = objective.value_and_gradient(weights[0].detach())
            return loss
        loss = objective.loss(objective.model(objective.inputs), objective.targets)
        loss.backward()
        return loss

    for _ in range(3):
        before, loss = params, optimizer.step(closure)
        assert float(loss.detach()) == pytest.approx(float(objective.value(before)), rel=1e-10)
        params = step(objective.gradient, params, 0.1, 0.2)
    after = torch.cat([p.detach().reshape(-1) for p in weights])
    torch.testing.assert_close(after, params, rtol=1e-9, atol=1e-11)
    # What the base optimizer stepped with is still there.
    used = torch.cat([p.grad.reshape(-1) for p in weights])
    torch.testing.assert_close(used, (before - params) / 0.1, rtol=1e-6, atol=1e-9)
    assert optimizer.evaluations == 2


def test_adaptive_perturbation_by_hand():
    # Kwon et al.: ρ T²g/‖T g‖; a weight at zero moves a little too.
    w, g, rho = torch.tensor([3.0, -1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 2.0, -5.0]).double(), 0.5
    t = [3.01, 1.01, 0.01]
    length = math.sqrt(sum((a * b) ** 2 for a, b in zip(t, g.tolist(), strict=True))) + 1e-5
    expected = [x + rho * a * a * b / length for x, a, b in zip(w.tolist(), t, g.tolist(), strict=True)]
    torch.testing.assert_close(asam_perturb(w, g, rho), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_groups_choose_their_variant():
    """One norm over all, of T g where a group is adaptive; a group that does not normalise goes by ρ g."""
    values, slopes = (3.0, -4.0, 2.0), (1.0, 2.0, -2.0)
    p, q, r = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in values)
    groups = [{"params": [p], "adaptive": True}, {"params": [q], "normalize": False}, {"params": [r], "rho": 1.0}]
    optimizer = SAM(groups, rho=0.5, lr=0.1)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append([x.item() for x in (p, q, r)])
        sum(a * x for a, x in zip(slopes, (p, q, r), strict=True)).sum().backward()

    optimizer.step(closure)
    length = math.sqrt(3.01**2 + 4 + 4) + EPSILON
    expected = (3 + 0.5 * 3.01**2 / length, -4 + 0.5 * 2, 2 - 1.0 * 2 / length)
    assert seen[1] == pytest.approx(expected, rel=1e-13)
    assert [
        {k: g[k] for k in ("rho", "normalize", "adaptive", "every", "beta", "age")} for g in optimizer.param_groups
    ] == [
        {"rho": 0.5, "normalize": True, "adaptive": True, "every": 1, "beta": 0.99, "age": 0},
        {"rho": 0.5, "normalize": False, "adaptive": False, "every": 1, "beta": 0.99, "age": 0},
        {"rho": 1.0, "normalize": True, "adaptive": False, "every": 1, "beta": 0.99, "age": 0},
    ]
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


@pytest.mark.parametrize("norm", [0.0, 1e-12, 1e-6, 1e-4, 1.0, 1e6])
def test_the_perturbation_at_gradients_of_any_length(norm):
    """‖g‖ + 1e-5 is what is divided by: at ‖g‖ = 1e-6 the perturbation is ρ/11."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SAM([p], rho=0.5, lr=0.1)
    slope, seen = norm * torch.tensor([0.6, 0.8], dtype=torch.float64), []

    def closure():
        optimizer.zero_grad()
        seen.append(p.detach().clone())
        (slope @ p).backward()

    optimizer.step(closure)
    assert float(seen[1].norm()) == pytest.approx(0.5 * norm / (norm + 1e-5), rel=1e-12)
    torch.testing.assert_close(p.detach(), -0.1 * slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(seen[1], sam_perturb(seen[0], slope, 0.5), rtol=1e-12, atol=0)


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
}
ALL = {name: settings for name, (settings, _) in VARIANTS.items()} | {
    "cached": {"every": 3, "beta": 0.9},
    "held": {"every": 2, "beta": 1.0, "adaptive": True},
}


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("base", BASES)
def test_two_calls_are_one_step(base, variant):
    """As code without closures does it, also with a scheduler, which looks whether the optimizer stepped."""
    kind, settings = BASES[base]
    first, second = network(), network()
    optimizer = SAM(first.parameters(), kind, rho=0.3, **settings, **ALL[variant])
    straight = training(first, optimizer, steps=5)
    optimizer = SAM(second.parameters(), kind, rho=0.3, **settings, **ALL[variant])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        evaluations = 0
        if optimizer.needs_gradient:
            (second(x) - y).square().mean().backward()
            evaluations += 1
        assert not optimizer.perturbed
        optimizer.first_step(zero_grad=True)
        assert optimizer.perturbed
        assert all(p.grad is None for p in second.parameters())
        (second(x) - y).square().mean().backward()
        optimizer.second_step()
        assert optimizer.evaluations == evaluations + 1
        optimizer.zero_grad()
        scheduler.step()
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in second.parameters()]), straight)


def test_two_calls_in_the_wrong_order_are_explained():
    model = network()
    x = torch.ones(4, 3, dtype=torch.float64)
    optimizer = SAM(model.parameters(), rho=0.3, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="second_step was called without first_step"):
        optimizer.second_step()
    model(x).sum().backward()
    optimizer.first_step()
    for call in (optimizer.first_step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(RuntimeError, match="still perturbed"):
            call()
    # A copy taken in the middle comes back as well.
    for one, other in ((model, optimizer), copy.deepcopy((model, optimizer))):
        assert not torch.equal(one[0].weight, before["0.weight"])
        other.restore()
        assert all(torch.equal(before[k], v) for k, v in one.state_dict().items())
        other.zero_grad()
        one(x).sum().backward()
        other.first_step(zero_grad=True)
        one(x).sum().backward()
        other.second_step(zero_grad=True)
        assert not other.perturbed


def test_two_calls_at_rho_zero_are_the_base_optimizer():
    model, plain = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=0.0, lr=0.1)
    reference = torch.optim.Adam(plain.parameters(), lr=0.1)
    x = torch.ones(4, 3, dtype=torch.float64)
    for _ in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.second_step() if optimizer.repeated else optimizer.first_step()
        reference.zero_grad()
        plain(x).square().sum().backward()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_the_recipe_for_batch_statistics_moves_them_once_a_step():
    """At w where the closure is evaluated there, else at the perturbed weights: in every step, also of a cached one."""

    def counts(two_calls, **settings):
        torch.manual_seed(0)
        model = WithBatchNorm().double()
        optimizer = SAM(model.parameters(), lr=0.1, **settings)
        x, moved = torch.randn(16, 3, dtype=torch.float64), []

        def closure():
            optimizer.zero_grad()
            with frozen_batch_statistics(model, optimizer.repeated):
                loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            if two_calls:
                if optimizer.needs_gradient:
                    closure()
                optimizer.first_step(zero_grad=True)
                closure()
                optimizer.second_step()
            else:
                optimizer.step(closure)
            moved.append(model[1].num_batches_tracked.item())
        return moved

    for settings in ({"rho": 0.5}, {"rho": 0.5, "every": 3}, {"rho": 0.5, "every": 2, "beta": 1.0}, {"rho": 0.0}):
        assert counts(False, **settings) == [1, 2, 3, 4, 5, 6]
        assert counts(True, **settings) == [1, 2, 3, 4, 5, 6]


def test_clipping_both_gradients_or_the_steps_alone():
    def run(where):
        model = network()
        weights = list(model.parameters())
        optimizer = SAM(weights, rho=0.3, lr=0.1)
        x = torch.linspace(-3, 3, 12, dtype=torch.float64).view(4, 3)
        if where == "hook":

            def clip(*_):
                nn.utils.clip_grad_norm_(weights, 0.01)

            optimizer.base_optimizer.register_step_pre_hook(clip)

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - 1).square().sum()
            loss.backward()
            if where == "closure":
                nn.utils.clip_grad_norm_(weights, 0.01)
            return loss

        for _ in range(3):
            optimizer.step(closure)
            if where != "none":
                assert float(nn.utils.get_total_norm([p.grad for p in weights])) == pytest.approx(0.01, rel=1e-3)
        return torch.cat([p.detach().reshape(-1) for p in weights])

    start = torch.cat([p.detach().reshape(-1) for p in network().parameters()])
    hook, closure, none = run("hook"), run("closure"), run("none")
    assert float((hook - start).norm()) <= 3 * 0.1 * 0.01 * 1.001
    # The first gradient's length is divided out, but for 1e-5 in 0.01.
    torch.testing.assert_close(closure - start, hook - start, rtol=0.02, atol=1e-6)
    assert float((none - start).norm()) > 10 * float((hook - start).norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho must be a non-negative finite number, got -0.1"),
        ({"rho": math.inf}, "rho must be"),
        ({"every": 0}, "every must be a whole number of steps, at least 1, got 0"),
        ({"every": 2.5}, "every must be"),
        ({"every": "epoch"}, "every must be"),
        ({"beta": 1.5}, "beta must be a number from 0 to 1, got 1.5"),
        ({"beta": math.nan}, "beta must be"),
        ({"normalize": "no"}, "normalize must be True or False, got 'no'"),
        ({"adaptive": None}, "adaptive must be True or False"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    p, q = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        SAM([p], lr=0.1, **settings)
    with pytest.raises(ValueError, match=message):
        SAM([{"params": [p]}, {"params": [q], **settings}], lr=0.1)
    optimizer = SAM([p], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [q], **settings})
    assert len(optimizer.param_groups) == 1


def test_one_period_for_all_groups():
    p, q = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    with pytest.raises(ValueError, match="every must be the same in all parameter groups, got 3 and 2"):
        SAM([{"params": [p]}, {"params": [q], "every": 3}], every=2, lr=0.1)
