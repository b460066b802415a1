"""The networks: those of the paper, as in its public reference code (google-deepmind/sam_edge), and of the chapters."""

from .cnn import CNN
from .mlp import MLP
from .transformer import Transformer

__all__ = ["CNN", "MLP", "Transformer"]
