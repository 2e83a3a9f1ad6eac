"""The page that documents/page.py writes: whole, offline, the same each time, and honest about what is missing."""

import base64
import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from documents import load, plain
from made_up import write_profiles
from nbformat.v4 import new_code_cell, new_notebook, new_output

from effnet_study.documents.charts import figure8, spread
from effnet_study.documents.evidence import Study, alternative_texts, outcome
from effnet_study.documents.page import build_page, convert
from effnet_study.documents.templates import capital
from effnet_study.files import ROOT
from effnet_study.methods import color

pytest_plugins = ["documents"]
OTHERS = {"report.pdf", "../poster/poster.pdf", "../README.md"}  # what else `make report` and the repository bring
# The path of a file or folder on some computer, whatever its first folder is called; not the path of an address
MACHINE = re.compile(
    r"/(?:tmp|home|root|Users)/|(?<![\w.:/-])/(?:[\w.-]+/)+[\w.-]+\.(?:py|ipynb|yaml|json|csv|png|pdf)\b"
)


def build(folder: Path, study: Study) -> BeautifulSoup:
    """The page of a study, written to `folder`."""
    build_page(study, folder)
    return parse(folder / "index.html")


def parse(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def words(page: BeautifulSoup) -> str:
    """What a reader without scripts sees, in one line."""
    page = BeautifulSoup(str(page), "html.parser")
    for script in page.find_all(["script", "style"]):
        script.decompose()
    return plain(page.get_text(" "))


def specifications(page: BeautifulSoup) -> dict:
    return json.loads(page.find("script", id="specs").string)


@pytest.fixture(scope="session")
def pages(rebuilt) -> Path:
    """The folder of the page of the made-up study."""
    return rebuilt / "report"


@pytest.fixture(scope="session")
def page(pages) -> BeautifulSoup:
    """That page, to be read and not changed."""
    return parse(pages / "index.html")


def cells(page: BeautifulSoup, caption: str) -> list[list[str]]:
    """The words of a table's rows, cell by cell."""
    table = next(table for table in page.find_all("table") if table.caption.get_text() == caption)
    return [[plain(cell.get_text()).strip() for cell in row.find_all(["th", "td"])] for row in table.select("tbody tr")]


# ---- what is written -----------------------------------------------------------------------------------------------


def test_results_extensions_and_notebooks_are_there(page, study):
    text, links = words(page), {link["href"] for link in page.find_all("a")}
    assert plain(outcome(study)["headline"]) in text
    expected = {f"notebooks/mini/{name}.html" for name in ("00_architecture", "05_analysis")}
    expected |= {
        f"notebooks/{path.parent.name}/{path.stem}.html" for path in study.results.glob("throughput/*/*.ipynb")
    }
    assert len(expected) == 4 and {link for link in links if link.startswith("notebooks/")} == expected
    for claim in study.claims:
        assert plain(f"{capital(claim['title'])}: {claim['status']} .") in text
    for other in study.extensions:
        assert f"{other.profile.title} ({other.name}): {len(other.finished)} of {len(other.runs)} planned runs" in text


def test_headings_of_results_name_the_scale(page):
    assert "pocket scale" in page.h1.get_text() and "pocket scale" in page.title.get_text()
    headings = [heading.get_text() for heading in page.find_all("h2")]
    assert len(headings) > 6
    others = {"Notebooks, as they were executed", "What is missing"}
    assert {text for text in headings if "pocket scale" not in text} == others


def test_figure_8_has_the_runs_at_other_budgets(page):
    dots = [row for rows in specifications(page)["figure8"]["datasets"].values() for row in rows if "seed" in row]
    assert {row["method"] for row in dots} >= {"compound", "compound_x2", "fast_compound"}
    assert len(dots) == 2 * 11


def test_figure_8_has_scores_and_flops_of_the_records(page, study):
    """Read from run.json here, by other code than the page's."""
    rows = [row for rows in specifications(page)["figure8"]["datasets"].values() for row in rows]
    for path in (study.study_dir / "runs").glob("*/run.json"):
        record = json.loads(path.read_text())
        (dot,) = (r for r in rows if (r.get("seed"), r["method"]) == (record["seed"], record["method"]))
        assert dot["top1"] == record["test"]["top1"] and dot["minutes"] == record["seconds"] / 60
        assert dot["flops"] == record["cost"]["flops"] == 1e6 * dot["x"]
    means = {row["method"]: (row["mean"], row["low"], row["high"]) for row in rows if "low" in row}
    for row in pd.read_csv(study.study_dir / "tables" / "table7.csv").itertuples():
        assert means[row.method] == pytest.approx((row.top1, row.top1_low, row.top1_high))


def test_the_papers_panel_has_table_7_as_published(page):
    rows = [row for rows in specifications(page)["paper"]["datasets"].values() for row in rows]
    dots = {(row["method"], row["x"], row["top1"]) for row in rows if "flops" in row}
    singles = {("depth", 1.8, 79.0), ("width", 1.8, 78.9), ("resolution", 1.9, 79.1)}
    assert dots == {("baseline", 0.4, 77.3), ("compound", 1.8, 81.1), *singles}


def test_learning_curves_are_the_histories(page, study):
    for column in ("train_loss", "minival_top1"):
        (rows,) = specifications(page)[column]["datasets"].values()
        for run in study.finished.itertuples():
            lines = (run.run_dir / "history.jsonl").read_text().splitlines()
            expected = {json.loads(line)["epoch"]: json.loads(line)[column] for line in lines}
            drawn = {row["epoch"]: row[column] for row in rows if row["run"] == run.run_dir.name}
            assert drawn == pytest.approx(expected, abs=1e-4) and len(drawn) == 8
    options = [option["value"] for option in page.find("select", id="run").find_all("option")]
    assert options[0] == "" and len(options) == 1 + 18 + 4  # of the study, and of its extension at another budget
    assert {*options[1:19]} == {path.name for path in study.finished["run_dir"]}


def test_figures_of_the_analysis_are_in_the_page(page, study):
    pictures = {image["alt"]: image["src"] for image in page.find_all("img", class_="card")}
    for name in ("contrasts", "lengths"):
        kind, _, body = pictures[alternative_texts()[name]].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(body) == (study.study_dir / "figures" / f"{name}.svg").read_bytes()
    assert len(pictures) == 2 and ".card { " in page.style.string and "background: #fff" in page.style.string


def test_tables_say_what_the_csv_files_say(page, study):
    tables = study.study_dir / "tables"
    for row, found in zip(pd.read_csv(tables / "table7.csv").itertuples(), cells(page, "Table 7, ours and the paper's"),
                          strict=True):  # fmt: skip
        paper = [f"{row.paper_top1:.1f}", f"{row.paper_flops / 1e9:.1f}"]
        assert found == [
            row.method.replace("_", " "),
            f"{row.top1:.2f}",
            f"{row.top1_low:.2f} to {row.top1_high:.2f}",
            f"{row.n}",
            f"{row.top1_sd:.2f}",
            f"{row.flops / 1e6:.2f}",
            f"{row.params / 1e6:.2f}",
            f"{row.activations / 1e6:.3f}",
            *(value.replace("nan", "–") for value in paper),
        ]
    contrasts = pd.read_csv(tables / "contrasts.csv")
    assert len(contrasts) == 10
    for row, found in zip(contrasts.itertuples(), cells(page, "Planned contrasts"), strict=True):
        paper = f"{row.paper_difference:+.1f}".replace("+nan", "–")
        between = f"{row.low:+.2f} to {row.high:+.2f}"
        said = f"{row.target} - {row.other}".replace("_", " ")
        assert found == [said, f"{row.difference:+.2f}", between, "2", f"{row.flops_ratio:.2f}", paper, row.outcome]
    runs = cells(page, "Finished runs, also at other budgets")
    assert len(runs) == 22 and runs[0][:3] == ["baseline, seed 0", "24", "40.40"] and runs[0][5:] == ["6.0", "box"]


def test_nothing_is_loaded_and_every_link_leads_somewhere(pages):
    for path in pages.rglob("*.html"):
        page = parse(path)
        loaded = [tag[name] for tag in page.find_all(["script", "link", "img", "iframe"]) for name in ("src", "href")
                  if tag.has_attr(name)]  # fmt: skip
        assert all(address.startswith("data:") for address in loaded), path
        assert "@import" not in path.read_text() and not re.search(r"url\(['\"]?(?!data:|#)", str(page.style)), path
        for link in page.find_all("a"):
            parts = urlsplit(link["href"])
            if parts.scheme or (path.parent == pages and link["href"] in OTHERS):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path}: {link['href']}"
            assert not parts.fragment or parse(target).find(id=parts.fragment), f"{path}: {link['href']}"


def test_pages_are_accessible(pages):
    for path in pages.rglob("*.html"):
        page = parse(path)
        assert page.html["lang"] == "en" and page.title.get_text() and page.find("meta", attrs={"name": "viewport"})
        assert len(page.find_all("main")) == 1 and len(page.find_all("h1")) == 1, path
        for image in page.find_all("img"):
            assert image.get("alt") and "No description" not in image["alt"], path
        levels = [int(heading.name[1]) for heading in page.find_all(re.compile(r"^h[1-6]$"))]
        assert all(after - before <= 1 for before, after in pairwise(levels)), (path, levels)
        assert page.find("a", class_="skip")["href"] == "#main"
    for table in parse(pages / "index.html").find_all("table"):
        assert table.caption and all(head.get("scope") for head in table.find_all("th"))


def test_figure_8_joins_what_is_scaled_the_same_way():
    flops = {"baseline": 1e6, "depth_x2": 2e6, "depth_x8": 8e6, "compound": 4e6}
    dots = [{"method": m, "label": m, "flops": f, "x": f / 1e6, "top1": 50 + f / 1e6} for m, f in flops.items()]
    spec = figure8(pd.DataFrame(dots), "FLOPs", "top-1", "made up")
    rows = [row for rows in spec["datasets"].values() for row in rows if "x0" in row]
    steps = {row["method"]: (row["x0"], row["y0"], row["x"], row["mean"]) for row in rows}
    assert steps == {"depth_x2": (1, 51, 2, 52), "depth_x8": (2, 52, 8, 58), "compound": (1, 51, 4, 54)}


def test_methods_have_their_colours_and_matched_flops_are_hollow(page):
    dots = next(layer for layer in specifications(page)["figure8"]["layer"] if layer["mark"]["type"] == "point")
    scale = dots["encoding"]["fill"]["scale"]
    assert scale["range"] == [color(method) for method in scale["domain"]]
    hollow, filled = dots["encoding"]["fillOpacity"]["condition"][0], dots["encoding"]["fillOpacity"]["value"]
    assert "_matched" in hollow["test"] and hollow["value"] == 0 < filled


def test_no_path_of_the_machine_is_told(pages):
    assert MACHINE.search(" /volume/project/effnet_lib.py") and MACHINE.search("/home/ann/results")
    for path in pages.rglob("*.html"):
        text = re.sub(r"data:[a-z/]+;base64,[A-Za-z0-9+/=]+", "", path.read_text())
        assert not MACHINE.search(text) and str(ROOT) not in text, path


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(pages, study, tmp_path):
    build(tmp_path, study)
    files = sorted(path.relative_to(pages) for path in pages.rglob("*.html"))
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.html"))
    assert all((pages / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_formulas_are_mathml_and_widgets_are_gone(pages):
    for path in pages.glob("notebooks/*/00_architecture.html"):
        page = parse(path)
        assert page.find("math") and not page.find("script") and "widget-view" not in str(page)
        for annotation in page.find_all("annotation"):
            annotation.decompose()
        assert not re.search(r"\$[^$\s][^$\n]*\$", words(page))


def test_progress_bars_are_left_out(tmp_path):
    bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "dead bar"}
    outputs = [new_output("display_data", bar), new_output("stream", text="kept")]
    nbformat.write(new_notebook(cells=[new_code_cell("1", outputs=outputs)]), tmp_path / "bar.ipynb")
    _, body = convert(tmp_path / "bar.ipynb")
    assert "kept" in body and "dead bar" not in body and "widget" not in body


@pytest.mark.parametrize("values", [[3.0, 1.0, 1.0, 1.0], [0.0, 10.0], [9.9, 10.0, 9.95]])
def test_labels_never_touch(values):
    placed = spread(values, 1, 0, 10)
    gaps = sorted(placed)
    assert min(gaps) >= 0 and max(gaps) <= 10
    assert all(after - before >= 1 - 1e-9 for before, after in pairwise(gaps))


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_what_there_is_none_of_is_named(tmp_path):
    name = write_profiles(tmp_path / "profiles", 5)
    page = build(tmp_path / "out", load(name, tmp_path))
    assert not specifications(page) and not page.select(".chart")
    text = words(page)
    assert "no run of mini is finished" in text and "Nothing is finished yet" in text
    assert "There is no Figure 8" in text and "No notebook has been executed" in text
    assert "[Re: undecided]" in text and "Unfinished: 0 of 45 planned runs have ended" in text


def test_missing_tables_and_seeds_are_named(study, tmp_path):
    """Seed 1 is missing. A title with "</script>" stays a title."""
    runs = study.runs.assign(status=study.runs["status"].where(study.runs["seed"] == 0, "missing"))
    runs = runs.assign(data="</script><b>Images")
    page = build(tmp_path / "out", dataclasses.replace(study, results=tmp_path, runs=runs, extensions=()))
    specs, text = specifications(page), words(page)
    assert set(specs) == {"figure8", "paper", "train_loss", "minival_top1"} and not page.find_all("img")
    assert specs["figure8"]["description"].startswith("</script><b>Images")
    assert "Table 7 (tables/table7.csv); to make it: make report" in text and "There is no verdict" in text
    assert len({row["run"] for rows in specs["train_loss"]["datasets"].values() for row in rows}) == 9
    assert text.count("Unfinished: 9 of 18 planned runs have ended") == 3 and "seed 1 (missing)" in text


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture
def visit(pages, browser):
    """A function that opens a page as a reader with this screen and scheme does; what goes wrong fails the test."""
    wrong, contexts = [], []

    def ask(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(request.url)

    def go(file: str, width: int, scheme: str, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options))
        contexts[-1].set_default_timeout(300_000)  # a slow machine has other work, too
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", ask)
        page.goto((pages / file).as_uri())
        if file == "index.html" and options.get("java_script_enabled", True):
            page.wait_for_function("document.documentElement.dataset.drawn")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_charts_are_drawn_and_answer(visit, width, scheme):
    page = visit("index.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = page.locator(".chart").all()
    assert boxes and all(box.locator("svg path").count() for box in boxes)
    right = "[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().right)"
    assert all(edge <= width for edge in page.evaluate(right))

    dot = page.locator('[data-chart="figure8"] path[aria-label*="seed: "]').first
    dot.scroll_into_view_if_needed()
    dot.hover(force=True)
    tooltip = page.locator("#vg-tooltip-element.visible").inner_text()
    box = page.locator("#vg-tooltip-element.visible").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0 and box["y"] + box["height"] <= 800
    assert re.search(r"seed\s+\d", tooltip) and re.search(r"FLOPs\s+\d{1,3}(,\d{3})+", tooltip)

    chart = page.locator('[data-chart="train_loss"] svg')
    before = chart.inner_html()
    page.locator("#run").select_option(index=1)
    page.wait_for_function(
        "([chart, old]) => document.querySelector(chart).innerHTML !== old",
        arg=['[data-chart="train_loss"] svg', before],
    )
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    page.wait_for_function(f"document.documentElement.dataset.drawn !== '{scheme}'")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_a_table_sorts_by_keyboard(visit):
    page = visit("index.html", 1280, "light")
    button = page.locator("table.sortable").nth(1).locator("th button").nth(1)
    button.focus()
    page.keyboard.press("Enter")
    cells = page.locator("table.sortable").nth(1).locator("tbody tr td:nth-child(2)").all_inner_texts()
    values = [float(text) for text in cells]
    assert values == sorted(values, reverse=True)


@pytest.mark.slow
def test_without_scripts_verdicts_and_tables_stay(visit):
    page = visit("index.html", 360, "light", java_script_enabled=False)
    assert page.locator("table.sortable").nth(1).is_visible() and page.locator(".verdict").first.is_visible()
    assert not page.locator(".picker").first.is_visible()


@pytest.mark.slow
def test_notebooks_fit_a_phone(visit, pages):
    for path in sorted(pages.glob("notebooks/*/*.html")):
        page = visit(path.relative_to(pages).as_posix(), 360, "dark")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        page.context.close()
