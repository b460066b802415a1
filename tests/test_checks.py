"""Right or refused, never silently wrong: layers and losses of all kinds, put in at random."""

import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from samlib import HessianOperator, Objective
from samlib.objective import flatten_parameters

from .plain import Function, dense, plain_derivatives

WIDTH, EXAMPLES, CLASSES = 6, 9, 3


def heads(layer):
    """Attention over the two halves of a layer of features."""
    return Function(lambda self, x: layer_of(self.layer, x.unflatten(-1, (2, -1))).flatten(1), layer=layer)


def layer_of(layer, x):
    return layer(x, x, x, need_weights=False)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


def fused(self, x):
    x = self.inner(x).unflatten(-1, (2, -1))
    return F.scaled_dot_product_attention(x, x, x, is_causal=True).flatten(1)


def checkpointed(reentrant):
    return Function(
        lambda self, x: checkpoint(self.inner, x, use_reentrant=reentrant),
        inner=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    )


def linear():
    return nn.Linear(WIDTH, WIDTH)


def recurrent(self, x):
    return self.inner(x.unflatten(-1, (2, -1)))[0].flatten(1)


def dimmed(self, x):
    with torch.no_grad():
        h = self.inner(x)
    return x + h


def past_the_module(self, x):
    (weight,) = self.held
    return x @ weight


def with_list(layer):
    layer.held = [layer.weight]
    return layer


class InList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [linear().double()]

    def forward(self, x):
        return x + self.layers[0](x)


def noisy(draw):
    return lambda: Function(lambda self, x: x if draw() < 1e-6 else torch.tanh(x))


def own_noise():
    generator = torch.Generator().manual_seed(0)
    return Function(lambda self, x: x + torch.randn(WIDTH, generator=generator, dtype=x.dtype))


def counting():
    def forward(self, x):
        self.calls += 1
        return x + self.calls * torch.linspace(0, 1, WIDTH, dtype=x.dtype).square()

    return Function(forward, calls=0)


def averaging():
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().square().mean()
        return x

    layer = Function(forward)
    layer.register_buffer("mean", torch.zeros(()))
    return layer


def written(self, x):
    return x.mul_(2)


RIGHT = {
    "dropout of nothing": lambda: nn.Dropout(0.0),
    "dropout": lambda: nn.Dropout(0.5).eval(),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH).eval(),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),  # its formula depends on whether gradients are differentiated again
    "SiLU": nn.SiLU,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "RReLU": lambda: nn.RReLU().eval(),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "frozen": lambda: linear().requires_grad_(False),
    "no_grad, frozen": lambda: Function(dimmed, inner=linear().requires_grad_(False)),
    "unused": lambda: Function(lambda self, x: x, inner=linear()),
    "checkpointing": lambda: checkpointed(False),
    "used twice": lambda: Function(lambda self, x: self.inner(torch.tanh(self.inner(x))), inner=linear()),
    "attention": lambda: heads(nn.MultiheadAttention(3, 1, batch_first=True).eval()),
    "encoder layer": lambda: heads(nn.TransformerEncoderLayer(3, 1, 2, batch_first=True).eval()),
    "encoder, training": lambda: heads(nn.TransformerEncoderLayer(3, 1, 2, dropout=0.0, batch_first=True)),
    "fused attention": lambda: Function(fused, inner=linear()),
    "LSTM": lambda: Function(recurrent, inner=nn.LSTM(3, 3, batch_first=True)),
}
REFUSED = {
    "dropout, training": (lambda: nn.Dropout(0.5), r"\(Dropout\) is in training mode and draws random numbers"),
    "functional dropout": (lambda: Function(lambda self, x: F.dropout(x, 0.1, self.training)), "draws random numbers"),
    "RReLU, training": (nn.RReLU, r"\(RReLU\) is in training mode"),
    "attention's dropout": (
        lambda: heads(nn.MultiheadAttention(3, 1, dropout=0.5, batch_first=True)),
        r"\(MultiheadAttention\) is in training mode",
    ),
    "hardly ever a layer less": (noisy(lambda: torch.rand(())), "draws random numbers"),
    "the same by NumPy": (noisy(np.random.rand), "draws random numbers"),
    "the same by Python": (noisy(random.random), "draws random numbers"),
    "noise of its own": (own_noise, "two values at the same w"),
    "state of its own": (counting, "two values at the same w"),
    "batch norm, training": (lambda: nn.BatchNorm1d(WIDTH), r"\(BatchNorm1d\) is in training mode.*running_mean"),
    "spectral norm, training": (lambda: parametrizations.spectral_norm(linear()), "evaluating the loss moves"),
    "average of its own": (averaging, "evaluating the loss moves .*mean"),
    "reentrant checkpointing": (lambda: checkpointed(True), "pass use_reentrant=False"),
    "parameter in a list": (
        lambda: with_list(Function(past_the_module, weight=nn.Parameter(torch.eye(WIDTH)))),
        "past",
    ),
    "module in a list": (InList, "nn.ModuleList"),
    "no_grad": (lambda: Function(dimmed, inner=linear()), "autograd does not see how"),
}
WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
ADDITIVE = {
    "mean": F.cross_entropy,
    "squares": lambda o, y: (o - F.one_hot(y.clamp(0), CLASSES)).square().mean(),
    "class weights": lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS),
    "weights, smoothed": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
    "sum": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "sum over a number": lambda o, y: F.cross_entropy(o, y, reduction="sum") / 7,
}
COUPLED = {
    "root": lambda o, y: (o - F.one_hot(y.clamp(0), CLASSES)).square().mean().sqrt(),
    "log": lambda o, y: (o - F.one_hot(y.clamp(0), CLASSES)).square().mean().log(),
    "contrastive": lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o))),
    "worst": lambda o, y: F.cross_entropy(o, y, reduction="none").max(),
    "normalised by itself": lambda o, y: (o.exp() * o).sum() / o.exp().sum(),
}


def network(names, seed, everything):
    torch.manual_seed(seed)
    layers = [everything[name]() for name in names]
    return nn.Sequential(linear(), nn.Tanh(), *layers, nn.Linear(WIDTH, CLASSES)).double()


def examples(seed, ignored=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)
    targets[:ignored] = -100
    return inputs, targets


def batches(inputs, targets, size):
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def check(model, loss, inputs, targets, **settings):
    """That an objective and its products are those of plain autograd; by batches where ``batch`` is given."""
    size = settings.pop("batch", None)
    data = (batches(inputs, targets, size),) if size else (inputs, targets)
    objective = Objective(model, loss, *data, **settings)
    params = flatten_parameters(model)
    operator = HessianOperator(objective, params)
    value, gradient, hessian = plain_derivatives(model, loss, inputs, targets)
    torch.testing.assert_close(operator.value, value)
    torch.testing.assert_close(operator.gradient, gradient)
    torch.testing.assert_close(dense(operator), hessian)
    torch.testing.assert_close(objective.value(params), value)
    for ours, theirs in zip((operator.value, operator.gradient), objective.value_and_gradient(params), strict=True):
        assert torch.equal(ours, theirs)
    assert operator.asymmetry() < 1e-10


ways = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"chunk_size": st.integers(1, EXAMPLES), "retain_graph": st.booleans()}),
    st.fixed_dictionaries({"batch": st.integers(1, EXAMPLES)}, optional={"chunk_size": st.integers(1, EXAMPLES)}),
)


def several(settings):
    return min(settings.get("chunk_size", EXAMPLES), settings.get("batch", EXAMPLES)) < EXAMPLES


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(RIGHT)), max_size=2), st.sampled_from(sorted(ADDITIVE)), ways, st.integers(0, 99)
)
def test_layers_and_losses_that_are_right(names, loss, way, seed):
    check(network(names, seed, RIGHT), ADDITIVE[loss], *examples(seed), **way)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(REFUSED)), st.lists(st.sampled_from(sorted(RIGHT)), max_size=1), ways)
def test_layers_that_are_refused(data, name, others, way):
    everything = {**RIGHT, name: REFUSED[name][0]}
    model = network(data.draw(st.permutations([name, *others])), 0, everything)
    buffers = {key: b.clone() for key, b in model.named_buffers()}
    states = torch.get_rng_state(), np.random.get_state()[2], random.getstate()  # noqa: NPY002
    alone = way.get("chunk_size") == 1 or way.get("batch") == 1 or EXAMPLES % way.get("batch", EXAMPLES) == 1
    message = "more than 1 value per channel" if "norm, training" in name and alone else REFUSED[name][1]
    with pytest.raises(ValueError, match=f"{REFUSED[name][1]}|{message}"):
        check(model, F.cross_entropy, *examples(0), **way)
    assert all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    if "noise" not in name and "less" not in name and "same" not in name:
        assert torch.equal(states[0], torch.get_rng_state())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ADDITIVE)), st.integers(1, EXAMPLES - 1), ways, st.integers(0, 99))
def test_ignored_targets_count_for_nothing(loss, ignored, way, seed):
    """Also where whole chunks are ignored, whose own mean is 0/0."""
    check(network([], seed, RIGHT), ADDITIVE[loss], *examples(seed, ignored), **way)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(COUPLED)), ways, st.integers(0, 99))
@example("contrastive", {"chunk_size": 1}, 0)  # no chunk has a gradient
@example("worst", {"chunk_size": 8, "retain_graph": True}, 1)  # the rest has none beside the first
def test_losses_that_couple_examples_are_right_in_one_chunk_and_refused_in_several(loss, way, seed):
    model = network([], seed, RIGHT)
    if several(way):
        with pytest.raises(ValueError, match=r"do not determine the loss of all examples|how chunks add up"):
            check(model, COUPLED[loss], *examples(seed), **way)
    else:
        check(model, COUPLED[loss], *examples(seed), **way)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, EXAMPLES))
def test_batch_statistics_are_right_in_one_chunk_and_refused_in_several(size):
    """BatchNorm without running statistics moves no buffers, and is a smooth function of w and of all examples."""
    model = network(["norm"], 0, {"norm": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False)})
    if size < EXAMPLES:
        with pytest.raises(ValueError, match=r"batch statistics\? module '2' \(BatchNorm1d\)|more than 1 value"):
            check(model, F.cross_entropy, *examples(0), chunk_size=size)
    else:
        check(model, F.cross_entropy, *examples(0), chunk_size=size)


def test_losses_that_use_the_modules_parameters():
    """Looked up when they are used, they are w; captured before, they would be constants."""
    model = network([], 0, RIGHT)
    penalty = lambda parameters: sum(p.square().sum() ** 2 for p in parameters)  # noqa: E731
    looked_up = lambda o, y: F.cross_entropy(o, y) + penalty(model.parameters())  # noqa: E731
    captured = list(model.parameters())
    for size in (EXAMPLES, 4, 1):
        check(model, looked_up, *examples(0), chunk_size=size)
        with pytest.raises(ValueError, match=r"reaches 0\.weight, 0\.bias, 2\.weight and 1 more past the module"):
            Objective(model, lambda o, y: F.cross_entropy(o, y) + penalty(captured), *examples(0), chunk_size=size)
    summed = lambda o, y: F.cross_entropy(o, y, reduction="sum") + penalty(model.parameters())  # noqa: E731
    check(model, summed, *examples(0))
    with pytest.raises(ValueError, match="do not determine"):
        Objective(model, summed, *examples(0), chunk_size=4)


def test_outputs_that_the_loss_does_not_use_may_depend_on_anything():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (nn.Linear(WIDTH, CLASSES, dtype=torch.float64) for _ in range(2))

        def forward(self, x):
            return {"one": self.one(x).tanh(), "other": self.other(x), "nothing": None}

    for size in (EXAMPLES, 4, 1):
        check(TwoHeads(), lambda o, y: F.cross_entropy(o["one"], y), *examples(0), chunk_size=size)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"one real number.* of shape \(9,\)"),
        (lambda o, y: F.cross_entropy(o, y).item(), "got a float; do not call .item()"),
        (lambda o, y: F.cross_entropy(o, y) * torch.nan, "must be finite, but is nan"),
        (lambda o, y: F.cross_entropy(o, y) / 0, "must be finite, but is inf"),
        (lambda o, y: F.cross_entropy(o.detach(), y), "does not depend on the parameters"),
        (lambda o, y: (o.argmax(1) != y).float().mean(), "does not depend on the parameters"),
        (lambda o, y: F.cross_entropy(o, y).to(torch.complex128), "one real number"),
        (lambda o, y: F.cross_entropy(F.dropout(o), y), "the loss function draws random numbers"),
    ],
)
def test_losses_that_are_no_losses(loss, message):
    with pytest.raises(ValueError, match=message):
        Objective(network([], 0, RIGHT), loss, *examples(0))


def test_inputs_that_the_forward_pass_writes_into():
    x, y = examples(0)
    before = x.clone()
    with pytest.raises(ValueError, match="writes into its inputs"):
        Objective(nn.Sequential(Function(written), nn.Linear(WIDTH, CLASSES).double()), F.cross_entropy, x, y)
    assert torch.equal(x, before)


class Inner(nn.Module):
    """A model that computes its own loss, as some do when they are given labels."""

    def __init__(self, **reduction):
        super().__init__()
        self.linear, self.reduction = nn.Linear(WIDTH, CLASSES, dtype=torch.float64), reduction

    def forward(self, x, labels):
        logits = self.linear(x).tanh()
        return {"loss": F.cross_entropy(logits, labels, **self.reduction), "logits": logits}


@pytest.mark.parametrize("size", [EXAMPLES, 4, 2])
def test_losses_that_the_model_computes(size):
    x, y = examples(0)
    for model in (Inner(), Inner(reduction="sum")):
        check(model, lambda o, y: o["loss"], {"x": x, "labels": y}, y, chunk_size=size)
    weighted = Inner(weight=WEIGHTS)
    if size == EXAMPLES:
        check(weighted, lambda o, y: o["loss"], {"x": x, "labels": y}, y)
    else:
        with pytest.raises(ValueError, match="do not determine"):
            Objective(weighted, lambda o, y: o["loss"], {"x": x, "labels": y}, y, chunk_size=size)
    with pytest.raises(ValueError, match="larger chunks"):
        Objective(Inner(), lambda o, y: o["loss"], {"x": x, "labels": y}, y, chunk_size=1)


@pytest.mark.parametrize("size", [None, 4, 2, 1])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_check_costs(size, streamed):
    """At most two evaluations of all examples, once; and none without it."""
    rows = []

    def counting(self, x):
        rows.append(len(x))
        return self.inner(x)

    model = Function(counting, inner=network([], 0, RIGHT))
    data = ([examples(0), examples(1)],) if streamed else examples(0)
    total = EXAMPLES * (2 if streamed else 1)
    objective = Objective(model, F.cross_entropy, *data, chunk_size=size)
    assert total <= sum(rows) <= 2 * total
    rows.clear()
    objective.gradient(flatten_parameters(model))
    assert sum(rows) == total
    rows.clear()
    Objective(model, F.cross_entropy, *data, chunk_size=size, check=False)
    assert not rows


def test_without_the_check_nothing_is_refused():
    model = network(["dropout, training"], 0, {"dropout, training": nn.Dropout})
    objective = Objective(model, F.cross_entropy, *examples(0), check=False)
    params = flatten_parameters(model)
    assert objective.value(params) != objective.value(params)


def test_large_chunks_in_single_precision():
    """A chunk against four rows: their part in the loss of both is far below the rounding of large numbers."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 3), torch.randn(300_000, 2), torch.randint(0, 3, (300_000,))
    params = flatten_parameters(model)
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))):
        y[250_000:] = 1
        chunked = Objective(model, loss, x, y, chunk_size=250_000).value(params)
        torch.testing.assert_close(chunked, loss(model(x), y).detach(), rtol=1e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 60), st.integers(1, 60), st.floats(-2, 2))
def test_single_precision_is_no_reason_to_refuse(seed, count, size, exponent):
    """Nets in float32, inputs of any scale; the chunked loss is the whole one to what float32 can."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(count, 5) * 10**exponent, torch.randint(0, 3, (count,))
    y[1:][torch.rand(count - 1) < 0.3] = -100
    weights = 5 * torch.rand(3) + 0.1
    params = flatten_parameters(model)
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(weight=weights), nn.CrossEntropyLoss(reduction="sum")):
        pairs = [Objective(model, loss, x, y, chunk_size=n).value_and_gradient(params) for n in (size, None)]
        for ours, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def small(width=5):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def refused(match, *arguments, **settings):
    with pytest.raises(ValueError, match=match):
        Objective(*arguments, **settings)


def test_a_mean_over_the_classes_that_are_there_is_no_mean_of_chunks():
    """Each chunk holds one class: any two of them add up, all of them do not."""
    x, y = numbers(24, 5), torch.arange(4).repeat_interleave(torch.tensor([12, 6, 3, 3]))

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels, weight=1 / torch.bincount(labels, minlength=4).clamp(min=1).double())

    refused("do not determine", small(), loss, x, y, chunk_size=6)
    refused("do not determine", small(), loss, list(zip(x.split(6), y.split(6), strict=True)))
    Objective(small(), loss, x, y)  # in one piece it is right


class TimeFirst(nn.Module):
    """Outputs (time, batch, classes)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.recurrent, self.head = nn.RNN(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.recurrent(x.transpose(0, 1))[0])


def test_outputs_with_the_time_first_are_looked_at_across_chunks():
    x = numbers(24, 3, 5)
    sorted_by_class = (torch.arange(24) // 8)[:, None].expand(24, 3).contiguous()
    sorted_by_length = torch.randint(0, 4, (24, 3), generator=torch.Generator().manual_seed(0))
    sorted_by_length[:8, 1:] = -100
    weights = torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=torch.float64)
    model = TimeFirst().double()

    def weighted(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.T.flatten(), weight=weights)

    def ignoring(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.T.flatten())

    refused("do not determine", model, weighted, x, sorted_by_class, chunk_size=8)
    refused("do not determine", model, ignoring, x, sorted_by_length, chunk_size=8)
    plain = torch.randint(0, 4, (24, 3), generator=torch.Generator().manual_seed(0))
    whole, chunked = (Objective(model, ignoring, x, plain, chunk_size=size) for size in (None, 7))
    w = flatten_parameters(model)
    torch.testing.assert_close(chunked.gradient(w), whole.gradient(w))


def test_a_last_layer_of_zeros_hides_nothing():
    x, y = numbers(24, 5), torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))
    draws = np.random.default_rng(0)
    noise = Function(lambda self, x: x + torch.as_tensor(draws.normal(size=x.shape)))
    for layer, settings_, match in (
        (nn.BatchNorm1d(6, track_running_stats=False), {"chunk_size": 8}, "batch statistics"),
        (noise, {}, "two values at the same w"),
    ):
        model = nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.Linear(6, 4)).double().eval()
        nn.init.zeros_(model[3].weight)
        refused(match, model, F.cross_entropy, x, y, **settings_)


def test_what_writes_into_its_parameters_or_has_other_gradients_is_refused():
    words, y = (torch.randint(0, n, (24,), generator=torch.Generator().manual_seed(0)) for n in (6, 4))
    for options, match in (
        ({"max_norm": 0.5}, "writes into the parameters 0.weight"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True}, "sparse=False"),
    ):
        model = nn.Sequential(nn.Embedding(6, 5, **options), nn.Linear(5, 4)).double()
        refused(match, model, F.cross_entropy, words, y)
