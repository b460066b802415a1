import functools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F

from samlib import Objective
from samlib.features import gini, lorenz_curve
from samlib.gradient_parts import PARTS, confined, gradient_part, remainder
from samlib.objective import flatten_parameters
from samlib.optim import frozen_batch_statistics, sam_perturb
from samlib.toys.balance import (
    at_loss,
    diagonal_flow,
    diagonal_invariant,
    diagonal_steps,
    linear_steps,
    logistic_weights,
    phantom_weights,
    two_groups,
)

MU, START = np.array([1.0, 0.5]), np.array([0.1, 0.1])
S = np.arange(0, 12, 1e-3)


def share_at_loss(path, loss=0.1):
    """What the hard feature contributes to the margin."""
    parts = MU * at_loss(path, MU, loss)
    return parts[1] / parts.sum()


# --- Weights of a linear model at the perturbed point


@pytest.mark.parametrize("seed", range(20))
def test_phantom_weights_are_those_of_autograd_at_the_perturbed_point(seed):
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(15, 6, generator=random, dtype=torch.float64)
    w = torch.randn(6, generator=random, dtype=torch.float64).requires_grad_()
    rho = 2.0 * torch.rand((), generator=random).item()
    (g,) = torch.autograd.grad(F.softplus(-z @ w).mean(), w)
    expected = torch.sigmoid(-z @ (w + rho * g / g.norm()).detach())
    margins = (z @ w).detach()
    np.testing.assert_allclose(phantom_weights(margins, z @ z.T, rho), expected, rtol=1e-12)


def test_slope_of_the_phantom_weights():
    random = np.random.default_rng(0)
    z, m = random.normal(size=(9, 4)), random.normal(size=9)
    gram, weights, h = z @ z.T, logistic_weights(m), 1e-5
    c = gram @ weights / np.sqrt(weights @ gram @ weights)
    slope = (np.log(phantom_weights(m, gram, h)) - np.log(phantom_weights(m, gram, -h))) / (2 * h)
    np.testing.assert_allclose(slope, (1 - weights) * c, atol=1e-9)


def test_phantom_weights_without_a_gradient_are_the_weights():
    z = np.array([[1.0], [-1.0]])
    assert phantom_weights([0.0, 0.0], z @ z.T, 1.0).tolist() == [0.5, 0.5]


def test_a_common_shift_makes_weights_more_uniform_in_the_whole_lorenz_order():
    random = np.random.default_rng(1)
    for _ in range(300):
        n = random.integers(2, 20)
        margins, rho = 3 * random.normal(size=n), random.uniform(0.01, 3)
        weights = logistic_weights(margins)
        # All examples share one direction; what else they have cancels in the gradient.
        rest = random.normal(size=(n, 3))
        rest -= weights @ rest / weights.sum()
        z = np.column_stack([np.full(n, random.uniform(0.1, 3)), rest])
        perturbed = phantom_weights(margins, z @ z.T, rho)
        assert (lorenz_curve(perturbed) - lorenz_curve(weights)).min() > -1e-13
        assert gini(perturbed) < gini(weights)


def test_orthogonal_examples_become_less_uniform_where_all_are_learnt():
    random = np.random.default_rng(2)
    for _ in range(300):
        margins = random.uniform(0.2, 6, random.integers(2, 20))
        weights = logistic_weights(margins)
        perturbed = phantom_weights(margins, random.uniform(0.1, 9) * np.eye(len(margins)), 1e-3)
        assert (lorenz_curve(perturbed) - lorenz_curve(weights)).max() < 1e-13
        assert gini(perturbed) > gini(weights)


@pytest.mark.parametrize(
    ("margins", "squared_norms", "rho", "expected"),
    [
        ((1, 3), (1, 1), 0, 0.3501),
        ((1, 3), (1, 1), 0.1, 0.3569),
        ((1, 3), (1, 1), 1, 0.3987),
        ((-1, -3), (1, 1), 0, 0.0658),
        ((-1, -3), (1, 1), 0.1, 0.0627),  # λ > ½: the other way
        ((1, 3), (1, 9), 0.1, 0.3410),  # unequal norms: the other way
    ],
)
def test_two_orthogonal_examples(margins, squared_norms, rho, expected):
    perturbed = phantom_weights(margins, np.diag(squared_norms), rho)
    assert gini(perturbed) == pytest.approx(expected, abs=6e-5)


# --- The linear model with two groups


def linear_flow_at_loss(z, rho, loss):
    """θ of the flow where the loss is reached, by SciPy, from the definition of SAM's gradient."""

    def gradient(theta):
        return -(1 / (1 + np.exp(z @ theta))) @ z / len(z)

    def velocity(_, theta):
        g = gradient(theta)
        return -gradient(theta + rho * g / np.linalg.norm(g))

    def reached(_, theta):
        return np.log1p(np.exp(-z @ theta)).mean() - loss

    reached.terminal = True
    solved = solve_ivp(velocity, (0, 200), np.zeros(z.shape[1]), events=reached, rtol=1e-10, atol=1e-12)
    return solved.y_events[0][0]


def test_with_two_groups_sam_learns_less_of_the_hard_feature():
    z = two_groups()
    assert z.shape == (10, 2)
    assert (z.mean(0) == [0.9, 0.5]).all()
    ends = {rho: at_loss(linear_steps(z, rho, 0.01, 1500), z, 0.1) for rho in (0.0, 1.0)}
    ratios = {rho: theta[1] / theta[0] for rho, theta in ends.items()}
    for rho, theta in ends.items():
        flow = linear_flow_at_loss(z, rho, 0.1)
        assert ratios[rho] == pytest.approx(flow[1] / flow[0], abs=1e-3)
        np.testing.assert_allclose(theta, flow, rtol=1e-3)
    assert ratios[0.0] == pytest.approx(0.6342, abs=2e-4)
    assert ratios[1.0] == pytest.approx(0.5722, abs=2e-4)
    # The weights: more uniform at each one's perturbed point, and yet less so for SAM, like compared with like.
    here = {rho: gini(logistic_weights(z @ theta)) for rho, theta in ends.items()}
    there = {rho: gini(phantom_weights(z @ theta, z @ z.T, 1.0)) for rho, theta in ends.items()}
    assert here == pytest.approx({0.0: 0.2785, 1.0: 0.2913}, abs=3e-4)
    assert there == pytest.approx({0.0: 0.1181, 1.0: 0.1271}, abs=3e-4)


def test_the_two_group_ratio_of_the_steps_is_of_first_order():
    z = two_groups()
    theta = linear_flow_at_loss(z, 1.0, 0.1)
    errors = []
    for eta in (0.2, 0.1, 0.05):
        end = at_loss(linear_steps(z, 1.0, eta, int(20 / eta)), z, 0.1)
        errors.append(abs(end[1] / end[0] - theta[1] / theta[0]))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


# --- The diagonal net


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.1, 0.15, 0.18])
def test_the_diagonal_flow_is_that_of_sam_in_time(rho):
    """Against SciPy, in time and in all four weights, from the definition of SAM's gradient."""

    def gradient(w):
        a, u = w[:2], w[2:]
        weight = 1 / (1 + np.exp(MU @ (a * u)))
        return -weight * np.concatenate([MU * u, MU * a]), weight

    def velocity(_, state):
        g, _ = gradient(state[:4])
        uphill, weight = gradient(state[:4] + rho * g / np.linalg.norm(g))
        return np.append(-uphill, weight)  # ds = λ̃ dt

    initial = np.concatenate([START, START, [0]])
    solved = solve_ivp(velocity, (0, 40), initial, rtol=1e-12, atol=1e-13, t_eval=np.linspace(0, 40, 50))
    a, u, s = solved.y[:2].T, solved.y[2:4].T, solved.y[4]
    np.testing.assert_allclose(a, u, rtol=1e-9)
    fine = np.unique(np.concatenate([np.arange(0, s[-1], 1e-3), s]))
    flow = diagonal_flow(MU, START, rho, fine)[np.searchsorted(fine, s)]
    np.testing.assert_allclose(flow, a * u, rtol=1e-7)
    # Its invariant, of our solution and of SciPy's.
    assert np.ptp(diagonal_invariant(MU, flow, s)) < 1e-12
    assert np.ptp(diagonal_invariant(MU, a * u, s)) < 1e-8


def test_gradient_descent_on_the_diagonal_net_in_closed_form():
    margin = -np.log(np.expm1(0.1))
    s = brentq(lambda s: 0.01 * MU @ np.exp(2 * MU * s) - margin, 0, 12)
    exact = 0.01 * MU[1] * np.exp(2 * MU[1] * s) / margin
    assert exact == pytest.approx(0.03277, abs=5e-6)
    assert share_at_loss(diagonal_flow(MU, START, 0.0, S)) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(("rho", "expected"), [(0.05, 0.03942), (0.1, 0.05328), (0.12, 0.06483)])
def test_share_of_the_hard_feature_under_sam(rho, expected):
    assert share_at_loss(diagonal_flow(MU, START, rho, S)) == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize("part", ["plain", "weights", "jacobian", "sam"])
def test_steps_approach_the_flow_in_first_order_and_the_jacobian_carries_all_of_it(part):
    flow = share_at_loss(diagonal_flow(MU, START, 0.1 if part in ("jacobian", "sam") else 0.0, S))
    errors = [
        share_at_loss(diagonal_steps(MU, START, 0.1, eta, int(20 / eta), part)) - flow for eta in (0.04, 0.02, 0.01)
    ]
    assert abs(errors[-1]) < 2e-4
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("layer", ["a", "u"])
def test_perturbing_one_layer_of_the_diagonal_net(layer):
    path = diagonal_steps(MU, START, 0.1, 0.01, 2000, "sam", (layer,))
    assert share_at_loss(path) == pytest.approx(0.0427, abs=1e-4)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("perturbed", [("a", "u"), ("a",), ("u",)])
def test_steps_of_the_diagonal_net_are_those_of_the_parts_by_autograd(part, perturbed):
    def forward(w, x):
        return x @ (w[:2] * w[2:])

    def loss(outputs, _):
        return F.softplus(-outputs).mean()

    x, eta, rho = torch.tensor(MU)[None], 0.3, 0.07
    layers = [{"a": slice(0, 2), "u": slice(2, 4)}[name] for name in perturbed]
    w, path = torch.tensor([0.1, 0.2, 0.1, 0.2], dtype=torch.float64), []
    for _ in range(5):
        path.append((w[:2] * w[2:]).tolist())
        g = confined(gradient_part("plain", forward, loss, w, x, x, w), layers)
        w = w - eta * gradient_part(part, forward, loss, w, x, x, w + rho * g / g.norm())
    np.testing.assert_allclose(diagonal_steps(MU, [0.1, 0.2], rho, eta, 4, part, perturbed), path, rtol=1e-12)


def test_a_large_radius_collapses_the_diagonal_net():
    flow = diagonal_flow(MU, START, 0.2, S)
    assert (flow[-1] == 0).all()
    assert np.isfinite(flow).all()
    with pytest.raises(ValueError, match=r"never falls to 0\.1: the lowest on the path is 0\.6.* smaller rho"):
        at_loss(flow, MU, 0.1)
    near = share_at_loss(diagonal_flow(MU, START, 0.18, S), np.log1p(np.exp(-1.0)))
    assert near == pytest.approx(0.896, abs=1e-3)  # at margin 1


def test_bad_requests_of_the_toys_are_named():
    with pytest.raises(ValueError, match=r"s must rise from 0, got \[0\. 2\. 1\.\]"):
        diagonal_flow(MU, START, 0.1, [0, 2, 1])
    with pytest.raises(ValueError, match="s must rise from 0"):
        diagonal_flow(MU, START, 0.1, [0.5, 1])
    with pytest.raises(ValueError, match="start must be positive"):
        diagonal_flow(MU, [0.1, 0.0], 0.1, [0, 1])
    with pytest.raises(ValueError, match="part must be 'plain', 'weights', 'jacobian' or 'sam', got 'both'"):
        diagonal_steps(MU, START, 0.1, 0.1, 1, "both")
    for layers in ((), ("b",)):
        with pytest.raises(ValueError, match="perturbed must name layers out of 'a' and 'u'"):
            diagonal_steps(MU, START, 0.1, 0.1, 1, "sam", layers)


# --- SAM's gradient in two parts


def network(activation=nn.Tanh, seed=0):
    """(forward, loss, params, inputs, targets) of a small classifier, and its objective."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 3)).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.randint(0, 3, (11,))
    objective = Objective(model, F.cross_entropy, x, y)
    return (objective.forward, F.cross_entropy, 2 * flatten_parameters(model), x, y), objective


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_parts_against_dense_jacobians(activation):
    arguments, objective = network(activation)
    forward, _, w, x, y = arguments
    uphill = sam_perturb(w, objective.gradient(w), 0.3)

    def dense(at):
        jacobian = torch.func.jacfwd(forward)(at, x)  # another mode than the code under test uses
        return (forward(at, x).softmax(1) - F.one_hot(y, 3)) / len(x), jacobian

    (r, jacobian), (r_up, jacobian_up) = dense(w), dense(uphill)
    expected = {
        "plain": torch.einsum("nc,ncp->p", r, jacobian),
        "weights": torch.einsum("nc,ncp->p", r_up, jacobian),
        "jacobian": torch.einsum("nc,ncp->p", r, jacobian_up),
        "sam": torch.einsum("nc,ncp->p", r_up, jacobian_up),
    }
    for part, gradient in expected.items():
        torch.testing.assert_close(gradient_part(part, *arguments, uphill), gradient, rtol=1e-12, atol=1e-14)
    left = torch.einsum("nc,ncp->p", r_up - r, jacobian_up - jacobian)
    torch.testing.assert_close(remainder(*arguments, uphill), left, rtol=1e-12, atol=1e-14)


def test_parts_add_up_exactly_with_the_remainder():
    for seed in range(5):
        arguments, objective = network(nn.ReLU, seed)
        uphill = sam_perturb(arguments[2], objective.gradient(arguments[2]), 0.5)
        part = {name: gradient_part(name, *arguments, uphill) for name in PARTS}
        total = part["weights"] + part["jacobian"] - part["plain"] + remainder(*arguments, uphill)
        torch.testing.assert_close(total, part["sam"], rtol=0, atol=1e-14)


def test_without_the_remainder_parts_add_up_to_second_order_on_a_smooth_network():
    arguments, objective = network(nn.Tanh)
    w = arguments[2]

    def gap(rho):
        uphill = sam_perturb(w, objective.gradient(w), rho)
        part = {name: gradient_part(name, *arguments, uphill) for name in PARTS}
        # The parts themselves differ from the plain gradient in first order.
        first = (part["jacobian"] - part["plain"]).norm()
        return (part["weights"] + part["jacobian"] - part["plain"] - part["sam"]).norm(), first

    (coarse, first), (fine, half) = gap(2e-3), gap(1e-3)
    assert coarse / fine == pytest.approx(4, abs=0.05)
    assert first / half == pytest.approx(2, abs=0.05)


def test_without_perturbation_every_part_is_the_plain_gradient_bit_for_bit():
    arguments, objective = network(nn.ReLU)
    w = arguments[2]
    g = objective.gradient(w)
    unmoved, moved = sam_perturb(w, g, 0.0), sam_perturb(w, g, 0.1)
    with torch.no_grad():  # as inside an optimizer's step
        assert all(torch.equal(gradient_part(part, *arguments, unmoved), g) for part in PARTS)
    assert torch.equal(gradient_part("sam", *arguments, moved), objective.gradient(moved))
    assert not w.requires_grad


def test_the_parts_leave_the_statistics_of_batchnorm_alone_where_these_are_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).double()
    x, y, w = torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 3, (9,)), flatten_parameters(model)

    def forward(params, inputs):
        sizes = [p.numel() for p in model.parameters()]
        weights = {
            name: part.view(p.shape)
            for (name, p), part in zip(model.named_parameters(), params.split(sizes), strict=True)
        }
        return torch.func.functional_call(model, weights, (inputs,))

    before = model[1].running_mean.clone()
    with frozen_batch_statistics(model):
        frozen = [gradient_part(part, forward, F.cross_entropy, w, x, y, 1.1 * w) for part in PARTS]
    assert torch.equal(model[1].running_mean, before)
    assert model[1].num_batches_tracked == 0
    # Batch statistics normalise all the same, so nothing else changes.
    moving = [gradient_part(part, forward, F.cross_entropy, w, x, y, 1.1 * w) for part in PARTS]
    assert all(torch.equal(a, b) for a, b in zip(frozen, moving, strict=True))
    assert not torch.equal(model[1].running_mean, before)


def test_a_confined_perturbation_moves_only_its_layers_by_rho():
    arguments, objective = network()
    w = arguments[2]
    g, kept = objective.gradient(w), [slice(0, 35), slice(60, len(w))]
    moved = sam_perturb(w, confined(g, kept), 0.3) - w
    assert (moved[35:60] == 0).all()
    assert moved.norm().item() == pytest.approx(0.3, rel=1e-3)
    along = torch.cat([g[:35], g[60:]])
    assert F.cosine_similarity(along, torch.cat([moved[:35], moved[60:]]), 0).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one part of the parameters"):
        confined(g, [])


def test_an_unknown_part_is_named():
    arguments, _ = network()
    call = functools.partial(gradient_part, "both", *arguments, arguments[2])
    with pytest.raises(ValueError, match="part must be one of plain, weights, jacobian, sam, got 'both'"):
        call()
