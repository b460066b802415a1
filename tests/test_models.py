import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from samlib import CNN, MLP, HessianOperator, Objective, RunConfig, Transformer, top_eigenpairs
from samlib.experiments import cross_entropy, mean_squared_error
from samlib.experiments.task import Task
from samlib.layers import LayerNorm, _MaxPool, _Normalize, gelu
from samlib.objective import flatten_parameters

from .conftest import small_config


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_of_the_paper_in_closed_form():
    assert count(MLP()) == (784 * 1000 + 1000) + 2 * (1000 * 1000 + 1000) + (1000 * 10 + 10)
    assert count(CNN()) == (27 * 16 + 16) + 2 * 16 + (144 * 32 + 32) + 2 * 32 + (32 * 8 * 8 * 10 + 10)
    width, inner = 128, 8 * 32
    block = 2 * 2 * width + 3 * (width * inner + inner) + (inner * width + width)
    block += (width * 4 * width + 4 * width) + (4 * width * width + width)
    assert count(Transformer()) == 128 * width + 64 * width + 6 * block + 2 * width + (width * 128 + 128)


@pytest.mark.parametrize("dim", [1, -1])
def test_layer_norm_is_pytorchs(dim):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 5, dtype=torch.float64)
    layer = LayerNorm(5, dim).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    expected = F.layer_norm(x.movedim(dim, -1), (5,), layer.weight, layer.bias).movedim(-1, dim)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dim", [1, -1])
def test_layer_norm_derivatives(dim):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Normalize.apply(x, dim, 1e-5), (x,))
    assert torch.autograd.gradgradcheck(lambda x: _Normalize.apply(x, dim, 1e-5), (x,))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [4, 5])
def test_max_pool_is_pytorchs_with_exact_derivatives(layout, size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    torch.testing.assert_close(_MaxPool.apply(x), torch.nn.functional.max_pool2d(x, 2))
    assert torch.autograd.gradcheck(_MaxPool.apply, (x,))
    assert torch.autograd.gradgradcheck(_MaxPool.apply, (x,))


def test_gelu_is_the_tanh_approximation_with_exact_derivatives():
    torch.manual_seed(0)
    x = (3 * torch.randn(50, dtype=torch.float64)).requires_grad_()
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(gelu(x), expected)
    assert torch.autograd.gradcheck(gelu, (x,))
    assert torch.autograd.gradgradcheck(gelu, (x,))
    extreme = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)  # where x³ overflows nothing and σ saturates
    (slope,) = torch.autograd.grad(gelu(extreme).sum(), extreme)
    assert slope.tolist() == [0, 0.5, 1]


def test_mlp_forward_pass_in_numpy():
    torch.manual_seed(0)
    model, x = MLP(6, 5, 3, 2).double(), np.random.default_rng(0).normal(size=(4, 6))
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in model.parameters())
    h = np.maximum(x @ w1.T + b1, 0)
    h = np.maximum(h @ w2.T + b2, 0)
    np.testing.assert_allclose(model(torch.tensor(x)).detach().numpy(), h @ w3.T + b3, rtol=1e-12)


def test_cnn_forward_pass_in_numpy():
    torch.manual_seed(0)
    model = CNN((2, 4, 4), (3,), 2).double()
    x = np.random.default_rng(0).normal(size=(2, 4, 4))
    w, b, scale, shift, w_out, b_out = (p.detach().numpy() for p in model.parameters())
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    h = np.zeros((3, 4, 4))
    for i in range(4):
        for j in range(4):
            h[:, i, j] = (w * padded[:, i : i + 3, j : j + 3]).sum((1, 2, 3)) + b
    h = np.maximum(h, 0)
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-6) * scale[:, None, None] + shift[:, None, None]
    h = h.reshape(3, 2, 2, 2, 2).max((2, 4))
    expected = w_out @ h.reshape(-1) + b_out
    np.testing.assert_allclose(model(torch.tensor(x)[None])[0].detach().numpy(), expected, rtol=1e-10)


def test_transformer_forward_pass_in_numpy():
    torch.manual_seed(0)
    model = Transformer(vocabulary=7, length=5, width=6, layers=1, heads=2, key_size=3, widening=2).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    tokens = np.array([3, 1, 4, 1, 5])
    x = weights["embed.weight"][tokens] + weights["position"]
    h = norm(x, "blocks.0.norm1")
    q, k, v = (linear(h, f"blocks.0.{n}").reshape(5, 2, 3) for n in ("query", "key", "value"))
    mixed = np.zeros((5, 2, 3))
    for head in range(2):
        for t in range(5):
            scores = np.array([q[t, head] @ k[s, head] for s in range(t + 1)]) / math.sqrt(3)
            attention = np.exp(scores) / np.exp(scores).sum()
            mixed[t, head] = attention @ v[: t + 1, head]
    x = x + linear(mixed.reshape(5, 6), "blocks.0.out")
    u = linear(norm(x, "blocks.0.norm2"), "blocks.0.up")
    u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    x = x + linear(u, "blocks.0.down")
    expected = linear(norm(x, "norm"), "head")
    np.testing.assert_allclose(model(torch.tensor(tokens)[None])[0].detach().numpy(), expected, rtol=1e-10)


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    model = MLP(400, 500, 3, 10)
    weight = model[3].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 1000), rel=0.02)
    assert all(not layer.bias.any() for layer in model if hasattr(layer, "bias"))
    language = Transformer()
    assert language.blocks[0].up.weight.std().item() == pytest.approx(math.sqrt(2 / (6 * 128)), rel=0.02)
    # Haiku draws a truncated normal without making up for the truncation: its spread is 0.8796 of the scale named.
    assert language.embed.weight.std().item() == pytest.approx(0.8796 * 0.02, rel=0.02)
    limit = 2 * math.sqrt(2 / (6 * 128)) / 0.8796
    assert limit * 0.98 < language.blocks[0].up.weight.abs().max().item() <= limit * 1.001


def test_the_transformer_starts_near_a_uniform_guess():
    # The head sees unit-variance features and draws at 0.8796/√width: logits of variance σ² = 0.8796², and
    # E[log Σ exp] ≈ log V + σ²/2.
    losses = []
    for seed in range(10):
        torch.manual_seed(seed)
        model = Transformer(layers=6)
        tokens, targets = torch.randint(0, 128, (2, 16, 64))
        losses.append(cross_entropy(model(tokens), targets).item())
    assert np.mean(losses) == pytest.approx(math.log(128) + 0.8796**2 / 2, abs=0.1)


def numpy_reference(seed, x, y):
    """Initial loss, gradient norm and sharpness of the MLP from NumPy alone: its own Glorot draw, its own backward
    pass, and power iteration on finite differences of that gradient."""
    random = np.random.default_rng(seed)
    sizes = [x.shape[1], 16, 16, 10]
    ws = [random.normal(0, math.sqrt(2 / (a + b)), (b, a)) for a, b in pairwise(sizes)]
    bs = [np.zeros(b) for b in sizes[1:]]

    def gradient(parameters):
        ws, bs = parameters
        hs = [x]
        for i, (w, b) in enumerate(zip(ws, bs, strict=True)):
            z = hs[-1] @ w.T + b
            hs.append(np.maximum(z, 0) if i < 2 else z)
        loss = ((hs[-1] - y) ** 2).mean()
        delta = 2 * (hs[-1] - y) / y.size
        gw, gb = [], []
        for i in (2, 1, 0):
            gw.insert(0, delta.T @ hs[i])
            gb.insert(0, delta.sum(0))
            delta = delta @ ws[i] * (hs[i] > 0)
        return loss, gw + gb

    def flat(parts):
        return np.concatenate([p.ravel() for p in parts])

    def unflat(vector):
        parts, at = [], 0
        for shape in [w.shape for w in ws] + [b.shape for b in bs]:
            size = math.prod(shape)
            parts.append(vector[at : at + size].reshape(shape))
            at += size
        return parts[:3], parts[3:]

    start = flat(ws + bs)
    loss, grad = gradient((ws, bs))
    v = random.normal(size=len(start))
    for _ in range(60):
        v /= np.linalg.norm(v)
        above, below = (flat(gradient(unflat(start + s * 1e-5 * v))[1]) for s in (1, -1))
        v = (above - below) / 2e-5
    return loss, np.linalg.norm(flat(grad)), np.linalg.norm(v)


def test_initial_loss_gradient_and_sharpness_lie_within_the_spread_of_an_independent_reference():
    dataset = small_config().load_dataset()
    x, y = dataset.train_inputs.flatten(1).double().numpy(), dataset.train_targets.double().numpy()
    reference = np.array([numpy_reference(seed, x, y) for seed in range(10)])
    ours = []
    for seed in range(10):
        experiment = Task(small_config(seed=seed, dtype="float64"), dataset)
        operator = HessianOperator(experiment.objective(0), experiment.initial_parameters())
        norm = top_eigenpairs(operator, 1, "LM", tol=1e-3).values.abs().item()
        ours.append((operator.value.item(), operator.gradient.norm().item(), norm))
    ours = np.array(ours)
    # Two samples of ten from one distribution: means within three standard errors of their difference.
    error = np.sqrt((reference.var(0, ddof=1) + ours.var(0, ddof=1)) / 10)
    assert (np.abs(ours.mean(0) - reference.mean(0)) < 3 * error).all()


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_cifar10_starts_where_the_reference_starts():
    """Initial loss, ‖g‖ and λ of the full CNN on real images: the ranges measured with an independent prototype."""
    rows = []
    for seed in range(5):
        config = RunConfig(experiment="cifar10", profile="paper", examples=400, learning_rate=1e-3, rho=0, seed=seed)
        experiment = Task(config)
        operator = HessianOperator(experiment.objective(0), experiment.initial_parameters())
        rows.append((operator.value.item(), operator.gradient.norm().item(), top_eigenpairs(operator).values.item()))
    loss, norm, sharpness = np.mean(rows, 0)
    assert 3 < loss < 5
    assert 25 < norm < 45
    assert 350 < sharpness < 600


def test_losses_in_closed_form():
    assert float(mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))) == 2.5
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert float(cross_entropy(logits, torch.tensor([[1]]))) == pytest.approx(-math.log(3 / 4))


def test_models_are_functions_of_the_seed_alone():
    dataset = small_config().load_dataset()
    torch.manual_seed(1)
    first = Task(small_config(), dataset).initial_parameters()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = Task(small_config(), dataset).initial_parameters()
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, Task(small_config(seed=1), dataset).initial_parameters())
    objective = Task(small_config(), dataset).objective(0)
    assert isinstance(objective, Objective)
    assert flatten_parameters(objective.model).shape == first.shape
