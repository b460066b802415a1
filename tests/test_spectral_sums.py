import numpy as np
import pytest
import torch
from torch import nn

from samlib import HessianOperator, Objective
from samlib.experiments import mean_squared_error
from samlib.objective import flatten_parameters
from samlib.spectrum import _without_last_step, curvature_measures, spectral_density, spectral_sums

from .conftest import PROBLEMS, problem

MEASURES = ("trace", "frobenius_norm", "log_determinant")


def with_spectrum(values, seed=0):
    """A dense symmetric matrix with given eigenvalues and random eigenvectors."""
    random = np.random.default_rng(seed).standard_normal((len(values), len(values)))
    basis = np.linalg.qr(random)[0]
    return torch.from_numpy((basis * np.asarray(values)) @ basis.T)


def network_like(size=1200, seed=0):
    """What a trained network shows: ten outliers, a bulk that falls as a power, a few small negative values."""
    random = np.random.default_rng(seed)
    outliers, bulk = random.uniform(0.8, 2, 10), random.uniform(0.5, 1, size - 60) * np.arange(1, size - 59) ** -0.6
    return np.concatenate([outliers, bulk, -random.uniform(0, 0.02, 50)])


def exact(values, beta=1.0):
    values = np.asarray(values)
    logs = np.log1p(beta * values.clip(min=0))
    return {"trace": values.sum(), "frobenius_norm": np.linalg.norm(values), "log_determinant": logs.sum()}


def dense(operator):
    return torch.stack([operator @ e for e in torch.eye(operator.shape[0], dtype=torch.float64)])


@pytest.mark.parametrize("seed", range(5))
def test_within_five_per_cent_at_the_default_cost(seed):
    values = network_like(seed=seed)
    sums = curvature_measures(with_spectrum(values, seed), generator=torch.Generator().manual_seed(seed))
    assert sums.matvecs <= 100
    for name, expected in exact(values).items():
        assert sums.values[name] == pytest.approx(expected, rel=0.05), name


def test_a_trained_network_within_five_per_cent_and_four_standard_errors():
    torch.manual_seed(0)
    inputs, targets = torch.rand(150, 36).double(), torch.eye(6).double()[torch.randint(6, (150,))]
    model = nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6)).double()
    objective, params = Objective(model, mean_squared_error, inputs, targets), flatten_parameters(model)
    for _ in range(600):
        params = params - objective.gradient(params)
    operator = HessianOperator(objective, params)
    sums = curvature_measures(operator, probes=8)
    for name, expected in exact(torch.linalg.eigvalsh(dense(operator)).numpy()).items():
        assert sums.values[name] == pytest.approx(expected, rel=0.05), name
        assert abs(sums.values[name] - expected) <= 4 * sums.errors[name], name
    assert sums.matvecs == operator.matvecs - len(params)


@pytest.mark.parametrize("name", PROBLEMS[:2])
def test_mean_and_standard_error_on_networks(name):
    """Over many runs: no bias in trace and squared norm, and an error that is the stated one or less."""
    matrix = dense(HessianOperator(*problem(name)))
    matrix = (matrix + matrix.mT) / 2
    values = torch.linalg.eigvalsh(matrix)
    functions = {"trace": lambda x: x, "square": torch.square}
    runs = [
        spectral_sums(matrix, functions, k=4, probes=2, generator=torch.Generator().manual_seed(seed), tol=1e-6)
        for seed in range(60)
    ]
    for key, expected in {"trace": values.sum(), "square": values.square().sum()}.items():
        off = torch.tensor([run.values[key] for run in runs]) - float(expected)
        stated = torch.tensor([run.errors[key] for run in runs]).square().mean().sqrt()
        assert abs(off.mean()) <= 3 * off.std() / 60**0.5
        assert off.square().mean().sqrt() <= 1.3 * stated  # 60 runs know a deviation to 10 %


def test_the_stated_error_is_that_of_gaussian_vectors():
    """√(2 ‖H_c‖²_F/probes): Hutchinson's variance, which random eigenvectors attain with signs too."""
    values = network_like()
    rest = np.sort(np.abs(values))[:-12]
    sums = curvature_measures(with_spectrum(values), tol=1e-8)
    assert sums.errors["trace"] == pytest.approx((2 * np.sum(rest**2) / 3) ** 0.5, rel=0.1)
    norm = (2 * np.sum(rest**4) / 3) ** 0.5 / (2 * np.linalg.norm(values))
    assert sums.errors["frobenius_norm"] == pytest.approx(norm, rel=0.2)


def test_all_is_exact_where_the_leading_pairs_are_the_whole_spectrum():
    values = np.array([3.0, 2.0, 1.0, 0.5, -0.25])
    sums = curvature_measures(with_spectrum(values), beta=0.7, tol=1e-10)
    for name, expected in exact(values, 0.7).items():
        assert sums.values[name] == pytest.approx(expected, rel=1e-9)
        assert sums.errors[name] == 0
    np.testing.assert_allclose(sums.eigenvalues, values, atol=1e-9)


def test_functions_that_do_not_vanish_at_zero_count_each_eigenvalue_once():
    values = np.concatenate([[5.0, -4.0], np.full(48, 0.5)])  # Lanczos ends after one step on the rest
    functions = {"count": torch.ones_like, "exp": torch.exp, "cube": lambda x: x**3}
    sums = spectral_sums(with_spectrum(values), functions, k=2, probes=400, tol=1e-10)
    assert sums.values["count"] == pytest.approx(50)
    assert sums.errors["count"] == 0
    for name, f in {"exp": np.exp, "cube": lambda x: x**3}.items():
        assert abs(sums.values[name] - f(values).sum()) <= 4 * sums.errors[name] + 1e-6


def test_one_lanczos_step_fewer_is_what_a_shorter_run_gives():
    matrix = with_spectrum(network_like(200))
    longer, shorter = (spectral_density(matrix, probes=3, steps=n) for n in (8, 7))
    nodes, weights = _without_last_step(longer.nodes, longer.weights)
    torch.testing.assert_close(nodes, shorter.nodes, rtol=0, atol=1e-8)
    torch.testing.assert_close(weights, shorter.weights, rtol=0, atol=1e-8)


def test_the_error_tells_of_a_quadrature_too_short():
    """log(1 + 300 λ) bends near zero, where two steps see little: the stated error covers what is missed."""
    values = np.concatenate([np.full(12, 2.0), np.linspace(0, 1, 588) ** 4])
    sums = curvature_measures(with_spectrum(values), beta=300, probes=30, steps=2)
    off = sums.values["log_determinant"] - exact(values, 300)["log_determinant"]
    assert off > 0.05 * exact(values, 300)["log_determinant"]
    assert off <= 2 * sums.errors["log_determinant"]


def test_float32_repeats_by_seed_and_a_model_saves_products():
    values = network_like(300)
    matrix = with_spectrum(values).float()
    first = curvature_measures(matrix)
    assert first.values == curvature_measures(matrix).values
    assert first.values["frobenius_norm"] == pytest.approx(np.linalg.norm(values), rel=0.02)
    assert curvature_measures(matrix, v0=first.model).matvecs < first.matvecs


def test_zero_has_no_error():
    sums = curvature_measures(torch.zeros(30, 30, dtype=torch.float64))
    assert set(sums.values) == set(MEASURES)
    assert not any(sums.values.values())
    assert not any(sums.errors.values())


@pytest.mark.parametrize("settings", [{"k": 0}, {"probes": 0}, {"steps": 1}, {"beta": 0.0}, {"beta": float("nan")}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        curvature_measures(torch.eye(3), **settings)
