"""The report in headless Chromium, at F = 1,024 and 262,144: no console error, no request beyond the file itself, hover, click, sorting and filtering work.

Chromium is looked for on PATH. STAGEDIFF_INTEGRATION=0 switches these tests off; a missing browser is a failure, not a skip.
"""

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from stagediff import steps
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


def _builder():
    path = Path(__file__).parents[1] / "report" / "synthetic_run.py"
    spec = importlib.util.spec_from_file_location("synthetic_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[1024, 262_144])
def run(request, tmp_path_factory) -> SimpleNamespace:
    builder = _builder()
    store = Store(str(tmp_path_factory.mktemp("store")))
    spec = builder.write_run(store, request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
        ref = steps.run(spec, store, device="cpu")
    table = store.artifact(spec.nodes["diff"]).read_table("features.parquet")
    return SimpleNamespace(features=request.param, table=table, file=store.artifact(ref).local("index.html"), builder=builder)


class Opened:
    """A page with everything it said and asked for."""

    def __init__(self, browser, file: Path, **options):
        self.context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 900}), **options)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.messages.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.messages.append(f"error: {e}"))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.url = file.as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("#feature-table tbody tr")
        self.page.wait_for_timeout(150)

    def is_quiet(self) -> bool:
        assert self.messages == []
        assert [r for r in self.requests if r != self.url] == []
        assert self.page.evaluate("window.hacked") is None
        return True

    def point(self, feature: int) -> tuple[float, float]:
        self.page.evaluate("document.getElementById('plot').scrollIntoView({block: 'center', behavior: 'instant'})")
        x, y = self.page.evaluate(f"stagediff.plot.at({feature})")
        return x, y

    def column(self, title: str) -> list[str]:
        heads = self.page.locator("#feature-table thead button").all_inner_texts()
        return self.page.locator(f"#feature-table tbody td:nth-child({heads.index(title) + 1})").all_inner_texts()


@pytest.fixture
def opened(browser, run) -> Iterator[Opened]:
    page = Opened(browser, run.file)
    yield page
    page.context.close()


def loneliest(table: pd.DataFrame) -> int:
    """A selected feature far from every other point, so that no neighbour takes its place under the pointer."""
    xy = table[["x", "y"]].to_numpy()
    candidates = table[table.selected].sort_values("score").head(50).feature.to_numpy()
    gaps = [np.partition(np.hypot(*(xy - xy[i]).T), 1)[1] for i in candidates]
    return int(candidates[int(np.argmax(gaps))])


def test_it_opens_without_errors_or_requests_within_its_size(opened, run):
    assert run.file.stat().st_size < MOST_BYTES
    opened.page.mouse.wheel(0, 4000)
    opened.page.wait_for_timeout(200)
    assert opened.is_quiet()


def test_the_scripts_columns_are_the_tables(opened, run):
    for name in ("x", "y", "cos_s_d", "cos_f_f", "new_top", "new_mass"):
        got = np.array(opened.page.evaluate(f"Array.from(stagediff.features.col.{name}).map(v => Number.isNaN(v) ? null : v)"), dtype=float)
        np.testing.assert_allclose(got, run.table[name], atol=3e-5)
    for name in ("density_F_D", "norm_S"):
        got = np.array(opened.page.evaluate(f"Array.from(stagediff.features.col.{name})"), dtype=float)
        np.testing.assert_allclose(got, run.table[name], rtol=3e-4)
    for name in ("alive", "selected", "born"):
        assert (
            opened.page.evaluate(f"Array.from({{length: {run.features}}}, (_, i) => stagediff.features.{name}(i))")
            == run.table[name].tolist()
        )


def test_a_point_is_drawn_where_its_feature_lies(opened, run):
    feature = loneliest(run.table)
    opened.point(feature)
    colour = opened.page.evaluate(
        """(i) => { const c = document.querySelector('#plot canvas.points'), b = c.getBoundingClientRect();
        const [x, y] = stagediff.plot.at(i), k = c.width / b.width;
        return Array.from(c.getContext('2d').getImageData(Math.round((x - b.left) * k), Math.round((y - b.top) * k), 1, 1).data) }""",
        feature,
    )
    assert np.abs(np.array(colour[:3]) - [0xD1, 0x49, 0x5B]).max() < 40  # the colour of selected features


def test_hover_shows_the_feature(opened, run):
    feature = loneliest(run.table)
    opened.page.mouse.move(*opened.point(feature))
    tip = opened.page.locator("#plot .tip")
    tip.wait_for(state="visible")
    text = tip.inner_text()
    row = run.table.iloc[feature]
    assert f"Feature {feature:,}" in text
    for value in (row.x, row.y, row.cos_s_d, row.cos_s_m, row.cos_f_f):
        assert f"{value:.3f}".replace("-", "−")[:-1] in text  # the last digit may differ: 16-bit columns
    assert "density" in text
    assert opened.is_quiet()


def test_a_click_opens_the_examples_with_the_activating_tokens_shaded(opened, run):
    feature = loneliest(run.table)
    opened.page.mouse.click(*opened.point(feature))
    panel = opened.page.locator("#feature-panel")
    assert panel.locator("h3").inner_text() == f"Feature {feature:,}"
    want = run.builder.fake_examples(None, None, [feature])
    assert panel.locator(".examples li").count() == len(want)
    first = panel.locator(".examples li").first
    assert first.locator(".peak").text_content() == f" I{feature}"
    shaded = first.locator("span").evaluate_all("spans => spans.filter(s => s.style.backgroundColor).length")
    assert shaded == sum(a > 0 for a in want.iloc[0].activations)
    assert panel.locator("svg rect").count() > 0
    assert panel.locator(".cosines tr").count() == 7
    assert panel.locator(".stages tbody tr").count() == 6
    assert opened.is_quiet()


def test_markup_in_a_corpus_is_shown_as_text(opened, run):
    for feature in opened.page.evaluate("[...stagediff.features.extreme].slice(0, 12)"):  # these show all their examples
        opened.page.evaluate(f"stagediff.features.open({feature})")
    text = opened.page.locator("#feature-panel").inner_text()
    assert "<script>" in text
    assert "<img" in text
    assert opened.page.locator("main img, main script").count() == 0
    assert opened.is_quiet()


def test_the_table_sorts_by_every_measure(opened, run):
    chosen = run.table[run.table.selected]
    assert opened.column("Feature")[:10] == [str(i) for i in chosen.sort_values(["score", "feature"]).feature[:10]]
    for title, name in (("x", "x"), ("New top", "new_top")):
        opened.page.locator("#feature-table thead button", has_text=title).filter(has_text=title).first.click()
        up = [float(v.replace("−", "-")) for v in opened.column(title)]
        assert up == sorted(up)
        assert up[0] == pytest.approx(chosen[name].min(), abs=2e-3)
        opened.page.locator("#feature-table thead button", has_text=title).first.click()
        down = [float(v.replace("−", "-")) for v in opened.column(title)]
        assert down == sorted(down, reverse=True)
        assert down[0] == pytest.approx(chosen[name].max(), abs=6e-3)
    assert opened.is_quiet()


def test_the_table_filters_by_text_and_by_measures(opened, run):
    box, status = opened.page.locator("#table-filter"), opened.page.locator("#feature-table .pager [role=status]")
    chosen = run.table[run.table.selected]
    box.fill("new_top>=0.475 score<1.8")
    opened.page.wait_for_timeout(400)
    want = int(((chosen.new_top >= 0.5) & (chosen.score < 1.8)).sum())
    assert status.inner_text().endswith(f"of {want:,}") or want == 0
    feature = int(chosen.sort_values("score").feature.iloc[3])
    box.fill(f" I{feature} ".strip())
    opened.page.wait_for_timeout(1500)
    assert str(feature) in opened.column("Feature")
    box.fill("nothing like this occurs")
    opened.page.wait_for_timeout(1500)
    assert status.inner_text() == "0 rows"
    box.fill("nosuch>3")
    opened.page.wait_for_timeout(400)
    assert "nosuch" in opened.page.locator("#table-said").inner_text()
    box.fill("")
    opened.page.locator("#table-scope").select_option("all")
    opened.page.wait_for_timeout(400)
    assert status.inner_text().endswith(f"of {run.features:,}")
    assert opened.is_quiet()


def test_a_row_opens_its_feature(opened, run):
    second = opened.column("Feature")[1]
    opened.page.locator("#feature-table tbody tr").nth(1).locator("button").press("Enter")
    assert opened.page.locator("#feature-panel h3").inner_text() == f"Feature {int(second):,}"
    assert opened.page.evaluate("location.hash") == f"#feature={second}"


def test_every_colouring_axis_and_group_draws(opened, run):
    opened.point(0)
    pictures = set()
    for colouring in ("quadrant", "new_top", "new_mass", "density_F_D", "selected"):
        opened.page.locator("#plot-colour").select_option(colouring)
        opened.page.wait_for_timeout(250)
        pictures.add(opened.page.locator("#plot").screenshot())
        assert opened.page.locator("#plot-legend button").count() >= 2
    opened.page.locator("#plot-scale").select_option("angle")
    opened.page.wait_for_timeout(250)
    pictures.add(opened.page.locator("#plot").screenshot())
    opened.page.locator("#plot-legend button").last.click()
    opened.page.wait_for_timeout(250)
    pictures.add(opened.page.locator("#plot").screenshot())
    assert len(pictures) == 7
    assert opened.is_quiet()


def test_drag_zoom_and_keys_move_the_view_and_reset_brings_it_back(opened, run):
    feature = loneliest(run.table)
    home = opened.point(feature)
    plot = opened.page.locator("#plot canvas.over")
    box = plot.bounding_box()
    opened.page.mouse.move(box["x"] + 300, box["y"] + 300)
    opened.page.mouse.down()
    opened.page.mouse.move(box["x"] + 360, box["y"] + 340, steps=4)
    opened.page.mouse.up()
    assert np.allclose(np.subtract(opened.point(feature), home), [60, 40], atol=1.5)
    opened.page.locator("#plot-in").click()
    opened.page.locator("#plot-reset").click()
    assert np.allclose(opened.point(feature), home, atol=0.5)
    plot.focus()
    before = opened.page.evaluate("stagediff.features.current")
    opened.page.keyboard.press("ArrowLeft")
    opened.page.keyboard.press("+")
    assert not np.allclose(opened.point(feature), home, atol=1)
    opened.page.keyboard.press("n")
    assert opened.page.evaluate("stagediff.features.current") != before
    assert opened.is_quiet()


def test_it_stays_smooth(opened, run):
    times = [opened.page.evaluate("stagediff.plot.time()") for _ in range(7)]
    assert sorted(times)[3] < 150, times  # milliseconds per frame, on a shared machine without a GPU
    start = time.monotonic()
    opened.page.mouse.move(*opened.point(loneliest(run.table)))
    opened.page.locator("#plot .tip").wait_for(state="visible")
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (768, "dark"), (1280, "dark")])
def test_it_fits_phones_and_both_themes(browser, run, width, scheme):
    page = Opened(browser, run.file, viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 400)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    x, y = page.point(loneliest(run.table))
    if width < 400:
        page.page.touchscreen.tap(x, y)
    else:
        page.page.mouse.click(x, y)
    assert page.page.locator("#feature-panel .examples li").count() > 0
    assert page.is_quiet()
    page.context.close()


def test_no_static_table_hides_columns_on_a_laptop(browser, run):
    page = Opened(browser, run.file, viewport={"width": 1200, "height": 900})
    hidden = page.page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(box => box.querySelector('table.plain') && box.scrollWidth > box.clientWidth)"
        ".map(box => box.innerText.slice(0, 200))"
    )
    assert hidden == []
    page.context.close()


def test_the_layout_does_not_jump(opened):
    """Opening features and hovering changes no section's place."""
    places = "Array.from(document.querySelectorAll('section')).map(s => s.offsetTop)"
    before = opened.page.evaluate(places)
    for feature in opened.page.evaluate("stagediff.features.withExamples.slice(0, 5)"):
        opened.page.evaluate(f"stagediff.features.open({feature})")
        assert opened.page.evaluate(places) == before
