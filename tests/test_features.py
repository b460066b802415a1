import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from samlib.features import (
    Labelled,
    ProbeSets,
    effective_share,
    example_weights,
    gini,
    lorenz_curve,
    lorenz_deciles,
    probe_features,
    ridge_probe,
)

weights_lists = st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=7)


# --- Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_example_weights_are_one_minus_p_without_cancellation(dtype):
    torch.manual_seed(0)
    logits, labels = (30 * torch.randn(50, 4)).to(dtype), torch.randint(0, 4, (50,))
    labels[:30] = logits[:30].argmax(1)
    found = example_weights(logits, labels)
    with mpmath.workdps(150):
        for row, label, weight in zip(logits.tolist(), labels.tolist(), found.tolist(), strict=True):
            terms = [mpmath.exp(v) for v in row]
            exact = 1 - terms[label] / sum(terms)
            assert abs(weight / exact - 1) < 1e-13
    assert found.min() < 1e-17  # what 1 − p and log p in float64 would call zero


def test_example_weights_are_those_of_the_gradient():
    torch.manual_seed(1)
    logits, labels = torch.randn(6, 5, 3, dtype=torch.float64).requires_grad_(), torch.randint(0, 3, (6, 5))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), logits)
    expected = -gradient.gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(example_weights(logits, labels), expected, rtol=1e-13, atol=0)


def test_labels_that_do_not_fit_the_logits_are_named():
    with pytest.raises(ValueError, match=r"one label per row of logits, got \(3,\) for \(4, 2\)"):
        example_weights(torch.zeros(4, 2), torch.zeros(3, dtype=torch.long))


@given(weights_lists)
def test_gini_and_effective_share_by_their_definitions(weights):
    n, mean = len(weights), sum(weights) / len(weights)
    brute = sum(abs(a - b) for a in weights for b in weights) / (2 * n**2 * mean)
    assert gini(weights) == pytest.approx(brute, abs=1e-13)
    assert effective_share(weights) == pytest.approx(sum(weights) ** 2 / (n * sum(w * w for w in weights)), rel=1e-12)


@given(weights_lists)
def test_the_lorenz_curve_is_the_least_that_any_k_examples_hold(weights):
    total = math.fsum(weights)
    least = [min(math.fsum(c) for c in itertools.combinations(weights, k)) / total for k in range(len(weights) + 1)]
    np.testing.assert_allclose(lorenz_curve(weights), least, atol=1e-14)
    area = np.trapezoid(lorenz_curve(weights), dx=1 / len(weights))
    assert gini(weights) == pytest.approx(1 - 2 * area, abs=1e-13)


@given(weights_lists)
def test_deciles_by_counting(weights):
    tenfold = sorted(weights * 10)  # a tenth of the examples is then a whole number of them
    expected = [math.fsum(tenfold[: k * len(weights)]) / math.fsum(tenfold) for k in range(1, 10)]
    np.testing.assert_allclose(lorenz_deciles(weights), expected, atol=1e-13)
    assert gini(weights * 10) == pytest.approx(gini(weights), abs=1e-13)


def test_the_ends_of_the_scale():
    assert gini([1.0] * 8) == 0
    assert effective_share([1.0] * 8) == 1
    assert gini([1.0] + [0.0] * 7) == 7 / 8
    assert effective_share([1.0] + [0.0] * 7) == 1 / 8
    tiny = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64) * 1e-300
    assert gini(tiny) == 0.3125
    assert effective_share(tiny) == pytest.approx(64 / 88)
    huge = [1e308, 1e308, 2e307]
    assert gini(huge) == pytest.approx(gini([1.0, 1.0, 0.2]))


def test_weights_of_a_diverged_run_give_nan_and_bad_ones_are_refused():
    for undefined in ([np.nan, 1.0], [0.0, 0.0]):
        assert math.isnan(gini(undefined))
        assert math.isnan(effective_share(undefined))
        assert np.isnan(lorenz_deciles(undefined)).all()
    for wrong in ([], [1.0, -1.0]):
        with pytest.raises(ValueError, match="weights must be at least one non-negative number"):
            gini(wrong)


# --- Probes


def noisy(classes, n, d, seed):
    """Features that tell the classes apart, but not well; one of them is constant."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    features = (centres[labels] + 2 * random.normal(size=(n, d))) * random.uniform(0.1, 10, d) + 3
    features[:, 0] = 7
    return torch.as_tensor(features), torch.as_tensor(labels)


def by_normal_equations(fit, strength, new):
    """Error of ridge regression, from its definition."""
    (x, y), (x_new, y_new) = ([t.numpy() for t in pair] for pair in (fit, new))
    classes = y.max() + 1
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1
    x, x_new = (x - mean) / std, (x_new - mean) / std
    targets = 2.0 * (y[:, None] == np.arange(classes)) - 1
    n, d = x.shape
    solution = np.linalg.solve(x.T @ x / n + strength * np.eye(d), x.T @ (targets - targets.mean(0)) / n)
    return float(((x_new @ solution + targets.mean(0)).argmax(1) != y_new).mean())


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("strength", [1e-3, 0.1, 1.0])
def test_a_ridge_probe_solves_the_normal_equations(classes, strength):
    train, test = noisy(classes, 400, 8, 1), noisy(classes, 500, 8, 2)
    probe = ridge_probe(*train, *test, strengths=[strength])
    assert probe.error == by_normal_equations(train, strength, test)
    assert 0.05 < probe.error < 1 - 1 / classes
    assert probe.strength == strength


@pytest.mark.parametrize("seed", range(5))
def test_the_strength_is_chosen_on_a_held_out_quarter_as_by_scikit_learn(seed):
    train, test = noisy(4, 82, 30, 10 + seed), noisy(4, 300, 30, 3)
    strengths = [1e-3, 1e-1, 1.0, 10.0]
    probe = ridge_probe(*train, *test, strengths=strengths, seed=seed)
    held_out = np.random.default_rng(seed).permutation(82)[:20]
    fold = np.full(82, -1)
    fold[held_out] = 0
    search = GridSearchCV(
        make_pipeline(StandardScaler(), RidgeClassifier()),
        {"ridgeclassifier__alpha": [62 * strength for strength in sorted(strengths, reverse=True)]},
        cv=PredefinedSplit(fold),
        refit=False,
    ).fit(*(t.numpy() for t in train))
    assert probe.held_out_error == pytest.approx(1 - search.best_score_)
    assert probe.strength == pytest.approx(search.best_params_["ridgeclassifier__alpha"] / 62)
    assert probe.error == by_normal_equations(train, probe.strength, test)


def test_probes_find_what_features_hold_and_nothing_else():
    torch.manual_seed(0)
    shown, hidden = torch.randint(0, 5, (2, 2000))
    inputs = F.one_hot(shown).float() + 0.1 * torch.randn(2000, 5)
    halves = (
        Labelled(inputs[part], {"shown": shown[part], "hidden": hidden[part]})
        for part in (slice(0, 1000), slice(1000, 2000))
    )
    sets = ProbeSets(*halves)
    calls = []

    def features(x):
        calls.append((len(x), torch.is_grad_enabled()))
        return 3 * x.view(-1, 1, 5) - 1

    probes = probe_features(features, sets, chunk_size=300)
    assert probes["shown"].error == 0
    assert probes["hidden"].error == pytest.approx(0.8, abs=0.05)
    assert calls == [*[(300, False)] * 3, (100, False)] * 2
    direct = ridge_probe(inputs[:1000], hidden[:1000], inputs[1000:], hidden[1000:])
    assert probes["hidden"] == direct


def test_a_probe_is_a_matter_of_its_seed_only():
    train, test = noisy(3, 100, 40, 1), noisy(3, 100, 40, 2)
    state = torch.get_rng_state()
    assert ridge_probe(*train, *test, seed=1) == ridge_probe(*train, *test, seed=1)
    assert len({ridge_probe(*train, *test, seed=s).held_out_error for s in range(10)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_that_cannot_be_probed_are_named():
    x, y = noisy(3, 40, 4, 0)
    with pytest.raises(ValueError, match=r"no labels to probe; name at least one"):
        Labelled(x, {})
    with pytest.raises(ValueError, match=r"label 'digit' must have shape \(40,\), one per example, got \(39,\)"):
        Labelled(x, {"digit": y[1:]})
    with pytest.raises(ValueError, match="must have the same labels, got digit and object"):
        ProbeSets(Labelled(x, {"digit": y}), Labelled(x, {"object": y}))
    one = Labelled(x, {"digit": y, "object": torch.full((40,), 7)})
    with pytest.raises(ValueError, match=r"label 'object' cannot be probed: .* at least two classes .* got \[7\]"):
        probe_features(lambda x: x, ProbeSets(one, one))


def test_bad_requests_of_a_probe_are_named():
    x, y = noisy(2, 40, 4, 0)
    with pytest.raises(ValueError, match=r"strengths must be positive, got \(0\.1, 0\.0\)"):
        ridge_probe(x, y, x, y, strengths=(0.1, 0.0))
    with pytest.raises(ValueError, match=r"strengths must be positive, got \(\)"):
        ridge_probe(x, y, x, y, strengths=())
    with pytest.raises(ValueError, match="features must be finite"):
        ridge_probe(x / 0, y, x, y)
    with pytest.raises(ValueError, match="3 examples are too few to hold out a quarter"):
        ridge_probe(x[:3], torch.tensor([0, 1, 0]), x, y)
