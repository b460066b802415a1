import dataclasses

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from samlib import Run, RunConfig, published_runs
from samlib.claims import CLAIMS, Evidence, agrees_with_record, evaluate, of_experiment, record, table, verdicts
from samlib.cli import app
from samlib.experiments import EXPERIMENTS
from samlib.figures import said, standard
from samlib.runs import publish, published_path

BY_KEY = {claim.key: claim for claim in CLAIMS}
STEPS = np.arange(0, 1501, 25)


def synthetic(rho=0.1, seed=0, ratio=1.0, falling=True, learning_rate=0.3, **columns):
    """A run whose operator norm follows its edge at a given ratio."""
    config = RunConfig(
        experiment="mnist", profile="reduced", learning_rate=learning_rate, rho=rho, seed=seed, device="cpu"
    )
    edge = (
        2 / learning_rate * np.ones(len(STEPS)) if rho == 0 else (3 / (1 + STEPS / 500) if falling else 0 * STEPS + 2)
    )
    rows = {
        "step": STEPS,
        "loss": np.exp(-STEPS / 300),
        "operator_norm": ratio * edge,
        "eigenvalue_1": ratio * edge,
        "gd_edge": 2 / learning_rate,
        "sam_edge": edge,
        "edge_ratio": ratio,
        "grad_alignment": 0.3,
        "sam_grad_alignment": 0.5,
        "test_metric": 0.1,
    }
    about = {"record": 2, "standin": False, "fingerprint": "f", "dataset": "mnist"}
    return Run(config.identity("f"), config, pd.DataFrame({**rows, **columns}), "finished", about)


def verdict(key, runs):
    return evaluate(BY_KEY[key], Evidence(runs, {}), "mnist")


def test_a_run_at_its_edge_whose_curvature_falls_supports_the_claim():
    result = verdict("sam", [synthetic(seed=s) for s in range(3)])
    assert (result.outcome, result.supporting, result.total) == ("reproduced", 3, 3)
    assert result.value == pytest.approx(1)
    assert result.details.slope.to_numpy() == pytest.approx(1)
    assert result.details.fall.to_numpy() == pytest.approx(4)


def test_a_ratio_of_one_without_a_fall_does_not():
    """The 2-cycle on a quadratic: ratio 1, λ fixed."""
    assert verdict("sam", [synthetic(falling=False)]).outcome == "not reproduced"
    assert verdict("sam", [synthetic(ratio=0.5)]).outcome == "not reproduced"
    assert verdict("sam", [synthetic(ratio=1.5)]).outcome == "not reproduced"


def test_a_fall_from_above_the_edge_is_none_at_the_edge():
    """An unstable start: λ comes down to the edge, and stays."""
    start = np.where(STEPS < 300, 20.0, 1.0)
    above = {"edge_ratio": start, "operator_norm": 2 * start, "eigenvalue_1": 2 * start}
    down = synthetic(falling=False, **above)
    assert verdict("sam", [down]).outcome == "reproduced"
    assert verdict("falls", [down]).outcome == "not reproduced"
    assert verdict("falls", [down]).value == pytest.approx(1)
    assert verdict("falls", [down]).details.since_step[0] == 300
    on = verdict("falls", [synthetic()])
    assert (on.outcome, on.value) == ("reproduced", pytest.approx(4))
    assert verdict("falls", [synthetic(ratio=2.0), synthetic(rho=0)]).outcome == "not recorded"


def test_shares_decide():
    good, bad = ([synthetic(seed=s, ratio=r) for s in range(10)] for r in (1.0, 2.0))
    assert verdict("sam", good[:8] + bad[8:]).outcome == "reproduced"
    assert verdict("sam", good[:7] + bad[7:]).outcome == "partly"
    assert verdict("sam", good[:4] + bad[4:]).outcome == "partly"
    assert verdict("sam", good[:3] + bad[3:]).outcome == "not reproduced"


def test_gd_counts_only_runs_that_reach_their_edge():
    result = verdict("gd", [synthetic(rho=0), synthetic(rho=0, seed=1, ratio=0.4), synthetic(rho=0.1)])
    assert (result.outcome, result.total) == ("reproduced", 1)


def test_far_below_is_judged_when_the_loss_has_halved():
    result = verdict("below", [synthetic()])
    edge = 3 / (1 + 225 / 500)  # the first measured step with exp(−t/300) ≤ ½
    assert result.value == pytest.approx((2 / 0.3) / edge)
    assert result.outcome == "reproduced"
    assert verdict("below", [synthetic(learning_rate=1.5)]).outcome == "not reproduced"


def test_alignment_and_test_error():
    assert verdict("alignment", [synthetic()]).value == pytest.approx(0.2)
    assert verdict("alignment", [synthetic(sam_grad_alignment=0.1)]).outcome == "not reproduced"
    runs = [synthetic(test_metric=0.08), synthetic(rho=0, test_metric=0.1)]
    result = verdict("test", runs)
    assert result.value == pytest.approx(0.8)
    assert result.details.loss_ratio_equal_gradients[0] == pytest.approx(np.exp(-750 / 300) / np.exp(-1500 / 300))
    assert verdict("test", runs[:1]).outcome == "not recorded"


def test_diverged_runs_enter_no_statistic():
    assert verdict("sam", [dataclasses.replace(synthetic(), outcome="diverged")]).total == 0


def test_the_interval_covers_the_median_and_widens_with_the_spread():
    runs = [synthetic(seed=s, ratio=1 + 0.05 * s, rho=rho) for s in range(3) for rho in (0.03, 0.1, 0.3)]
    result = verdict("sam", runs)
    assert result.low <= result.value <= result.high
    assert result.low < result.high
    same = verdict("sam", [synthetic(seed=s) for s in range(3)])
    assert same.low == same.high == pytest.approx(1)


def test_command_line_fails_when_the_record_no_longer_matches(tmp_path):
    publish([synthetic(seed=s) for s in range(3)], published_path("mnist", tmp_path))
    folder = ["--published", str(tmp_path)]
    result = CliRunner().invoke(app, ["claims", *folder])
    assert result.exit_code == 1
    assert "do not match" in result.output
    assert CliRunner().invoke(app, ["claims", *folder, "--update"]).exit_code == 0
    result = CliRunner().invoke(app, ["claims", *folder])
    assert result.exit_code == 0
    assert "reproduced" in result.output
    publish([synthetic(seed=s, ratio=2.0) for s in range(3, 9)], published_path("mnist", tmp_path))
    result = CliRunner().invoke(app, ["claims", *folder])
    assert result.exit_code == 1
    assert "sam/mnist/reduced: computed not reproduced" in result.output
    published_path("mnist", tmp_path).write_bytes(b"garbage")
    assert CliRunner().invoke(app, ["claims", *folder]).exit_code == 1


def test_the_recorded_verdicts_are_those_of_the_published_runs():
    results = verdicts()
    assert agrees_with_record(results) == []
    assert len(table(results)) == len(results) >= sum(len(claim.experiments) for claim in CLAIMS)


def test_an_experiments_verdicts_are_those_among_all(tmp_path):
    publish([synthetic(rho=rho, seed=seed) for rho in (0.0, 0.1) for seed in (0, 1)], published_path("mnist", tmp_path))
    everything = verdicts(tmp_path)
    assert [v.claim for v in everything if v.claim in CLAIMS] == [c for c in CLAIMS for _ in c.experiments]
    for name in ("mnist", "shakespeare"):
        found = of_experiment(name, tmp_path)
        assert [v.claim.key for v in found] == [claim.key for claim in CLAIMS if name in claim.experiments]
        among = [v for v in everything if v.experiment == name and v.claim in CLAIMS]
        assert [(v.claim, v.outcome, v.supporting, v.total) for v in found] == [
            (v.claim, v.outcome, v.supporting, v.total) for v in among
        ]


def test_a_verdict_in_a_sentence():
    assert said(verdict("sam", [synthetic(seed=seed) for seed in range(3)])) == "● **reproduced** (3 of 3)"
    assert said(verdict("sam", [synthetic(ratio=2.0)])) == "○ **not reproduced** (0 of 1)"
    assert said(verdict("sam", [])) == "– **not recorded**"


def test_record_round_trip(tmp_path):
    results = verdicts(tmp_path)
    record(results, tmp_path)
    assert agrees_with_record(results, tmp_path) == []


PUBLISHED = [name for name in EXPERIMENTS if published_path(name).exists()]


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_runs_are_whole_real_and_what_they_say(experiment):
    runs = published_runs(experiment)
    assert len({run.id for run in runs}) == len(runs)
    for run in runs:
        assert run.config.experiment == experiment
        assert run.config.identity(run.provenance["fingerprint"], run.record) == run.id
        assert run.provenance["standin"] is False
        assert run.provenance["dataset"] == experiment
        assert {"torch", "device", "seconds", "commit", "gradients"} <= set(run.provenance)
        rows = run.measurements
        assert rows.step.is_monotonic_increasing
        if run.outcome == "finished":
            assert rows.step.iloc[-1] == run.config.steps
            assert np.isfinite(run.last.test_metric)
            rows = rows.drop(columns=["test_metric", *(c for c in rows if c.startswith("eval_"))])
        else:
            rows = rows.iloc[:-1]
            rows = rows[[c for c in rows if rows[c].notna().any()]]
        assert np.isfinite(rows.to_numpy(dtype=float)).all()
        assert (rows.residual <= 1.01 * run.config.tolerance * rows.operator_norm).all()


def test_published_files_are_small():
    assert sum(published_path(name).stat().st_size for name in PUBLISHED) < 10e6


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_the_published_grid_has_no_holes(experiment):
    grid = standard(published_runs(experiment))
    points = {(r.config.learning_rate, r.config.rho, r.config.seed) for r in grid}
    axes = [sorted({point[i] for point in points}) for i in range(3)]
    assert len(points) == np.prod([len(axis) for axis in axes])
    assert 0.0 in axes[1]


def scaled(profile, **point):
    run = synthetic(**point)
    given = {"experiment": "mnist", "learning_rate": run.config.learning_rate, "rho": run.config.rho, "device": "cpu"}
    config = RunConfig(**given, seed=run.config.seed, profile=profile)
    return dataclasses.replace(run, config=config, id=config.identity("f"))


def test_the_paper_profile_speaks_for_an_experiment_once_its_grid_is_whole(tmp_path):
    reduced = [synthetic(rho=rho) for rho in (0.0, 0.1)]
    points = [(rate, rho) for rate in (0.1, 0.2, 0.3) for rho in (0.0, 0.03, 0.1, 0.3)]
    paper = [scaled("paper", learning_rate=rate, rho=rho, ratio=1.0 if rho == 0 else 3.0) for rate, rho in points]
    path = published_path("mnist", tmp_path)

    publish([*reduced, *paper[:-1]], path)
    found = [v for v in verdicts(tmp_path) if v.claim.key == "sam" and v.experiment == "mnist"]
    assert [(v.profile, v.leading, v.outcome) for v in found] == [
        ("reduced", True, "reproduced"),
        ("paper", False, "not reproduced"),
    ]
    publish(paper[-1:], path)
    found = [v for v in verdicts(tmp_path) if v.claim.key == "sam" and v.experiment == "mnist"]
    assert [(v.profile, v.leading, v.total) for v in found] == [("paper", True, 9), ("reduced", False, 1)]
