"""A molecule as two tables of small whole numbers: what each atom is, and how each two atoms are related.

Both are words for a model to look up. Each atom has eight words, one of each kind in :data:`KINDS`; each pair of atoms
has one. They do not depend on the order in which a molecule's text names its atoms: chirality is the R or S of the
Cahn–Ingold–Prelog rules, not the parity of the written order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .files import DataError

__all__ = ["ATOM_WORDS", "ELEMENTS", "KINDS", "PAIR_WORDS", "MolecularGraph", "atom_words", "pair_words", "parse"]

ELEMENTS = ("H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Br", "I")
KINDS = {
    "element": 14,  # those above, any other, unknown (*)
    "degree": 7,  # bonds to atoms of the graph: 0 to 5, more
    "charge": 5,  # −2 or less, −1, 0, 1, 2 or more
    "hydrogens": 5,  # that are not atoms of the graph: 0 to 3, more
    "hybridisation": 4,  # sp, sp², sp³, other
    "chirality": 3,  # none, R, S
    "aromatic": 2,
    "ring": 2,
}
"""The kinds of words of an atom, and how many there are of each."""
ATOM_WORDS = sum(KINDS.values())

# Words of pairs. 7 to 13 are distances of 2 to 8 bonds; 13 also stands for more.
PADDING, SELF, SINGLE, DOUBLE, TRIPLE, AROMATIC, OTHER_BOND, FARTHEST, OTHER_FRAGMENT = 0, 1, 2, 3, 4, 5, 6, 13, 14
PAIR_WORDS = 15

_SIZES = np.array(list(KINDS.values()))
_FIRST = np.cumsum(_SIZES) - _SIZES


class MolecularGraph(NamedTuple):
    """A molecule of n atoms.

    Attributes:
        atoms: words of the atoms, uint8 (n, 8), each below ``ATOM_WORDS``.
        pairs: words of the pairs, uint8 (n, n), each below ``PAIR_WORDS`` and none 0; symmetric.
        scaffold: name of its ring systems with what links them; the same for all molecules without a ring.
    """

    atoms: np.ndarray
    pairs: np.ndarray
    scaffold: str


def atom_words(categories: Any) -> np.ndarray:
    """Words of atoms from a number of each kind, shape (n, 8): limited to what its kind allows, and made distinct.

    >>> atom_words([[2, 4, 2, 0, 2, 0, 0, 1]]).tolist()  # a carbon atom in a saturated ring
    [[2, 18, 23, 26, 33, 35, 38, 41]]
    """
    return (np.clip(categories, 0, _SIZES - 1) + _FIRST).astype(np.uint8)


def pair_words(bonds: np.ndarray) -> np.ndarray:
    """Words of all pairs of atoms from the words of the bonds, (n, n) with 0 where there is no bond.

    >>> chain = np.array([[0, 2, 0], [2, 0, 3], [0, 3, 0]])
    >>> pair_words(chain).tolist()
    [[1, 2, 7], [2, 1, 3], [7, 3, 1]]
    """
    pairs = np.full(bonds.shape, OTHER_FRAGMENT, np.uint8)
    linked = (bonds > 0).astype(np.float32)
    reached = at = np.eye(len(bonds), dtype=bool)
    distance = 0
    while at.any():
        distance += 1
        at = (at @ linked > 0) & ~reached
        pairs[at] = min(5 + distance, FARTHEST)
        reached = reached | at
    pairs[bonds > 0] = bonds[bonds > 0]
    np.fill_diagonal(pairs, SELF)
    return pairs


def parse(smiles: list[str]) -> list[MolecularGraph | None]:
    """The graphs of molecules, from their SMILES; None where a text is not a molecule's or names no atom.

    Raises:
        DataError: if RDKit is not installed.
    """
    try:
        from rdkit import rdBase
    except ImportError:
        raise DataError(
            "reading molecules needs RDKit, which is not installed: pip install 'samlib[molecules]'"
        ) from None
    with rdBase.BlockLogs():
        return [_graph(text) for text in smiles]


def _graph(smiles: str) -> MolecularGraph | None:
    from rdkit import Chem
    from rdkit.Chem import rdCIPLabeler
    from rdkit.Chem.Scaffolds import MurckoScaffold

    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not molecule.GetNumAtoms():
        return None
    for atom in molecule.GetAtoms():
        atom.ClearProp("_CIPCode")  # of RDKit's older rules, which may be wrong
    rdCIPLabeler.AssignCIPLabels(molecule)
    hybrids = [getattr(Chem.HybridizationType, name) for name in ("SP", "SP2", "SP3")]
    categories = [
        (
            _place(atom.GetSymbol(), ELEMENTS) + (atom.GetAtomicNum() == 0),
            atom.GetDegree(),
            atom.GetFormalCharge() + 2,
            atom.GetTotalNumHs(),
            _place(atom.GetHybridization(), hybrids),
            " RS".index(atom.GetProp("_CIPCode").upper() if atom.HasProp("_CIPCode") else " "),
            atom.GetIsAromatic(),
            atom.IsInRing(),
        )
        for atom in molecule.GetAtoms()
    ]
    kinds = [getattr(Chem.BondType, name) for name in ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")]
    bonds = np.zeros((len(categories), len(categories)), np.uint8)
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i, j] = bonds[j, i] = SINGLE + _place(bond.GetBondType(), kinds)
    scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
    return MolecularGraph(atom_words(categories), pair_words(bonds), scaffold)


def _place(value: Any, known: Any) -> int:
    """Place of a value in a list; after the last for any other."""
    return known.index(value) if value in known else len(known)
