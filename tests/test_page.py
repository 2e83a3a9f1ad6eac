"""The page that report/page.py writes: whole, offline, the same each time, and honest about what is missing."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from bs4 import BeautifulSoup

import effnet_study as study

pytest.importorskip("altair")
pytest.importorskip("pypandoc")
pytest.importorskip("vl_convert")
from evidence import find_studies, outcome
from page import build_page, figure8, spread

OTHERS = {"report.pdf", "../poster/poster.pdf", "../README.md"}  # what else `make report` and the repository bring
# The path of a file or folder on some computer, whatever its first folder is called; not the path of an address
MACHINE = re.compile(
    r"/(?:tmp|home|root|Users)/|(?<![\w.:/-])/(?:[\w.-]+/)+[\w.-]+\.(?:py|ipynb|yaml|json|csv|png|pdf)\b"
)


def build(folder: Path, names=None, results: Path = study.RESULTS) -> BeautifulSoup:
    """The page of some studies, or of all, written to `folder`."""
    studies = find_studies(names, results)
    build_page(studies, outcome(studies), folder, results)
    return parse(folder / "index.html")


def parse(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def words(page: BeautifulSoup) -> str:
    """What a reader without scripts sees, in one line."""
    for script in page.find_all(["script", "style"]):
        script.decompose()
    return " ".join(page.get_text(" ").split())


def specifications(page: BeautifulSoup) -> dict:
    return json.loads(page.find("script", id="specs").string)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the page of all committed results."""
    folder = tmp_path_factory.mktemp("site") / "report"
    build(folder)
    return folder


# ---- what is written -----------------------------------------------------------------------------------------------


def test_every_study_and_notebook_is_there(site):
    page, studies = parse(site / "index.html"), find_studies()
    titles = [heading.get_text() for heading in page.find_all("h2")]
    assert [one.title for one in studies] == titles[: len(studies)]
    assert outcome(studies)["headline"] in page.get_text()
    links = {link["href"] for link in page.find_all("a")}
    expected = {f"notebooks/{one.name}/{path.stem}.html" for one in studies for path in one.notebooks}
    expected |= {
        f"notebooks/{path.parent.name}/{path.stem}.html" for path in study.RESULTS.glob("throughput/*/*.ipynb")
    }
    assert expected and expected <= links
    for one in studies:
        for claim, verdict in (one.verdict or {}).get("claims", {}).items():
            assert f"{verdict[0].upper()}{verdict[1:]}: {claim}." in page.find(id=one.name).get_text()


def test_nothing_is_loaded_and_every_link_leads_somewhere(site):
    for path in site.rglob("*.html"):
        page = parse(path)
        loaded = [tag[name] for tag in page.find_all(["script", "link", "img", "iframe"]) for name in ("src", "href")
                  if tag.has_attr(name)]  # fmt: skip
        assert all(address.startswith("data:") for address in loaded), path
        assert "@import" not in path.read_text() and not re.search(r"url\(['\"]?(?!data:|#)", str(page.style)), path
        for link in page.find_all("a"):
            parts = urlsplit(link["href"])
            if parts.scheme or (path.parent == site and link["href"] in OTHERS):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path}: {link['href']}"
            assert not parts.fragment or parse(target).find(id=parts.fragment), f"{path}: {link['href']}"


def test_pages_are_accessible(site):
    for path in site.rglob("*.html"):
        page = parse(path)
        assert page.html["lang"] == "en" and page.title.get_text() and page.find("meta", attrs={"name": "viewport"})
        assert len(page.find_all("main")) == 1 and len(page.find_all("h1")) == 1, path
        for image in page.find_all("img"):
            assert image.get("alt") and "No description" not in image["alt"], path
        levels = [int(heading.name[1]) for heading in page.find_all(re.compile(r"^h[1-6]$"))]
        assert all(after - before <= 1 for before, after in pairwise(levels)), (path, levels)
        assert page.find("a", class_="skip")["href"] == "#main"
    for table in parse(site / "index.html").find_all("table"):
        assert table.caption and all(head.get("scope") for head in table.find_all("th"))


def test_figure_8_joins_what_is_scaled_the_same_way():
    flops = {"baseline": 1e6, "depth_x2": 2e6, "depth_x8": 8e6, "compound": 4e6}
    dots = [{"method": m, "label": m, "flops": f, "x": f / 1e6, "top1": 50 + f / 1e6} for m, f in flops.items()]
    spec = figure8(pd.DataFrame(dots), [], "FLOPs", "top-1", "made up")
    rows = [row for rows in spec["datasets"].values() for row in rows if "x0" in row]
    steps = {row["method"]: (row["x0"], row["y0"], row["x"], row["mean"]) for row in rows}
    assert steps == {"depth_x2": (1, 51, 2, 52), "depth_x8": (2, 52, 8, 58), "compound": (1, 51, 4, 54)}


def test_table_7_and_charts_say_what_the_tables_say(site):
    page = parse(site / "index.html")
    specs = specifications(page)
    for one in find_studies():
        rows = {row["data-method"]: row for row in page.find(id=one.name).select("table.table7 tbody tr")}
        expected = pd.read_csv(one.folder / "tables" / "table7.csv").set_index("method")
        assert list(rows) == list(expected.index)
        for method, row in rows.items():
            cells = [cell.get_text().strip() for cell in row.find_all("td")]
            assert cells[0] == f"{expected['top1'][method]:.2f}" and cells[2] == str(expected["n"][method])
            assert cells[3] == f"{expected['flops'][method] / 1e6:,.2f}"
            low, high = expected["top1_low"][method], expected["top1_high"][method]
            assert cells[1] == (f"{low:.2f} to {high:.2f}" if expected["n"][method] > 1 else "one seed")
        dots = [row for rows in specs[f"{one.name}-figure8"]["datasets"].values() for row in rows if "seed" in row]
        assert sorted(row["top1"] for row in dots) == pytest.approx(sorted(one.finished["top1"]))
        scale = specs[f"{one.name}-figure8"]["layer"][-1]["encoding"]
        assert "text" in scale and specs[f"{one.name}-figure8"]["description"]
        scale = specs[f"{one.name}-figure8"]["layer"][-2]["encoding"]["fill"]["scale"]
        assert scale["range"] == [study.color(method) for method in scale["domain"]]


def test_no_path_of_the_machine_is_told(site):
    assert MACHINE.search(" /volume/project/effnet_lib.py") and MACHINE.search("/home/ann/results")
    for path in site.rglob("*.html"):
        text = re.sub(r"data:[a-z/]+;base64,[A-Za-z0-9+/=]+", "", path.read_text())
        assert not MACHINE.search(text) and str(study.ROOT) not in text, path


def test_the_same_results_give_the_same_bytes(site, tmp_path):
    build(tmp_path)
    files = sorted(path.relative_to(site) for path in site.rglob("*.html"))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.html"))
    assert all((site / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_formulas_are_mathml_and_widgets_are_gone(site):
    for path in site.glob("notebooks/*/00_architecture.html"):
        page = parse(path)
        assert page.find("math") and not page.find("script") and "widget-view" not in str(page)
        for annotation in page.find_all("annotation"):
            annotation.decompose()
        assert not re.search(r"\$[^$\s][^$\n]*\$", words(page))


@pytest.mark.parametrize("values", [[3.0, 1.0, 1.0, 1.0], [0.0, 10.0], [9.9, 10.0, 9.95]])
def test_labels_never_touch(values):
    placed = spread(values, 1, 0, 10)
    gaps = sorted(placed)
    assert min(gaps) >= 0 and max(gaps) <= 10
    assert all(after - before >= 1 - 1e-9 for before, after in pairwise(gaps))


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_what_there_is_none_of_is_named(tmp_path):
    page = build(tmp_path / "out", ["no-such-profile", "quick"], tmp_path)
    assert not specifications(page) and not page.select(".chart")
    text = words(page)
    assert "there is no profile no-such-profile" in text and "no run of quick is finished" in text
    assert "nothing to decide yet" in text and "[Re: undecided]" in text
    assert "there is no study yet" in words(build(tmp_path / "empty", [], tmp_path))


def test_missing_tables_histories_and_seeds_are_named(tmp_path):
    name = "cifar10-smoke"
    shutil.copytree(study.RESULTS / name / "runs", tmp_path / name / "runs")
    histories = sorted((tmp_path / name / "runs").glob("*/history.jsonl"))
    histories[0].unlink()
    page = build(tmp_path / "out", [name], tmp_path)
    assert f"{name}-contrasts" not in specifications(page) and f"{name}-figure8" in specifications(page)
    text = words(page)
    assert "Table 7 (tables/table7.csv); to make it: make study" in text and "There is no verdict" in text
    assert f"history.jsonl of {histories[0].parent.name} is not there" in text
    assert "an interval, for want of a second seed: baseline" in text and "no notebook of it has been executed" in text


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture
def visit(site, browser):
    """A function that opens a page as a reader with this screen and scheme does; what goes wrong fails the test."""
    wrong, contexts = [], []

    def ask(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(request.url)

    def go(file: str, width: int, scheme: str, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", ask)
        page.goto((site / file).as_uri())
        if file == "index.html" and options.get("java_script_enabled", True):
            page.wait_for_function("document.documentElement.dataset.drawn", timeout=60_000)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_charts_are_drawn_and_answer(visit, width, scheme):
    page = visit("index.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = page.locator(".chart").all()
    assert boxes and all(box.locator("svg path").count() for box in boxes)
    right = "[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().right)"
    assert all(edge <= width for edge in page.evaluate(right))

    run = next(one for one in find_studies() if one.has("tables/contrasts.csv")).name
    dot = page.locator(f'[data-chart="{run}-figure8"] path[aria-label*="seed: "]').first
    dot.scroll_into_view_if_needed()
    dot.hover(force=True)
    tooltip = page.locator("#vg-tooltip-element.visible").inner_text()
    box = page.locator("#vg-tooltip-element.visible").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0 and box["y"] + box["height"] <= 800
    assert re.search(r"seed\s+\d", tooltip) and re.search(r"FLOPs\s+\d{1,3}(,\d{3})+", tooltip)

    chart = page.locator(f'[data-chart="{run}-train_loss"] svg')
    before = chart.inner_html()
    page.locator(f"#{run}-run").select_option(index=1)
    page.wait_for_function(
        "([chart, old]) => document.querySelector(chart).innerHTML !== old",
        arg=[f'[data-chart="{run}-train_loss"] svg', before],
    )
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    page.wait_for_function(f"document.documentElement.dataset.drawn !== '{scheme}'", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_table_sorts_by_keyboard(visit):
    page = visit("index.html", 1280, "light")
    button = page.locator("table.table7").first.locator("th button").nth(1)
    button.focus()
    page.keyboard.press("Enter")
    cells = page.locator("table.table7").first.locator("tbody tr td:nth-child(2)").all_inner_texts()
    values = [float(text) for text in cells]
    assert values == sorted(values, reverse=True)


def test_without_scripts_verdicts_and_tables_stay(visit):
    page = visit("index.html", 360, "light", java_script_enabled=False)
    assert page.locator("table.table7").first.is_visible() and page.locator(".verdict").first.is_visible()
    assert not page.locator(".picker").first.is_visible()


def test_notebooks_fit_a_phone(visit, site):
    for path in sorted(site.glob("notebooks/*/*.html")):
        page = visit(path.relative_to(site).as_posix(), 360, "dark")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        page.context.close()
