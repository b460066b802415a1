"""The built website in a real browser: what a reader would trip over, on every page.

``make book`` leaves the site in ``_build/html``; these tests leave pictures of its pages in ``_build/screenshots``.
"""

import math

import pytest
from bs4 import BeautifulSoup

from samlib.figures import SHOWN

from .conftest import ROOT, SITE, needs_site

SHOTS = ROOT / "_build" / "screenshots"
pytestmark = needs_site
PAGES = [
    "search.html",
    *sorted(str(p.relative_to(SITE)) for f in ("book", "notebooks") for p in (SITE / f).glob("*.html")),
]
MEGABYTE = 2**20


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_with_its_mathematics_and_asks_no_other_host(visit, origin, name):
    page = visit(f"{origin}/{name}")
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith((f"{origin}/", "data:", "blob:"))] == []
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []

    unset = "[...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-math')).map(m => m.textContent)"
    assert page.evaluate(unset) == []
    assert page.locator("mjx-merror").count() == 0
    prose = """(() => {
        const copy = document.querySelector("main").cloneNode(true);
        copy.querySelectorAll("pre, code, script, style").forEach(e => e.remove());
        return copy.textContent;
    })()"""
    text = page.evaluate(prose)
    assert [sign for sign in ("\\(", "\\[", "\\frac", "\\lambda", "\\eta", "$$", "{math}") if sign in text] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_accessible_in_both_themes(visit, server, name, theme):
    page = visit(f"{server}/{name}", theme=theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    shot(page, name, theme)
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    serious = {
        v["id"]: [node["html"][:200] for node in v["nodes"]]
        for v in violations
        if v["impact"] in ("serious", "critical")
    }
    assert serious == {}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(visit, server, name):
    page = visit(f"{server}/{name}", width=390)
    shot(page, name, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


LEAST_TEXT = 11  # pixels, as drawn
SMALL_TEXT = """least => [...document.querySelectorAll("main svg[role=img] text")]
    .filter(text => text.textContent.trim() && text.getClientRects().length)
    .map(text => {
        const matrix = text.getScreenCTM();
        const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b);
        return [text.closest("svg[role=img]").getAttribute("aria-label")?.slice(0, 60), text.textContent, size];
    })
    .filter(([, , size]) => size < least)"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_the_text_in_every_figure_is_large_enough(visit, server, name, width):
    assert visit(f"{server}/{name}", width=width).evaluate(SMALL_TEXT, LEAST_TEXT) == []


@pytest.mark.parametrize("name", PAGES)
def test_no_figure_scrolls_on_a_desktop(visit, server, name):
    wider = """[...document.querySelectorAll("main .samlib-figure > div:has(svg[role=img])")]
        .filter(e => e.scrollWidth > e.clientWidth)
        .map(e => e.querySelector("svg").getAttribute("aria-label"))"""
    assert visit(f"{server}/{name}").evaluate(wider) == []


@pytest.fixture
def claims(visit, server):
    """Open the page of the claims, at one of them if given."""
    return lambda place="", **settings: visit(f"{server}/book/claims.html{place}", **settings)


def test_all_claims_are_seen_within_four_screens(claims):
    assert claims().evaluate("document.documentElement.scrollHeight") < 4000


def test_no_verdict_is_told_by_colour_alone(claims):
    told = claims().locator(".samlib-standing:has(b)").all_inner_texts()
    assert len(told) > 40
    shown = [f"{shape} {word}" for word, (shape, _) in SHOWN.items()]
    assert [text for text in told if not any(each in text.replace("\n", " ") for each in shown)] == []


def test_a_claim_opens_by_keyboard_by_link_and_for_print(claims):
    page = claims()
    fold = page.locator("details.samlib-fold").first
    assert fold.get_attribute("open") is None
    fold.locator("> summary").focus()
    page.keyboard.press("Enter")
    assert fold.locator("figure").first.is_visible()
    assert page.errors == []

    name = page.locator("details.samlib-fold h3").nth(3).get_attribute("id")
    linked = claims(f"#{name}")
    assert linked.locator("details.samlib-fold[open] h3").evaluate_all("all => all.map(h => h.id)") == [name]

    open_folds = "document.querySelectorAll('details.samlib-fold[open]').length"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(open_folds) == page.locator("details.samlib-fold").count()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(open_folds) == 1


def test_the_first_page_shows_and_links_every_system(visit, server):
    page = visit(f"{server}/book/index.html")
    doors = page.locator(".samlib-doors > section")
    assert doors.count() == 7
    wide = [box["x"] for box in (door.bounding_box() for door in doors.all())]
    assert len(set(wide)) > 2
    page.set_viewport_size({"width": 390, "height": 900})
    assert len({door.bounding_box()["x"] for door in doors.all()}) == 1  # one below the other
    doors.first.locator("h3 a").click()
    page.wait_for_url("**/notebooks/mnist.html")


def test_the_address_of_the_site_leads_to_its_first_page(visit, origin):
    page = visit(f"{origin}/index.html")
    page.wait_for_url("**/book/index.html")
    assert page.errors == []


def test_the_address_of_the_site_is_announced_as_its_first_page_and_asks_for_no_icon():
    texts = [(SITE / name).read_text(encoding="utf-8") for name in ("index.html", "book/index.html")]
    front, first = (BeautifulSoup(text, "html.parser") for text in texts)
    assert front.select_one("link[rel=icon]")["href"].startswith("data:")  # else browsers ask for /favicon.ico
    assert front.title == first.title
    cards = [page.select("meta[property^='og:']") for page in (front, first)]
    assert cards[0]
    assert cards[0] == cards[1]


def test_the_site_and_its_pages_are_light():
    assert sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file()) < 25 * MEGABYTE
    assert [name for name in PAGES if (SITE / name).stat().st_size > 3 * MEGABYTE] == []


def test_every_slider_of_the_laboratory_redraws_it(visit, origin):
    page = visit(f"{origin}/book/laboratory.html")
    curve, edge = page.locator("#lab-curve"), page.locator("#lab-edge")
    sliders = page.locator("#lab input[type=range]")
    assert sliders.count() == 4
    for i, slider in enumerate(sliders.all()):
        before = (
            curve.get_attribute("points"),
            edge.get_attribute("points"),
            page.locator("#lab output").nth(i).inner_text(),
        )
        slider.focus()
        for _ in range(10):
            page.keyboard.press("ArrowLeft")
        after = (
            curve.get_attribute("points"),
            edge.get_attribute("points"),
            page.locator("#lab output").nth(i).inner_text(),
        )
        assert after[0] != before[0] or slider.get_attribute("name") == "norm"
        assert (after[1] != before[1]) == (slider.get_attribute("name") in ("eta", "rho"))
        assert after[2] != before[2]


def test_the_laboratory_tells_the_three_outcomes_apart(visit, server):
    page = visit(f"{server}/book/laboratory.html")
    lab, state = page.locator("#lab"), page.locator("#lab-state")

    def press(name, key):
        page.locator(f"#lab input[name={name}]").focus()
        page.keyboard.press(key)

    assert lab.get_attribute("data-outcome") == "cycles"
    assert "2-cycle" in state.inner_text()
    press("lambda", "End")  # 2/η = 20 lies below the largest curvature
    assert lab.get_attribute("data-outcome") == "blows up"
    assert "above 2/η = 20" in state.inner_text()
    press("lambda", "Home")
    press("rho", "Home")
    assert lab.get_attribute("data-outcome") == "converges"


def test_the_laboratory_steps_by_the_rule_that_is_chosen(visit, server):
    page = visit(f"{server}/book/laboratory.html")
    lab, state = page.locator("#lab"), page.locator("#lab-state")
    for rule, limit in (("heavy", "3.8/η = 38"), ("nesterov", "1.36/η = 13.6"), ("usam", "2/η = 20")):
        page.locator("#lab select").select_option(rule)
        page.locator("#lab input[name=lambda]").fill("2.3")
        assert lab.get_attribute("data-outcome") == "blows up"
        assert f"above {limit}" in state.inner_text()
    points = page.locator("#lab-edge").get_attribute("points").split()
    level = {point.split(",")[1] for point in points}
    assert len(level) == 1  # unnormalised SAM's edge is the same for every gradient norm
    page.locator("#lab input[name=lambda]").fill("0")
    assert lab.get_attribute("data-outcome") == "converges"


def test_the_noise_of_small_batches_blows_up_what_full_batches_do_not(visit, server):
    page = visit(f"{server}/book/laboratory.html")
    noise, curve = page.locator("#noise"), page.locator("#noise-curve")

    def choose(rate, batch):
        for name, value in (("x", rate), ("batch", batch)):
            page.locator(f"#noise input[name={name}]").fill(f"{math.log10(value):.2f}")
        return noise.get_attribute("data-outcome")

    assert choose(0.2, 100) == "converges"
    assert choose(0.2, 50) == "converges"  # 2B/N = 1
    assert choose(0.2, 5) == "noise"  # 0.1
    assert choose(2.2, 100) == "blows up"
    assert choose(0.05, 5) == "converges"
    before = curve.get_attribute("points")
    page.locator("#noise input[name=seed]").fill("7")
    assert curve.get_attribute("points") != before


@pytest.fixture
def explorer(visit, origin):
    """Open the explorer at a place of its own address (what stands after #), with its charts drawn."""

    def open_at(place="", **settings):
        page = visit(f"{origin}/book/explorer.html{place}", **settings)
        page.wait_for_function(DRAWN, arg=0)
        return page

    return open_at


DRAWN = "after => +(document.getElementById('explorer').dataset.drawn ?? 0) > after"


def redrawn(page, act):
    """Do something to the explorer, wait until its charts are drawn anew, and return what it says of itself."""
    before = chosen(page)["drawn"]
    act()
    page.wait_for_function(DRAWN, arg=int(before))
    return chosen(page)


def chosen(page):
    return page.evaluate("({ ...document.getElementById('explorer').dataset })")


def curves(page):
    """What is drawn: the data of the curves, and the curves themselves."""
    values = "samlibExplorer.view.data('points').filter(p => p.quantity === 'operator_norm').map(p => p.value)"
    paths = "[...document.querySelectorAll('#explorer-chart .mark-line path')].map(path => path.getAttribute('d'))"
    return page.evaluate(values), page.evaluate(paths)


def test_choosing_another_run_draws_its_curves(explorer):
    page = explorer()
    for name in ("rho", "learning_rate"):
        select = page.locator(f"#explorer select[name={name}]")
        before, (values, paths) = chosen(page), curves(page)
        other = next(v for v in select.evaluate("s => [...s.options].map(o => o.value)") if v != select.input_value())
        after = redrawn(page, lambda select=select, other=other: select.select_option(other))
        assert after["rho" if name == "rho" else "learningRate"] == other
        assert set(after["runs"].split(",")).isdisjoint(before["runs"].split(","))
        assert curves(page)[0] != values
        assert curves(page)[1] != paths
    assert page.errors == []


def test_leaving_a_seed_out_and_linear_scales(explorer):
    page = explorer()
    values, paths = curves(page)
    after = redrawn(page, lambda: page.locator("#explorer input[name=log]").uncheck())
    assert after["scale"] == "linear"
    assert curves(page)[0] == values
    assert curves(page)[1] != paths
    seeds = chosen(page)["seeds"].split(",")
    after = redrawn(page, lambda: page.locator("#explorer input[name=seed]").first.uncheck())
    assert after["seeds"].split(",") == seeds[1:]
    assert len(curves(page)[0]) < len(values)
    assert page.url.endswith(f"/{after['seeds']}")


def test_a_click_on_the_map_chooses_the_run(explorer):
    page = explorer()
    before, values = chosen(page), curves(page)[0]
    cell = "samlibExplorer.overview.data('cells').findIndex(c => c.runs && !c.selected)"
    numbers = page.locator("#explorer-overview .mark-text text")  # in the middle of the tiles, where one clicks
    after = redrawn(page, lambda: numbers.nth(page.evaluate(cell)).click())
    assert (after["learningRate"], after["rho"]) != (before["learningRate"], before["rho"])
    assert curves(page)[0] != values


def test_a_link_leads_to_one_run(explorer):
    first = explorer()
    runs = first.evaluate("samlibExplorer.load('mnist').then(runs => runs.mnist)")
    run = next(r for r in runs if r["id"] not in chosen(first)["runs"])
    page = explorer(f"#mnist/{run['learning_rate']}/{run['rho']}/{run['seed']}")
    assert chosen(page)["runs"] == run["id"]
    drawn = [value for value in run["operator_norm"] if value is not None]
    assert curves(page)[0] == drawn


def test_the_values_at_a_step_follow_the_keyboard(explorer):
    page = explorer()
    table, step = page.locator("#explorer tbody"), page.locator("#explorer .samlib-explorer-step output")
    values, before = table.inner_text(), int(step.inner_text())
    page.locator("#explorer input[name=at]").focus()
    page.keyboard.press("ArrowRight")
    assert int(step.inner_text()) > before
    assert table.inner_text() != values


def test_the_explorer_follows_the_theme(explorer):
    page = explorer()
    ink = "getComputedStyle(document.querySelector('#explorer-chart .role-axis-label text')).fill"
    light = page.evaluate(ink)
    switch = page.locator(".theme-switch-button").locator("visible=true")
    for _ in range(3):  # from the system's theme to light to dark
        if page.evaluate("document.documentElement.dataset.theme") != "dark":
            switch.click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(ink) != light


def shot(page, name, kind):
    SHOTS.mkdir(parents=True, exist_ok=True)
    stem = name.removesuffix(".html").replace("/", "-")
    page.screenshot(path=SHOTS / f"{stem}-{kind}.png", full_page=True, animations="disabled")
