"""The network that trains in the reader's browser: against samlib, and as a reader meets it.

Like those of ``test_site``, these tests look at the site that ``make book`` leaves.
"""

import re

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from samlib import MLP, Objective, gd_edge, momentum_edge, sam_edge, top_eigenpairs
from samlib.experiments import mean_squared_error
from samlib.hessian import HessianOperator
from samlib.objective import flatten_parameters
from samlib.optim import EPSILON, gd_step, sam_step
from samlib.site.live import EXAMPLES, digits, stage_live

from .conftest import needs_site

STEPS, RHO, MOMENTUM = 50, 0.1, 0.9
SETTINGS = {"gd": 1.0, "sam": 1.0, "momentum": 0.5}  # rules and learning rates; SAM passes its edge within 50 steps
STILL = {"reduced_motion": "reduce"}  # the page then waits for the reader


def test_the_digits_are_scikit_learns():
    images, labels = load_digits(return_X_y=True)
    lines = digits().split("\n")
    assert [int(line[0]) for line in lines] == labels[:EXAMPLES].tolist()
    assert [[int(pixel, 17) for pixel in line[1:]] for line in lines] == images[:EXAMPLES].tolist()


def test_a_book_without_the_page_is_left_as_it_is(tmp_path):
    stage_live(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def network():
    """The page's network and its loss, in float64: the objective, and random weights to begin with."""
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images[:EXAMPLES]) / 16
    y = torch.nn.functional.one_hot(torch.as_tensor(labels[:EXAMPLES])).double()
    torch.manual_seed(0)
    model = MLP(64, widths=(32,), activation="tanh").double()
    return Objective(model, mean_squared_error, x - x.mean(0), y), flatten_parameters(model)


def trained(network, rule):
    """Step by step loss, ‖g‖, λ_max and edge by samlib."""
    objective, w = network
    rate, velocity, model, rows = SETTINGS[rule], torch.zeros_like(w), None, []
    for _ in range(STEPS):
        loss, g = objective.value_and_gradient(w)
        norm = float(g.norm())
        top = top_eigenpairs(HessianOperator(objective, w), tol=1e-7, v0=model)
        model = top.model
        if rule == "sam":
            edge = sam_edge(norm + EPSILON, rate, RHO)
            w = sam_step(objective.gradient, w, rate, RHO)
        elif rule == "gd":
            edge = gd_edge(rate)
            w = gd_step(objective.gradient, w, rate)
        else:
            edge = momentum_edge(rate, MOMENTUM)
            velocity = MOMENTUM * velocity + g
            w = w - rate * velocity
        rows.append((float(loss), norm, float(top.values[0]), edge))
    return np.array(rows).T


@needs_site
@pytest.mark.parametrize(("rule", "tolerance"), [("gd", 1e-3), ("sam", 1e-3), ("sam", 1e-6), ("momentum", 1e-3)])
def test_its_steps_and_sharpness_are_samlibs(visit, server, network, rule, tolerance):
    page = visit(f"{server}/book/live.html", **STILL)
    rows = page.evaluate(
        "options => samlibLive.train(options)",
        {"rule": rule, "learningRate": SETTINGS[rule], "rho": RHO, "steps": STEPS, "tolerance": tolerance}
        | {"weights": network[1].tolist()},
    )
    loss, norm, sharpness, edge = trained(network, rule)
    assert [row["step"] for row in rows] == list(range(STEPS))
    np.testing.assert_allclose([row["loss"] for row in rows], loss, rtol=1e-9)
    np.testing.assert_allclose([row["gradNorm"] for row in rows], norm, rtol=1e-9)
    np.testing.assert_allclose([row["edge"] for row in rows], edge, rtol=1e-9)
    np.testing.assert_allclose([row["sharpness"] for row in rows], sharpness, rtol=1e-4)
    assert max(row["residual"] / row["sharpness"] for row in rows) <= tolerance
    if rule == "sam":  # the comparison covers the edge
        assert sharpness[0] < edge[0]
        assert (sharpness > edge).any()


@needs_site
def test_a_seed_decides_the_path(visit, server):
    page = visit(f"{server}/book/live.html", **STILL)
    first, again, other = (
        page.evaluate("seed => samlibLive.train({ rule: 'gd', learningRate: 1, seed, steps: 3 })", seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert [row["loss"] for row in first] != [row["loss"] for row in other]


def wait(page, condition):
    page.wait_for_function(f"(({{ state, steps, running }}) => {condition})(document.getElementById('live').dataset)")


@needs_site
def test_it_trains_once_it_is_seen_and_can_be_paused_and_restarted(visit, origin):
    page = visit(f"{origin}/book/live.html")
    run = page.locator("#live button[name=run]")
    wait(page, "steps >= 20")  # so many that a restart is seen
    run.focus()
    page.keyboard.press("Enter")
    wait(page, "running === 'false'")
    assert run.inner_text() == "Continue"
    assert page.locator("#live-state").inner_text().startswith("Paused at step")
    curves = page.locator("#live-curvature polyline[data-key]")
    assert [curve.get_attribute("data-key") for curve in curves.all()] == ["sharpness", "gdEdge", "edge"]
    steps = int(page.locator("#live").get_attribute("data-steps"))
    page.keyboard.press("Enter")
    wait(page, f"steps > {steps}")
    page.locator("#live button[name=restart]").click()
    wait(page, f"steps > 0 && steps <= {steps}")
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith((f"{origin}/", "data:", "blob:"))] == []


@needs_site
def test_readers_who_prefer_little_motion_start_it_themselves(visit, server):
    page = visit(f"{server}/book/live.html", **STILL)
    wait(page, "state === 'waiting'")
    assert page.locator("#live-state").inner_text() == "Press Start to train."
    assert page.workers == []
    page.locator("#live button[name=run]").click()
    wait(page, "steps >= 1")
    assert len(page.workers) == 1


@needs_site
def test_its_link_holds_the_settings(visit, origin):
    page = visit(f"{origin}/book/live.html#momentum/0.5/0.2/7")
    link = page.locator("#live-link")
    assert link.get_attribute("href") == "#momentum/0.5/0.2/7"
    assert page.locator("#live input[name=rho]").is_disabled()
    page.locator("#live select[name=rule]").select_option("sam")
    for name in ("learningRate", "rho"):
        page.locator(f"#live input[name={name}]").focus()
        page.keyboard.press("ArrowRight")
    assert link.get_attribute("href") == "#sam/0.55/0.22/7"
    assert page.url.endswith("#sam/0.55/0.22/7")
    assert page.locator("#live input[name=rho]").get_attribute("aria-valuetext") == "0.22"
    again = visit(page.url)
    assert again.locator("#live-link").get_attribute("href") == "#sam/0.55/0.22/7"
    assert again.locator("#live output").all_inner_texts() == ["0.55", "0.22"]


@needs_site
def test_the_edges_move_while_it_trains(visit, server):
    page = visit(f"{server}/book/live.html#sam/1/0.1/0")
    wait(page, "steps >= 2")
    page.locator("#live input[name=learningRate]").focus()
    page.keyboard.press("ArrowLeft")
    heights = """() => new Set(document.querySelector("polyline[data-key=gdEdge]").getAttribute("points").split(" ")
        .map(point => point.split(",")[1])).size"""
    page.wait_for_function(f"({heights})() === 2")  # before the key and after it


@needs_site
def test_the_edges_move_while_it_rests(visit, server):
    page = visit(f"{server}/book/live.html#sam/1/0.1/0")
    wait(page, "steps >= 2")
    page.locator("#live button[name=run]").click()
    wait(page, "running === 'false'")
    steps = int(page.locator("#live").get_attribute("data-steps"))
    numbers = page.locator("#live-numbers")
    shown = numbers.inner_text()
    page.locator("#live input[name=rho]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("shown => document.getElementById('live-numbers').innerText !== shown", arg=shown)
    before, after = (dict(zip(*[iter(text.split("\n"))] * 2, strict=True)) for text in (shown, numbers.inner_text()))
    assert {name for name in before if before[name] != after[name]} == {"SAM edge", "ratio of the two"}
    assert float(after["SAM edge"]) < float(before["SAM edge"])
    assert int(page.locator("#live").get_attribute("data-steps")) == steps


@needs_site
def test_diverging_is_said_and_drawn(visit, server):
    page = visit(f"{server}/book/live.html#gd/7/0.1/0")
    wait(page, "state === 'diverged'")
    text = page.locator("#live-state").inner_text()
    assert re.match(r"Diverged at step \d+: the loss has passed a million\. The sharpness was above the GD edge", text)
    for name in ("curvature", "loss"):
        assert "diverged at step" in page.locator(f"#live-{name}").text_content()
    assert page.locator("#live button[name=run]").is_disabled()
    assert page.errors == []


@needs_site
@pytest.mark.parametrize("width", [1280, 390])
def test_its_text_is_drawn_large_enough_and_nothing_is_cut_off(visit, server, width):
    page = visit(f"{server}/book/live.html", width=width)
    wait(page, "steps >= 2")
    sizes = """[...document.querySelectorAll('#live svg text')].map(text => {
        const scale = text.getScreenCTM().a, own = text.getBoundingClientRect();
        const frame = text.ownerSVGElement.getBoundingClientRect();
        return [parseFloat(getComputedStyle(text).fontSize) * scale, own.left - frame.left, frame.right - own.right];
    })"""
    size, left, right = np.array(page.evaluate(sizes)).T.tolist()
    assert min(size) >= 11
    assert min(left) >= 0
    assert min(right) >= 0
