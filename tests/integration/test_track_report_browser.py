"""SAE-Track's report in headless Chromium, at F = 1,024 x 12 and 65,536 x 30: no console error, no request beyond the file itself; hover, click, sorting,
filtering, links to features and axes work. And the comparison of several runs.

Chromium is looked for on PATH. STAGEDIFF_INTEGRATION=0 switches these tests off; a missing browser is a failure, not a skip.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from track import fake_tables

from stagediff.store import Store

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.environ.get("STAGEDIFF_INTEGRATION") == "0", reason="STAGEDIFF_INTEGRATION=0"),
]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
MOST_BYTES = 40 * 2**20
SIZES = [(1024, 12), (65_536, 30)]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail(
            f"The report's browser tests need Chromium on PATH (one of {', '.join(BROWSERS)}): apt-get install chromium. "
            "STAGEDIFF_INTEGRATION=0 leaves them out."
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=SIZES, ids=[f"{f}x{t}" for f, t in SIZES])
def run(request, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("track")
    features, checkpoints = request.param
    made = fake_tables.write_track(Store(str(folder / "store")), features, checkpoints)
    file = folder / "index.html"
    file.write_text(fake_tables.page_of(made), encoding="utf-8")
    return SimpleNamespace(features=features, checkpoints=checkpoints, lives=made.lives, file=file, words=made.words)


class Opened:
    """A page with everything it said and asked for."""

    def __init__(self, browser, file: Path, hash: str = "", ready: str = "#track-table tbody tr", **options):
        self.context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 900}), **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.messages.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.messages.append(f"error: {e}"))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.url = file.as_uri()
        self.page.goto(self.url + hash)
        self.page.wait_for_selector(ready)
        self.page.wait_for_timeout(150)

    def is_quiet(self) -> bool:
        assert self.messages == []
        assert [r for r in self.requests if not r.startswith(self.url)] == []
        assert self.page.evaluate("window.hacked") is None
        return True

    def column(self, title: str) -> list[str]:
        heads = self.page.locator("#track-table thead button").all_inner_texts()
        return self.page.locator(f"#track-table tbody td:nth-child({heads.index(title) + 1})").all_inner_texts()

    def status(self) -> str:
        return self.page.locator("#track-table .pager [role=status]").inner_text()

    def life(self) -> str:
        return self.page.locator("#life h3").inner_text()

    def hover(self, chart: str, k: int) -> str:
        """The tip of a chart at its k-th position."""
        self.page.evaluate(f"stagediff.track.charts['{chart}'].mount.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        self.page.wait_for_timeout(120)
        x, y = self.page.evaluate(f"stagediff.track.charts['{chart}'].at({k})")
        self.page.mouse.move(x, y)
        tip = self.page.locator(f"#{chart} .chart-tip")
        tip.wait_for(state="visible")
        return tip.inner_text()

    def picture(self, chart: str) -> bytes:
        self.page.wait_for_timeout(150)
        return self.page.locator(f"#{chart} canvas").screenshot()


@pytest.fixture
def opened(browser, run) -> Iterator[Opened]:
    page = Opened(browser, run.file)
    yield page
    page.context.close()


def numbers(texts: list[str]) -> list[float]:
    return [float(t.split()[0].replace("−", "-").replace(",", "")) for t in texts]


def alive(run) -> np.ndarray:
    return np.flatnonzero(run.lives.kind[:, -1] != 3)


def test_it_opens_without_errors_or_requests_within_its_size(opened, run):
    assert run.file.stat().st_size < MOST_BYTES
    opened.page.mouse.wheel(0, 20_000)
    opened.page.wait_for_timeout(300)
    charts = opened.page.locator(".chart canvas")
    assert charts.count() > 30
    assert all(w > 100 for w in opened.page.evaluate("Array.from(document.querySelectorAll('.chart canvas')).map(c => c.width)"))
    assert opened.is_quiet()


def test_the_scripts_curves_are_the_tables(opened, run):
    some = [int(i) for i in alive(run)[[0, 7, -1]]]
    coarse = run.features * run.checkpoints > 400_000
    for i in some:
        m = np.array(opened.page.evaluate(f"stagediff.track.curve({i}, 'm')"), float)
        np.testing.assert_allclose(m, run.lives.m[i], atol=6e-3 if coarse else 1e-4)
        cos = np.array(opened.page.evaluate(f"stagediff.track.curve({i}, 'cos_final')"), float)
        np.testing.assert_allclose(cos, run.lives.decoder[i] @ run.lives.decoder[i, -1], atol=7e-3 if coarse else 1e-4)
        said = opened.page.evaluate(f"stagediff.track.tokens({i})")
        want = [None if k == 3 else run.words[t] for k, t in zip(run.lives.kind[i], run.lives.token[i], strict=True)]
        assert said == want


def test_hover_tells_the_shares_at_a_checkpoint(opened, run):
    for k in (0, run.checkpoints - 1):
        text = opened.hover("shares", k)
        assert f"step {run.lives.steps[k]:,}" in text
        dead = int((run.lives.kind[:, k] == 3).sum())
        assert f"{dead:,} ·" in text
    assert opened.is_quiet()


def test_charts_can_be_read_with_the_keyboard(opened, run):
    canvas = opened.page.locator("#formed canvas")
    canvas.focus()
    for _ in range(3):
        opened.page.keyboard.press("ArrowRight")
    assert f"step {run.lives.steps[2]:,}" in opened.page.locator("#formed .chart-tip").inner_text()
    opened.page.keyboard.press("Escape")
    assert not opened.page.locator("#formed .chart-tip").is_visible()


def test_the_axis_is_switched_everywhere_at_once(opened):
    before = {c: opened.picture(c) for c in ("shares", "progress", "cosines")}
    opened.page.locator("select.track-axis").first.select_option("log_step")
    opened.page.wait_for_timeout(200)
    assert set(opened.page.locator("select.track-axis").evaluate_all("s => s.map(e => e.value)")) == {"log_step"}
    assert all(opened.picture(c) != before[c] for c in before)
    opened.page.locator("select.track-axis").last.select_option("step")
    assert opened.picture("shares") != before["shares"]
    assert opened.is_quiet()


def test_patterns_and_measures_can_be_switched(opened):
    before = opened.picture("patterns")
    opened.page.locator("#patterns-legend button", has_text="maintaining").click()
    assert opened.picture("patterns") != before
    before = opened.picture("progress")
    opened.page.locator("#progress-measure").select_option("feature_jaccard")
    assert opened.picture("progress") != before
    opened.page.locator("#progress-set").select_option("levels")
    assert opened.is_quiet()


def test_a_click_in_the_heat_map_chooses_the_histogram(opened, run):
    opened.hover("heat", 1)
    before = opened.picture("histogram")
    x, y = opened.page.evaluate(
        "stagediff.track.charts.heat.mount.scrollIntoView({block: 'center', behavior: 'instant'}), stagediff.track.charts.heat.at(1)"
    )
    opened.page.mouse.click(x, y)
    assert opened.page.locator("#histogram-said").inner_text() == f"step {run.lives.steps[1]:,}"
    assert opened.picture("histogram") != before
    opened.page.locator("#histogram-against").select_option("previous")
    assert opened.is_quiet()


def test_the_table_sorts_by_every_head(opened, run):
    last = run.lives.m[:, -1]
    best = alive(run)[np.argsort(-last[alive(run)])]
    got = [int(i) for i in opened.column("Feature")]
    np.testing.assert_allclose(last[got], last[best[: len(got)]], atol=2e-3)
    for title in ("Drift", "Density", "Norm", "Final M"):
        for _ in range(2):
            opened.page.locator("#track-table thead button", has_text=title).click()
            values = numbers(opened.column(title))
            direction = opened.page.locator("#track-table th[aria-sort]").get_attribute("aria-sort")
            assert values == sorted(values, reverse=direction == "descending")
    opened.page.locator("#track-table thead button", has_text="Formed").click()
    steps = [v for v in opened.column("Formed at step") if v != "–"]
    assert numbers(steps) == sorted(numbers(steps))
    assert opened.is_quiet()


def test_the_filters_find_kinds_patterns_tokens_and_conditions(opened, run):
    page, lives = opened.page, run.lives
    page.locator("#track-kind").select_option("concept")
    few = (np.arange(lives.kind.size) % 997 == 3).reshape(lives.kind.shape)[:, -1]  # without a kind: too few examples
    want = int(((lives.kind[:, -1] == 1) & ~few).sum())
    assert opened.status().endswith(f"of {want:,}")
    page.locator("#track-kind").select_option("")
    page.locator("#track-pattern").select_option("token_to_concept")
    a, b = lives.kind[:, :-1], lives.kind[:, 1:]
    want = int(((a == 0) & (b == 1)).any(1)[alive(run)].sum())
    assert opened.status().endswith(f"of {want:,}")
    page.locator("#track-pattern").select_option("")
    page.locator("#track-filter").fill("final_m>0.8 formed<20")
    page.wait_for_timeout(500)
    assert all(v > 0.8 for v in numbers(opened.column("Final M")))
    assert all(v < 20 for v in numbers(opened.column("Formed at step")))
    page.locator("#track-filter").fill("_name")
    page.wait_for_timeout(2500)
    assert page.locator("#track-table tbody tr").count() > 0
    page.locator("#track-filter").fill("nosuch>3")
    page.wait_for_timeout(500)
    assert "No measure is named nosuch" in page.locator("#track-said").inner_text()
    page.locator("#track-filter").fill("")
    page.locator("#track-scope").select_option("all")
    page.wait_for_timeout(500)
    assert opened.status().endswith(f"of {run.features:,}")
    assert opened.is_quiet()


def test_a_row_opens_the_features_life_under_its_own_address(opened):
    chosen = int(opened.column("Feature")[2])
    opened.page.locator("#track-table tbody tr").nth(2).locator("td").nth(4).click()
    opened.page.wait_for_timeout(300)
    assert opened.life() == f"Feature {chosen:,}"
    assert opened.page.evaluate("location.hash") == f"#feature-{chosen}"
    other = int(opened.column("Feature")[3])
    opened.page.locator("#life-next").click()
    opened.page.wait_for_timeout(300)
    assert opened.life() == f"Feature {other:,}"
    opened.page.go_back()
    opened.page.wait_for_timeout(300)
    assert opened.life() == f"Feature {chosen:,}"
    assert opened.is_quiet()


def test_a_link_to_a_feature_opens_it_and_every_feature_has_a_view(browser, run):
    for feature in (0, run.features // 2, run.features - 1):
        page = Opened(browser, run.file, hash=f"#feature-{feature}")
        assert page.life() == f"Feature {feature:,}"
        top = page.page.evaluate("document.getElementById('life').getBoundingClientRect().top")
        assert -5 < top < 500
        if run.lives.kind[feature, -1] != 3:
            assert page.page.locator("#life .strip .run").count() > 1
            assert page.page.locator("#life canvas").count() >= 3
        assert page.is_quiet()
        page.context.close()


def test_a_life_shows_measures_path_events_examples_and_region(opened, run):
    feature = int(opened.page.evaluate("stagediff.track.outstanding[0]"))
    opened.page.evaluate(f"stagediff.track.open({feature})")
    opened.page.wait_for_timeout(400)
    life = opened.page.locator("#life")
    assert life.locator(".four figure").count() == 4
    text = life.inner_text()
    assert "Path of its direction" in text
    assert "What happened to it" in text
    assert life.locator(".examples li").count() == 10
    assert life.locator(".examples .peak").count() == 10
    assert life.locator(".levels section").count() == 5
    assert life.locator(".datapoint .peak").count() == 25
    canvas = life.locator(".four canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] - 15, box["y"] + 60)
    tip = life.locator(".four .chart-tip").first
    tip.wait_for(state="visible")
    assert f"step {run.lives.steps[-1]:,}" in tip.inner_text()
    assert f"{run.lives.m[feature, -1]:.2f}".replace("-", "−")[:-1] in tip.inner_text()
    assert opened.is_quiet()


def test_markup_in_a_corpus_is_shown_as_text(opened):
    for feature in opened.page.evaluate("stagediff.track.withTexts.slice(0, 6)"):
        opened.page.evaluate(f"stagediff.track.open({feature})")
        opened.page.wait_for_timeout(120)
    text = opened.page.locator("#life").inner_text()
    assert "<script>" in text
    assert opened.page.locator("main img, main script").count() == 0
    assert opened.is_quiet()


def test_umap_points_tell_their_text_and_open_their_feature(opened):
    canvas = opened.page.locator("#umaps canvas").nth(4)
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    opened.page.keyboard.press("ArrowLeft")  # the last point: of a feature
    tip = opened.page.locator("#umaps .chart-tip").nth(4)
    assert "feature" in tip.inner_text()
    assert tip.locator(".tokens .peak").count() == 1
    feature = tip.locator("strong").inner_text().removeprefix("feature ")
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_timeout(300)
    assert opened.life() == f"Feature {feature}"
    assert opened.is_quiet()


def test_paths_of_chosen_features_stand_side_by_side(opened):
    wanted = opened.page.evaluate("stagediff.track.outstanding.slice(0, 3)")
    box = opened.page.locator("#paths-form input")
    box.fill(", ".join(str(i) for i in wanted) + ", 99999999, x")
    opened.page.locator("#paths-form button").click()
    assert opened.page.locator("#paths figure").count() == 3
    assert "99999999, x" in opened.page.locator("#paths-said").inner_text()
    opened.page.locator("#paths .close").first.click()
    assert opened.page.locator("#paths figure").count() == 2
    opened.page.locator("#paths figcaption a").first.click()
    opened.page.wait_for_timeout(300)
    assert opened.life() == f"Feature {wanted[1]:,}"
    assert opened.is_quiet()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (768, "dark"), (1280, "dark")])
def test_it_fits_phones_and_both_themes(browser, run, width, scheme):
    page = Opened(browser, run.file, viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.is_quiet()
    page.context.close()


def test_a_comparison_draws_every_run_and_switches_its_axes(browser, tmp_path):
    from stagediff.track.compare import compare_page

    found = []
    for k, name in enumerate(("160m", "410m", "1.4b <b>")):
        made = fake_tables.write_track(Store(str(tmp_path / name.split()[0])), 200, 8 + k, seed=k, name=name, slower=0.1 * k)
        found.append((name, fake_tables.context_of(made)))
    file = tmp_path / "compare.html"
    file.write_text(compare_page(found)[0], encoding="utf-8")
    page = Opened(browser, file, ready="#boundaries canvas")
    assert page.page.locator("#kinds-figures canvas").count() == 3
    assert page.page.locator("#stacks canvas").count() == 3
    canvas = page.page.locator("#kinds-figures canvas").first
    before = canvas.screenshot()
    page.page.locator("select.compare-axis").first.select_option("log")
    page.page.wait_for_timeout(250)
    switched = canvas.screenshot()
    assert switched != before
    page.page.locator("#kinds-legend button").first.click()
    page.page.wait_for_timeout(250)
    assert canvas.screenshot() != switched
    page.page.locator("#boundaries canvas").focus()
    page.page.keyboard.press("ArrowRight")
    assert "boundary 1" in page.page.locator("#boundaries .chart-tip").inner_text()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.is_quiet()
    page.context.close()
