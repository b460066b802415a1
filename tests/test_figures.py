import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from samlib import Run, RunConfig, figures, published_runs, train
from samlib.claims import CHAPTERS, CLAIMS, SYSTEMS, Evidence, evaluate, of_chapter, verdicts
from samlib.cli import app
from samlib.experiments import EXPERIMENTS

from .conftest import ROOT, small_config
from .test_claims import synthetic


@pytest.fixture(scope="module")
def runs():
    configs = [small_config(rho=rho, seed=seed, eigenvalues=2) for rho in (0.0, 0.1) for seed in (0, 1)]
    return [train(c) for c in configs] + [train(small_config(learning_rate=1000.0, rho=0.0))]


DRAWN = {
    "norms_and_edges": lambda runs: figures.norms_and_edges(runs),
    "norms_and_sam_edge": lambda runs: figures.norms_and_edges(runs, gd=False),
    "alignments": figures.alignments,
    "losses": figures.losses,
    "eigenvalues": figures.eigenvalues,
    "edge_ratios": figures.edge_ratios,
    "headline": lambda runs: figures.headline(runs[-2]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_accessible_themed_and_carries_its_data(name, runs):
    figure = DRAWN[name](runs)
    page = figure._repr_html_()
    label = re.search(r'role="img" aria-label="([^"]+)"', page)
    assert label
    assert len(label[1]) > 40
    assert "currentColor" in page
    assert figures.style.FOREGROUND not in page
    assert figure.name == name
    csv = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    data = pd.read_csv(io.BytesIO(csv))
    assert len(data) == len(figure.data)
    for run in figure.runs:
        assert run.id in page
        assert run.id in set(data.run_id)
    assert "samlib run mnist" in page
    assert "Stand-in data" in page or name == "headline"


def test_the_data_are_the_measurements(runs):
    data = figures.norms_and_edges(runs).data
    for run in runs:
        drawn = data[data.run_id == run.id]
        np.testing.assert_array_equal(drawn.operator_norm, run.measurements.operator_norm)


def test_diverged_runs_are_shown(runs):
    assert "1 of 1 diverged" in figures.losses(runs).svg


def test_the_command_under_a_figure_reproduces_the_run(runs, tmp_path):
    from typer.testing import CliRunner

    run = runs[2]
    arguments = figures.command(run).split()[1:]
    result = CliRunner().invoke(
        app, [*arguments, "--data", "standin", "--device", "cpu", "--store", str(tmp_path / "s")]
    )
    assert run.id in result.output


def test_final_table(runs):
    table = figures.final_table(runs)
    assert list(table["ρ"]) == ["0", "0.1", "0"]
    sam = [run for run in runs if run.config.rho]
    expected = np.mean([run.last.loss for run in sam])
    assert table["training loss"][1].startswith(f"{expected:.4g}")
    assert table["training loss"][2] == "–"
    assert list(table["diverged"]) == [0, 0, 1]


def test_choosing_runs(runs):
    assert figures.standard(runs, "quick") == []
    assert figures.with_spectrum(runs) == runs[:-1]
    assert len(figures.beside([train(small_config(seed=3))])) == 1
    assert "digits" in figures.banner(runs).data
    assert figures.banner([]).data == ""
    with pytest.raises(ValueError, match="no runs to draw"):
        figures.alignments([run for run in runs if not run.config.rho])


def test_a_setting_recorded_on_two_devices_counts_once():
    def run(device, seed):
        config = RunConfig(experiment="mnist", profile="paper", learning_rate=0.3, rho=0.1, seed=seed, device=device)
        return Run(f"{device}{seed}", config, pd.DataFrame(), "finished", {})

    runs = [run("cpu", 0), run("cuda", 0), run("cuda", 1), run("cpu", 2)]
    assert [r.id for r in figures.standard(runs, "paper")] == ["cuda0", "cuda1", "cpu2"]
    runs = [run("cpu", 0), run("cpu", 1), run("cuda", 0)]
    assert [r.id for r in figures.standard(runs, "paper")] == ["cpu0", "cpu1"]
    assert figures.typical(runs) is None
    assert figures.typical(published_runs("mnist")).config.rho == 0.1


def drawn(svg):
    """The numbers of a picture's paths, and its words."""
    page = BeautifulSoup(svg, "html.parser")
    numbers = [float(n) for path in page.select("path[d]") for n in re.findall(r"-?[\d.]+", path["d"])]
    return np.array(numbers), [text.get_text() for text in page.select("text")]


def test_the_picture_of_the_readme_is_that_of_the_published_runs():
    """If not: make picture."""
    run = figures.typical(published_runs("mnist"))
    kept = (ROOT / "book/_static/edge.svg").read_text(encoding="utf-8")
    (numbers, words), (expected, expected_words) = drawn(kept), drawn(figures.standalone(run))
    assert words == expected_words
    np.testing.assert_allclose(numbers, expected, atol=0.01)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"![{figures.seen(run)}](book/_static/edge.svg)" in readme.split("##")[0]


def test_the_picture_of_the_readme_can_be_read_on_light_and_on_dark_pages():
    svg = (ROOT / "book/_static/edge.svg").read_text(encoding="utf-8")

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    used = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", svg))
    assert len(used) == 4
    for colour in used:
        for ground in ("#ffffff", "#0d1117"):  # GitHub's
            dark, light = sorted([luminance(colour), luminance(ground)])
            assert (light + 0.05) / (dark + 0.05) > 3, (colour, ground)


def test_a_list_of_claims_tells_each_verdict_by_word_and_shape(runs):
    results = [evaluate(claim, Evidence(runs if i % 2 else [], {}), "mnist") for i, claim in enumerate(CLAIMS)]
    page = BeautifulSoup(figures.claims(results, "paper").data, "html.parser")
    folds = page.select("details.samlib-fold")
    assert [fold.h3["id"] for fold in folds] == [f"paper-{claim.key}" for claim in CLAIMS]
    for fold, verdict in zip(folds, results, strict=True):
        assert not fold.has_attr("open")
        assert verdict.claim.text == fold.summary.h3.get_text()
        told = fold.summary.get_text(" ", strip=True)
        assert f"{figures.SHOWN[verdict.outcome][0]} {verdict.outcome}" in told
        assert (f"{verdict.supporting} of {verdict.total}" in told) == bool(verdict.total)
        for fact in (verdict.claim.unit, verdict.claim.statistic, verdict.claim.threshold):
            assert fact in fold.dl.get_text()
        assert len(fold.select("figure")) == bool(verdict.total)
    assert any(verdict.total for verdict in results)


def test_every_experiment_and_every_system_has_a_door():
    page = BeautifulSoup(figures.doors(verdicts()).data, "html.parser")
    links = [section.a["href"] for section in page.select("section")]
    names = dict.fromkeys(name for claim in CLAIMS for name in claim.experiments)
    assert links == [f"../notebooks/{name}.html" for name in (*names, *SYSTEMS)]
    assert set(names) <= set(EXPERIMENTS)
    for section in page.select("section"):
        assert len(section.svg["aria-label"]) > 40
        word = section.strong.get_text()
        assert any(word == f"{shape} {outcome}" for outcome, (shape, _) in figures.SHOWN.items())


def test_doors_without_runs_say_so(tmp_path):
    page = figures.doors(verdicts(tmp_path), tmp_path).data
    assert page.count("No picture yet.") == page.count("–</b> not recorded") == 3 + len(SYSTEMS)


def _numbers(words):
    return [float(number) for number in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", words)]


def test_a_mean_is_said_with_its_spread():
    values = np.random.default_rng(0).normal(size=7)
    assert figures.mean_in_words([]) == "–"
    assert figures.mean_in_words([1.2345678]) == "1.235"
    half, error = (values.max() - values.min()) / 2, values.std(ddof=1) / 7**0.5
    assert figures.mean_in_words(values) == f"{values.mean():.4g}\u00a0±\u00a0{half:.2g}"
    assert figures.mean_in_words(values, "+.1f", error=".1f") == f"{values.mean():+.1f}\u00a0±\u00a0{error:.1f}"


def test_words_give_the_numbers_of_the_runs(runs):
    done = [run for run in runs if run.outcome == "finished"]
    sharpness_aware = [run for run in done if run.config.rho > 0]
    plain = [run for run in done if run.config.rho == 0]

    start = [run.last.operator_norm / run.measurements.operator_norm[0] for run in sharpness_aware]
    below = [run.last.operator_norm / run.last.gd_edge for run in sharpness_aware]
    ends = np.mean([run.last.operator_norm / run.last.gd_edge for run in plain])
    found = _numbers(figures.norms_in_words(runs))
    wanted = [
        len(sharpness_aware),
        0,
        *_low_high(start),
        *_low_high(below),
        2,
        0,
        2,
        ends,
        plain[0].config.learning_rate,
    ]
    np.testing.assert_allclose(found, wanted, atol=0.00501)

    halves = [run.measurements[run.measurements.step >= run.measurements.step.max() / 2] for run in sharpness_aware]
    ratios = [half.edge_ratio.median() for half in halves]
    found = _numbers(figures.ratios_in_words(runs).partition(" Once")[0])
    every = pd.concat(halves).edge_ratio
    np.testing.assert_allclose(
        found, [0, np.median(ratios), *_low_high(ratios), every.min(), every.max()], atol=0.00501
    )

    cosines = [np.median([half[c].median() for half in halves]) for c in ("sam_grad_alignment", "grad_alignment")]
    larger = sum(half.sam_grad_alignment.median() > half.grad_alignment.median() for half in halves)
    found = _numbers(figures.alignments_in_words(runs))
    np.testing.assert_allclose(found, [*cosines, larger, len(halves)], atol=0.00501)

    found = _numbers(figures.losses_in_words(runs))
    means = [np.mean([run.last[c] for run in g]) for c in ("loss", "test_metric") for g in (sharpness_aware, plain)]
    np.testing.assert_allclose(found, [0.1, 0, plain[0].config.learning_rate, *means], rtol=0.06)


def test_words_say_how_the_curvature_falls_at_the_edge_beside_a_control():
    start = np.where(np.arange(61) < 12, 20.0, 1.0)
    from_above = synthetic(falling=False, edge_ratio=start, operator_norm=2 * start, eigenvalue_1=2 * start)
    plain = [synthetic(rho=0), synthetic(rho=0, ratio=0.4)]
    at = " Once there, λ falls by a factor of {} in the median to the end of training{}."
    assert figures.ratios_in_words([synthetic(), *plain]).endswith(at.format("4.00", "; without SAM, at 2/η, by 1.00"))
    assert figures.ratios_in_words([from_above]).endswith(at.format("1.00", ""))
    assert "falls" not in figures.ratios_in_words([synthetic(ratio=2.0), *plain])


def _low_high(values):
    return [max(values)] if f"{min(values):.2f}" == f"{max(values):.2f}" else [min(values), max(values)]


def test_words_about_nothing_say_nothing(runs):
    plain = [run for run in runs if run.config.rho == 0]
    assert figures.ratios_in_words(plain) == figures.alignments_in_words(plain) == figures.losses_in_words(plain) == ""
    assert "ρ > 0" not in figures.norms_in_words(plain)
    assert figures.norms_in_words([]) == ""


@pytest.mark.parametrize(("done", "said"), [(2, "Provisional: 2 of 3 runs are recorded."), (3, "")])
def test_a_chapters_claims_say_while_they_are_provisional(done, said, monkeypatch):
    monkeypatch.setattr(figures.verdicts, "recorded", lambda name: (done, 3) if name == "kinks" else None)
    page = BeautifulSoup(figures.chapter(of_chapter("kinks")).data, "html.parser")
    assert page.select_one(".samlib-claims-head > b").text == said
    assert len(page.select("details.samlib-fold")) == len(CHAPTERS["kinks"].claims)


def test_a_wide_table_has_the_pages_width_and_no_index():
    page = BeautifulSoup(figures.wide(pd.DataFrame({"η": [0.3, 1.0]})).to_html(), "html.parser")
    assert "full-width" in page.table["class"]
    assert [cell.text for cell in page.select("th")] == ["η"]
