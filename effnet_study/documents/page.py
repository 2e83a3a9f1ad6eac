"""The page: report/index.html and the executed notebooks as HTML, all readable offline.

The template is report/index-template.html. The page contains its figures, and the libraries that draw its charts.
Everything is read from results/, so the same results give the same bytes.
"""

import base64
import json
import re
from pathlib import Path

import altair as alt
import nbformat
import pandas as pd
import pypandoc
import vl_convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from effnet_study.documents.charts import INK, curves, figure8, shape
from effnet_study.documents.evidence import Study, alternative_texts, outcome
from effnet_study.documents.templates import fill_in
from effnet_study.files import load_history, plain
from effnet_study.methods import PAPER_TABLE7, color, spoken

RUN_FIELDS = ["method", "label", "seed", "flops", "x", "resolution", "top1", "minutes", "device"]
WIDGET = "application/vnd.jupyter.widget-view+json"
MATH = re.compile(r"\$[^$\s][^$]*\$")
FIGURES = {  # of the analysis: a heading and what is to be seen
    "contrasts": "Differences between the methods, with their intervals",
    "lengths": "Length of training: accuracy by epochs",
    "search": "Coefficient search: accuracy of the candidates",
    "figure7": "Figure 7: where the networks look",
    "ablation": "What the change of the recipe does",
}


def scored_runs(study: Study) -> pd.DataFrame:
    """Return the finished runs of a study and of its extensions at other budgets, as Figure 8 shows them: x is in
    million multiply-adds. Empty if no run of the study is finished."""
    if study.finished.empty:
        return study.finished
    runs = pd.concat([study.finished, *(each.finished for each in study.extensions if each.kind == "budget")])
    names, labels = [path.name for path in runs["run_dir"]], runs["method"].map(spoken)
    return runs.assign(run=names, label=labels, x=runs["flops"] / 1e6, minutes=runs["seconds"] / 60)


def draw(study: Study, runs: pd.DataFrame) -> dict[str, dict]:
    """Return the specifications of the charts by name. runs: of `scored_runs`."""
    x, about = "FLOPs ({} multiply-adds)", ["run", "method", "label", "seed"]
    epochs = pd.concat(load_history(row["run_dir"]).assign(**row[about]) for _, row in runs.iterrows())
    paper = [(method, flops, top1, method, flops / 1e9) for method, (flops, top1) in PAPER_TABLE7.items()]
    paper = pd.DataFrame(paper, columns=["method", "flops", "top1", "label", "x"])
    return {
        "figure8": figure8(runs[RUN_FIELDS], x.format("million"), "test top-1 (%)", f"{study.data}, all runs"),
        "paper": figure8(paper, x.format("billion"), "ImageNet top-1 (%)", "The paper's Table 7"),
        "train_loss": curves(epochs, "train_loss", f"{study.data}: training loss by epoch"),
        "minival_top1": curves(epochs, "minival_top1", f"{study.data}: minival top-1 by epoch"),
    }


def embed_figures(study: Study) -> list[dict[str, str]]:
    """Return the figures of the analysis that exist, of the study and its extensions: title, alternative text, and
    address, which contains the picture."""
    found = []
    for name, title in FIGURES.items():
        for each in (study, *study.extensions):
            if each.has(f"figures/{name}.svg"):
                picture = base64.b64encode((each.study_dir / "figures" / f"{name}.svg").read_bytes()).decode()
                title_here = title if each is study else f"{plain(each.profile.title)}: {title}"
                figure = {"title": title_here, "alt": alternative_texts()[name]}
                found.append(figure | {"address": f"data:image/svg+xml;base64,{picture}"})
    return found


def render_markdown(text: str) -> str:
    """Convert Markdown to HTML. Pandoc converts formulas: MathML needs neither script nor network."""
    if MATH.search(text):
        options = {"format": "gfm+tex_math_dollars", "extra_args": ["--mathml", "--wrap=none"]}
        return pypandoc.convert_text(text, "html", **options)
    return MarkdownWithMath(renderer=IPythonRenderer(escape=False, exclude_anchor_links=True)).render(text)


def heading(cell: NotebookNode) -> str | None:
    """Return the last heading of a markdown cell, without its marks."""
    found = re.findall(r"^#{1,6} +(.+?)\s*$", cell["source"], re.MULTILINE) if cell["cell_type"] == "markdown" else []
    return found[-1] if found else None


def convert(path: Path) -> tuple[str, str]:
    """Return the title of an executed notebook, and its body in HTML. Pictures get their cell's alternative text, or
    the heading above."""
    book = nbformat.read(path, as_version=4)
    above = title = heading(book["cells"][0]) or path.stem
    for cell in book["cells"]:
        above = heading(cell) or above
        outputs = cell.get("outputs", [])
        # Without a kernel, progress bars and sliders are dead; and each conversion gives them other numbers
        outputs[:] = [output for output in outputs if WIDGET not in output.get("data", {})]
        for output in outputs:
            alternative = cell["metadata"].get("alt", f"Figure: {above}")
            output.get("metadata", {}).setdefault("image/png", {}).setdefault("alt", alternative)
    # clean_html would clean what Pygments made, and takes longer than everything else.
    filters = {"markdown2html": render_markdown, "clean_html": lambda code: code}
    hidden = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    return title, HTMLExporter(template_name="basic", filters=filters, **hidden).from_notebook_node(book)[0]


def write_notebooks(study: Study, output: Path) -> list[dict[str, str]]:
    """Write OUTPUT/notebooks/{STUDY,DEVICE}/*.html, without the notebooks of single runs. Return address, group and
    title of each."""
    pygments = [Markup(HtmlFormatter(style=name).get_style_defs(".highlight")) for name in ("default", "github-dark")]
    folders = {each.name: each.study_dir / "notebooks" for each in (study, *study.extensions)}
    folders |= {path.name: path for path in sorted(study.results.glob("throughput/*"))}
    books = []
    for group, folder in folders.items():
        for path in sorted(folder.glob("*.ipynb")):
            if "_seed" in path.name or ".partial" in path.name:
                continue
            title, body = convert(path)
            book = {"address": f"notebooks/{group}/{path.stem}.html", "group": group, "title": title}
            page = fill_in("index-template.html", notebook=book | {"body": Markup(body), "pygments": pygments})
            (output / "notebooks" / group).mkdir(parents=True, exist_ok=True)
            (output / book["address"]).write_text(page, encoding="utf-8", errors="replace")
            books.append(book)
    return books


def build_page(study: Study, output: Path) -> None:
    """Write OUTPUT/index.html and the notebooks under OUTPUT/notebooks."""
    output.mkdir(parents=True, exist_ok=True)
    # Vega, Vega-Lite and Vega-Embed, of the version that Altair writes for
    libraries = vl_convert.javascript_bundle(vl_version=".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2]))
    runs = scored_runs(study)
    specs = draw(study, runs) if len(runs) else {}
    # "</script>" and "<!--" in a string would change where the element that holds it ends.
    packed = Markup(json.dumps(specs, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
    values = {"study": study, "outcome": outcome(study), "runs": runs, "specs": specs, "packed": packed}
    values |= {"figures": embed_figures(study), "books": write_notebooks(study, output)}
    values |= {"libraries": Markup(libraries), "color": color, "shape": shape, "ink": INK}
    (output / "index.html").write_text(fill_in("index-template.html", **values), encoding="utf-8", errors="replace")
