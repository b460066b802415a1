"""Every law is checked against its optimizer, on quadratics just below and just above the edge that it tells."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop

from samlib import (
    SAM,
    HessianOperator,
    Objective,
    adam_edge,
    edge_law,
    momentum_edge,
    sam_edge,
    top_eigenpairs,
    usam_edge,
)
from samlib.optim import EPSILON

from .quadratics import SIZE, Quadratic, around, expected, fill, flat, holder, stepping

FROZEN = 1 - 1e-9  # β₂ with which v̂ does not move within a few hundred steps

DESCENT = {
    "plain": {},
    "momentum .5": {"momentum": 0.5},
    "momentum .9": {"momentum": 0.9},
    "momentum .95": {"momentum": 0.95},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "dampening without momentum": {"dampening": 0.4},
    "nesterov .5": {"momentum": 0.5, "nesterov": True},
    "nesterov .9": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.7},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 3.0},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.7},
    "dampening and decay": {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.7},
    "maximize": {"maximize": True},
    "maximize, momentum and decay": {"maximize": True, "momentum": 0.5, "weight_decay": 0.7},
}

ADAM = {
    "adam": (Adam, {}),
    "adam .5": (Adam, {"betas": (0.5, FROZEN)}),
    "adam 0": (Adam, {"betas": (0.0, FROZEN)}),
    "adam .95": (Adam, {"betas": (0.95, FROZEN)}),
    "adam, L2": (Adam, {"weight_decay": 0.6}),
    "adam, maximize and L2": (Adam, {"weight_decay": 0.6, "maximize": True}),
    "adam, large epsilon": (Adam, {"eps": 0.5}),
    "amsgrad": (Adam, {"amsgrad": True}),
    "adam, decoupled": (Adam, {"weight_decay": 3.0, "decoupled_weight_decay": True}),
    "adamw": (AdamW, {"weight_decay": 3.0}),
    "adamw .5, amsgrad": (AdamW, {"weight_decay": 8.0, "betas": (0.5, FROZEN), "amsgrad": True}),
}


def observed(optimizer, params, slope=0.0):
    """Which of the directions around the law's edge grow, and the law."""
    law = edge_law(optimizer)
    quadratic = Quadratic(around(law(slope + EPSILON)), slope, law.scale, law.shift)
    fill(params, quadratic.start)

    def gradient(w):
        return law.sign * quadratic.hessian @ w + quadratic.slope

    if law.rho and not law.normalize:  # stepped by hand: the perturbation is the definition
        step = stepping(optimizer.base_optimizer, params, lambda w: gradient(w + law.sign * law.rho * gradient(w)))
    else:
        step = stepping(optimizer, params, gradient)
    return quadratic.grows(step, lambda: flat(params)), law


def settle(optimizer, seed=0):
    """Give Adam the state of many steps: a v̂ that is to stay, and no momentum."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            t = torch.tensor(1e7)
            second = (1 - group["betas"][1] ** 1e7) * torch.rand(p.shape, generator=generator, dtype=p.dtype) ** 2
            optimizer.state[p] = {"step": t, "exp_avg": torch.zeros_like(p), "exp_avg_sq": second.clone()}
            if group["amsgrad"]:
                optimizer.state[p] |= {"exp_avg_sq": second / 9, "max_exp_avg_sq": second.clone()}


@pytest.mark.parametrize("rate", [0.03, 0.2])
@pytest.mark.parametrize("name", DESCENT)
def test_gradient_descent_is_stable_up_to_its_edge(name, rate):
    params = holder(SIZE)
    grows, law = observed(SGD(params, lr=rate, **DESCENT[name]), params)
    assert grows.tolist() == expected().tolist()
    assert law.scale is None
    assert law.sign == (-1 if DESCENT[name].get("maximize") else 1)


@pytest.mark.parametrize(("rate", "rho", "slope"), [(0.2, 0.1, 0.3), (0.03, 0.5, 0.02), (0.2, 0.02, 5.0)])
@pytest.mark.parametrize("normalize", [True, False], ids=["sam", "usam"])
@pytest.mark.parametrize("name", DESCENT)
def test_sam_is_stable_up_to_its_edge(name, normalize, rate, rho, slope):
    params = holder(SIZE)
    optimizer = SAM(params, SGD, rho=rho, lr=rate, **DESCENT[name])
    optimizer.param_groups[0]["normalize"] = normalize
    grows, law = observed(optimizer, params, slope)
    assert grows.tolist() == expected().tolist()
    base = edge_law(optimizer.base_optimizer)
    assert law(slope) < base()
    assert math.isnan(law(math.nan)) == normalize


@pytest.mark.parametrize("rate", [0.01, 0.2])
@pytest.mark.parametrize("name", ADAM)
def test_adam_with_its_preconditioner_frozen_is_stable_up_to_its_edge(name, rate):
    kind, settings = ADAM[name]
    params = holder(SIZE - 3, 3)
    optimizer = kind(params, lr=rate, **{"betas": (0.9, FROZEN), **settings})
    settle(optimizer)
    grows, law = observed(optimizer, params)
    assert grows.tolist() == expected().tolist()
    assert law.scale.shape == (SIZE,)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SGD, {}),
        (SGD, {"momentum": 0.9}),
        (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.5}),
        (SGD, {"weight_decay": 0.5, "maximize": True}),
        (Adam, {"weight_decay": 0.5}),
        (AdamW, {"weight_decay": 0.0}),
    ],
)
def test_groups_with_rates_of_their_own_are_stable_up_to_the_constant(kind, settings):
    params = holder(2, SIZE - 2)
    groups = [{"params": [params[0]], "lr": 0.5}, {"params": [params[1]], "lr": 0.02}]
    optimizer = kind(groups, **settings)
    if kind is not SGD:
        for group, epsilon in zip(optimizer.param_groups, (1e-8, 1e-3), strict=True):
            group["betas"], group["eps"] = (0.9, FROZEN), epsilon  # only β₁ and the decay must be the same
        settle(optimizer)
    grows, law = observed(optimizer, params)
    assert grows.tolist() == expected().tolist()
    assert law.learning_rate == 1
    assert law.name.endswith("rates by group")
    if kind is SGD:
        assert law.scale.tolist() == [0.5] * 2 + [0.02] * (SIZE - 2)


def test_the_operator_of_a_law_is_the_hessian_that_its_edge_is_for():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    optimizer = Adam(
        [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": model[2].parameters(), "lr": 0.01, "betas": (0.9, 0.99)},
        ],
        weight_decay=0.3,
    )
    gradients = []
    for _ in range(7):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        decay = 0.3 * torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        gradients[-1] = gradients[-1] + decay
        optimizer.step()
    law = edge_law(optimizer, model.parameters())

    first = sum(p.numel() for p in model[0].parameters())
    size = gradients[0].numel()
    beta = torch.tensor([0.999] * first + [0.99] * (size - first), dtype=torch.float64)
    rate = torch.tensor([0.1] * first + [0.01] * (size - first), dtype=torch.float64)
    second = sum((1 - beta) * beta ** (6 - i) * g**2 for i, g in enumerate(gradients)) / (1 - beta**7)
    torch.testing.assert_close(law.scale, rate / (second.sqrt() + 1e-8), rtol=1e-12, atol=0)

    params = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    hessian = HessianOperator(Objective(model, nn.functional.mse_loss, inputs, targets), params)
    dense = torch.stack([hessian @ e for e in torch.eye(size, dtype=torch.float64)])
    expected = torch.linalg.eigvals(
        law.scale[:, None] * (dense + 0.3 * torch.eye(size, dtype=torch.float64))
    ).real.max()
    found = top_eigenpairs(law.operator(hessian), tol=1e-9, max_matvecs=1000).values
    torch.testing.assert_close(found, expected[None], rtol=1e-9, atol=0)


def test_where_nothing_scales_the_operator_is_the_hessian_itself_or_its_negative():
    hessian = torch.diag(torch.tensor([3.0, -1.0]))
    params = holder(2)
    assert edge_law(SGD(params, lr=0.1)).operator(hessian) is hessian
    turned = edge_law(SGD(params, lr=0.1, maximize=True)).operator(hessian)
    assert (turned @ torch.ones(2)).tolist() == [-3, 1]


@pytest.mark.parametrize(
    ("make", "name", "edge"),
    [
        (lambda p: SGD(p, lr=0.1), "gradient descent", 20),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), "gradient descent with momentum 0.9", 38),
        (
            lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
            "gradient descent with Nesterov momentum 0.9 and weight decay 0.0005",
            3.8 / 2.8 / 0.1 - 5e-4,
        ),
        (
            lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
            "gradient descent with momentum 0.9 and dampening 0.5",
            76,
        ),
        (lambda p: SGD(p, lr=torch.tensor(0.1, dtype=torch.float64)), "gradient descent", 20),
        (lambda p: SAM(p, rho=0.2, lr=0.1), "SAM", sam_edge(0.7, 0.1, 0.2)),
        (
            lambda p: SAM(p, rho=0.2, lr=0.1, momentum=0.9, weight_decay=0.1),
            "SAM with momentum 0.9 and weight decay 0.1",
            sam_edge(0.7, 0.1, 0.2, limit=3.8, weight_decay=0.1),
        ),
        (lambda p: SAM(p, rho=0.0, lr=0.1, momentum=0.5), "gradient descent with momentum 0.5", 30),
        (lambda p: SAM([{"params": p, "normalize": False}], rho=0.2, lr=0.1), "unnormalised SAM", usam_edge(0.1, 0.2)),
        (lambda p: SAM([{"params": p, "every": 1, "beta": 0.3}], rho=0.2, lr=0.1), "SAM", sam_edge(0.7, 0.1, 0.2)),
        (lambda p: moved(Adam(p, lr=0.1)), "Adam", 380),
        (lambda p: moved(SAM(p, Adam, rho=0.0, lr=0.1, betas=(0.5, 0.9))), "Adam", 60),
        (lambda p: moved(SAM(p, Adam, rho=0.1, lr=0.1)).base_optimizer, "Adam", 380),
        (lambda p: moved(AdamW(p, lr=0.1)), "AdamW with weight decay 0.01", adam_edge(0.1, weight_decay=0.01)),
        (
            lambda p: moved(Adam(p, lr=0.1, weight_decay=0.01, decoupled_weight_decay=True)),
            "Adam with decoupled weight decay 0.01",
            adam_edge(0.1, weight_decay=0.01),
        ),
        (lambda p: moved(Adam(p, lr=0.1, weight_decay=0.01)), "Adam with weight decay 0.01", 380),
        (
            lambda p: SGD([{"params": [p[0]]}, {"params": holder(2), "lr": 0.2}], lr=0.1, momentum=0.9),
            "gradient descent with momentum 0.9 and rates by group",
            3.8,
        ),
    ],
)
def test_laws_are_named_and_valued(make, name, edge):
    law = edge_law(make(holder(3)))
    assert (law.name, law.reason) == (name, "")
    assert law(0.7) == pytest.approx(edge, rel=1e-12)


def moved(optimizer):
    """After one step."""
    params = [p for g in optimizer.param_groups for p in g["params"]]

    def closure():
        for p in params:
            p.grad = torch.ones_like(p)
        return 0.0

    optimizer.step(closure)
    return optimizer


def groups(**settings):
    """Two groups that differ in a setting, given by pairs."""
    return [{"params": [p], **{k: v[i] for k, v in settings.items()}} for i, p in enumerate(holder(2, 3))]


class Subclass(SGD):
    pass


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: LBFGS(holder(2)), "LBFGS", "no law is known for LBFGS: they are for SGD, Adam, AdamW"),
        (lambda: RMSprop(holder(2)), "RMSprop", "no law is known for RMSprop"),
        (lambda: Subclass(holder(2), lr=0.1), "Subclass", "no law is known for Subclass"),
        (lambda: SAM(holder(2), RMSprop, lr=0.1), "SAM around RMSprop", "no law is known for RMSprop"),
        (
            lambda: moved(SAM(holder(2), Adam, lr=0.1)),
            "SAM around Adam",
            r"SAM around Adam; edge_law\(optimizer\.base_",
        ),
        (lambda: SAM([{"params": holder(2), "adaptive": True}], lr=0.1), "SAM around SGD", "adaptive SAM"),
        (lambda: SAM([{"params": holder(2), "every": 5}], lr=0.1), "SAM around SGD", "cached direction"),
        (lambda: SAM(groups(rho=(0.1, 0.0)), lr=0.1), "SAM around SGD", r"differ in rho \(0, 0\.1\)"),
        (lambda: SAM(groups(normalize=(True, False)), lr=0.1), "SAM around SGD", "differ in normalize"),
        (lambda: SAM(groups(lr=(0.1, 0.2))), "SAM around SGD", "differ in lr: with SAM"),
        (lambda: SGD(groups(momentum=(0.9, 0.5)), lr=0.1), "SGD", r"differ in momentum \(0\.5, 0\.9\)"),
        (lambda: SGD(groups(dampening=(0, 0.5)), lr=0.1, momentum=0.9), "SGD", "differ in dampening"),
        (lambda: SGD(groups(nesterov=(True, False)), lr=0.1, momentum=0.9), "SGD", "differ in nesterov"),
        (lambda: SGD(groups(weight_decay=(0.0, 0.1)), lr=0.1), "SGD", "differ in weight_decay"),
        (lambda: SGD(groups(maximize=(True, False)), lr=0.1), "SGD", "differ in maximize"),
        (lambda: moved(Adam(groups(betas=((0.9, 0.99), (0.8, 0.99))))), "Adam", "differ in beta1"),
        (lambda: moved(AdamW(groups(lr=(0.1, 0.2)))), "AdamW", "differ in lr: with decoupled"),
        (lambda: Adam(holder(2)), "Adam", "has not stepped yet"),
        (lambda: SGD(holder(2), lr=0.0), "SGD", r"learning_rate must be positive and finite, got 0\.0"),
        (lambda: SGD(groups(lr=(0.1, math.inf))), "SGD", "learning_rate must be non-negative and finite, got inf"),
        (
            lambda: SGD(holder(2), lr=0.1, momentum=1.0),
            "SGD",
            r"momentum must be non-negative and less than 1, got 1\.0",
        ),
        (lambda: SGD(holder(2), lr=0.1, momentum=0.5, dampening=1.0), "SGD", "dampening must be non-negative and less"),
        (lambda: SGD(holder(2), lr=0.1, weight_decay=20.0), "SGD", "weight_decay must be below limit/learning_rate"),
        (
            lambda: moved(AdamW(holder(2), lr=0.1, weight_decay=20.0)),
            "AdamW",
            "weight_decay must be below 2/learning_r",
        ),
        (lambda: changed(SGD(holder(2), lr=0.1), weight_decay=-0.1), "SGD", "weight_decay must be non-negative"),
        (lambda: changed(moved(Adam(holder(2))), weight_decay=-0.1), "Adam", "weight_decay must be non-negative"),
        (lambda: changed(SAM(holder(2), lr=0.1), rho=-0.1), "SAM around SGD", "rho must be non-negative"),
        (lambda: frozen(SGD(holder(2), lr=0.1)), "SGD", "no parameter of this optimizer needs a gradient"),
        (lambda: dead(moved(Adam(holder(2), eps=0.0))), "Adam", "zero or not finite in some coordinate"),
    ],
)
def test_where_no_law_is_known_the_reason_is_told(make, name, reason):
    law = edge_law(make())
    assert law.name == name
    assert re.search(reason, law.reason), law.reason
    assert math.isnan(law(1.0))
    assert law.scale is None


def changed(optimizer, **settings):
    optimizer.param_groups[0].update(settings)
    return optimizer


def frozen(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.requires_grad_(False)
    return optimizer


def dead(optimizer):
    """No gradient has ever reached the first coordinate."""
    for state in optimizer.state.values():
        state["exp_avg_sq"][0] = 0
    return optimizer


def test_only_optimizers_are_read():
    with pytest.raises(TypeError, match=r"reads a torch\.optim\.Optimizer, got Linear"):
        edge_law(nn.Linear(2, 2))


def test_reading_changes_nothing():
    for optimizer in (
        moved(Adam(holder(2, 3))),
        Adam(holder(2, 3)),
        SAM(holder(2, 3)),
        SGD(holder(2, 3), momentum=0.9),
    ):
        before = copy.deepcopy(optimizer.state_dict())
        law = edge_law(optimizer)
        torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
        assert len(optimizer.state) == len(before["state"])
        if law.scale is not None:
            kept = law.scale.clone()
            moved(optimizer)
            assert torch.equal(law.scale, kept)


def test_the_law_follows_the_settings():
    optimizer = SAM(holder(2), rho=0.1, lr=0.4, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    assert edge_law(optimizer)(1.0) == sam_edge(1.0, 0.4, 0.1, limit=3.0)
    moved(optimizer)
    scheduler.step()
    assert edge_law(optimizer)(1.0) == sam_edge(1.0, 0.2, 0.1, limit=3.0)
    optimizer.param_groups[0]["rho"] = 0.0
    assert edge_law(optimizer)() == momentum_edge(0.2, 0.5)


def test_the_order_of_the_parameters_is_that_asked_for():
    a, b, c = holder(1, 2, 3)
    other = nn.Parameter(torch.zeros(2), requires_grad=False)
    optimizer = SGD([{"params": [a, other], "lr": 0.1}, {"params": [b], "lr": 0.2}])
    assert edge_law(optimizer).scale.tolist() == [0.1, 0.2, 0.2]
    assert edge_law(optimizer, iter([b, a])).scale.tolist() == [0.2, 0.2, 0.1]
    # Of the others the optimizer moves none: one that it does not hold, one that is frozen.
    assert edge_law(optimizer, [c, b, other]).scale.tolist() == [0, 0, 0, 0.2, 0.2, 0, 0]
    alike = SGD([a, b], lr=0.1)
    assert edge_law(alike, [b, a]).scale is None
    law = edge_law(alike, [c, a])
    assert (law.scale.tolist(), law()) == ([0, 0, 0, 1], 20)


def test_what_adam_has_never_moved_has_no_part_in_the_edge():
    used, unused = holder(2, 3)
    optimizer = Adam([used, unused], lr=0.1, eps=0.0)
    used.grad = torch.tensor([3.0, -4.0], dtype=torch.float64)
    optimizer.step()
    assert edge_law(optimizer).scale.tolist() == pytest.approx([1 / 3, 1 / 4, 0, 0, 0], rel=1e-12)


def test_the_scale_is_at_least_in_single_precision():
    params = [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(2))]
    assert edge_law(moved(Adam(params))).scale.dtype == torch.float32
    assert edge_law(moved(Adam(holder(2)))).scale.dtype == torch.float64
