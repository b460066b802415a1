import copy
import importlib.util
import math

import numpy as np
import pytest
import torch

from samlib.datasets.molecular_graphs import parse
from samlib.datasets.molecules import load_molecules
from samlib.datasets.toy_molecules import toy_molecules
from samlib.layers import plain
from samlib.models.graph import TYPICAL_SIZE, GraphTransformer
from samlib.objective import flatten_parameters, pure_loss

needs_rdkit = pytest.mark.skipif(
    importlib.util.find_spec("rdkit") is None, reason="RDKit is not installed (samlib[molecules])"
)


def tables(graphs, room=0):
    """Padded tensors of some molecules, with room for more atoms than the largest has."""
    size = max(len(graph.atoms) for graph in graphs) + room
    atoms, pairs = (torch.zeros(len(graphs), size, width, dtype=torch.uint8) for width in (8, size))
    for row, graph in enumerate(graphs):
        n = len(graph.atoms)
        atoms[row, :n], pairs[row, :n, :n] = torch.tensor(graph.atoms), torch.tensor(graph.pairs)
    return atoms, pairs


def moved_model(seed=0, dtype=torch.float64, **settings):
    """Off the initial parameters: zero biases and unit scales hide mistakes."""
    torch.manual_seed(seed)
    model = GraphTransformer(**{"width": 12, "layers": 2, "heads": 3, "key_size": 4, "outputs": 2} | settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model.to(dtype)


@pytest.fixture(scope="module")
def molecules():
    return toy_molecules(12, seed=1)[0]


def test_parameter_counts_in_closed_form():
    block = 2 * 2 * 64 + 3 * (64 * 64 + 64) + (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64)
    model = GraphTransformer()
    assert sum(p.numel() for p in model.parameters()) == 42 * 64 + 15 * 4 + 3 * block + 2 * 64 + (64 + 1) == 103_357
    assert not model.relation.weight.any()


def test_forward_pass_in_numpy(molecules):
    model = moved_model(layers=1)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    outputs = model(tables(molecules)).detach().numpy()
    for graph, output in zip(molecules, outputs, strict=True):
        n = len(graph.atoms)
        x = np.array([sum(weights["embed.weight"][word] for word in words) for words in graph.atoms])
        h = norm(x, "blocks.0.norm1")
        q, k, v = (linear(h, f"blocks.0.{name}").reshape(n, 3, 4) for name in ("query", "key", "value"))
        mixed = np.zeros((n, 3, 4))
        for head in range(3):
            for i in range(n):
                bias = [weights["relation.weight"][graph.pairs[i, j], head] for j in range(n)]
                scores = np.array([q[i, head] @ k[j, head] / 2 + bias[j] for j in range(n)])
                mixed[i, head] = np.exp(scores) / np.exp(scores).sum() @ v[:, head]
        x = x + linear(mixed.reshape(n, 12), "blocks.0.out")
        u = linear(norm(x, "blocks.0.norm2"), "blocks.0.up")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, "blocks.0.down")
        np.testing.assert_allclose(output, linear(norm(x, "norm").sum(0) / TYPICAL_SIZE, "head"), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("trim", [True, False])
def test_padding_changes_no_output_and_no_gradient(monkeypatch, molecules, dtype, tolerance, trim):
    model = moved_model(dtype=dtype)
    alone = torch.cat([model(tables([graph])) for graph in molecules])
    gradient = torch.autograd.grad(alone.square().sum(), list(model.parameters()))
    # As in a compiled program, which keeps the columns that are all padding.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not trim)
    together = model(tables(molecules, room=7))
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
    for a, b in zip(torch.autograd.grad(together.square().sum(), list(model.parameters())), gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=100 * tolerance, atol=100 * tolerance)


def test_what_padding_holds_is_never_looked_at(molecules):
    model = moved_model()
    atoms, pairs = tables(molecules, room=2)
    expected = model((atoms, pairs))
    padding = pairs.diagonal(dim1=1, dim2=2) == 0
    torch.manual_seed(0)
    noise = torch.randint(0, 42, atoms.shape, dtype=torch.uint8)
    torch.testing.assert_close(model((torch.where(padding[..., None], noise, atoms), pairs)), expected)


def test_the_order_of_the_atoms_changes_no_output(molecules):
    model, random = moved_model(), np.random.default_rng(0)
    orders = [random.permutation(len(graph.atoms)) for graph in molecules]
    shuffled = [
        graph._replace(atoms=graph.atoms[order], pairs=graph.pairs[np.ix_(order, order)])
        for graph, order in zip(molecules, orders, strict=True)
    ]
    torch.testing.assert_close(model(tables(shuffled)), model(tables(molecules)), rtol=0, atol=1e-12)


@needs_rdkit
def test_another_writing_of_a_molecule_changes_no_output():
    from rdkit import Chem

    texts = ["N[C@@H](C)C(=O)O", "CN1C(=O)N(C)c2ncn(C)c2C1=O", "C[C@H](O)[C@@H](F)Cl.[Na+]", "OC[C@@H]1CC[C@H](N)C1"]
    model = moved_model()
    expected = model(tables(parse(texts)))
    for seed in range(1, 6):
        written = [Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(text), 1, randomSeed=seed)[0] for text in texts]
        torch.testing.assert_close(model(tables(parse(written))), expected, rtol=0, atol=1e-12)


def test_outputs_tell_molecules_apart_by_atoms_bonds_and_size(molecules):
    model = moved_model()
    outputs = model(tables(molecules))[:, 0]
    assert len({round(value, 6) for value in outputs.tolist()}) == len(molecules)
    graph = molecules[0]
    pairs = graph.pairs.copy()
    pairs[0, 1] = pairs[1, 0] = 3
    assert (model(tables([graph._replace(pairs=pairs)]))[0, 0] - outputs[0]).abs() > 1e-4


def loss_and_parameters(molecules):
    model, inputs = moved_model(), tables(molecules)
    targets = torch.randn(len(molecules), 2, dtype=torch.float64)
    return model, inputs, targets, lambda outputs, y: (outputs - y).square().mean()


def test_second_derivatives_are_those_of_finite_differences_and_of_plain_operations(molecules):
    model, inputs, targets, loss = loss_and_parameters(molecules)
    params = flatten_parameters(model)
    sizes, shapes = [p.numel() for p in model.parameters()], [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def gradient(w, create_graph=False):
        parts = {n: p.view(s) for n, p, s in zip(names, w.split(sizes), shapes, strict=True)}
        value = loss(torch.func.functional_call(model, parts, (inputs,)), targets)
        return torch.autograd.grad(value, w, create_graph=create_graph)[0]

    w = params.clone().requires_grad_()
    first = gradient(w, create_graph=True)
    oracle = pure_loss(model, loss)
    for seed in range(3):
        torch.manual_seed(seed)
        v = torch.randn_like(params)
        v /= v.norm()
        (product,) = torch.autograd.grad(first, w, v, retain_graph=True)
        step = 1e-5
        ahead, behind = (gradient((params + sign * step * v).requires_grad_()) for sign in (1, -1))
        torch.testing.assert_close(product, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
        _, forward = torch.func.jvp(lambda p: torch.func.grad(oracle)(p, inputs, targets), (params,), (v,))
        torch.testing.assert_close(product, forward, rtol=1e-9, atol=1e-11)


def test_plain_operations_and_stacked_parameters_give_the_same(molecules):
    model, inputs, targets, loss = loss_and_parameters(molecules)
    torch.testing.assert_close(plain(copy.deepcopy(model))(inputs), model(inputs))
    others = [flatten_parameters(moved_model(seed)) for seed in range(3)]
    losses = torch.vmap(pure_loss(model, loss), in_dims=(0, None, None))(torch.stack(others), inputs, targets)
    expected = torch.stack([loss(moved_model(seed)(inputs), targets) for seed in range(3)])
    torch.testing.assert_close(losses, expected)


def test_it_learns_the_stand_in():
    dataset = load_molecules("esol", policy="standin")
    torch.manual_seed(0)
    model = GraphTransformer(width=32, layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def error(inputs, targets):
        with torch.no_grad():
            return (model(inputs) - targets).square().mean().sqrt().item()

    before = error(dataset.test_inputs, dataset.test_targets)
    for _ in range(60):
        optimizer.zero_grad()
        (model(dataset.train_inputs) - dataset.train_targets).square().mean().backward()
        optimizer.step()
    # The values spread by 1.6; a constant guess cannot do better than that.
    assert before > 2
    assert error(dataset.test_inputs, dataset.test_targets) < 0.5
