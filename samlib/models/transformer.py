"""The language model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..layers import LayerNorm, gelu
from .initial import TRUNCATION, scaled, truncated_normal

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """Pre-LayerNorm causal language model with learned positions and an untied output layer.

    Maps tokens (B, T) to logits (B, T, vocabulary). Weights come from normal distributions truncated at two standard
    deviations: in the blocks of variance 2/(layers · fan_in); for embeddings of standard deviation 0.02, and for the
    output layer 1/√fan_in, *before* truncation, which leaves 0.88 of them.

    Args:
        vocabulary: number of tokens (128: ASCII).
        length: longest sequence T.
        width: model size D.
        layers: number of blocks.
        heads: attention heads.
        key_size: size of keys, queries and values in each head.
        widening: hidden units of the MLP per unit of ``width``.
    """

    def __init__(
        self,
        vocabulary: int = 128,
        length: int = 64,
        width: int = 128,
        layers: int = 6,
        heads: int = 8,
        key_size: int = 32,
        widening: int = 4,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(length, width))
        for weight in (self.embed.weight, self.position):
            truncated_normal(weight, 0.02 * TRUNCATION)
        self.blocks = nn.Sequential(*(_Block(width, heads, key_size, widening, layers) for _ in range(layers)))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        truncated_normal(self.head.weight, TRUNCATION / math.sqrt(width))
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x_BTD = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x_BTD)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, key_size: int, widening: int, layers: int) -> None:
        super().__init__()
        self.heads, self.activation = heads, gelu
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.query, self.key, self.value = (scaled(nn.Linear(width, heads * key_size), layers) for _ in range(3))
        self.out = scaled(nn.Linear(heads * key_size, width), layers)
        self.up = scaled(nn.Linear(width, widening * width), layers)
        self.down = scaled(nn.Linear(widening * width, width), layers)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attend(self.norm1(x_BTD))
        return x_BTD + self.down(self.activation(self.up(self.norm2(x_BTD))))

    def attend(self, x_BTD: Tensor) -> Tensor:
        # Written out because the fused kernels have no second derivative.
        q_BHTK, k_BHTK, v_BHTK = (
            f(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        length = x_BTD.shape[1]
        future_TT = torch.ones(length, length, dtype=torch.bool, device=x_BTD.device).triu(1)
        scores_BHTT = (q_BHTK / math.sqrt(q_BHTK.shape[-1])) @ k_BHTK.mT
        weights_BHTT = scores_BHTT.masked_fill(future_TT, -math.inf).softmax(-1)
        return self.out((weights_BHTT @ v_BHTK).transpose(1, 2).flatten(2))
