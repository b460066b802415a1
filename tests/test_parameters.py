import pytest
import torch
from torch import nn
from torch.nn import functional as F

from samlib import HessianOperator, Objective
from samlib.objective import flatten_parameters

from .conftest import wraps_for_compiler
from .plain import dense, plain_derivatives


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def examples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator)


def hessian(model, parameters=None, inputs=None, **settings):
    x, y = examples()
    x = x if inputs is None else inputs
    objective = Objective(model, F.cross_entropy, x, y, parameters=parameters, **settings)
    return objective, HessianOperator(objective, flatten_parameters(model, parameters))


@pytest.mark.parametrize("frozen", [["0"], ["0.bias", "4.weight"], ["2", "4"]])
def test_frozen_parameters_are_constants(frozen):
    model = network()
    for name, p in model.named_parameters():
        p.requires_grad_(not any(name.startswith(f) for f in frozen))
    objective, operator = hessian(model)
    _, gradient, matrix = plain_derivatives(model, F.cross_entropy, *examples())
    torch.testing.assert_close(operator.gradient, gradient)
    torch.testing.assert_close(dense(operator), matrix)
    trainable = [p.reshape(-1) for p in model.parameters() if p.requires_grad]
    assert torch.equal(flatten_parameters(model), torch.cat(trainable))
    assert objective.size == len(gradient) == operator.shape[0]


@pytest.mark.parametrize("chosen", ["2", ["2"], ["4.bias", "0.weight"], ["0", "4.bias"], ["0", "2", "4"]])
def test_a_block_of_the_hessian(chosen):
    """By names of parameters or of modules, in the model's order; frozen ones if they are named."""
    model = network()
    full, _ = hessian(model)
    _, gradient, matrix = plain_derivatives(model, F.cross_entropy, *examples())
    names = [chosen] if isinstance(chosen, str) else chosen
    kept = [n for n in full.slices if any(n == name or n.startswith(f"{name}.") for name in names)]
    index = torch.cat([torch.arange(full.size)[full.slices[n]] for n in kept])
    for p in model[0].parameters():
        p.requires_grad_(False)
    for settings in ({}, {"chunk_size": 3, "retain_graph": False}):
        objective, operator = hessian(model, chosen, **settings)
        torch.testing.assert_close(operator.gradient, gradient[index])
        torch.testing.assert_close(dense(operator), matrix[index][:, index])
        assert list(objective.slices) == kept
        assert torch.equal(flatten_parameters(model, chosen), flatten_parameters_of_all(model)[index])


def flatten_parameters_of_all(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_slices_say_where_each_parameter_lies():
    model = network()
    objective, operator = hessian(model)
    params = flatten_parameters(model)
    F.cross_entropy(model(examples()[0]), examples()[1]).backward()
    assert list(objective.slices) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert torch.equal(params[objective.slices[name]].view(p.shape), p)
        torch.testing.assert_close(operator.gradient[objective.slices[name]].view(p.shape), p.grad)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, tokens):
        return self.head(self.embed(tokens).tanh())


@pytest.mark.parametrize("name", [None, "embed", "head.weight"])
def test_tied_weights_count_once_under_each_of_their_names(name):
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 6, (8,))
    objective, operator = hessian(model, name and [name], tokens)
    _, gradient, matrix = plain_derivatives(model, F.cross_entropy, tokens, examples()[1])
    assert objective.slices == {"embed.weight": slice(0, 24)}
    torch.testing.assert_close(operator.gradient, gradient)
    torch.testing.assert_close(dense(operator), matrix)


def test_constants_are_read_when_they_are_used():
    """Parameters that were not chosen may be trained on between evaluations."""
    model = network()
    objective, _ = hessian(model, ["4"])
    params = flatten_parameters(model, ["4"])
    with torch.no_grad():
        model[0].weight.mul_(2)
    x, y = examples()
    torch.testing.assert_close(objective.value(params), F.cross_entropy(model(x), y).detach())


@wraps_for_compiler
def test_compiled_modules_are_taken_as_they_were():
    """Their programs have no second derivative."""
    model = network()
    _, operator = hessian(torch.compile(model))
    torch.testing.assert_close(dense(operator), dense(hessian(model)[1]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (network().half(), r"'0.weight' is torch.float16; .* copy.deepcopy\(model\).float\(\)"),
        (network().bfloat16(), "'0.weight' is torch.bfloat16"),
        (
            nn.Linear(4, 3, dtype=torch.complex128),
            "'weight' is torch.complex128; derivatives are taken in float32 or float64",
        ),
        (
            nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double()),
            "share dtype and device, but are torch.float32 on cpu",
        ),
        (nn.LazyLinear(3), "has no values yet; run the model once"),
        (network().requires_grad_(False), "of the model's 6 none is trainable"),
        (nn.Tanh(), "of the model's 0 none is trainable"),
    ],
)
def test_models_without_the_right_parameters(model, message):
    with pytest.raises(ValueError, match=message):
        Objective(model, F.cross_entropy, *examples())
    with pytest.raises(ValueError, match=message):
        flatten_parameters(model)


def test_names_and_vectors_that_are_none():
    model = network()
    with pytest.raises(ValueError, match=r"no parameters named '1', '0\.wei'; the model has 0\.weight, 0\.bias"):
        Objective(model, F.cross_entropy, *examples(), parameters=["0", "1", "0.wei"])
    with pytest.raises(ValueError, match="none was chosen"):
        Objective(model, F.cross_entropy, *examples(), parameters=[])
    objective, _ = hessian(model)
    params = flatten_parameters(model)
    for wrong in (params[1:], params[None], params.half(), params.to(torch.complex128)):
        for call in (objective.value, objective.gradient, lambda w: HessianOperator(objective, w)):
            with pytest.raises(ValueError, match=f"params must be a vector of {objective.size} numbers"):
                call(wrong)
