"""The universal class as a chapter: claims on evidence that must and must not support them, runs, pictures, page."""

import dataclasses
import json

import numpy as np
import pandas as pd
import papermill
import pytest

from samlib import Run
from samlib.claims import CHAPTERS, Evidence, evaluate
from samlib.claims import universal_statistics as statistics
from samlib.claims import universal_tables as tables
from samlib.claims.universal_runs import LEVELS, SEEDS, STUDIES, configs, measure_at_level, study
from samlib.claims.universal_sam import solved
from samlib.figures import forest
from samlib.figures import universal_sam as pictures
from samlib.figures import universal_toys as toy_pictures
from samlib.observables.sampled import RADII
from samlib.toys.universal import HYPERBOLA_RULES, RESTING_RULES, hyperbola_table, resting_table, scale_table

from .conftest import ROOT

CHAPTER = CHAPTERS["universal_sam"]
CLAIMS = {claim.key: claim for claim in CHAPTER.claims}
PLACES = {
    run.config: (kind, *place)
    for kind in STUDIES
    for place, run in study([Run("", config, pd.DataFrame(), "finished", {}) for config in configs()], kind).items()
}

# Ratios to gradient descent as the trials had them.
RATIOS = {
    "GD": (1.0, 1.0, 1.0, 1.0),
    "SAM": (0.265, 0.433, 0.343, 0.461),
    "Frobenius, paired": (0.412, 0.573, 0.474, 0.602),
    "trace, plain": (0.442, 0.515, 0.475, 0.539),
    "determinant, paired": (0.523, 0.566, 0.543, 0.588),
    "Frobenius, published": (0.997, 0.996, 0.997, 0.997),
    "determinant, published": (0.711, 0.760, 0.729, 0.778),
    "trace at h/√3": (0.715, 0.757, 0.731, 0.779),
    "Frobenius, plain": (0.565, 0.697, 0.609, 0.724),
}
GRADIENTS = {"GD": 788, "SAM": 1839, "Frobenius, paired": 4580, "trace, plain": 1843, "determinant, published": 1644}
NORMS = {"SGD": 58.0, "Frobenius, published": 38.0, "its Frobenius term": 57.0}
EDGES = {name: (1.05, 0.8) if name == "Frobenius, paired" else (1.02, 1.02) for name in STUDIES["edges"]}
EDGES |= {"trace, plain, n = 1": (0.7, 0.75), "SAM": (np.nan, 0.41)}


def rows_of(kind, name, seed, changes):
    """The measurements of a run as a trial had them, or with changes by (kind, name) of the numbers."""
    at = changes.get((kind, name), {})
    noise = 1 + 0.002 * (seed - 12)
    if kind == "table":
        values = dict(zip(statistics.MEASURES, np.array((1.7, 89.3, 5.14, 80.9)) * RATIOS[name] * noise, strict=True))
        end = {"loss": 0.0019, **values, "test_metric": 0.12} | at
        return [{"step": 0, "loss": 0.2, **dict.fromkeys(values, 3.0)}, {"step": 900, **end}]
    if kind == "published":
        end = {"loss": 0.0595, "frobenius_norm": NORMS.get(name, 50.0) * noise, "test_metric": 0.1} | at
        return [{"step": 0, "loss": 2.3, "frobenius_norm": 9.0}, {"step": 800, **end}]
    if kind == "edges":
        own, sharpness = (at.get(key, value) for key, value in zip(("own", "sharpness"), EDGES[name], strict=True))
        edge = {"gd_edge": 4 / 3, "edge_ratio": sharpness, "loss": 0.01}
        values = {"eigenvalue_1": sharpness * 4 / 3, "operator_norm": sharpness * 4 / 3, "own_sharpness": own * 4 / 3}
        return [{"step": step, **edge, **values} for step in (0, 150, 300, 450, 600)]
    sampled = {"ReLU": (0.9, 5.0), "GELU": (1.04, 1.04)}[name]
    start, end = at.get("start", sampled[0]), at.get("end", sampled[1])
    radii = {f"sampled_trace_{rho:g}" for rho in RADII}
    return [
        {"step": step, "loss": 0.1, "trace": 70.0, **dict.fromkeys(radii, 70.0 * ratio)}
        for step, ratio in ((0, start), (200, end), (400, end))
    ]


def recorded(changes=None, gradients=None, diverged=()):
    """All runs of the chapter, as the trials had them but for some changes."""
    spent = GRADIENTS | (gradients or {})
    found = []
    for config, (kind, name, seed) in PLACES.items():
        rows = pd.DataFrame(rows_of(kind, name, seed, changes or {}))
        about = {"gradients": spent.get(name, 2500), "standin": False, "dataset": "mnist", "parameters": 100}
        outcome = "finished"
        if (kind, name) in diverged:
            rows, outcome = pd.DataFrame([*rows.iloc[:1].to_dict("records"), {"step": 20, "loss": np.inf}]), "diverged"
        found.append(Run(config.identity("f"), config, rows, outcome, about))
    return found


def verdict(key, runs=(), **toys):
    return evaluate(CLAIMS[key], Evidence(runs, toys), "universal_sam")


def test_runs_are_valid_different_and_on_new_seeds():
    assert len(configs()) == len(set(configs())) == len(PLACES) == len(SEEDS) * sum(map(len, STUDIES.values()))
    assert len(SEEDS) >= 3
    assert not {0, 1, 2} & {config.seed for config in configs()}
    assert {config.data for config in configs()} == {"real"}
    claimed = [PLACES[c] for c in configs()]
    assert claimed.index(("edges", "trace, plain, n = 1", 13)) < claimed.index(("table", "Frobenius, plain", 11))


def test_thresholds_are_those_of_before_the_recording():
    assert (statistics.DRIFT, statistics.COSINE) == ((0.95, 1.05), 0.995)
    assert statistics.REST_WITHIN == 0.03
    assert statistics.OWN_AT_MOST == {"Frobenius, paired": 0.6, "trace, plain": 0.6, "determinant, paired": 0.7}
    assert (statistics.NO_EFFECT, statistics.MECHANISM, statistics.SAME) == (0.97, (0.93, 0.75), 0.03)
    assert (statistics.OWN_EDGE, statistics.BELOW) == ((0.9, 1.15), 0.85)
    assert (statistics.KINKED, statistics.SMOOTH, statistics.AT_START) == (3.0, (0.9, 1.1), (0.8, 1.2))


def test_without_evidence_nothing_is_recorded():
    assert {verdict(key).outcome for key in CLAIMS} == {"not recorded"}


AS_IN_THE_TRIALS = {
    "own_measure": ("reproduced", 9),
    "selectivity": ("reproduced", 3),
    "published_strength": ("not reproduced", 3),
    "published_mechanism": ("reproduced", 3),
    "determinant_is_trace": ("reproduced", 3),
    "better_than_sam": ("not reproduced", 18),
    "own_edge": ("reproduced", 18),
    "kinks": ("reproduced", 9),
}


@pytest.mark.parametrize("key", AS_IN_THE_TRIALS)
def test_claims_on_runs_as_in_the_trials(key):
    result = verdict(key, recorded())
    assert (result.outcome, result.total) == AS_IN_THE_TRIALS[key]


AGAINST = {
    "own_measure": {
        ("table", name): {statistics.OWN_MEASURE[name.split(",")[0]]: 999.0} for name in statistics.OWN_AT_MOST
    },
    "selectivity": {("table", "Frobenius, paired"): {"frobenius_norm": 0.99 * 5.14}},
    "published_mechanism": {("published", "its Frobenius term"): {"frobenius_norm": 45.0}},
    "determinant_is_trace": {("table", "determinant, published"): {"log_determinant": 0.85 * 80.9}},
    "own_edge": {("edges", name): {"own": 0.86} for name in STUDIES["edges"]},
    "kinks": {("kinks", "ReLU"): {"end": 1.1, "start": 0.5}},
}


@pytest.mark.parametrize("key", AGAINST)
def test_claims_on_runs_that_speak_against_them(key):
    result = verdict(key, recorded(AGAINST[key]))
    assert result.outcome == "not reproduced"


def test_claims_that_were_not_expected_to_hold_can():
    lower = recorded({("table", "Frobenius, published"): {"frobenius_norm": 0.96 * 5.14 * 0.99}})
    assert verdict("published_strength", lower).outcome == "reproduced"
    cheap = {("table", "trace, plain"): {"trace": 0.4 * 89.3}}
    assert (
        verdict("better_than_sam", recorded(cheap, {"trace, plain": 1843})).supporting == 0
    )  # four gradients too many
    assert verdict("better_than_sam", recorded(cheap, {"trace, plain": 1839})).supporting == 3
    assert verdict("better_than_sam", recorded({}, {"trace, plain": 1000})).supporting == 0


def test_a_run_that_diverged_or_stopped_above_the_level_supports_nothing():
    lost = recorded(diverged=[("table", "Frobenius, paired"), ("edges", "GD")])
    result = verdict("own_measure", lost)
    assert (result.supporting, result.total) == (6, 9)
    assert verdict("selectivity", lost).supporting == 0
    assert verdict("own_edge", lost).supporting == 15
    above = recorded({("table", "GD"): {"loss": 0.0021}})
    assert verdict("own_measure", above).supporting == 0
    run = study(above, "table")["GD", 11]
    assert np.isnan(measure_at_level(run, LEVELS["table"], "trace"))
    assert measure_at_level(run, 0.003, "trace") == run.last.trace


def test_runs_at_one_seed_only_are_units_of_that_seed():
    some = [run for run in recorded() if run.config.seed == 12]
    assert verdict("own_measure", some).details.seed.unique().tolist() == [12]
    half = [run for run in some if run.config.rule != "frobenius_sam"]
    assert verdict("selectivity", half).outcome == "not recorded"


def drift_rows(slope=1.0, cosine=0.9999):
    row = {"name": "frobenius", "samples": 2, "paired": True, "rho": 0.01, "slope": slope, "slope_error": 0.01}
    return pd.DataFrame([{**row, "cosine": cosine, "seed": seed} for seed in SEEDS])


def test_drift():
    assert verdict("drift", drift=drift_rows()).outcome == "reproduced"
    assert verdict("drift", drift=drift_rows(slope=1.06)).outcome == "not reproduced"
    assert verdict("drift", drift=drift_rows(cosine=0.99)).outcome == "not reproduced"
    assert verdict("drift", drift=drift_rows().assign(name="trace")).outcome == "not recorded"


def resting_rows(**moved):
    theory = {"frobenius_norm": -0.1155, "trace": -0.2310, "log_determinant": -0.4196}
    return pd.DataFrame(
        [
            {
                "measure": m,
                "samples": statistics.REST[m],
                "paired": True,
                "beta": 1.0,
                "seed": seed,
                "theory": t,
                "start": u,
            }
            | {"u": t + moved.get(m, 0.005)}
            for m, t in theory.items()
            for seed in SEEDS
            for u in (0.6, -0.9)
        ]
    )


def test_resting_places():
    assert verdict("resting_places", resting=resting_rows()).outcome == "reproduced"
    assert verdict("resting_places", resting=resting_rows(trace=0.04)).supporting == 6
    one_sided = resting_rows()
    one_sided.loc[(one_sided.start == 0.6) & (one_sided.measure == "trace"), "u"] += 0.04
    assert verdict("resting_places", resting=one_sided).supporting == 6  # from one start only
    swapped = resting_rows()
    swapped["theory"] = swapped.u = swapped.measure.map(
        {"frobenius_norm": -0.3, "trace": -0.2, "log_determinant": -0.1}
    )
    assert verdict("resting_places", resting=swapped).outcome == "not reproduced"  # near, but not in order


def test_tables_and_pictures_are_accessible_and_carry_their_data():
    runs = recorded(diverged=[("table", "Frobenius, plain"), ("edges", "Frobenius, plain")])
    table = tables.measures_table(runs)
    assert table[table.rule == "SAM"].frobenius_norm.mean() == pytest.approx(0.343)
    assert table[table.rule == "GD"].trace.mean() == pytest.approx(89.3, rel=1e-3)
    price = tables.price_table(runs)
    assert price[price.rule == "Frobenius, paired"].cost.mean() == pytest.approx(4580 / 1839)
    terms = tables.mechanism_table(runs)
    assert terms[terms.rule == "Frobenius, published"].ratio.mean() == pytest.approx(38 / 58)
    where = tables.edges_table(runs)
    assert where[where.rule == "trace, plain, n = 1"].own.tolist() == pytest.approx([0.7] * 3)
    compared = table[table.rule != "GD"]
    shown = [
        pictures.measures(compared, tables.own_columns(), runs, LEVELS["table"]),
        pictures.price(price.dropna(), runs),
        pictures.mechanism(terms[terms.rule != "SGD"], runs, statistics.MECHANISM, LEVELS["published"]),
        pictures.kinks(study(runs, "kinks"), RADII),
        pictures.edges(where, runs),
        *(forest(verdict(key, runs)) for key in AS_IN_THE_TRIALS),
    ]
    for figure in shown:
        html = figure._repr_html_()
        assert 'role="img"' in figure.svg
        assert figure.alt
        assert f'download="{figure.name}.csv"' in html
        assert len(figure.data)
        assert "NaN" not in html.split("base64")[0]
    assert "3 diverged" in shown[4].svg
    assert "loss not reached" in shown[0].svg


def test_rules_that_are_named_for_a_measure():
    assert tables.own_columns() == {
        **dict.fromkeys(("Frobenius, paired", "Frobenius, published", "Frobenius, plain"), "frobenius_norm"),
        **dict.fromkeys(("trace, plain", "trace at h/√3"), "trace"),
        **dict.fromkeys(("determinant, paired", "determinant, published"), "log_determinant"),
    }


def test_pictures_of_toys():
    resting = resting_table(seed=5, copies=2, steps=20, rules=[r for r in RESTING_RULES if r[1].samples <= 8][:3])
    hyperbola = hyperbola_table(seed=5, copies=2, steps=(5, 10))
    drift = drift_rows().assign(signal_to_noise=0.2)
    for figure in (
        toy_pictures.resting_places(resting),
        toy_pictures.hyperbola(hyperbola),
        toy_pictures.drift(drift, statistics.DRIFT),
    ):
        assert 'role="img"' in figure.svg
        assert len(figure.data)
        assert figure.alt
    assert len(hyperbola[hyperbola.flow.notna()]) == 2 * sum(rule.sharpness is not None for rule in HYPERBOLA_RULES)


def test_toys_are_solved_for_each_seed():
    called = []
    solve = solved(lambda seed: called.append(seed) or scale_table(seed, copies=1, steps=2))
    assert solve().seed.unique().tolist() == called == list(SEEDS)


def test_the_page_names_its_parameters_and_types_no_results():
    path = ROOT / "notebooks" / "universal_sam.ipynb"
    names = papermill.inspect_notebook(str(path))
    assert {"profile", "data", "device", "store", "seed", "steps"} <= names.keys()
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    text = "".join("".join(cell["source"]) for cell in cells)
    for key in CLAIMS:
        assert f'judge("{key}"' in text, key


def test_verdicts_survive_a_change_of_data_policy():
    runs = [dataclasses.replace(r, config=r.config.model_copy(update={"data": "auto"})) for r in recorded()]
    assert verdict("own_measure", runs).total == 9
