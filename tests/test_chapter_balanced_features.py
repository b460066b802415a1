import base64
import io
import re

import numpy as np
import pandas as pd
import papermill
import pytest

from samlib import Run
from samlib.claims import CHAPTERS, Evidence, evaluate, published_toys
from samlib.claims.balanced_features import interval_of, ratio_of_means
from samlib.claims.balanced_runs import LEVELS, NETWORKS, SEEDS, at_level, cell, configs, pairs
from samlib.datasets.dominoes import CLASSES, load_dominoes
from samlib.figures import balanced_features as pictures
from samlib.figures import balanced_toys as toy_pictures
from samlib.figures import forest

from .conftest import ROOT

CHAPTER = CHAPTERS["balanced_features"]
CLAIM = {claim.key: claim for claim in CHAPTER.claims}
ALL = configs()


def recorded(config, object_error=0.68, digit_error=0.05, change=-0.1, reach=0.0, pace=1.0):
    """A run with given probe errors at every level down to ``reach``, ``pace`` times as slow as SGD."""
    levels = [level for level in config.measure_at_losses if level >= reach]
    count = len(levels) + 1
    rows = {
        "step": [0.0, *(pace * 100 * (i + 1) for i in range(len(levels)))],
        "loss": [2.3, *(0.99 * level for level in levels)],
        "loss_level": [np.nan, *levels],
        "probe_object": object_error,
        "probe_digit": digit_error,
    }
    if "edge" in config.observables:
        rows |= {"edge_ratio": np.linspace(0.5, 1, count), "operator_norm": np.linspace(1, 4, count)}
    else:
        rows |= {"weights_gini": 0.5, "perturbed_weights_gini": 0.5 + change}
        for i in range(1, 10):
            rows |= {f"weights_decile_{i}": (i / 10) ** 3, f"perturbed_weights_decile_{i}": (i / 10) ** 2}
    about = {"record": 1, "standin": False, "fingerprint": "f", "dataset": "digits_on_cifar"}
    return Run(config.identity("f"), config, pd.DataFrame(rows), "finished", about)


def effect_of(config, effect):
    """What a table of effects by (network's name, ρ, rule) says of a configuration; else nothing happens."""
    normalised = (
        "CNN with BatchNorm" if config.network == "convolutional" else "MLP" + " with BatchNorm" * config.batch_norm
    )
    return effect.get((normalised, config.rho, config.rule), {})


def runs_with(effect, noise=0.002, **every):
    """All runs of the chapter, each seed with a level of its own, which pairing takes away, and a little noise."""
    found = []
    for config in ALL:
        random = np.random.default_rng([config.seed, round(100 * config.rho), len(config.rule)])
        moved = {"object": 0.0, "digit": 0.0} | effect_of(config, effect)
        common = 0.03 * (config.seed % 5)
        errors = {
            "object_error": 0.68 + common + moved["object"] + noise * random.standard_normal(),
            "digit_error": 0.05 + common / 10 + moved["digit"] + noise / 4 * random.standard_normal(),
        }
        found.append(recorded(config, **errors, **every))
    return found


BETTER = {
    ("CNN with BatchNorm", 0.1, "sam"): {"object": -0.004},
    ("CNN with BatchNorm", 0.3, "sam"): {"object": -0.014, "digit": -0.01},
    ("CNN with BatchNorm", 0.6, "sam"): {"object": -0.03},
    ("CNN with BatchNorm", 0.3, "jacobian_sam"): {"object": -0.013},
    ("MLP", 0.1, "sam"): {"object": -0.02},
}
WORSE = {
    ("CNN with BatchNorm", 0.3, "sam"): {"object": 0.01, "digit": 0.02},
    ("CNN with BatchNorm", 0.6, "sam"): {"object": 0.02},
    ("CNN with BatchNorm", 0.3, "jacobian_sam"): {"object": -0.002},
    ("MLP", 0.1, "sam"): {"object": 0.02},
}


@pytest.fixture(scope="module")
def better():
    return runs_with(BETTER)


@pytest.fixture(scope="module")
def toys():
    return {name: solve() for name, solve in CHAPTER.toys.items()}


def verdict(key, runs):
    return evaluate(CLAIM[key], Evidence(runs, {}), CHAPTER.name)


@pytest.mark.parametrize("key", CLAIM)
def test_evidence_for_a_claim_reproduces_it(key, better):
    result = verdict(key, better)
    assert result.outcome == "reproduced"
    assert result.low <= result.value <= result.high
    assert result.details.run_id.str.len().min() > 0


@pytest.mark.parametrize("key", CLAIM)
def test_evidence_against_a_claim_does_not(key):
    assert verdict(key, runs_with(WORSE, change=0.1)).outcome == "not reproduced"


@pytest.mark.parametrize("key", CLAIM)
def test_without_runs_nothing_is_recorded(key):
    assert verdict(key, []).outcome == "not recorded"


def test_an_effect_within_the_noise_supports_no_claim_about_an_interval():
    runs = runs_with({}, noise=0.01)
    for key in ("harder", "unnormalised", "grows", "jacobian"):
        assert verdict(key, runs).outcome == "not reproduced", key


@pytest.mark.parametrize(("moved", "outcome"), [(0.003, "reproduced"), (0.007, "not reproduced")])
def test_the_digit_may_lose_half_a_point(moved, outcome):
    runs = runs_with({("CNN with BatchNorm", 0.3, "sam"): {"digit": moved}}, noise=0.001)
    assert verdict("easier", runs).outcome == outcome


@pytest.mark.parametrize(("reproduced_part", "outcome"), [(0.8, "reproduced"), (0.3, "not reproduced")])
def test_the_jacobian_must_carry_half_of_the_effect(reproduced_part, outcome):
    effect = {
        ("CNN with BatchNorm", 0.3, "sam"): {"object": -0.02},
        ("CNN with BatchNorm", 0.3, "jacobian_sam"): {"object": -0.02 * reproduced_part},
    }
    result = verdict("jacobian", runs_with(effect, noise=0.0005))
    assert result.outcome == outcome
    assert result.value == pytest.approx(reproduced_part, abs=0.1)


def test_nine_in_ten_measurements_must_be_more_uniform():
    """Of eight seeds and four levels 32 measurements: 28 are too few, 29 enough."""
    for wrong, outcome in ((4, "not reproduced"), (3, "reproduced")):
        runs = runs_with({})
        for run in runs:
            if "perturbed_weights_gini" in run.measurements and run.config.seed - SEEDS[0] < wrong:
                run.measurements.loc[1, "perturbed_weights_gini"] = 0.6
        result = verdict("weights", runs)
        assert set(result.details.measurements) == {32}
        assert result.outcome == outcome


def test_runs_that_do_not_arrive_are_counted_not_compared(better):
    late = [
        recorded(run.config, 0.9, reach=0.03) if run.config.rho == 0.3 and run.config.seed == SEEDS[0] else run
        for run in better
    ]
    [row] = verdict("harder", late).details.itertuples()
    assert (row.pairs, row.not_arrived) == (len(SEEDS) - 1, 1)
    assert row.difference < 0
    assert set(pictures.paired_table(late).query("network == 'CNN with BatchNorm' and ρ == '0.3'")["not arrived"]) == {
        1
    }


def test_pairs_share_their_seed_and_take_away_what_seeds_have_in_common():
    runs = runs_with(BETTER, noise=0.0)
    found = pairs(runs, "CNN with BatchNorm", 0.3, 0.01)
    assert [pair.run.config.seed for pair in found] == list(SEEDS)
    for pair in found:
        assert pair.plain.config == pair.run.config.model_copy(update={"rho": 0.0, "rule": "sam"})
        assert pair.difference("probe_object") == pytest.approx(-0.014)
        assert pair.cost == 1


def test_a_look_that_finds_two_levels_passed_counts_for_both():
    run = recorded(ALL[0])
    run.measurements.drop(index=1, inplace=True)  # that of the highest level
    assert at_level(run, LEVELS[0]).loss_level == LEVELS[1]
    assert at_level(run, LEVELS[-1]).loss_level == LEVELS[-1]
    assert at_level(recorded(ALL[0], reach=0.03), 0.01) is None


def test_cells_do_not_overlap(better):
    kinds = [(network, rho) for network in NETWORKS for rho in (0.0, 0.1, 0.3, 0.6)]
    found = [run.id for kind in kinds for run in cell(better, *kind).values()]
    assert len(found) == len(set(found))
    layers = [cell(better, "MLP", 0.3, "layer_sam", layers=(part,)) for part in ("last", "body")]
    assert [len(part) for part in layers] == [len(SEEDS)] * 2
    assert not {r.id for r in layers[0].values()} & {r.id for r in layers[1].values()}


def test_the_ratio_of_means_has_fiellers_interval():
    """Against its definition: the ends are those θ at which the paired t-test is just significant."""
    from scipy.stats import ttest_1samp

    random = np.random.default_rng(3)
    for _ in range(20):
        under = -2 + 0.8 * random.standard_normal(8)
        over = 0.6 * under + 0.5 * random.standard_normal(8)
        value, low, high = ratio_of_means(over, under)
        assert low < value < high
        for end in (low, high):
            assert ttest_1samp(over - end * under, 0).pvalue == pytest.approx(0.05, rel=1e-6)
    assert ratio_of_means(over, under - under.mean() + 0.01)[1:] == (-np.inf, np.inf)


def test_the_interval_is_students():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(0).standard_normal(8)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval_of(values) == pytest.approx((values.mean(), expected.low, expected.high))


def test_the_runs_to_record_are_valid_and_have_seeds_of_their_own():
    assert len(set(ALL)) == len(ALL)
    assert {config.seed for config in ALL} == set(SEEDS)
    assert len(SEEDS) >= 8
    assert min(SEEDS) >= 100  # trials had smaller ones
    for config in ALL:
        assert config.data == "real"
        assert config.loss_every <= 10
        assert config.measure_at_losses == LEVELS[: len(config.measure_at_losses)]
    probed = [config for config in ALL if "edge" not in config.observables]
    kinds = {(c.network, c.batch_norm, c.rho, c.rule, getattr(c, "layers", ())) for c in probed}
    assert len(probed) == len(kinds) * len(SEEDS)


# Pictures.

DRAWN = {
    "at_equal_loss": pictures.at_equal_loss,
    "split": pictures.split,
    "through_the_loss": pictures.through_the_loss,
    "lorenz": pictures.lorenz,
    "gini_changes": pictures.gini_changes,
    "edges_beside_probes": pictures.edges,
}
TOYS = {"diagonal": "diagonal", "counterexample": "groups", "uniformity": "ginis"}


def check(figure, name):
    page = figure._repr_html_()
    label = re.search(r'role="img" aria-label="([^"]+)"', page)
    assert label
    assert len(label[1]) > 40
    assert figure.name == name
    csv = pd.read_csv(io.BytesIO(base64.b64decode(re.search(r"text/csv;base64,([^\"]+)", page)[1])))
    assert len(csv) == len(figure.data) > 0
    assert "nan" not in label[1]
    for run in figure.runs:
        assert run.id in page
    return page


@pytest.mark.parametrize("name", DRAWN)
def test_every_picture_of_runs_is_accessible_and_carries_its_data(name, better):
    figure = DRAWN[name](better)
    check(figure, name)
    assert figure.runs
    if "run_id" in figure.data:
        assert set(figure.data.run_id) <= {run.id for run in figure.runs}


@pytest.mark.parametrize("name", TOYS)
def test_every_picture_of_a_toy_is_accessible_and_carries_its_data(name, toys):
    check(getattr(toy_pictures, name)(toys[TOYS[name]]), name)


def test_the_first_picture_says_its_numbers(better):
    figure = pictures.at_equal_loss(better)
    values = figure.data.query("network == 'CNN with BatchNorm' and rho == 0.3 and probe == 'object'").difference
    mean, low, high = interval_of(values.to_numpy())
    assert f"object, CNN with BatchNorm, ρ = 0.3: {mean:+.1f} [{low:+.1f}, {high:+.1f}]" in figure.alt
    assert figure.alt in figure._repr_html_()


def test_pictures_of_a_part_of_the_runs():
    """While not all is recorded, what there is can be drawn."""
    some = [run for run in runs_with(BETTER) if run.config.rho in (0.0, 0.3) and run.config.seed < SEEDS[3]]
    for name, draw in DRAWN.items():
        check(draw(some), name)


def test_a_forest_is_drawn_for_the_weights(better):
    check(forest(verdict("weights", better)), "weights_balanced_features")


def test_dominoes_are_drawn():
    data = load_dominoes(images_per_class=4, test_images_per_class=2, policy="standin")
    figure = toy_pictures.dominoes(data, CLASSES)
    check(figure, "dominoes")
    assert figure.data.object.tolist() == list(CLASSES)


# Toy problems.


def test_the_diagonal_nets_table_is_that_of_theory(toys):
    """Against an independent solver of the flow: the hard feature's share of the margin at loss 0.1."""
    from scipy.integrate import solve_ivp

    mu, level = np.array([1.0, 0.5]), -np.log(np.expm1(0.1))
    for row in toys["parts"].query("kind == 'flow'").itertuples():

        def slope(s, log_a, rho=row.rho):
            return mu * (1 - rho * mu / np.sqrt(2 * (mu**2 * np.exp(2 * log_a)).sum()))

        def reached(s, log_a):
            return mu @ np.exp(2 * log_a) - level

        reached.terminal = True
        log_a = solve_ivp(slope, (0, 20), np.log([0.1, 0.1]), events=reached, rtol=1e-10, atol=1e-12).y[:, -1]
        carried = mu * np.exp(2 * log_a)
        assert row.share == pytest.approx(carried[1] / carried.sum(), abs=2e-5)


def test_in_the_diagonal_net_the_jacobian_carries_all(toys):
    table = toy_pictures.part_table(toys["parts"])
    assert (table["Jacobian only"] / table["steps"]).to_numpy() == pytest.approx(1, abs=2e-3)
    assert np.ptp(table["weights only"]) < 0.01
    assert table["steps"].is_monotonic_increasing


def test_the_linear_counterexample_goes_the_other_way(toys):
    gd, sam = (toys["groups"][toys["groups"].rho == rho].reset_index() for rho in (0.0, 1.0))
    assert (sam.ratio < gd.ratio).all()
    at = gd.loss.sub(0.1).abs().argmin()
    assert (gd.ratio[at], sam.ratio[at]) == pytest.approx((0.6342, 0.5722), abs=1e-3)
    small = gd.loss < 0.5
    assert (sam.gini > gd.gini)[small].all()
    assert (sam.perturbed_gini < sam.gini)[small].all()


def test_published_toys_are_those_of_today(toys):
    for name, table in published_toys(CHAPTER.name, ROOT / "data" / "published").items():
        pd.testing.assert_frame_equal(table, toys[name], rtol=1e-9)


def test_the_notebook_takes_the_usual_parameters():
    parameters = papermill.inspect_notebook(str(ROOT / "notebooks/balanced_features.ipynb"))
    assert {"profile", "data", "device", "store", "seeds"} <= set(parameters)
