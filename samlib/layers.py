"""Layers whose second derivatives cost one pass, and the same networks in PyTorch's own operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LayerNorm", "MaxPool", "gelu", "plain"]


class LayerNorm(nn.Module):
    """Layer normalisation over one dimension, with scale and shift; its second derivative costs one pass.

    Args:
        features: size of the normalised dimension.
        dim: that dimension (1 for the channels of an image, −1 for the features of a token).
        eps: ε, added to the variance.
    """

    def __init__(self, features: int, dim: int = -1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 1 - self.dim % x.dim()))
        return _Normalize.apply(x, self.dim, self.eps) * self.weight.view(shape) + self.bias.view(shape)


class _Normalize(torch.autograd.Function):
    """x̂ = (x − mean x)·r with r = (var x + ε)^−½, and its first two derivatives in closed form.

    The gradient is r·P(h), with the symmetric P(h) = h − mean h − x̂ mean(h x̂).
    """

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, eps: float) -> Tensor:
        centred = x - x.mean(dim, keepdim=True)
        r = (centred.square().mean(dim, keepdim=True) + eps).rsqrt()
        xhat = centred.mul_(r)
        ctx.save_for_backward(x, xhat, r)
        ctx.dim = dim
        return xhat

    @staticmethod
    def backward(ctx, h: Tensor):
        return _NormalizeBackward.apply(h, *ctx.saved_tensors, ctx.dim), None, None


class _NormalizeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, x: Tensor, xhat: Tensor, r: Tensor, dim: int) -> Tensor:
        # x is an argument only so that autograd asks for the derivative with respect to it.
        h = _laid_out_as(xhat, h)
        hx = (h * xhat).mean(dim, keepdim=True)
        ctx.save_for_backward(h, xhat, r, hx)
        ctx.dim, ctx.Ph = dim, None
        return torch.addcmul(h - h.mean(dim, keepdim=True), xhat, hx, value=-1).mul_(r)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u: Tensor):
        h, xhat, r, hx = ctx.saved_tensors
        dim, u = ctx.dim, _laid_out_as(xhat, u)
        if ctx.Ph is None:  # the same for every product on a retained graph
            ctx.Ph = torch.addcmul(h - h.mean(dim, keepdim=True), xhat, hx, value=-1)
        Ph = ctx.Ph
        ux = (u * xhat).mean(dim, keepdim=True)
        Pu = torch.addcmul(u - u.mean(dim, keepdim=True), xhat, ux, value=-1)
        uPh = (u * Ph).mean(dim, keepdim=True)
        grad_x = torch.addcmul(xhat * uPh, Pu, hx).addcmul_(Ph, ux).mul_(-r * r)
        return Pu.mul_(r), grad_x, None, None, None


def plain(model: nn.Module) -> nn.Module:
    """Replace, in place, our own autograd functions in a network by PyTorch's operations, and return it.

    The parameters stay the same objects. For tools that use ``torch.func``, whose transforms our functions have no
    rules for, and for oracles that must share no derivative with them.
    """
    for parent in list(model.modules()):
        if hasattr(parent, "activation"):
            parent.activation = nn.GELU(approximate="tanh")
        for name, layer in parent.named_children():
            if isinstance(layer, LayerNorm):
                setattr(parent, name, _PlainLayerNorm(layer))
            elif isinstance(layer, MaxPool):
                setattr(parent, name, nn.MaxPool2d(2))
            elif isinstance(layer, nn.Embedding):
                setattr(parent, name, _PlainEmbedding(layer))
    return model


class _PlainLayerNorm(nn.Module):
    # Not F.layer_norm: its forward-over-reverse derivative with respect to the weight is wrong in torch 2.13.
    def __init__(self, layer: LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.dim, self.eps = layer.dim, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.dim, -1)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + self.eps).sqrt()
        return (x * self.weight + self.bias).movedim(-1, self.dim)


class _PlainEmbedding(nn.Module):
    # As a matrix product: a compiled gradient of a look-up adds rows up one by one, where kernels are deterministic.
    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        every = torch.arange(len(self.weight), device=tokens.device)
        return (tokens[..., None] == every).to(self.weight.dtype) @ self.weight


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides of another tensor: convolutions return what suits them, and mixed layouts are slow."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


class MaxPool(nn.Module):
    """2×2 max-pooling whose second derivative keeps the channels last, as PyTorch's own does not."""

    def forward(self, x: Tensor) -> Tensor:
        return _MaxPool.apply(x)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y, indices = F.max_pool2d_with_indices(x, (2, 2))
        ctx.save_for_backward(x, indices)
        return y

    @staticmethod
    def backward(ctx, h: Tensor):
        return _MaxPoolBackward.apply(h, *ctx.saved_tensors)


class _MaxPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        options = ([2, 2], [2, 2], [0, 0], [1, 1], False)
        return torch.ops.aten.max_pool2d_with_indices_backward(h, x, *options, indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u: Tensor):
        (indices,) = ctx.saved_tensors
        # Linear in h, so the derivative is the pooling's own choice of elements; pixels are numbered row by row.
        if indices.is_contiguous():
            return u.flatten(2).gather(2, indices.flatten(2)).view(indices.shape), None, None
        u_BSC, i_BSC = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (u, indices))
        chosen = u_BSC.gather(1, i_BSC).unflatten(1, indices.shape[2:])
        return chosen.permute(0, 3, 1, 2), None, None


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, x·σ(2√(2/π)(x + 0.044715 x³)), with two derivatives that reuse σ."""
    return _Gelu.apply(x)


# The argument of σ in GELU is A·x + B·x³.
_A = 2 * math.sqrt(2 / math.pi)

_B = _A * 0.044715


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        s = x.square().mul_(_B).add_(_A).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, h: Tensor):
        return _GeluBackward.apply(h, *ctx.saved_tensors)


class _GeluBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, x: Tensor, s: Tensor) -> Tensor:
        z1 = x.square().mul_(3 * _B).add_(_A)  # derivative of σ's argument
        s1 = torch.addcmul(s, s, s, value=-1).mul_(z1)  # of σ
        first = torch.addcmul(s, x, s1)
        ctx.save_for_backward(h, x, s, first)
        ctx.second = None
        return h * first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u: Tensor):
        h, x, s, first = ctx.saved_tensors
        if ctx.second is None:  # the same for every product on a retained graph
            z1, z2 = x.square().mul_(3 * _B).add_(_A), 6 * _B * x
            slope = s * (1 - s)
            s2 = slope * ((1 - 2 * s) * z1.square() + z2)
            ctx.second = (2 * slope * z1 + x * s2) * h
        return u * first, u * ctx.second, None
