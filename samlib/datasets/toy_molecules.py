"""Small molecules made in code: they stand in for a data set where there is neither a network nor RDKit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .molecular_graphs import AROMATIC, ELEMENTS, SINGLE, MolecularGraph, atom_words, pair_words

__all__ = ["toy_molecules"]

_VALENCE = {"C": 4, "N": 3, "O": 2, "F": 1, "Cl": 1}
_VALUE = {"C": -0.3, "N": 0.5, "O": 0.6, "F": -0.2, "Cl": -0.7}
_ORDER = np.array([0, 0, 1, 0, 0, 1.5])  # of a bond, by its word
_RINGS = (("CCCCC", SINGLE), ("CCCCCC", SINGLE), ("CCCOCC", SINGLE), ("CCCCCC", AROMATIC), ("CCCNCC", AROMATIC))
_GROUPS = (["C"], ["O"], ["N"], ["F"], ["Cl"], ["C", "C"], ["C", "O"], ["C", "N"])
_LARGEST = 22  # two rings of six, two atoms between them and four groups of two


def toy_molecules(count: int, seed: int = 0) -> tuple[list[MolecularGraph], np.ndarray]:
    """Molecules of up to two rings, each with a value that its atoms add up to.

    Returns:
        Their graphs and values, shape (count,).
    """
    random = np.random.default_rng(seed)
    molecules = [_molecule(random) for _ in range(count)]
    return [graph for graph, _ in molecules], np.array([value for _, value in molecules])


class _Builder:
    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.symbols: list[str] = []
        self.bonds = np.zeros((_LARGEST, _LARGEST), np.uint8)

    def hydrogens(self) -> np.ndarray:
        used = _ORDER[self.bonds].sum(1)[: len(self.symbols)].astype(int)
        return np.array([_VALENCE[symbol] for symbol in self.symbols], dtype=int) - used

    def link(self, i: int, j: int, bond: int = SINGLE) -> None:
        self.bonds[i, j] = self.bonds[j, i] = bond

    def attach(self, chain: Sequence[str]) -> None:
        """Put a chain of atoms in the place of one hydrogen atom, if there is any atom yet."""
        free = np.flatnonzero(self.hydrogens())
        at = self.random.choice(free) if len(free) else None
        for symbol in chain:
            self.symbols.append(symbol)
            if at is not None:
                self.link(at, len(self.symbols) - 1)
            at = len(self.symbols) - 1


def _molecule(random: np.random.Generator) -> tuple[MolecularGraph, float]:
    """Up to two rings in a row, or one carbon atom, with some groups in the place of hydrogen atoms."""
    made = _Builder(random)
    rings = random.integers(len(_RINGS), size=random.choice(3, p=[0.1, 0.3, 0.6]))
    between = int(random.integers(3)) if len(rings) == 2 else 0
    in_ring: list[int] = []
    for ring, bond in (_RINGS[kind] for kind in rings):
        chain = ["C"] * between if in_ring else []
        made.attach([*chain, *ring])
        atoms = list(range(len(made.symbols) - len(ring), len(made.symbols)))
        for i, j in zip(atoms, [*atoms[1:], atoms[0]], strict=True):
            made.link(i, j, bond)
        in_ring += atoms
    if not in_ring:
        made.attach(["C"])
    for group in random.integers(len(_GROUPS), size=random.integers(1, 5)):
        made.attach(_GROUPS[group])

    n = len(made.symbols)
    bonds = made.bonds[:n, :n]
    aromatic = (bonds == AROMATIC).any(1)
    categories = {
        "element": [ELEMENTS.index(symbol) for symbol in made.symbols],
        "degree": (bonds > 0).sum(1),
        "charge": np.full(n, 2),
        "hydrogens": made.hydrogens(),
        "hybridisation": np.where(aromatic, 1, 2),
        "chirality": np.zeros(n),
        "aromatic": aromatic,
        "ring": np.isin(np.arange(n), in_ring),
    }
    scaffold = f"{sorted(rings.tolist())} {between}"
    value = sum(_VALUE[symbol] for symbol in made.symbols) - 0.1 * int(aromatic.sum())
    return MolecularGraph(atom_words(np.stack([*categories.values()], 1)), pair_words(bonds), scaffold), round(value, 2)
