"""Molecules and their measured properties: sets of MoleculeNet, split by scaffold; a stand-in made in code.

Inputs are one tuple: the atoms' words, uint8 (M, n, 8), and the pairs', uint8 (M, n, n), see
:mod:`samlib.datasets.molecular_graphs`. Molecules of fewer than n atoms come first in their rows; a pair's word of 0
marks what is padding. Targets are float (M, tasks): a value, or a label 0 or 1; NaN where nothing was measured.

Source: Wu et al. (2018), *MoleculeNet*, arXiv:1703.00564, as cleaned by Rong et al. (2020), *GROVER*, arXiv:2007.02835.
"""

from __future__ import annotations

import csv
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import DataPolicy, Dataset, Source, take
from .files import RemoteFile
from .molecular_graphs import KINDS, MolecularGraph, parse
from .toy_molecules import toy_molecules

__all__ = ["CLASSIFICATION", "MAX_ATOMS", "SOURCES", "load_molecules", "scaffold_split"]

MAX_ATOMS = 150
"""Larger molecules are left out: the pairs of every molecule take the room of the largest. Of the sets here only SIDER
has any (29 of 1,427, up to 492 atoms)."""

CLASSIFICATION = ("bace", "bbbp", "clintox", "sider", "tox21")
"""The sets whose targets are labels; those of the others are values."""

_CHECKSUMS = {
    "bace": "847be1e38d3798c60df03e1aaf2ccd0f09f9ed89407de78e80463aa637088532",
    "bbbp": "a61e17872cbec0743a6147dc802a1f7550acfe8dc1053f881f4c42a3ce2dc597",
    "clintox": "cc561402d058a0d996a9f5e5d02bc20f6652b7003525b32c3598b8da4b24e9b7",
    "esol": "9e2bf77f3fc2d0ced4572341e2094904b992c9edf3762795f77cfc2bfd4de5ac",
    "freesolv": "97d74c86228d4c16c0fbbf063bb8280354d8152db09a85ade8517a2f43bd9824",
    "lipo": "aa9bd9669188e35efd908758a75561bba402016d901fed2d0d949289abbcf31c",
    "sider": "71efc6ac4ca82d6545bc512509863281be0f17234afd7adaf71a71899988302e",
    "tox21": "b58cc1f683e78e3c7a1bf7116e9aac0119804018d100f7b8cdb0857941c31aca",
}
_GROVER = "https://raw.githubusercontent.com/tencent-ailab/grover/main/exampledata/finetune/"


class _Molecules(NamedTuple):
    graphs: list[MolecularGraph]
    targets: np.ndarray  # float64 (M, tasks)


def load_molecules(
    name: str,
    examples: int | None = None,
    policy: DataPolicy = "auto",
    split: int = 0,
    held_out: Literal["test", "validation"] = "test",
) -> Dataset:
    """Load a set of molecules: the training part of a scaffold split, and one of the held-out parts.

    Args:
        name: "bbbp", "esol" or another set of MoleculeNet that is in :data:`SOURCES`.
        examples: number of training molecules, a random choice; all by default.
        policy: as for :func:`samlib.load_dataset`. Real molecules are read by RDKit (``samlib[molecules]``).
        split: seed of the split, see :func:`scaffold_split`.
        held_out: the part that becomes the test examples: "validation" to choose settings by.

    Returns:
        A :class:`samlib.Dataset` whose inputs are tuples (atoms, pairs).

    Raises:
        DataError: if ``policy="real"`` and the data or RDKit cannot be had, or there are fewer examples than asked for.
        ValueError: for an unknown name, policy or part.
    """
    if name not in SOURCES:
        raise ValueError(f"molecules must be one of {', '.join(SOURCES)}, got {name!r}")
    return SOURCES[name].load(examples, policy, split=split, held_out=held_out)


def scaffold_split(scaffolds: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split molecules into 80 % for training and 10 % each for validation and test, no scaffold in two of them.

    Scaffolds that would fill more than half a test set go to training. The others, in random order, go to training
    while it has room for them, then to validation, then to test. Each part is in random order too. "Random" is the
    order of SHA-256 digests, so that a seed gives the same split everywhere.

    Args:
        scaffolds: name of each molecule's scaffold.
        seed: of the random order.

    Returns:
        The places of the training, validation and test molecules.

    >>> [part.tolist() for part in scaffold_split([*"aaaaaaaaaaaabbcdefgh"])]
    [[6, 14, 4, 17, 10, 2, 1, 7, 5, 12, 13, 0, 8, 9, 3, 11], [18, 16], [15, 19]]
    """
    groups: dict[str, list[int]] = {}
    for place, scaffold in enumerate(scaffolds):
        groups.setdefault(scaffold, []).append(place)

    def draw(place: int) -> str:
        return hashlib.sha256(f"{seed} {place}".encode()).hexdigest()

    tenth = len(scaffolds) / 10
    train: list[int] = []
    validation: list[int] = []
    test: list[int] = []
    for members in sorted(groups.values(), key=lambda members: (len(members) <= tenth / 2, draw(members[0]))):
        if len(members) > tenth / 2 or len(train) + len(members) <= 8 * tenth:
            train += members
        elif len(validation) + len(members) <= tenth:
            validation += members
        else:
            test += members
    first, second, third = (np.array(sorted(part, key=draw), dtype=np.int64) for part in (train, validation, test))
    return first, second, third


def _read(paths: list[Path]) -> _Molecules:
    """The molecules of a CSV file: SMILES first, then targets. What cannot be used is left out, and said."""
    with paths[0].open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    targets = np.array([[float(value or "nan") for value in row[1:]] for row in rows])
    graphs = parse([row[0] for row in rows])
    unreadable = [row[0] for row, graph in zip(rows, graphs, strict=True) if graph is None]
    large = [row[0] for row, graph in zip(rows, graphs, strict=True) if graph and len(graph.atoms) > MAX_ATOMS]
    for left_out, why in ((unreadable, "which RDKit cannot read"), (large, f"of more than {MAX_ATOMS} atoms")):
        if left_out:
            some = ", ".join(text[:40] for text in left_out[:3]) + (", …" if len(left_out) > 3 else "")
            warnings.warn(
                f"{paths[0].name}: {len(left_out)} of {len(rows)} molecules are left out, {why}: {some}",
                UserWarning,
                stacklevel=2,
            )
    fits = [(graph, row) for graph, row in zip(graphs, targets, strict=True) if graph and len(graph.atoms) <= MAX_ATOMS]
    return _Molecules([graph for graph, _ in fits], np.array([row for _, row in fits]))


def _prepare(
    raw: _Molecules, examples: int | None, label: str, *, split: int = 0, held_out: str = "test"
) -> tuple[list[np.ndarray], Any]:
    if held_out not in ("test", "validation"):
        raise ValueError(f"held_out must be 'test' or 'validation', got {held_out!r}")
    train, validation, test = scaffold_split([graph.scaffold for graph in raw.graphs], split)
    train = train[: take(len(train), examples, label)]
    content: list[np.ndarray] = []
    tensors: list[tuple[Tensor, ...] | Tensor] = []
    for part in (train, test if held_out == "test" else validation):
        atoms, pairs = _padded([raw.graphs[place] for place in part], max(len(graph.atoms) for graph in raw.graphs))
        targets = raw.targets[part]
        content += [atoms, pairs, targets.astype("<f8").view("<i2")]  # the bits of the targets identify them
        tensors += [(torch.from_numpy(atoms), torch.from_numpy(pairs)), torch.from_numpy(targets).float()]
    return content, tuple(tensors)


def _padded(graphs: list[MolecularGraph], size: int) -> tuple[np.ndarray, np.ndarray]:
    atoms, pairs = (np.zeros((len(graphs), size, width), np.uint8) for width in (len(KINDS), size))
    for row, graph in enumerate(graphs):
        count = len(graph.atoms)
        atoms[row, :count], pairs[row, :count, :count] = graph.atoms, graph.pairs
    return atoms, pairs


def _made_up_values() -> _Molecules:
    """300 small molecules made in code, with a made-up value"""
    graphs, values = toy_molecules(300)
    return _Molecules(graphs, values[:, None])


def _made_up_labels() -> _Molecules:
    """300 small molecules made in code, with a made-up label"""
    graphs, values = toy_molecules(300)
    return _Molecules(graphs, (values[:, None] > np.median(values)).astype(np.float64))


SOURCES = {
    name: Source(
        name,
        (RemoteFile(f"moleculenet/{name}.csv", "sha256", checksum, (f"{_GROVER}{name}.csv",)),),
        _read,
        _made_up_labels if name in CLASSIFICATION else _made_up_values,
        _prepare,
    )
    for name, checksum in _CHECKSUMS.items()
}
"""The sets of molecules, by name."""
