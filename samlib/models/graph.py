"""A Transformer for molecules: each atom attends to all others, by what they are and how they are related."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..datasets.molecular_graphs import ATOM_WORDS, PADDING, PAIR_WORDS
from ..layers import LayerNorm, gelu
from .initial import scaled, truncated_normal

__all__ = ["GraphTransformer"]

TYPICAL_SIZE = 20  # atoms; brings the sum over them, which tells large molecules from small ones, to the order of one


class GraphTransformer(nn.Module):
    """Pre-LayerNorm Transformer over a molecule's atoms, with a bias of attention for each kind of pair.

    Maps (atoms, pairs), see :mod:`samlib.datasets.molecules`, to (M, outputs): a linear map of the sum of the atoms'
    features over 20. Neither padding nor the order of the atoms changes an output. The bias starts at zero and is
    shared by the layers; the other weights are drawn as those of :class:`samlib.Transformer`.

    Args:
        width: features D of an atom.
        layers: number of blocks.
        heads: attention heads.
        key_size: size of keys, queries and values in each head.
        widening: hidden units of the MLP per unit of ``width``.
        outputs: number of outputs, one for each property.
    """

    def __init__(
        self,
        width: int = 64,
        layers: int = 3,
        heads: int = 4,
        key_size: int = 16,
        widening: int = 2,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.embed, self.relation = nn.Embedding(ATOM_WORDS, width), nn.Embedding(PAIR_WORDS, heads)
        truncated_normal(self.embed.weight, 0.02)
        nn.init.zeros_(self.relation.weight)
        self.blocks = nn.ModuleList(_Block(width, heads, key_size, widening, layers) for _ in range(layers))
        self.norm = LayerNorm(width)
        self.head = scaled(nn.Linear(width, outputs), layers)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        atoms_BNF, pairs_BNN = inputs
        real_BN = pairs_BNN.diagonal(dim1=1, dim2=2) != PADDING
        if not torch.compiler.is_compiling():  # which keeps its shapes
            most = int(real_BN.sum(1).max())
            atoms_BNF, pairs_BNN, real_BN = atoms_BNF[:, :most], pairs_BNN[:, :most, :most], real_BN[:, :most]
        bias_BHNN = self.relation(pairs_BNN.long()).permute(0, 3, 1, 2)
        bias_BHNN = bias_BHNN.masked_fill(~real_BN[:, None, None], -math.inf)
        x_BND = self.embed(atoms_BNF.long()).sum(2)
        for block in self.blocks:
            x_BND = block(x_BND, bias_BHNN)
        return self.head((self.norm(x_BND) * real_BN[..., None]).sum(1) / TYPICAL_SIZE)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, key_size: int, widening: int, layers: int) -> None:
        super().__init__()
        self.heads, self.activation = heads, gelu
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key, self.value = (scaled(nn.Linear(width, heads * key_size), layers) for _ in range(3))
        self.out = scaled(nn.Linear(heads * key_size, width), layers)
        self.up = scaled(nn.Linear(width, widening * width), layers)
        self.down = scaled(nn.Linear(widening * width, width), layers)

    def forward(self, x_BND: Tensor, bias_BHNN: Tensor) -> Tensor:
        x_BND = x_BND + self.attend(self.norm1(x_BND), bias_BHNN)
        return x_BND + self.down(self.activation(self.up(self.norm2(x_BND))))

    def attend(self, x_BND: Tensor, bias_BHNN: Tensor) -> Tensor:
        # Written out because the fused kernels have no second derivative.
        q_BHNK, k_BHNK, v_BHNK = (
            f(x_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        scores_BHNN = (q_BHNK / math.sqrt(q_BHNK.shape[-1])) @ k_BHNK.mT + bias_BHNN
        return self.out((scores_BHNN.softmax(-1) @ v_BHNK).transpose(1, 2).flatten(2))
