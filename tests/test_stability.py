import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

from samlib import effective_curvature, growth_factor, momentum_edge, spectral_radius

from .quadratics import flat, holder

rates = st.floats(1e-3, 1e3)
momenta = st.floats(0, 0.99)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), rates, st.floats(0, 1e3))
def test_sams_growth_is_that_of_its_effective_curvature(curvature, grad_norm, learning_rate, rho):
    seen = effective_curvature(curvature, grad_norm, rho)
    factor = growth_factor(curvature, grad_norm, learning_rate, rho)
    assert 1 - learning_rate * seen == pytest.approx(factor, rel=1e-12)
    assert spectral_radius(seen, learning_rate) == pytest.approx(abs(factor), rel=1e-12)


@pytest.mark.parametrize("decay", ["step", "decoupled"])
@pytest.mark.parametrize("nesterov", [False, True])
@given(data=st.data())
def test_the_radius_is_that_of_the_map_that_pytorch_steps_by(nesterov, decay, data):
    rate, delta = data.draw(st.floats(0.01, 2)), data.draw(st.floats(0, 1))
    momentum = data.draw(st.floats(0.01, 0.99))
    dampening = 0.0 if nesterov else data.draw(st.floats(0, 0.9))
    curvature = data.draw(st.floats(-5, 10)) / rate

    def step(position, buffer):
        (p,) = params = holder(1)
        p.data.fill_(position)
        coupled = delta if decay == "step" else 0.0
        optimizer = SGD(params, rate, momentum, dampening, coupled, nesterov)
        optimizer.state[p]["momentum_buffer"] = torch.tensor([buffer], dtype=torch.float64)
        p.grad = curvature * p.detach()
        optimizer.step()
        after = flat(params).item() - (rate * delta * position if decay == "decoupled" else 0)
        return [after, optimizer.state[p]["momentum_buffer"].item()]

    eigenvalues = np.linalg.eigvals(np.array([step(1.0, 0.0), step(0.0, 1.0)]).T)
    settings = {"dampening": dampening, "nesterov": nesterov, "weight_decay": delta, "decay": decay}
    found = spectral_radius(curvature, rate, momentum, **settings)
    # Where the two eigenvalues meet, rounding moves them by its root.
    assert found == pytest.approx(np.abs(eigenvalues).max(), rel=1e-6, abs=1e-6)


@given(rates, momenta, momenta, st.floats(0, 0.9), st.booleans(), st.sampled_from(["step", "decoupled"]))
def test_it_passes_one_at_the_edge(learning_rate, momentum, dampening, share, nesterov, decay):
    settings = {"nesterov": True} if nesterov else {"dampening": dampening}
    settings |= {"weight_decay": share / learning_rate, "decay": decay}
    edge = momentum_edge(learning_rate, momentum, **settings)
    assert spectral_radius(edge, learning_rate, momentum, **settings) == pytest.approx(1, abs=1e-6)
    assert spectral_radius(0.999 * edge, learning_rate, momentum, **settings) < 1
    assert spectral_radius(1.001 * edge, learning_rate, momentum, **settings) > 1


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_arrays_and_tensors_broadcast(make):
    curvatures, betas = make([-1.0, 2.0, 9.0]), make([[0.0], [0.9]])
    found = spectral_radius(curvatures, 0.3, betas, nesterov=True)
    assert type(found) is type(curvatures)
    expected = [[spectral_radius(a, 0.3, b, nesterov=True) for a in (-1.0, 2.0, 9.0)] for b in (0.0, 0.9)]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6)
    assert isinstance(effective_curvature(1.0, 1.0, 0.1), float)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_radius(1.0, 0.0), "learning_rate must be positive and finite"),
        (lambda: spectral_radius(1.0, 0.1, 1.0), "momentum must be non-negative and less than 1"),
        (lambda: spectral_radius(1.0, 0.1, weight_decay=-1.0), "weight_decay must be non-negative"),
        (lambda: spectral_radius(1.0, 0.1, decay="l2"), "decay must be one of"),
        (lambda: effective_curvature(1.0, 0.0, 0.1), "grad_norm must be positive and finite"),
        (lambda: effective_curvature(1.0, 1.0, math.inf), "rho must be non-negative and finite"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
