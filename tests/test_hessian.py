import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from samlib import HessianOperator, top_eigenpairs
from samlib.layers import plain

from .conftest import PROBLEMS, problem


def dense(operator):
    return torch.stack([operator @ e for e in torch.eye(operator.shape[0], dtype=torch.float64)])


@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_curvlinops_and_scipy(name):
    from curvlinops import HessianLinearOperator

    objective, params = problem(name)
    torch.nn.utils.vector_to_parameters(params, objective.model.parameters())
    plain(objective.model)  # so that the oracle shares no derivative
    loss = torch.nn.CrossEntropyLoss() if name == "transformer" else torch.nn.MSELoss()

    class Flat(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).flatten(0, -2)

    targets = objective.targets.flatten() if name == "transformer" else objective.targets
    peer = HessianLinearOperator(
        Flat(objective.model), loss, list(objective.model.parameters()), [(objective.inputs, targets)]
    )
    ours = HessianOperator(problem(name)[0], params)
    torch.manual_seed(1)
    vector = torch.randn(objective.size, dtype=torch.float64)
    torch.testing.assert_close(ours @ vector, peer @ vector)
    values, _ = scipy.sparse.linalg.eigsh(
        scipy.sparse.linalg.LinearOperator(
            ours.shape, lambda v: (peer @ torch.as_tensor(v, dtype=torch.float64).flatten()).numpy(), dtype=np.float64
        ),
        k=2,
        which="LA",
        tol=1e-10,
    )
    result = top_eigenpairs(ours, 2, tol=1e-9, max_matvecs=600)
    np.testing.assert_allclose(result.values.numpy(), values[::-1], rtol=1e-6)


def test_products_that_rebuild_the_graph_work_in_the_solver():
    objective, params = problem("mlp", chunk_size=4, retain_graph=False)
    kept, _ = problem("mlp")
    rebuilt, whole = (top_eigenpairs(HessianOperator(o, params), tol=1e-8) for o in (objective, kept))
    torch.testing.assert_close(rebuilt.values, whole.values)
