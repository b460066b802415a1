import pytest
import torch

from samlib import HessianOperator
from samlib.spectrum import hutchinson_trace, spectral_density

from .conftest import PROBLEMS, problem
from .matrices import dense


@pytest.mark.parametrize("name", PROBLEMS)
def test_trace_of_small_nets(name):
    operator = HessianOperator(*problem(name))
    exact = float(dense(operator).diagonal().sum())
    estimate, error = hutchinson_trace(operator, probes=400)
    assert abs(estimate - exact) <= 4 * error
    offdiagonal = dense(operator) - torch.diag(dense(operator).diagonal())
    assert error == pytest.approx(
        float((2 * offdiagonal.square().sum() / 400) ** 0.5), rel=0.3
    )  # Hutchinson's variance


@pytest.mark.parametrize("name", PROBLEMS)
def test_spectral_density_has_the_moments_of_the_spectrum(name):
    operator = HessianOperator(*problem(name))
    eigenvalues = torch.linalg.eigvalsh(dense(operator))
    density = spectral_density(operator, probes=200, steps=12)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(200, dtype=torch.float64))
    for power in (1, 2, 3):
        expected = float((eigenvalues**power).mean())
        samples = (density.nodes**power * density.weights).sum(1)
        assert abs(density.moment(power) - expected) <= 4 * float(samples.std()) / 200**0.5
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    at = torch.linspace(2 * low - high, 2 * high - low, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(density(at, (high - low) / 50), at)) == pytest.approx(1, abs=1e-6)


def test_spectral_density_is_exact_where_lanczos_ends_early():
    """Three different eigenvalues end every Lanczos sequence after three steps, with the spectrum as nodes."""
    values = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64).repeat_interleave(20)
    density = spectral_density(torch.diag(values), probes=3, steps=10)
    assert (density.weights > 1e-12).sum(1).tolist() == [3, 3, 3]
    torch.testing.assert_close(density.weights[density.weights > 1e-12], torch.full((9,), 1 / 3).double())
    assert sorted(set(density.nodes[density.weights > 1e-12].round(decimals=9).tolist())) == [-2, 1, 3]


@pytest.mark.parametrize("call", [lambda m: hutchinson_trace(m, 1), lambda m: spectral_density(m, 0)])
def test_too_few_probes_are_refused(call):
    with pytest.raises(ValueError, match="probes"):
        call(torch.eye(3))


@pytest.mark.parametrize("kind", ["array", "Hermitian", "float16"])
def test_operators_of_other_kinds(kind):
    torch.manual_seed(0)
    matrix = torch.randn(20, 20, dtype=torch.complex128 if kind == "Hermitian" else torch.float64)
    matrix = matrix + matrix.mH
    matrix = matrix.half() if kind == "float16" else matrix
    operator = matrix.numpy() if kind == "array" else matrix
    eigenvalues = torch.linalg.eigvalsh(matrix.float() if kind == "float16" else matrix).double()
    trace, error = hutchinson_trace(operator, probes=300)
    assert abs(trace - float(eigenvalues.sum())) < 4 * error
    density = spectral_density(operator, probes=1, steps=20)
    tolerance = 1e-2 if kind == "float16" else 1e-9
    torch.testing.assert_close(density.nodes[0], eigenvalues, rtol=0, atol=tolerance)
