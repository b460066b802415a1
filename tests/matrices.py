"""Matrices with known spectra for the tests of the eigen-solver, and plain Lanczos as the measure of its cost."""

import numpy as np
import torch
from hypothesis import strategies as st

from samlib.lowrank import LowRank


def dense(operator):
    return torch.stack([operator @ e for e in torch.eye(operator.shape[0], dtype=torch.float64)])


def with_spectrum(values, seed):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    matrix = q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2


spectra = st.one_of(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=60),
    st.lists(st.floats(-1e3, 0, allow_subnormal=False), min_size=1, max_size=30),  # nothing positive
    st.lists(st.sampled_from([0.0, 1.0, 1.0 + 1e-7, 2.0, -2.0]), min_size=1, max_size=60),  # clustered
    st.integers(1, 40).map(lambda n: [0.0] * n),
    st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda v: [v]),
    st.tuples(st.integers(1, 40), st.floats(-10, 10, allow_subnormal=False)).map(lambda nv: [nv[1]] * nv[0]),
)


def low_rank(size, rank, generator):
    vectors, _ = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator))
    return LowRank(
        vectors, torch.randn(vectors.shape[1], dtype=torch.float64, generator=generator).sort().values.flip(0)
    )


class Diagonal:
    """A diagonal matrix that counts its products; every other one is this in another basis."""

    def __init__(self, values, dtype=torch.float64):
        self.values = torch.as_tensor(np.asarray(values)).to(dtype)
        self.dtype, self.shape, self.products = dtype, (len(values), len(values)), 0

    def __matmul__(self, vector):
        self.products += 1
        return self.values * vector


def like_mnist(outliers=(1.886, 1.775, 1.556, 1.527, 1.462, 1.379, 1.315, 1.198, 1.101, 1.032), copies=1):
    """Eigenvalues like those of the MNIST network: ten apart, as many as there are classes, and a bulk about zero."""
    bulk = np.concatenate([0.4 * np.exp(-np.arange(600) / 30), -0.05 * np.exp(-np.arange(400) / 30), np.zeros(3000)])
    return np.concatenate([np.tile(outliers, copies), np.tile(bulk, copies)])


def lanczos(operator, k, tol, seed=0):
    """Products that plain Lanczos with full orthogonalisation takes until the k largest Ritz values have small
    residuals. It knows nothing of copies, and does not check.
    """
    size, dtype = operator.shape[0], operator.dtype
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    basis, diagonal, beside = (vector / vector.norm())[None], [], []
    while True:
        image = operator @ basis[-1]
        diagonal.append(float(basis[-1] @ image))
        for _ in range(2):
            image = image - (basis @ image) @ basis
        length, steps = float(image.norm()), len(diagonal)
        off = torch.tensor(beside, dtype=torch.float64)
        theta, rotation = torch.linalg.eigh(
            torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off.diag(1) + off.diag(-1)
            if beside
            else torch.tensor([diagonal], dtype=torch.float64)
        )
        norm = float(theta.abs().max())
        if steps == size or length <= 1e-12 * norm:
            return steps
        if steps >= k and float((length * rotation[-1, -k:]).abs().max()) <= tol * norm:
            return steps
        beside.append(length)
        basis = torch.cat([basis, (image / length)[None]])
