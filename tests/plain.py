"""Oracles: value, gradient and Hessian of ordinary modules by plain autograd, one row at a time."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def plain_derivatives(model, loss, inputs, targets):
    """ℓ, ∇ℓ and ∇²ℓ of a module's trainable parameters, all examples at once, shapes (), (P,) and (P, P)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    positions, keywords = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    if isinstance(inputs, tuple):
        positions = inputs

    def flat(value):
        grads = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(model(*positions, **keywords), targets)
        gradient = flat(value)
        rows = [flat(g).detach() if g.requires_grad else torch.zeros_like(gradient) for g in gradient]
    torch.backends.mha.set_fastpath_enabled(fast)
    return value.detach(), gradient.detach(), torch.stack(rows)


def dense(operator):
    """An operator's matrix, column by column."""
    return torch.stack([operator @ e for e in torch.eye(operator.shape[0], dtype=operator.dtype)], 1)


class Function(nn.Module):
    """A module that does what a function says."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs, **keywords):
        return self.function(self, *inputs, **keywords)
