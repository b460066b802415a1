"""The toys of the universal class: closed forms against autograd and minimisation, and rules that follow them."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar

from samlib import determinant, frobenius, sam_step, trace, universal_gradient, universal_step
from samlib.toys.drift import _drift, _updates, drift_table, interpolation, measure_gradient
from samlib.toys.universal import (
    HYPERBOLA_RULES,
    RESTING_RULES,
    Rule,
    flow,
    hyperbola,
    hyperbola_flow,
    hyperbola_table,
    invariance_table,
    resting_place,
    resting_table,
    scale_flow,
    scale_invariant,
    scale_table,
    simulate,
    valley,
)

LOSSES = {"hyperbola": (hyperbola, 2), "valley": (valley, 3), "scale-invariant": (scale_invariant, 3)}
ONE = determinant(1.0)
FUNCTIONS = {
    trace: lambda v: v.sum() / 2,
    frobenius: lambda v: v.square().sum() / 4,
    ONE: lambda v: v.log1p().sum() / 2,
}


def point(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(loss, w):
    return torch.func.hessian(lambda v: loss(v)[0])(w)


def measure(loss, sharpness, w):
    """S as ρ → 0 at a minimum, from the dense Hessian."""
    return FUNCTIONS[sharpness](torch.linalg.eigvalsh(hessian(loss, w)).clamp_min(0))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_losses(name):
    loss, size = LOSSES[name]
    w = torch.stack([point(size, seed) for seed in range(4)])
    torch.testing.assert_close(loss(w)[1], torch.func.vmap(torch.func.grad(lambda v: loss(v)[0]))(w))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("sharpness", FUNCTIONS)
def test_copies_step_as_the_pure_rule(sharpness, paired):
    rule, start = Rule("one", sharpness, 0.7, 4, paired), torch.stack([point(3, seed) for seed in range(5)])
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    after = simulate(valley, start, rule, [1], seed=3)[0]
    for i, w in enumerate(start):
        torch.testing.assert_close(after[i], universal_step(valley, w, 0.1, x[:, i], 0.05, 0.7, sharpness, paired))


def test_sam_copies_step_as_the_pure_rule_and_snapshots_go_on():
    start = torch.stack([point(3, seed) / 4 for seed in range(5)])
    found = simulate(valley, start, Rule("sam"), [0, 1, 3])
    assert torch.equal(found[0], start)
    for i, w in enumerate(start):
        for _ in range(3):
            w = sam_step(lambda v: valley(v)[1], w, 0.1, 0.05)
        torch.testing.assert_close(found[2, i], w)


def test_flow_against_scipy():
    times = [0.3, 1.0, 4.0]
    expected = solve_ivp(lambda _, y: -y + y**3 / 5, (0, 4), [1.5], t_eval=times, rtol=1e-11, atol=1e-12).y[0]
    np.testing.assert_allclose(flow(lambda y: -y + y**3 / 5, 1.5, times), expected, rtol=1e-9)


@pytest.mark.parametrize("sharpness", FUNCTIONS)
def test_the_hyperbolas_flow_is_the_tangential_gradient_of_the_measure(sharpness):
    w = torch.tensor([2.2, 1 / 2.2], dtype=torch.float64)
    s = w.square().sum()
    gradient = torch.func.grad(lambda v: measure(hyperbola, sharpness, v))(w)
    normal = w.flip(0) / s.sqrt()
    velocity = -0.01 * (gradient - normal * (normal @ gradient))
    short = 1e-4
    after = hyperbola_flow(sharpness, 0.01, float(s), [short])[0]
    assert (after - float(s)) / short == pytest.approx(float(2 * w @ velocity), rel=1e-4)


def test_the_determinant_is_constant_along_a_symmetry_and_nothing_else_is():
    table = invariance_table()
    for row in table.itertuples():
        values = torch.linalg.eigvalsh(
            hessian(hyperbola, torch.tensor([0.8 * row.factor, 1 / row.factor], dtype=torch.float64))
        )
        assert row.determinant == pytest.approx(float(values.prod()), rel=1e-10)
        assert row.trace == pytest.approx(float(values.sum()), rel=1e-10)
        assert row.log_determinant == pytest.approx(float(values.log1p().sum()), rel=1e-10)
    assert table.determinant.to_numpy() == pytest.approx(0.28)
    assert table.trace.is_monotonic_increasing
    assert table.log_determinant.is_monotonic_increasing


@pytest.mark.parametrize("beta", [0.3, 1.0, 10.0])
def test_resting_places_are_where_the_measures_are_least(beta):
    def eigenvalues(u):
        return torch.linalg.eigvalsh(hessian(valley, torch.tensor([0.0, 0.0, u], dtype=torch.float64)))

    for name, f in {
        "sharpness": lambda v: v.max(),
        "frobenius_norm": lambda v: v.norm(),
        "trace": lambda v: v.sum(),
        "log_determinant": lambda v: (beta * v).log1p().sum(),
    }.items():
        least = minimize_scalar(lambda u, f=f: float(f(eigenvalues(u))), (-2, 1), tol=1e-10).x
        assert resting_place(name, beta) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("sharpness", FUNCTIONS)
def test_the_scale_flow_is_the_gradient_of_the_measure(sharpness):
    gradient = torch.func.grad(lambda v: measure(scale_invariant, sharpness, v))(torch.tensor([0.0, 0.0, 1.0]).double())
    assert (scale_flow(sharpness, 0.01, [1e-4])[0] - 1) / 1e-4 == pytest.approx(-0.01 * float(gradient[2]), rel=1e-4)
    closed = {trace: (1 + 12 * 3) ** (1 / 4), frobenius: (1 + 30 * 3) ** (1 / 6)}
    if sharpness in closed:
        assert scale_flow(sharpness, 1.0, [3.0])[0] == pytest.approx(closed[sharpness], rel=1e-7)


def test_the_hyperbolas_runs():
    table = hyperbola_table(copies=8, steps=(100, 300))
    measured = table[table.flow.notna()]
    assert len(measured) == 8
    assert measured.trace.to_numpy() == pytest.approx(measured.flow.to_numpy(), rel=0.06)
    assert (measured.trace < 6.2).all()
    assert table[table.name == "gd"].trace.to_numpy() == pytest.approx(6.4023, abs=1e-3)
    past = table[(table.name == "frobenius") & ~table.paired & (table.strength == 1)]
    assert 0.1 * 6.4 * (1 + 6.4) > 2
    assert past.diverged.iloc[-1] >= 2
    climbs = table[(table.name == "determinant") & ~table.paired]
    assert (climbs.trace > 10).all()
    published = table[table.name == "published determinant"]
    assert (published[published.half_width.isna()].diverged == 8).all()
    assert not published[published.half_width.notna()].diverged.any()
    assert table.equals(hyperbola_table(copies=8, steps=(100, 300)))


def test_each_measure_has_its_resting_place():
    table = resting_table(copies=4, rules=[(name, rule) for name, rule in RESTING_RULES if rule.slow == 1])
    many = table[((table.samples >= 8) | (table.name == "trace")) & (table.beta == 1)]
    assert set(many.measure) == {"frobenius_norm", "trace", "log_determinant"}
    assert many.u.to_numpy() == pytest.approx(many.theory.to_numpy(), abs=0.03)
    assert table[table.name == "sam"].u.to_numpy() == pytest.approx(0, abs=0.04)
    few = table[(table.name == "determinant") & (table.samples == 1)]
    assert few.u.to_numpy() == pytest.approx(resting_place("trace"), abs=0.06)
    assert not table.diverged.any()


def test_scale_invariance_gains_nothing():
    table = scale_table(copies=4, steps=1000)
    assert table.scaled_trace.to_numpy() == pytest.approx(3, abs=1e-4)
    measured = table[table.flow.notna()]
    assert measured.norm.to_numpy() == pytest.approx(measured.flow.to_numpy(), rel=0.015)
    w = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)
    by_hand = (3 - 6 * scale_invariant(w)[0]) / w.square().sum()
    assert float(hessian(scale_invariant, w).trace()) == pytest.approx(float(by_hand))


def test_the_interpolating_network_is_at_a_minimum():
    problem = interpolation(1)
    loss, gradient = problem.value_and_gradient(problem.params)
    dense = torch.func.hessian(problem.loss)(problem.params)
    assert float(loss) < 1e-20
    assert float(gradient.norm()) < 1e-10
    torch.testing.assert_close(problem.tangent @ problem.tangent, problem.tangent)
    assert float(problem.tangent.trace()) == pytest.approx(len(gradient) - 8)
    assert float((dense @ problem.tangent).norm()) < 1e-8
    values = torch.linalg.eigvalsh(dense)
    assert int((values > 1e-4).sum()) == 8


@pytest.mark.parametrize(("sharpness", "samples"), [(trace, 1), (frobenius, 2), (frobenius, 4), (determinant(0.3), 64)])
def test_the_mean_update_drifts_along_the_gradient_of_the_measure(sharpness, samples):
    problem = interpolation(0)
    found = _drift(
        _updates(problem, sharpness, samples, True, 0.01, 40_000 // samples, 0),
        measure_gradient(problem, sharpness),
        problem.tangent,
    )
    few = 0.02 if samples == 64 else 0.01  # a determinant of few samples leans to the trace; ρ > 0 costs about 1 %
    assert abs(found["slope"] - 1) <= 3 * found["slope_error"] + few
    assert found["cosine"] > 0.99


def test_off_the_tangent_space_plain_frobenius_has_a_term_of_its_own():
    """At a minimum its mean is λρ² (∇ ¼‖H‖²_F + ½ H ∇ tr H); x and −x together, so that odd noise cancels."""
    problem, copies, rho = interpolation(0), 20_000, 0.02
    x = torch.randn(4, copies, len(problem.params), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = problem.params.expand(copies, -1)
    both = [universal_gradient(problem.value_and_gradient, at, y, rho, 1.0, frobenius, False) for y in (x, -x)]
    normal = torch.eye(len(problem.params)) - problem.tangent
    own = normal @ torch.func.hessian(problem.loss)(problem.params) @ measure_gradient(problem, trace)
    rest = (both[0] + both[1]) / 2 / rho**2 - measure_gradient(problem, frobenius)
    shares = rest @ normal @ own / own.square().sum()
    error = shares.std() / copies**0.5
    assert error < 0.1
    assert abs(shares.mean() - 1) <= 3 * error


def test_the_table_of_drifts():
    table = drift_table(evaluations=8_000)
    assert (table.slope.sub(1).abs() <= 4 * table.slope_error + 0.06)[(table.name != "determinant")].all()
    few = table[table.name == "determinant"].set_index("samples").slope
    assert few[2] > few[8] > few[64]  # with few samples it leans to the trace
    assert math.isfinite(table.signal_to_noise.min())
    assert len(HYPERBOLA_RULES) == 6
