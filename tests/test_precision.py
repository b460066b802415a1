import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samlib.optim.precision import LONG, add_scaled, norm, total_norm, wide

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


def exact_norm(x):
    """In NumPy's widest type, scaled so that no square leaves its range."""
    values = np.abs(x.detach().to_dense().double().numpy().astype(np.longdouble)).reshape(-1)
    largest = values.max(initial=0)
    return float(largest * np.sqrt(np.square(values / largest).sum())) if largest else 0.0


@given(
    size=st.integers(0, 3 * LONG) | st.sampled_from([LONG - 1, LONG, LONG + 1, 2 * LONG]),
    dtype=st.sampled_from(FLOATS),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_norms_are_exact_whatever_the_size_and_type(size, dtype, exponent, seed, strided):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * size if strided else size, generator=generator, dtype=torch.float64) * 10.0**exponent
    limits = torch.finfo(dtype)
    x = x.clamp(limits.min, limits.max).to(dtype)[:: 2 if strided else 1]
    assert float(total_norm([x])) == pytest.approx(exact_norm(x), rel=2e-7, abs=0)
    parts = x.split(max(1, size // 3))
    assert float(total_norm(parts)) == pytest.approx(exact_norm(x), rel=2e-7, abs=0)


def test_long_vectors_do_not_read_low():
    """torch's own float32 norm is 6e-5 too small here on one thread."""
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    for shape in ((-1,), (1000, 3000), (3000, 10, 100)):
        assert float(norm(x.view(shape))) == pytest.approx(exact_norm(x), rel=4e-8)
    assert float(norm(x.view(1000, 3000).T)) == pytest.approx(exact_norm(x), rel=4e-8)


def test_norms_keep_the_range_of_their_type():
    big = torch.full((10_000,), 3e38)
    assert float(total_norm([big, torch.ones(2)])) == pytest.approx(3e40, rel=2e-7)
    assert float(total_norm([torch.full((10_000,), 1e-35)])) == pytest.approx(1e-33, rel=2e-7, abs=0)
    assert float(total_norm([torch.full((9,), 65504.0, dtype=torch.float16)])) == 3 * 65504
    assert math.isinf(total_norm([torch.tensor([math.inf, 1.0])]))
    assert math.isnan(total_norm([torch.tensor([math.nan]), torch.ones(1)]))


def test_norms_of_complex_and_sparse_tensors():
    z = torch.tensor([3 + 4j, 12j], dtype=torch.complex64)
    assert float(norm(z)) == pytest.approx(13)
    # An uncoalesced sparse tensor holds two values for one entry: they count as their sum.
    x = torch.sparse_coo_tensor([[0, 2, 2]], torch.tensor([3.0, 1.0, 3.0]), (4,), check_invariants=False)
    assert float(norm(x)) == 5
    assert wide(x).tolist() == [3, 0, 4, 0]


def test_norms_run_stacked():
    x = torch.randn(3, LONG + 5, generator=torch.Generator().manual_seed(1))
    stacked = torch.func.vmap(norm)(x)
    torch.testing.assert_close(stacked, torch.stack([norm(row) for row in x]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tensor", [True, False])
def test_sums_are_rounded_once(dtype, tensor):
    """A scale beyond the range of float16, as ρ/1e-5 is, loses nothing."""
    generator = torch.Generator().manual_seed(0)
    p, x = (torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    x = x * torch.tensor(1e-4).to(dtype)
    scale = 5e4 / 3
    expected = (p.double() + scale * x.double()).to(dtype)
    add_scaled(p, wide(x), torch.tensor(scale, dtype=torch.float64) if tensor else scale)
    # Twice at most where float32 comes between: a last place may differ.
    torch.testing.assert_close(p, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    if dtype in HALF:
        assert (p == expected).float().mean() > 0.99


def test_norms_whose_squares_leave_float64():
    for size in (1e200, 1e-200):
        assert float(total_norm([torch.full((4,), size, dtype=torch.float64)])) == pytest.approx(2 * size, rel=1e-12)
