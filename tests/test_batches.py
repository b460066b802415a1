import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from samlib import HessianOperator, Objective
from samlib.objective import flatten_parameters
from samlib.objective.batches import concatenate

from .plain import Function, dense, plain_derivatives

COUNT = 11


def examples(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 5, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (COUNT,), generator=generator)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def check(model, loss, data, expected, **settings):
    objective = Objective(model, loss, *data, **settings)
    params = flatten_parameters(model)
    operator = HessianOperator(objective, params)
    value, gradient, hessian = expected
    torch.testing.assert_close(objective.value(params), value)
    torch.testing.assert_close(operator.value, value)
    torch.testing.assert_close(operator.gradient, gradient)
    torch.testing.assert_close(dense(operator), hessian)
    return objective


class Pair(nn.Module):
    """Takes two inputs, by position or by keyword, one of them whole numbers."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = (nn.Embedding(7, 4), nn.Linear(4, 3))
        self.double()

    def forward(self, ids, mask=None, *, scale=1.0):
        h = self.embed(ids)
        h = h if mask is None else h * mask[..., None]
        return {"logits": self.linear(h.sum(1).tanh() * scale), "ids": ids}


class OneArgument(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, batch):
        return self.inner(**batch) if isinstance(batch, dict) else self.inner(*batch)


def pairs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (COUNT, 3), generator=generator)
    return ids, (torch.rand(COUNT, 3, generator=generator) < 0.7).double()


@pytest.mark.parametrize("size", [None, 4, 1])
@pytest.mark.parametrize("kind", ["keywords", "positions", "list", "one dict", "one tuple"])
def test_inputs_of_several_tensors(kind, size):
    torch.manual_seed(0)
    (ids, mask), (_, y), model = pairs(), examples(), Pair()
    loss = lambda o, y: F.cross_entropy(o["logits"], y)  # noqa: E731
    inputs = {"keywords": {"ids": ids, "mask": mask, "scale": 2.0}, "positions": (ids, mask), "list": [ids, mask]}
    plain_inputs = tuple(inputs[kind]) if kind == "list" else inputs.get(kind)
    if kind.startswith("one"):
        inputs[kind] = {"ids": ids, "mask": mask} if kind == "one dict" else (ids, mask)
        model, plain_inputs = OneArgument(model), (inputs[kind],)
    check(model, loss, (inputs[kind], y), plain_derivatives(model, loss, plain_inputs, y), chunk_size=size)


def test_targets_of_several_tensors():
    x, y = examples()
    weights = torch.linspace(0, 1, COUNT, dtype=torch.float64)
    loss = lambda o, t: (F.cross_entropy(o, t["y"], reduction="none") * t["w"]).sum() / t["w"].sum()  # noqa: E731
    model, targets = network(), {"y": y, "w": weights}
    check(model, loss, (x, targets), plain_derivatives(model, loss, x, targets), chunk_size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays(dtype):
    """Of any precision and layout: numbers become the parameters'."""
    x, y = examples(dtype)
    model = network(dtype)
    expected = plain_derivatives(model, F.cross_entropy, x, y)
    for array in (x.numpy(), x.double().numpy(), np.asfortranarray(x.numpy()), x.numpy()[::-1][::-1]):
        array = array.copy(order="K")
        array.flags.writeable = False
        check(model, F.cross_entropy, (array, y.numpy()), expected, chunk_size=4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.none() | st.integers(1, 6), st.booleans())
def test_batches_weigh_as_much_as_their_examples(sizes, chunk_size, retain):
    total = sum(sizes)
    generator = torch.Generator().manual_seed(total)
    x, y = torch.randn(total, 5, generator=generator).double(), torch.randint(0, 3, (total,), generator=generator)
    model = network()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    expected = plain_derivatives(model, F.cross_entropy, x, y)
    for check_it in (True, False):
        settings = {"chunk_size": chunk_size, "retain_graph": retain, "check": check_it}
        objective = check(model, F.cross_entropy, (batches,), expected, **settings)
    with pytest.raises(AttributeError, match="come in batches"):
        objective.inputs  # noqa: B018


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_is_streamed_and_draws_nothing(shuffle):
    x, y = examples()
    model, state = network(), torch.get_rng_state()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)
    objective = check(model, F.cross_entropy, (loader,), plain_derivatives(model, F.cross_entropy, x, y))
    assert torch.equal(state, torch.get_rng_state())
    assert not objective.retain_graph


def test_batches_are_read_one_at_a_time():
    alive = []

    class Batches(IterableDataset):
        def __iter__(self):
            for _ in range(20):
                x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                alive.append(torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage()))
                assert sum(not s.expired() for s in alive) <= 5
                yield x, torch.zeros(4, dtype=torch.long)

    model = network()
    operator = HessianOperator(Objective(model, F.cross_entropy, Batches()), flatten_parameters(model))
    assert len(alive) == 20 * 3
    operator @ operator.gradient
    assert len(alive) == 20 * 4


class Noisy(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        x, y = examples()
        return x[i] + torch.randn(5), y[i]


class ReadOnce:
    """Looks like a loader, and is empty when it is read again."""

    def __init__(self):
        self.batches = iter([examples()])

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (DataLoader(Noisy(), 4), ValueError, "other examples on each pass"),
        (DataLoader(TensorDataset(*examples()), 4, shuffle=True, drop_last=True), ValueError, "other examples"),
        (ReadOnce(), ValueError, "held 11 examples at first and 0 now"),
        ((batch for batch in [examples()]), TypeError, r"iterator \(generator\) gives its batches only once"),
        (iter(DataLoader(TensorDataset(*examples()), 4)), TypeError, "only once"),
        ([], ValueError, "no examples"),
        (DataLoader(TensorDataset(examples()[0][:0]), 4), ValueError, "no examples"),
        ([{"x": 1}], TypeError, r"pair \(inputs, targets\), got a dict of 1"),
        ([(*examples(), 3)], TypeError, "got a tuple of 3"),
        (examples(), TypeError, "pass two tensors one by one"),
        (examples()[0], TypeError, "targets are missing"),
        ({"x": examples()[0]}, TypeError, "targets are missing"),
        (None, TypeError, "expected an iterable of pairs"),
    ],
)
def test_batches_that_are_none(batches, error, message):
    with pytest.raises(error, match=message):
        Objective(network(), F.cross_entropy, batches)


def test_batches_that_change_later():
    """Fewer or more examples than at first are noticed by each evaluation."""
    batches = [examples(), examples()]
    model = network()
    objective = Objective(model, F.cross_entropy, batches)
    batches.pop()
    with pytest.raises(ValueError, match="held 22 examples at first and 11 now"):
        objective.gradient(flatten_parameters(model))


def test_batches_in_another_order_that_weigh_differently():
    x, y = examples()
    weights = torch.tensor([1.0, 9.0, 3.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weights)
    model = network()
    data = TensorDataset(x, y)
    check(model, loss, (DataLoader(data, 4),), plain_derivatives(model, loss, x, y))
    with pytest.raises(ValueError, match="another order on each pass, but weigh differently"):
        Objective(model, loss, DataLoader(data, 4, shuffle=True))


def test_batches_of_different_lengths():
    """Sequences of other lengths in each batch cannot be compared; the mean is over examples, as documented."""
    torch.manual_seed(0)
    model = Function(lambda self, x: self.inner(x).tanh(), inner=nn.Linear(2, 3).double())
    loss = lambda o, y: (o.sum(-1) - y).square().mean()  # noqa: E731
    batches = [(torch.randn(n, t, 2).double(), torch.randn(n, t).double()) for n, t in ((3, 2), (2, 5), (1, 4))]
    objective = Objective(model, loss, batches)
    expected = sum(len(x) / 6 * loss(model(x), y) for x, y in batches)
    torch.testing.assert_close(objective.value(flatten_parameters(model)), expected.detach())


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        (pairs(), examples()[1][:2], ValueError, "as many targets as inputs and at least one, got 11 and 2"),
        ((pairs()[0], pairs()[1][:4]), examples()[1], ValueError, "got 4, 11 and 11"),
        (examples()[0][:0], examples()[1][:0], ValueError, "got 0 and 0"),
        (examples()[0], 3, ValueError, "got 11 and none"),
        (examples()[0], {"y": object()}, TypeError, "must be tensors or arrays .* got a object"),
    ],
)
def test_examples_that_are_none(inputs, targets, error, message):
    with pytest.raises(error, match=message):
        Objective(network(), F.cross_entropy, inputs, targets)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Objective(network(), F.cross_entropy, *examples(), chunk_size=0)


def test_trees_are_joined_only_where_each_example_has_a_row():
    a, b = torch.zeros(2, 3), torch.ones(1, 3)
    joined = concatenate([{"x": a, "n": None}, {"x": b, "n": None}], [2, 1])
    assert joined["n"] is None
    assert torch.equal(joined["x"], torch.cat([a, b]))
    for pair in (
        [a, b.T],
        [a, b[0]],
        [a, {"x": b}],
        [{"x": a, "n": 1}, {"x": b, "n": 2}],
        [(a, a.sum()), (b, b.sum())],
    ):
        with pytest.raises(ValueError, match=r"structures differ|expected tensors"):
            concatenate(pair, [2, 1])
