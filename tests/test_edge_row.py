"""Alignments where two eigenvalues lie close together: with the span of both, or with the right one."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from samlib.edge_row import EdgeRow
from samlib.eigen import extreme_eigenpairs
from samlib.laws import EdgeLaw
from samlib.lowrank import LowRank

from .matrices import with_spectrum

TOL = 3e-3


@dataclass
class Quadratic:
    """A Hessian with a gradient beside it."""

    matrix: Tensor
    gradient: Tensor
    value: Tensor = field(default_factory=lambda: torch.tensor(1.0))

    def __post_init__(self):
        self.shape, self.dtype, self.device = self.matrix.shape, self.matrix.dtype, self.matrix.device

    def __matmul__(self, vector):
        return self.matrix @ vector


def near_degenerate(seed, apart, sign, known):
    """Two eigenvalues some tolerances apart, and a model with one direction that is known and one that is rough.

    ``known`` is in coordinates of their eigenvectors. The residual of that direction is below the tolerance, and what
    the model has of the other looks like a value far below.
    """
    values = torch.cat([torch.tensor([1.0, 1 - apart * TOL]), torch.linspace(0.6, -0.4, 78)]).double()
    matrix = sign * with_spectrum(values.numpy(), seed)
    vectors = torch.linalg.eigh(sign * matrix).eigenvectors
    pair, rest = vectors[:, [-1, -2]], vectors[:, :-2]
    generator = torch.Generator().manual_seed(seed)
    side = rest @ torch.randn(78, generator=generator, dtype=torch.float64)
    turn = torch.tensor([[known[0], known[1]], [known[1], -known[0]]], dtype=torch.float64)
    start = pair @ turn + torch.outer(side / side.norm(), torch.tensor([0.0, 0.5], dtype=torch.float64))
    gradient = torch.randn(80, generator=generator, dtype=torch.float64) + 3 * pair[:, 1]
    return matrix, gradient, LowRank(torch.linalg.qr(start).Q, sign * torch.tensor([1.0, 0.8]).double()), pair


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("apart", "known", "together"),
    [(0.0, (0.8, 0.6), 2), (0.4, (0.8, 0.6), 2), (0.5, (0.6, 0.8), 2), (2.5, (0.0, 1.0), 1), (9.0, (0.0, 1.0), 1)],
    ids=["equal", "a mixture", "another", "the second passes for the first", "far off"],
)
@pytest.mark.parametrize("seed", range(4))
def test_alignment_where_a_rough_neighbour_hides(seed, apart, known, together, sign):
    matrix, gradient, model, pair = near_degenerate(seed, apart, sign, known)
    unaware = extreme_eigenpairs(matrix, v0=tuple(model), tol=TOL, explore=0)
    found = unaware.vectors[:, unaware.principal]
    assert unaware.converged
    assert float((pair[:, 1] @ found).abs()) > 0.5  # so this is a trap: by their residuals such vectors pass

    law = EdgeLaw("GD", learning_rate=0.1)
    row = EdgeRow(law, 0.1, 0.1, 1, TOL, torch.Generator, memory={"model": tuple(model)})
    read = row.measure(Quadratic(matrix, gradient), gradient)
    span = pair[:, :together]
    assert read["inseparable"] == together
    assert read["grad_alignment"] == pytest.approx(float((span.mT @ gradient).norm() / gradient.norm()), abs=0.03)
    assert read["operator_norm"] == pytest.approx(1, rel=TOL)
    if together == 1:
        assert read["gap"] == pytest.approx(apart * TOL, rel=0.1)


def test_a_cluster_that_no_one_can_separate_is_all_in_the_span():
    values = torch.cat([torch.ones(4), torch.linspace(0.5, -0.4, 56)]).double()
    matrix = with_spectrum(values.numpy(), 0)
    cluster = torch.linalg.eigh(matrix).eigenvectors[:, -4:]
    gradient = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = LowRank(cluster[:, :1], torch.ones(1, dtype=torch.float64))
    row = EdgeRow(EdgeLaw("GD", learning_rate=0.1), 0.1, 0.1, 1, TOL, torch.Generator, memory={"model": tuple(model)})
    read = row.measure(Quadratic(matrix, gradient), gradient)
    # Copies of an eigenvalue show only as far as the starting vectors have parts of them.
    assert 1 <= read["inseparable"] <= 4
    assert read["grad_alignment"] <= float((cluster.mT @ gradient).norm() / gradient.norm()) + 0.02


@pytest.mark.parametrize("seed", range(3))
def test_well_separated_pairs_cost_nothing_more(seed):
    values = torch.linspace(1, 0, 100, dtype=torch.float64) ** 4
    matrix = with_spectrum(values.numpy(), seed)
    cold = extreme_eigenpairs(matrix, tol=TOL)
    moved = matrix + 1e-3 * with_spectrum(values.numpy(), seed + 10)
    spent = [
        extreme_eigenpairs(moved, v0=cold, tol=TOL, explore=0, separate=separate).matvecs for separate in (False, True)
    ]
    assert spent[0] == spent[1]


@pytest.mark.parametrize("matrix", [torch.zeros(5, 5), torch.eye(6), torch.ones(2, 2), torch.tensor([[3.0]])])
def test_separating_ends_where_there_is_nothing_to_separate(matrix):
    result = extreme_eigenpairs(matrix.double(), 1, int(len(matrix) > 1), separate=True)
    assert result.converged
    assert result.matvecs <= len(matrix)
