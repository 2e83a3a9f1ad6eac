"""The page: report/index.html and the executed notebooks as HTML, all readable offline.

Charts are Vega-Lite specifications made with Altair; the libraries that draw them are put into the page once. What is
said and drawn is read from results/, so the same results give the same bytes.
"""

import base64
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import altair as alt
import jinja2
import nbformat
import numpy as np
import pandas as pd
import pypandoc
import vl_convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

import effnet_study as study
from evidence import Study, listed, spoken

INK, PAPER = "#000000", "#ffffff"  # what the page's script replaces by its own where it is dark
GREY = "#8a8a8a"  # 3:1 on both backgrounds
# Colour is not the only cue: a shape for each family of methods, as SVG paths within [-1, 1], which both Vega and the
# legend in HTML understand. A diamond is the paper's, as in the figures.
SHAPES = {
    "baseline": "M-.85,0A.85,.85,0,1,1,.85,0A.85,.85,0,1,1,-.85,0Z",
    **dict.fromkeys(["depth", "depth_matched"], "M-1,-.8L1,-.8L0,1Z"),
    **dict.fromkeys(["width", "width_matched"], "M-.8,-1L-.8,1L1,0Z"),
    **dict.fromkeys(["resolution", "resolution_matched"], "M-.8,-.8L.8,-.8L.8,.8L-.8,.8Z"),
    "compound": "M-.35,-1L.35,-1L.35,-.35L1,-.35L1,.35L.35,.35L.35,1L-.35,1L-.35,.35L-1,.35L-1,-.35L-.35,-.35Z",
    "compound_searched": "M0,.55L.7,1L.5,.15L1.1,-.4L.35,-.45L0,-1.15L-.35,-.45L-1.1,-.4L-.5,.15L-.7,1Z",
}
RUN_FIELDS = ["method", "seed", "flops", "params", "resolution", "top1", "seconds", "device"]
HEIGHT, LINE = 300, 17  # of Figure 8 and of a label in it, in pixels
CROWDED = 1500  # with more epochs than this in all, only the last ones and those of a picked run get dots
MATH = re.compile(r"\$[^$\s][^$]*\$")


# ---- 1. Charts -----------------------------------------------------------------------------------------------------


def style(methods: Iterable[str]) -> dict:
    """Encodings of the field `method` as colour and shape; FLOPs-matched methods are hollow."""
    methods = list(dict.fromkeys(methods))
    colors = alt.Scale(domain=methods, range=[study.color(m) for m in methods])
    shapes = alt.Scale(domain=methods, range=[SHAPES[study.family(m)] for m in methods])
    hollow = alt.when("test(/_matched$/, datum.method)")
    return {
        "fill": alt.Fill("method:N", scale=colors, legend=None),
        "stroke": alt.Stroke("method:N", scale=colors, legend=None),
        "shape": alt.Shape("method:N", scale=shapes, legend=None),
        "fillOpacity": hollow.then(alt.value(0)).otherwise(alt.value(0.75)),
    }


def spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """`values` (k,) moved apart, to be `gap` from each other and between low and high if there is room for all."""
    placed = np.array(values, float)
    order = np.argsort(placed, kind="stable")
    bound = low
    for index in order:
        placed[index] = max(placed[index], bound)
        bound = placed[index] + gap
    bound = high
    for index in order[::-1]:
        placed[index] = min(placed[index], bound)
        bound = placed[index] - gap
    return placed


def tips(**fields: str) -> list[alt.Tooltip]:
    """Tooltips: field="title", or field="title|number format"."""
    parts = [(field, *title.split("|")) for field, title in fields.items()]
    return [alt.Tooltip(name, title=title, type="quantitative", format=form[0]) if form else
            alt.Tooltip(name, title=title, type="nominal") for name, title, *form in parts]  # fmt: skip


def finish(chart: alt.Chart | alt.LayerChart, height: int, description: str) -> dict:
    """The specification: as wide as its container, axes and labels included."""
    fit = {"autosize": alt.AutoSizeParams(type="fit", contains="padding"), "padding": 5, "width": "container"}
    return chart.properties(height=height, description=description, **fit).to_dict()


def scored_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per finished run with what a dot of Figure 8 tells; x in million multiply-adds."""
    table = runs[RUN_FIELDS].assign(run=[Path(directory).name for directory in runs["directory"]])
    return table.assign(label=table["method"].map(spoken), x=table["flops"] / 1e6, minutes=table["seconds"] / 60)


def published_runs() -> pd.DataFrame:
    """The paper's Table 7 in the same columns as far as it has them; x in billion multiply-adds."""
    rows = [(m, spoken(m), flops, flops / 1e9, top1) for m, (flops, top1) in study.PAPER_TABLE7.items()]
    return pd.DataFrame(rows, columns=["method", "label", "flops", "x", "top1"])


def figure8(dots: pd.DataFrame, tooltip: list[alt.Tooltip], x: str, y: str, what: str) -> dict:
    """Accuracy against FLOPs: dots, a tick at each method's mean, a bar for the interval, Figure 8's lines."""
    rows = []
    for method, group in dots.groupby("method", sort=False):
        statistics = dict(zip(("mean", "low", "high"), study.t_interval(group["top1"]), strict=True))
        rows.append({"method": method, **group[["label", "x"]].iloc[0], "n": len(group), **statistics})
    means = pd.DataFrame(rows)
    several = means[means["n"] > 1]
    extent = pd.concat([several["low"], several["high"], dots["top1"]])
    room = max(0.08 * (extent.max() - extent.min()), 0.5)
    bottom, top = float(extent.min() - room), float(extent.max() + room)
    means["place"] = spread(means["mean"], LINE * (top - bottom) / HEIGHT, bottom + room / 2, top - room / 2)
    looks = style(means["method"])
    line = {"stroke": looks["stroke"]}
    wide, tall = ({"domain": span, "nice": False} for span in ([0, 1.08 * float(dots["x"].max())], [bottom, top]))
    across = alt.X("x:Q", title=x, scale=alt.Scale(**wide), axis=alt.Axis(tickCount=4, grid=False))
    upright = alt.Y("top1:Q", title=y, scale=alt.Scale(**tall, zero=False))
    layers = []
    points, joined = means.set_index("method")[["x", "mean"]], []
    for methods in study.figure8_lines(points["x"].to_dict()):
        here = points.loc[methods].reset_index()
        joined.append(here.join(here[["x", "mean"]].shift().set_axis(["x0", "y0"], axis="columns")).iloc[1:])
    if joined and len(ends := pd.concat(joined)):
        rules = alt.Chart(ends).mark_rule(opacity=0.55)
        layers.append(rules.encode(x=alt.X("x0:Q"), y=alt.Y("y0:Q"), x2="x:Q", y2="mean:Q", **line))
    if len(several):
        bars = alt.Chart(several).mark_rule(strokeWidth=2)
        ticks = alt.Chart(several).mark_tick(orient="horizontal", size=24, thickness=3, opacity=1, filled=True)
        layers.append(bars.encode(x="x:Q", y=alt.Y("low:Q"), y2="high:Q", **line))
        layers.append(ticks.encode(x="x:Q", y=alt.Y("mean:Q"), fill=looks["fill"]))
    layers.append(alt.Chart(dots).mark_point(size=90, opacity=1).encode(x=across, y=upright, tooltip=tooltip, **looks))
    names = alt.Chart(means).encode(x=alt.value("width"), y=alt.Y("place:Q"))
    layers.append(names.mark_point(size=70, opacity=1, xOffset=14).encode(**looks))
    layers.append(names.mark_text(align="left", dx=24, fontSize=12, color=INK).encode(text="label:N"))
    told = "; ".join(f"{row.label} {row.mean:.2f} % at {row.x:,.1f}, n = {row.n}" for row in means.itertuples())
    return finish(alt.layer(*layers), HEIGHT, f"{what}. {y} by {x}: {told}.")


def pair(contrast: str) -> str:
    """A contrast in print, with a minus sign: compound − depth."""
    return spoken(contrast).replace(" - ", " − ")


def forest(contrasts: pd.DataFrame, what: str) -> dict:
    """The contrasts: difference, interval, the margin of equivalence as a band, the paper's difference as diamond."""
    table = contrasts.assign(method=contrasts["contrast"].str.split(" - ").str[0])
    table["row"] = table["contrast"].map(pair) + ": " + table["verdict"]
    tooltip = tips(row="contrast", difference="difference|+.2f", low="from|+.2f", high="to|+.2f", p_holm="Holm's p|.3g")
    tooltip += tips(n="seeds", paper_difference="the paper's|+.1f", claim="claim")
    looks = style(table["method"])
    # Each row has its words above its marks, so that a narrow screen keeps its width for the marks.
    y = alt.Y("row:N", sort=list(table["row"]), axis=None)
    x = alt.X("difference:Q", title="difference (points of top-1)", scale=alt.Scale(padding=14))
    x.axis, low = alt.Axis(tickCount=5), {"yOffset": 8}
    band = alt.Chart(pd.DataFrame({"low": [-study.MARGIN], "high": [study.MARGIN]})).mark_rect(color=GREY, opacity=0.35)
    zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color=INK, opacity=0.6).encode(x="x:Q")
    words = alt.Chart(table).encode(x=alt.value(0), y=y, text="row:N")
    layers = [band.encode(x=alt.X("low:Q"), x2="high:Q"), zero]
    for look in ({"stroke": PAPER, "strokeWidth": 5, "strokeJoin": "round"}, {"color": INK}):
        layers.append(words.mark_text(align="left", dx=2, dy=-10, fontSize=12, **look))
    if len(spans := table.dropna(subset=["low", "high"])):
        bars = alt.Chart(spans).mark_rule(strokeWidth=2, **low)
        layers.append(bars.encode(x=alt.X("low:Q"), x2="high:Q", y=y, stroke=looks["stroke"], tooltip=tooltip))
    layers.append(alt.Chart(table).mark_point(size=100, opacity=1, **low).encode(x=x, y=y, tooltip=tooltip, **looks))
    if len(paper := table.dropna(subset="paper_difference")):
        diamonds = alt.Chart(paper).mark_point(shape="diamond", size=80, opacity=1, stroke=INK, filled=False, **low)
        layers.append(diamonds.encode(x=alt.X("paper_difference:Q"), y=y, tooltip=tooltip))
    told = "; ".join(f"{pair(row.contrast)} {row.difference:+.2f}: {row.verdict}" for row in table.itertuples())
    return finish(alt.layer(*layers), 46 * len(table), f"{what}: {told}.")


def curves(histories: dict[str, pd.DataFrame], runs: pd.DataFrame, column: str, title: str, what: str) -> dict:
    """A line per run over epochs. The chart's parameter `run` is the name of one run, or "" for all."""
    table = pd.concat(histories[name][["epoch", column]].assign(i=i) for i, name in enumerate(runs["run"]))
    table["v"] = [float(f"{value:.5g}") for value in table.pop(column)]
    about = runs[["run", "method", "label", "seed"]].assign(i=range(len(runs)))  # once for each run, for a small page
    known = alt.LookupData(about, "i", ["run", "method", "label", "seed"])
    base = alt.Chart(table).transform_lookup("i", known)
    looks, shown = style(runs["method"]), alt.when("run == '' || datum.run == run")
    x = alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, tickCount=6, format="d", grid=False))
    x.scale = alt.Scale(zero=False, nice=False, padding=6)
    at = {"x": x, "y": alt.Y("v:Q", title=title, scale=alt.Scale(zero=False))}
    methods = runs.drop_duplicates("method").set_index("method")["flops"]
    dashes = {method: [5, 3] if method.endswith("_matched") else [1, 0] for method in methods.index}
    for line in study.figure8_lines(
        {m: flops for m, flops in methods.items() if study.TIMES.fullmatch(m)}
    ):  # of one colour
        dashes |= zip(line, ([1, 0], [5, 3], [2, 2], [7, 2, 2, 2]) * len(line), strict=False)
    dashed = alt.StrokeDash("method:N", scale=alt.Scale(domain=[*dashes], range=[*dashes.values()]), legend=None)
    fading = {"opacity": shown.then(alt.value(0.9)).otherwise(alt.value(0.12)), "strokeDash": dashed}
    lines = base.mark_line(strokeWidth=1.8).encode(detail="run:N", stroke=looks["stroke"], **fading, **at)
    few = len(table) <= CROWDED
    some = "true" if few else f"datum.epoch == {table['epoch'].max()}"
    dots = base.transform_filter(f"datum.run == run || (run == '' && {some})").mark_point(
        size=45 if few else 15, opacity=1
    )
    dots = dots.encode(
        **at, **looks, tooltip=tips(label="method", run="run", seed="seed", epoch="epoch", v=f"{title}|.4g")
    )
    chart = alt.layer(lines, dots).add_params(alt.param(name="run", value=""))
    return finish(chart, 230, f"{what}, a line for each of {len(runs)} runs.")


def search_chart(candidates: pd.DataFrame, what: str) -> dict:
    """Minival top-1 of the candidates by cost; the best and the published look as the methods that use them."""
    best, top = candidates["top1"].idxmax(), candidates.loc[candidates["top1"].idxmax()]
    looks = {
        "best": (study.color("compound_searched"), SHAPES["compound_searched"]),
        "published": (study.color("compound"), SHAPES["compound"]),
        "other candidate": (GREY, SHAPES["baseline"]),
    }
    kind = np.where(candidates["published"], "published", "other candidate")
    table = candidates.assign(kind=np.where(candidates.index == best, "best", kind))
    present = [name for name in looks if name in set(table["kind"])]
    colors, shapes = (alt.Scale(domain=present, range=[looks[name][i] for name in present]) for i in (0, 1))
    tooltip = tips(candidate="candidate", alpha="alpha (depth)", beta="beta (width)", gamma="gamma (resolution)")
    tooltip += tips(flops="FLOPs|,", flops_ratio="FLOPs / baseline|.3f", params="parameters|,", px="pixels")
    tooltip += tips(top1="minival top-1 (%)|.2f", n="seeds", epochs="epochs")
    legend = {"legend": alt.Legend(orient="top", title=None)}
    axis = {"axis": alt.Axis(tickCount=5), "scale": alt.Scale(zero=False, padding=12)}
    chart = alt.Chart(table).mark_point(size=100, filled=True, opacity=0.9)
    chart = chart.encode(
        x=alt.X("flops_ratio:Q", title="FLOPs, as a multiple of the baseline's", **axis),
        y=alt.Y("top1:Q", title="minival top-1 (%)", **axis),
        color=alt.Color("kind:N", scale=colors, **legend),
        shape=alt.Shape("kind:N", scale=shapes, **legend),
        tooltip=tooltip,
    )
    told = f"the best is alpha {top.alpha:g}, beta {top.beta:g}, gamma {top.gamma:g} with {top.top1:.2f} %"
    return finish(chart, 260, f"{what}: {len(table)} candidates, {told}.")


# ---- 2. What the template gets -------------------------------------------------------------------------------------


def number(value: float, form: str = ".2f") -> str:
    """A number in print, or a dash where there is none."""
    return format(value, form) if math.isfinite(value) else "–"


def section(one: Study) -> dict:
    """What the template shows of a study: tables (None: not there), `charts` by name, what is missing beside."""
    view = {"study": one, "verdict": one.verdict or {}, "charts": {}, "runs": None, "figure7": None, "gaps": []}
    view["ablation"] = one.table("ablation")
    view |= {name: one.table(name) for name in ("table7", "contrasts", "search")}
    specs = {}
    if not one.finished.empty:
        view["runs"] = runs = scored_runs(one.finished)
        fields = tips(
            label="method", run="run", seed="seed", flops="FLOPs|,", params="parameters|,", resolution="pixels"
        )
        fields += tips(top1="top-1 (%)|.2f", seconds="seconds|,.0f", minutes="minutes|,.1f", device="device")
        what = f"{one.data}: {len(runs)} runs"
        specs["figure8"] = figure8(runs, fields, "FLOPs (million multiply-adds)", "test top-1 (%)", what)
        fields, what = tips(label="method", flops="FLOPs|,", top1="top-1 (%)|.1f"), "The paper's Table 7"
        x, y = "FLOPs (billion multiply-adds)", "ImageNet top-1 (%)"
        specs["paper"] = figure8(published_runs(), fields, x, y, f"{what}, one network each")
        histories, view["gaps"] = read_histories(one)
        view["curved"] = known = runs[runs["run"].isin(list(histories))]
        for column, title in {"train_loss": "training loss", "minival_top1": "minival top-1 (%)"}.items():
            if len(known):
                specs[column] = curves(histories, known, column, title, f"{one.data}: {title} by epoch")
        if one.has("figures/figure7.png"):
            picture = base64.b64encode((one.folder / "figures" / "figure7.png").read_bytes()).decode()
            networks = listed(dict.fromkeys(runs["label"]))
            text = f"Class activation maps on test images of {one.data}: the image, then a map for each network of"
            view["figure7"] = (picture, f"{text} {networks}, brighter where the network looks.")
    if view["contrasts"] is not None and "verdict" in view["contrasts"]:
        specs["contrasts"] = forest(view["contrasts"], f"{one.data}: differences of test top-1 in points")
    if view["search"] is not None:
        view["search"] = trained = view["search"].dropna(subset="top1").reset_index(drop=True)
        if len(trained):
            specs["search"] = search_chart(trained, f"{one.data}: minival top-1 by FLOPs")
    view["charts"] = {name: {"id": f"{one.name}-{name}", "spec": spec} for name, spec in specs.items()}
    return view


def read_histories(one: Study) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """History by run name of a study's finished runs, if any has two epochs; and in words what there is not."""
    found, gaps = {}, []
    for directory in map(Path, one.finished["directory"]):
        try:
            found[directory.name] = study.load_history(directory)
        except (OSError, ValueError):
            gaps.append(f"history.jsonl of {directory.name} is not there, or damaged.")
    if found and max(map(len, found.values())) < 2:
        return {}, [*gaps, "There are no learning curves: the runs have one epoch."]
    return found, gaps


# ---- 3. Notebooks --------------------------------------------------------------------------------------------------


def render_markdown(text: str) -> str:
    """Markdown as HTML. Where it has formulas pandoc renders it: MathML needs neither script nor network."""
    if MATH.search(text):
        options = {"format": "gfm+tex_math_dollars", "extra_args": ["--mathml", "--wrap=none"]}
        return pypandoc.convert_text(text, "html", **options)
    return MarkdownWithMath(renderer=IPythonRenderer(escape=False, exclude_anchor_links=True)).render(text)


def heading(cell: NotebookNode) -> str | None:
    """The last heading of a markdown cell, without its marks."""
    found = re.findall(r"^#{1,6} +(.+?)\s*$", cell["source"], re.MULTILINE) if cell["cell_type"] == "markdown" else []
    return found[-1] if found else None


def prepare(book: NotebookNode) -> NotebookNode:
    """Without widgets, which need a kernel; pictures with their cells' alternative text, else the heading above."""
    book["metadata"].pop("widgets", None)
    above = "the notebook"
    for cell in book["cells"]:
        above = heading(cell) or above
        alternative = cell["metadata"].get("alt", f"Figure: {above}")
        for output in cell.get("outputs", []):
            if output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None):
                output["data"] = {"text/markdown": "*Here are sliders where ipywidgets and a kernel run.*"}
            for kind in ("image/png", "image/jpeg"):
                output.get("metadata", {}).setdefault(kind, {}).setdefault("alt", alternative)
    return book


def convert(path: Path) -> tuple[str, str]:
    """Title and body in HTML of an executed notebook."""
    book = prepare(nbformat.read(path, as_version=4))
    title = next(filter(None, map(heading, book["cells"][:1])), path.stem)
    hidden = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    # What clean_html is asked to clean is Pygments' own output; it takes longer than all the rest.
    filters = {"markdown2html": render_markdown, "clean_html": lambda code: code}
    exporter = HTMLExporter(template_name="basic", filters=filters, **hidden)
    return title, exporter.from_notebook_node(book)[0]


# ---- 4. The page ---------------------------------------------------------------------------------------------------


@cache
def libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version that Altair writes for."""
    return vl_convert.javascript_bundle(vl_version=".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2]))


def device_title(folder: Path) -> str:
    """The device that results/throughput/NAME is of, in words."""
    path = folder / "device.json"
    return json.loads(path.read_text())["device"]["name"] if path.is_file() else folder.name


def build_page(studies: Sequence[Study], outcome: dict[str, str | None], output: Path, results: Path) -> None:
    """Write OUTPUT/index.html and OUTPUT/notebooks/{STUDY,DEVICE}/*.html."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.get_template("page.html")
    pygments = [Markup(HtmlFormatter(style=name).get_style_defs(".highlight")) for name in ("default", "github-dark")]
    groups = [(one.name, one.title, one.notebooks) for one in studies]
    for folder in sorted({path.parent for path in (results / "throughput").glob("*/*.ipynb")}):
        groups.append((folder.name, f"Throughput: {device_title(folder)}", sorted(folder.glob("*.ipynb"))))
    books = []
    for name, group, paths in groups:
        links = []
        for path in paths:
            title, body = convert(path)
            target = output / "notebooks" / name / f"{path.stem}.html"
            target.parent.mkdir(parents=True, exist_ok=True)
            about = {"title": title, "group": group, "body": Markup(body), "pygments": pygments}
            target.write_text(template.render(notebook=about), encoding="utf-8")
            links.append((f"notebooks/{name}/{target.name}", path.stem, title))
        books.append((group, links))
    views = [section(one) for one in studies]
    specs = {chart["id"]: chart["spec"] for view in views for chart in view["charts"].values()}
    # "</script>" in a string would end the element that holds it.
    packed = Markup(json.dumps(specs, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"))
    helpers = {"spoken": spoken, "number": number, "pair": pair, "margin": study.MARGIN, "ink": INK}
    helpers |= {"color": study.color, "shape": lambda method: SHAPES[study.family(method)]}
    told = {"outcome": outcome, "views": views, "books": books, "specs": packed, "libraries": Markup(libraries())}
    output.mkdir(parents=True, exist_ok=True)
    (output / "index.html").write_text(template.render(notebook=None, **told, **helpers), encoding="utf-8")
