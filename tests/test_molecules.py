import csv
import dataclasses
import hashlib
import importlib.util
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samlib.datasets import DataError, RemoteFile
from samlib.datasets import molecules as module
from samlib.datasets.molecular_graphs import ATOM_WORDS, ELEMENTS, KINDS, PAIR_WORDS, atom_words, pair_words, parse
from samlib.datasets.molecules import CLASSIFICATION, SOURCES, load_molecules, scaffold_split
from samlib.datasets.toy_molecules import toy_molecules
from samlib.experiments.molecule_metrics import rmse, roc_auc

from .conftest import REAL_DATA

needs_rdkit = pytest.mark.skipif(
    importlib.util.find_spec("rdkit") is None, reason="RDKit is not installed (samlib[molecules])"
)
needs_files = pytest.mark.skipif(
    not (REAL_DATA / "moleculenet").exists(), reason="real molecules not found (set SAMLIB_DATA)"
)
FIRST = dict(zip(KINDS, np.cumsum([0, *KINDS.values()]), strict=False))

MOLECULES = """
C O N [He] [Na+] [Cl-] [H+] [Fe+3] [2H] * [H][H] [2H]O[2H] [13CH4] [14C]#N CC C=C C#C C=O [C-]#[O+] N#N O=C=O
CC(=O)O CC(=O)[O-].[Na+] [NH4+].[Cl-] C[N+](C)(C)C OS(=O)(=O)O F[P-](F)(F)(F)(F)F [O-][Cl+3]([O-])([O-])[O-]
c1ccccc1 c1ccncc1 c1cc[nH]c1 c1ccc2ccccc2c1 C1CCCCC1 C1CC1 C12CC1C2 c1ccccc1-c1ccccc1 Cc1ccccc1.Cl
N[C@@H](C)C(=O)O N[C@H](C)C(=O)O C[C@H](O)[C@@H](F)Cl F/C=C/F F/C=C\\F CC(C)(C)c1ccc(O)cc1 OB(O)c1ccccc1
[Se]1C=CC=C1 C[Si](C)(C)C [Pt](Cl)(Cl)(N)N CS(C)(=O)=O CP(C)C IC(Br)(Cl)F [O-][N+](=O)c1ccc(cc1)[N+](=O)[O-]
[Cl].CC(C)NCC(O)COc1cccc2ccccc12 CN1C(=O)N(C)c2ncn(C)c2C1=O CCCCCCCCCCCC [Ca+2].[O-]C(=O)CCC(=O)[O-] *c1ccccc1
""".split()  # noqa: SIM905
assert len(MOLECULES) >= 50


def words_of(graph, kind):
    column = list(KINDS).index(kind)
    return graph.atoms[:, column].astype(int) - FIRST[kind]


@needs_rdkit
@pytest.mark.parametrize("smiles", MOLECULES)
def test_atoms_are_those_that_rdkit_finds_by_pattern(smiles):
    from rdkit import Chem

    molecule, (graph,) = Chem.MolFromSmiles(smiles), parse([smiles])
    n = molecule.GetNumAtoms()
    assert graph.atoms.shape == (n, 8)
    assert graph.atoms.dtype == graph.pairs.dtype == np.uint8

    def matches(pattern):
        hits = molecule.GetSubstructMatches(Chem.MolFromSmarts(pattern), maxMatches=1000)
        return np.isin(np.arange(n), [hit[0] for hit in hits])

    numbers = [Chem.GetPeriodicTable().GetAtomicNumber(symbol) for symbol in ELEMENTS]
    for word, number in [*enumerate(numbers), (13, 0)]:
        assert (matches(f"[#{number}]") == (words_of(graph, "element") == word)).all()
    for degree in range(6):
        assert (matches(f"[D{degree}]") == (words_of(graph, "degree") == degree)).all()
    for word, charge in ((1, "-1"), (2, "+0"), (3, "+1")):
        assert (matches(f"[{charge}]") == (words_of(graph, "charge") == word)).all()
    for word, pattern in enumerate(("[^1]", "[^2]", "[^3]")):
        assert (matches(pattern) == (words_of(graph, "hybridisation") == word)).all()
    assert (matches("a") == words_of(graph, "aromatic")).all()
    assert (matches("[R]") == words_of(graph, "ring")).all()
    added = Chem.AddHs(molecule)
    hydrogens = [sum(b.GetIdx() >= n for b in added.GetAtomWithIdx(i).GetNeighbors()) for i in range(n)]
    assert words_of(graph, "hydrogens").tolist() == np.minimum(hydrogens, 4).tolist()
    centres = dict(Chem.FindMolChiralCenters(molecule, useLegacyImplementation=False))
    assert words_of(graph, "chirality").tolist() == [" RS".index(centres.get(i, " ")) for i in range(n)]


@needs_rdkit
@pytest.mark.parametrize("smiles", MOLECULES)
def test_pairs_are_the_bonds_and_distances_that_rdkit_finds(smiles):
    from rdkit import Chem

    molecule, (graph,) = Chem.MolFromSmiles(smiles), parse([smiles])
    distances, fragments = Chem.GetDistanceMatrix(molecule), Chem.GetMolFrags(molecule)
    part = {atom: place for place, atoms in enumerate(fragments) for atom in atoms}
    kinds = {"SINGLE": 2, "DOUBLE": 3, "TRIPLE": 4, "AROMATIC": 5}
    for i, j in itertools.product(range(molecule.GetNumAtoms()), repeat=2):
        bond = molecule.GetBondBetweenAtoms(i, j)
        if i == j:
            expected = 1
        elif bond:
            expected = kinds.get(str(bond.GetBondType()), 6)
        else:
            expected = min(5 + distances[i, j], 13) if part[i] == part[j] else 14
        assert graph.pairs[i, j] == expected


@needs_rdkit
def test_single_words_by_hand():
    sodium, unknown, deuterium, iron = parse(["[Na+]", "*", "[2H]", "[Fe+3]"])
    assert sodium.atoms.tolist() == atom_words([[12, 0, 3, 0, 3, 0, 0, 0]]).tolist()
    assert unknown.atoms[0, 0] == 13
    assert deuterium.atoms[0, 0] == 0
    assert words_of(iron, "charge") == 4
    assert sodium.pairs.tolist() == [[1]]
    right, left, neither = parse(["C[C@H](O)CC", "C[C@@H](O)CC", "CC(O)CC"])
    assert sorted(words_of(g, "chirality")[1] for g in (right, left)) == [1, 2]
    assert not words_of(neither, "chirality").any()


def rewritten(molecule, seed):
    """Another SMILES of a molecule and, for each of its atoms, that atom's place in the molecule."""
    from rdkit import Chem

    text = Chem.MolToRandomSmilesVect(molecule, 1, randomSeed=seed)[0]
    other = Chem.MolFromSmiles(text)
    return text, other.GetSubstructMatches(molecule, useChirality=True, uniquify=False)


@needs_rdkit
@pytest.mark.parametrize("smiles", [s for s in MOLECULES if "H][H" not in s])
def test_another_writing_of_a_molecule_gives_the_same_graph(smiles):
    from rdkit import Chem

    molecule, (graph,) = Chem.MolFromSmiles(smiles), parse([smiles])
    for seed in range(1, 6):
        text, orders = rewritten(molecule, seed)
        (other,) = parse([text])
        same = [
            (other.atoms[[*order]] == graph.atoms).all() and (other.pairs[np.ix_(order, order)] == graph.pairs).all()
            for order in orders
        ]
        assert any(same)
        assert other.scaffold == graph.scaffold


@needs_rdkit
def test_scaffolds_are_ring_systems_with_what_links_them():
    toluene, phenol, chain, biphenyl, alanine, sodium = (
        graph.scaffold for graph in parse(["Cc1ccccc1", "Oc1ccccc1", "CCO", "c1ccccc1-c1ccc(C)cc1", "CC(N)O", "[Na+]"])
    )
    assert toluene == phenol != biphenyl
    assert chain == alanine == sodium == ""


def test_atom_words_are_distinct_and_limited():
    every = np.concatenate([atom_words([[place] * 8])[0] for place in range(14)])
    assert set(every.tolist()) == set(range(ATOM_WORDS))
    assert ATOM_WORDS == 42
    assert atom_words([[2, 9, -3, 7, 0, 0, 0, 0]]).tolist() == [[2, 14 + 6, 21, 26 + 4, 31, 35, 38, 40]]


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_pair_words_by_floyd_and_warshall(n, seed):
    random = np.random.default_rng(seed)
    bonds = np.triu(random.integers(2, 7, (n, n)) * (random.random((n, n)) < 1.2 / n), 1)
    bonds = bonds + bonds.T
    distance = np.where(bonds > 0, 1.0, np.inf)
    np.fill_diagonal(distance, 0)
    for k in range(n):
        distance = np.minimum(distance, distance[:, k, None] + distance[None, k])
    expected = np.where(np.isinf(distance), 14, np.minimum(5 + distance, 13))
    expected = np.where(bonds > 0, bonds, np.where(distance == 0, 1, expected))
    assert (pair_words(bonds) == expected).all()


def test_long_chains_end_in_the_word_for_far():
    bonds = np.diag(np.full(19, 2), 1)
    assert pair_words(bonds + bonds.T)[0].tolist() == [1, 2, *range(7, 13), *[13] * 12]


@needs_rdkit
@pytest.mark.parametrize("text", ["", "not a molecule", "C1CC", "C(C)(C)(C)(C)C", "c1cccc1", "[Xx]", "C C"])
def test_what_is_no_molecule_has_no_graph(text, capfd):
    # "C C" is read by RDKit as methane with a name.
    assert (parse([text])[0] is None) == (text != "C C")
    assert capfd.readouterr().err == ""


def test_toy_molecules_are_varied_and_well_formed():
    graphs, values = toy_molecules(300)
    assert len({graph.scaffold for graph in graphs}) > 40
    assert values.std() > 1
    for graph in graphs:
        assert graph.atoms.max() < ATOM_WORDS
        assert (graph.pairs == graph.pairs.T).all()
        assert 1 <= graph.pairs.min() <= graph.pairs.max() < PAIR_WORDS - 1
        assert (words_of(graph, "degree") == np.isin(graph.pairs, (2, 3, 4, 5)).sum(1)).all()
    again, _ = toy_molecules(300)
    assert all((a.pairs == b.pairs).all() for a, b in zip(graphs, again, strict=True))


@needs_rdkit
def test_toy_molecules_are_chemistry():
    from rdkit import Chem

    for graph in toy_molecules(100)[0]:
        molecule = Chem.RWMol()
        for element in words_of(graph, "element"):
            molecule.AddAtom(Chem.Atom(ELEMENTS[element]))
        for i, j in np.argwhere(np.triu(np.isin(graph.pairs, (2, 5)))):
            molecule.AddBond(int(i), int(j), Chem.BondType.AROMATIC if graph.pairs[i, j] == 5 else Chem.BondType.SINGLE)
            molecule.GetAtomWithIdx(int(i)).SetIsAromatic(bool((graph.pairs[i] == 5).any()))
            molecule.GetAtomWithIdx(int(j)).SetIsAromatic(bool((graph.pairs[j] == 5).any()))
        Chem.SanitizeMol(molecule)
        (parsed,) = parse([Chem.MolToSmiles(molecule, canonical=False)])
        # Written in another order; only sp² by conjugation, of N and O beside an aromatic ring, is not in the toys.
        kinds = [place for place, kind in enumerate(KINDS) if kind != "hybridisation"]
        assert sorted(parsed.atoms[:, kinds].tolist()) == sorted(graph.atoms[:, kinds].tolist())
        assert sorted(parsed.pairs.ravel().tolist()) == sorted(graph.pairs.ravel().tolist())


@given(st.lists(st.integers(0, 60), min_size=1, max_size=300), st.integers(0, 1000))
def test_a_split_holds_every_molecule_once_and_shares_no_scaffold(numbers, seed):
    scaffolds = [str(number) for number in numbers]
    parts = scaffold_split(scaffolds, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(scaffolds)))
    for a, b in itertools.combinations(parts, 2):
        assert not {scaffolds[i] for i in a} & {scaffolds[i] for i in b}
    sizes = [scaffolds.count(name) for name in scaffolds]
    count, (train, validation, _) = len(scaffolds), parts
    large = [i for i in range(count) if sizes[i] > count / 20]
    small = max((size for size in sizes if size <= count / 20), default=0)
    assert set(large) <= set(train.tolist())
    assert 0.8 * count - small < len(train) + 1e-9  # else another small scaffold would have had room
    assert len(train) <= max(0.8 * count, len(large)) + 1e-9
    assert len(validation) <= count / 10


def test_the_split_is_the_same_on_every_machine():
    scaffolds = [str(i * i % 91) for i in range(1000)]
    parts = scaffold_split(scaffolds, seed=3)
    assert [len(part) for part in parts] == [780, 88, 132]
    text = " ".join(map(str, np.concatenate(parts)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6b4cba699523beb1"
    assert parts[0].tolist() != scaffold_split(scaffolds, seed=4)[0].tolist()


def own_file(monkeypatch, tmp_path, text, name="esol"):
    """Make a set consist of one file with this text."""
    path = tmp_path / "mine/moleculenet/own.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    checksum = hashlib.sha256(text.encode()).hexdigest()
    files = (RemoteFile("moleculenet/own.csv", "sha256", checksum, ("http://127.0.0.1:9/x",)),)
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], files=files))
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path / "mine"))
    return path


def table(molecules):
    return "smiles,a,b\n" + "".join(f"{text},{place},\n" for place, text in enumerate(molecules))


CHAINS = ["C" * n for n in range(1, 11)]


@needs_rdkit
def test_a_file_becomes_padded_tables(monkeypatch, tmp_path):
    own_file(monkeypatch, tmp_path, table(CHAINS))
    dataset = load_molecules("esol", policy="real")
    atoms, pairs = dataset.train_inputs
    assert (atoms.dtype, pairs.dtype, dataset.train_targets.dtype) == (torch.uint8, torch.uint8, torch.float32)
    assert (atoms.shape, pairs.shape, dataset.train_targets.shape) == ((10, 10, 8), (10, 10, 10), (10, 2))
    assert not dataset.standin
    assert dataset.name == "esol"
    assert dataset.train_targets[:, 1].isnan().all()
    for row, target in enumerate(dataset.train_targets[:, 0].int().tolist()):
        (graph,) = parse([CHAINS[target]])
        size = target + 1
        assert (atoms[row, :size].numpy() == graph.atoms).all()
        assert (pairs[row, :size, :size].numpy() == graph.pairs).all()
        assert not atoms[row, size:].any()
        assert not pairs[row, size:].any()
        assert not pairs[row, :, size:].any()


@needs_rdkit
def test_what_cannot_be_read_is_left_out_counted_and_said(monkeypatch, tmp_path):
    own_file(monkeypatch, tmp_path, table(["C1CC", *CHAINS, "[Xx]", "", "nonsense"]))
    expected = r"own\.csv: 4 of 14 molecules are left out, which RDKit cannot read: C1CC, \[Xx\], , …"
    with pytest.warns(UserWarning, match=expected):
        dataset = load_molecules("esol", policy="real")
    assert sorted(dataset.train_targets[:, 0].tolist()) == list(range(1, 11))


@needs_rdkit
def test_a_molecule_above_the_size_bound_is_left_out_counted_and_said(monkeypatch, tmp_path):
    own_file(monkeypatch, tmp_path, table([*CHAINS, "C" * module.MAX_ATOMS, "C" * (module.MAX_ATOMS + 1)]))
    with pytest.warns(UserWarning, match=r"own\.csv: 1 of 12 molecules are left out, of more than 150 atoms: CCC"):
        dataset = load_molecules("esol", policy="real")
    assert dataset.train_inputs[1].shape == (11, 150, 150)


@needs_rdkit
def test_the_fingerprint_is_that_of_the_molecules_targets_and_split(monkeypatch, tmp_path):
    rings = [f"C1{'C' * n}C1" for n in range(1, 41)]
    prints = set()
    for place, text in enumerate([table(rings), table([*rings[:-1], "O1CC1"]), table(rings).replace(",7,", ",7.5,")]):
        folder = tmp_path / str(place)
        own_file(monkeypatch, folder, text)
        for options in ({}, {"split": 1}, {"held_out": "validation"}, {"examples": 20}):
            prints.add(load_molecules("esol", policy="real", **options).fingerprint)
            assert load_molecules("esol", policy="real", **options).fingerprint in prints
    assert len(prints) == 12


def test_a_missing_or_damaged_file_is_named(monkeypatch, tmp_path):
    path = own_file(monkeypatch, tmp_path, table(CHAINS))
    path.write_text("smiles,a\nC,1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot load esol: .*own\.csv is damaged \(sha256 [0-9a-f]+, expected"):
        load_molecules("esol", policy="real")
    path.unlink()
    with pytest.raises(DataError, match=r"own\.csv is missing.*Set SAMLIB_DATA .*data='standin'"):
        load_molecules("esol", policy="real")
    with pytest.warns(UserWarning, match=r"own\.csv is missing.*\nUsing a stand-in for esol: its results do not count"):
        assert load_molecules("esol").standin


def test_without_rdkit_the_extra_is_named(monkeypatch, tmp_path):
    own_file(monkeypatch, tmp_path, table(CHAINS))
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(DataError, match=r"needs RDKit, which is not installed: pip install 'samlib\[molecules\]'"):
        load_molecules("esol", policy="real")
    with pytest.warns(UserWarning, match=r"samlib\[molecules\]'\nUsing a stand-in for esol"):
        assert load_molecules("esol").standin


@pytest.mark.parametrize("name", SOURCES)
def test_stand_ins_need_neither_network_nor_rdkit(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    dataset = load_molecules(name, policy="standin")
    assert dataset.standin
    assert dataset.name.startswith(f"{name} stand-in: 300 small molecules made in code")
    (atoms, pairs), targets = dataset.train_inputs, dataset.train_targets
    assert len(atoms) == len(pairs) == len(targets) <= 245
    assert 20 <= len(dataset.test_targets) <= 40
    assert (set(targets.unique().tolist()) == {0, 1}) == (name in CLASSIFICATION)


def test_any_index_selects_molecules():
    dataset = load_molecules("esol", policy="standin")
    some = torch.tensor([3, 1, 4])
    atoms, pairs = (t[some] for t in dataset.train_inputs)
    assert (atoms[2] == dataset.train_inputs[0][4]).all()
    assert (pairs[2] == dataset.train_inputs[1][4]).all()


def test_fewer_examples_are_the_first_ones():
    every, few = load_molecules("esol", policy="standin"), load_molecules("esol", 20, "standin")
    assert len(few.train_targets) == 20
    for a, b in zip(every.train_inputs, few.train_inputs, strict=True):
        assert (a[:20] == b).all()
    assert (every.test_targets == few.test_targets).all()
    validation = load_molecules("esol", policy="standin", held_out="validation")
    assert (every.train_targets == validation.train_targets).all()
    assert every.test_targets.tolist() != validation.test_targets.tolist()


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match=r"molecules must be one of bace, bbbp, .*tox21, got 'qm9'"):
        load_molecules("qm9")
    with pytest.raises(ValueError, match="data must be 'auto', 'real' or 'standin', got 'fake'"):
        load_molecules("esol", policy="fake")
    with pytest.raises(ValueError, match="held_out must be 'test' or 'validation', got 'train'"):
        load_molecules("esol", policy="standin", held_out="train")
    with pytest.raises(DataError, match=r"asked for 999 training examples, but esol stand-in: .* has 2"):
        load_molecules("esol", 999, "standin")


@needs_rdkit
@needs_files
@pytest.mark.data
@pytest.mark.usefixtures("real_data")
@pytest.mark.parametrize(("name", "molecules"), [("esol", 1128), ("bbbp", 2039), ("freesolv", 642)])
def test_real_sets_are_split_by_scaffold(name, molecules):
    with (REAL_DATA / f"moleculenet/{name}.csv").open(encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    graphs = parse([row[0] for row in rows])
    assert len(graphs) == molecules
    scaffolds = [graph.scaffold for graph in graphs]
    for split in range(3):
        train, validation, test = scaffold_split(scaffolds, split)
        assert not {scaffolds[i] for i in train} & {scaffolds[i] for i in [*validation, *test]}
        assert 0.79 * molecules < len(train) <= 0.8 * molecules
        assert 0.09 * molecules < len(test) < 0.12 * molecules
    dataset = load_molecules(name, policy="real", split=2)
    assert len(dataset.train_targets) == len(train)
    assert dataset.test_targets[:, 0].tolist() == pytest.approx([float(rows[i][1]) for i in test])
    if name == "esol":  # all molecules without rings, and all with one benzene ring
        assert sorted(map(scaffolds.count, set(scaffolds)))[-2:] == [254, 317]
        assert {"", "c1ccccc1"} <= {scaffolds[i] for i in train}


def test_roc_auc_counts_pairs():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(40, 3)).round(1), random.integers(0, 2, (40, 3)).astype(float)
    labels[random.random((40, 3)) < 0.2] = math.nan
    labels[:, 2] = 1  # of one kind: no area
    areas = []
    for s, y in zip(scores.T[:2], labels.T[:2], strict=True):
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in s[y == 1] for b in s[y == 0]]
        areas.append(np.mean(wins))
    assert roc_auc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(np.mean(areas), rel=1e-12)
    assert math.isnan(roc_auc(torch.ones(3, 1), torch.ones(3, 1)))


def test_rmse_is_the_mean_over_what_was_measured():
    random = np.random.default_rng(0)
    given, true = random.normal(size=(2, 30, 2))
    true[5:, 1] = math.nan
    expected = [np.sqrt(np.mean((given[:, 0] - true[:, 0]) ** 2)), np.sqrt(np.mean((given[:5, 1] - true[:5, 1]) ** 2))]
    assert rmse(torch.tensor(given), torch.tensor(true)) == pytest.approx(np.mean(expected), rel=1e-12)
    assert math.isnan(rmse(torch.ones(2, 1), torch.full((2, 1), math.nan)))


@pytest.mark.parametrize("metric", [rmse, roc_auc])
def test_metrics_of_what_has_diverged_or_does_not_fit(metric):
    labels = torch.tensor([[0.0], [1.0]])
    assert math.isnan(metric(torch.tensor([[0.0], [math.nan]]), labels))
    with pytest.raises(ValueError, match=r"outputs and targets of one shape, got \(2,\), \(2, 1\)"):
        metric(torch.zeros(2), labels)
