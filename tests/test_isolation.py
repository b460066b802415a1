"""What surrounds a call does not change it, nor does the call change what surrounds it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from samlib import HessianOperator, Objective, top_eigenpairs
from samlib.objective import flatten_parameters
from samlib.objective.isolation import isolated


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
        self.head = nn.Linear(4, 2)
        self.last = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.Tanh())

    def forward(self, x, mask):
        return self.last(self.head(self.encoder(x, src_key_padding_mask=mask).mean(1)))


class DefaultDtype:
    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)


CONTEXTS = {
    "default device": lambda: torch.device("meta"),
    "cached parametrizations": parametrize.cached,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype": DefaultDtype,
    "another attention": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
}


def problem():
    torch.manual_seed(0)
    model = Net().eval()
    mask = torch.zeros(7, 5, dtype=torch.bool)
    mask[3:, 2:] = True
    return model, {"x": torch.randn(7, 5, 4), "mask": mask}, torch.randint(0, 2, (7,))


def results(model, inputs, targets, **settings):
    objective = Objective(model, F.cross_entropy, inputs, targets, **settings)
    params = flatten_parameters(model)
    operator = HessianOperator(objective, params)
    vector = torch.linspace(-1, 1, objective.size, dtype=torch.float32, device="cpu")
    return [
        objective.value(params),
        *objective.value_and_gradient(params),
        operator.value,
        operator.gradient,
        operator @ vector,
        objective.forward(params, inputs),
        next(objective.chunk_losses(params)),
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the fused encoder, outside of objectives
@pytest.mark.parametrize("settings", [{}, {"chunk_size": 3}, {"chunk_size": 3, "retain_graph": False}])
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_do_not_leak_in(name, settings):
    model, inputs, targets = problem()
    expected = results(model, inputs, targets, **settings)
    # Without gradients, the fused encoder would be another function: it puts zeros where the mask is.
    assert torch.equal(expected[0], expected[1])
    torch.testing.assert_close(F.cross_entropy(expected[6], targets), expected[0])
    with CONTEXTS[name]():
        model(**inputs)  # fills autocast's cache of casts
        with torch.no_grad():
            moved = model.head.weight.clone()
            model.head.weight.mul_(3)
            model.head.weight.copy_(moved)
        inside = results(model, inputs, targets, **settings)
    for ours, theirs in zip(inside, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_are_as_before(name):
    def state():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
            parametrize._cache_enabled,
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        )

    model, inputs, targets = problem()
    with CONTEXTS[name]():
        before = state()
        results(model, inputs, targets)
        with pytest.raises(ZeroDivisionError), isolated(torch.device("cpu")):
            _ = 1 / 0
        assert state() == before


def test_tensors_made_in_inference_mode():
    model, inputs, targets = problem()
    expected = results(model, inputs, targets)
    with torch.inference_mode():
        again, labels = {name: t.clone() for name, t in inputs.items()}, targets.clone()
        params = flatten_parameters(model)
    for got, wanted in zip(results(model, again, labels), expected, strict=True):
        assert torch.equal(got, wanted)
    objective = Objective(model, F.cross_entropy, [(again, labels)])
    assert torch.equal(objective.gradient(params), expected[2])
    assert torch.equal(HessianOperator(objective, params).gradient, expected[2])


def test_a_solver_in_a_validation_step():
    model, inputs, targets = problem()
    objective, params = Objective(model, F.cross_entropy, inputs, targets), flatten_parameters(model)
    outside = top_eigenpairs(HessianOperator(objective, params))
    with torch.inference_mode():
        inside = top_eigenpairs(HessianOperator(objective, params))
    torch.testing.assert_close(inside.values, outside.values)
