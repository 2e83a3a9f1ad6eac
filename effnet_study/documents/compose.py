"""make report: tables and figures from the runs' records, then README, report, poster and page from these.

    python -m effnet_study.documents.compose [STUDY] [--results DIR] [--output DIR] [--keep-figures]

The profiles that extend the study are part of its documents.
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import matplotlib
import segno
import typer
import typst
import yaml

from effnet_study.analysis.architecture import worth_of_surplus
from effnet_study.analysis.statistics import MARGIN
from effnet_study.analysis.summary import devices, short_table7, surplus
from effnet_study.coefficients import COEFFICIENTS, describe_search, load_coefficients
from effnet_study.documents.evidence import Study, alternative_texts, load_study, outcome, pilot_table
from effnet_study.documents.page import build_page
from effnet_study.documents.scale import describe_scale, load_facts
from effnet_study.documents.templates import fill_in
from effnet_study.execution.notebook import run_notebook
from effnet_study.files import RESULTS, ROOT, in_markdown, load_history, plain, print_any_text
from effnet_study.methods import COLORS, PAPER_TABLE7, color
from effnet_study.profile import load_profile
from effnet_study.record import read_record

DEFAULT = "pocket"  # the study that the committed documents are about
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # the fonts of the figures: typst has no sans-serif font
BEGIN, END = "<!-- results: made by make report -->", "<!-- results: end -->"
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def make_figures(study: Study) -> dict[str, str]:
    """Execute 05_analysis for the study and its extensions, where runs are finished, two at a time; for the study also
    00_architecture if its table is missing, and then 08_trained_networks. Return errors by the name of the study."""
    failures = {}

    def execute(task: tuple[Study, str, dict]) -> None:
        try:
            _execute(*task)
        except RuntimeError as error:
            failures[task[0].name] = str(error)

    tasks = [(each, "05_analysis", {}) for each in (study, *study.extensions) if not each.finished.empty]
    if not study.has("tables/table7_cost.csv"):  # the first finding, which needs no run
        tasks.append((study, "00_architecture", {"explorer": False}))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(execute, tasks))
    if not study.finished.empty and study.name not in failures:  # after 05, whose tables it may not take for its own
        execute((study, "08_trained_networks", {}))
    return failures


def _execute(study: Study, notebook: str, parameters: Mapping[str, object]) -> None:
    """Execute a notebook for a study. The old one stays if the tables and Figure 8 are the same: the images or weights
    for its Figure 7 may be missing here."""
    executed = study.study_dir / "notebooks" / f"{notebook}.ipynb"
    before = _shown(study)
    new = executed.parent / f"new_{notebook}" / executed.name
    parameters = {"profile": study.profile.source or study.name, **parameters}
    if study.results != RESULTS:  # keeps paths of this machine out
        parameters["results"] = str(study.results)
    run_notebook(notebook, new, parameters, threads=1)
    if not executed.is_file() or before != _shown(study):
        new.replace(executed)
    shutil.rmtree(new.parent)


def _shown(study: Study) -> dict[Path, bytes]:
    """Return the files by which two analyses are compared. Figure 8 also has runs of the study's extensions."""
    files = [*study.study_dir.glob("tables/*"), *study.study_dir.glob("figures/figure8.svg")]
    return {path: path.read_bytes() for path in files}


def describe(study: Study) -> dict:
    """Return the facts of a study for lib.typ: names, progress, claims, what is missing, files, the recipe."""
    files = [path.relative_to(study.study_dir).as_posix() for path in study.study_dir.glob("*/*.*")]
    facts = {
        "name": study.name,
        "title": plain(study.profile.title),
        "stamp": study.profile.stamp,
        "kind": study.kind,
        "data": study.data,
        "images": study.profile.data.name,
        "planned": len(study.runs),
        "finished": len(study.finished),
        "missing": study.missing,
        "claims": study.claims,
        "files": sorted(file for file in files if file.startswith(("tables/", "figures/"))),
        "record": None,
        "search": None,
    }
    if not study.finished.empty:
        commits = sorted({str(commit)[:10] for commit in study.finished["commit"]})
        facts["record"] = read_record(study.finished["run_dir"].iloc[0]) | {"commits": commits}
        facts["devices"] = devices(study.finished)
        facts["hours"] = float(study.finished["seconds"].sum() / 3600)
        losses = [load_history(run_dir)["minival_loss"] for run_dir in study.finished["run_dir"]]
        facts["overfitted"] = int(sum(loss.min() < loss.iloc[-1] for loss in losses))
    if study.has(COEFFICIENTS):
        facts["search"] = describe_search(load_coefficients(study.profile, study.study_dir))
    return facts


def gather(study: Study) -> dict:
    """Return what lib.typ calls facts: the study, its extensions, the outcome, colours, alternative texts."""
    measured = [
        {"name": path.name, "files": [file.relative_to(path).as_posix() for file in sorted(path.rglob("*.*"))]}
        for path in sorted(study.results.glob("throughput/*"))
    ]
    costs = study.table("table7_cost")
    methods = {*COLORS, *(method for each in (study, *study.extensions) for method in each.profile.methods)}
    return {
        "study": describe(study),
        "extensions": [describe(each) for each in study.extensions],
        "scale": study.profile.scale,
        "recipe": dict(study.profile.config()),
        "baseline": {"depth": study.profile.baseline.depth, "width": study.profile.baseline.width},
        "pilots": pilot_table(study),
        "worth": {} if costs is None else worth_of_surplus(costs).to_dict("index"),
        "throughput": measured,
        "outcome": outcome(study),
        "colors": {method: color(method) for method in sorted(methods)},
        "alt": alternative_texts(),
        "repository": yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")).get("repository-code"),
        "margin": MARGIN,
        "paper": {method: {"flops": flops, "top1": top1} for method, (flops, top1) in PAPER_TABLE7.items()},
    }


def compile_typst(
    source: Path, facts: Mapping, results: Path, figures: str = "pdf", standards: Sequence[str] = ()
) -> tuple[bytes, int]:
    """Compile SOURCE.typ. Return the PDF and its number of pages. RuntimeError for typst's warnings, such as an unknown
    font.

    figures: the format of the figures; the standard "ua-1" refuses all but svg.
    """
    text = json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace").decode()  # of names that are not UTF-8
    inputs = {"facts": text, "results": results.resolve().as_posix(), "figures": figures}
    if facts["repository"]:
        inputs["qr"] = segno.make(facts["repository"], error="m", micro=False).svg_inline(border=2, scale=4)
    options = {"root": "/", "font_paths": [str(FONTS)], "ignore_system_fonts": True, "sys_inputs": inputs}
    pdf, warnings = typst.compile_with_warnings(str(source), format="pdf", pdf_standards=list(standards), **options)
    if warnings:
        raise RuntimeError("\n".join(f"{source}: {warning.message}" for warning in warnings))
    return pdf, json.loads(typst.query(str(source), "<pages>", field="value", one=True, **options))


def results_block(study: Study) -> str:
    """Return the README's section of results, in Markdown, between its two marks."""
    rows, words = study.table("table7"), {name: in_markdown(text) for name, text in outcome(study).items()}
    values = {"study": study, "outcome": words, "alt": alternative_texts(), "rows": rows}
    values["pilots"] = sum(len(row["scores"]) for row in pilot_table(study))
    values["started"] = [each for each in study.extensions if not each.finished.empty]
    if rows is not None:
        values |= {"table7": short_table7(rows), "surplus": surplus(rows, study.table("table7_cost"))}
        values |= {"hours": rows["seconds"].sum() / 3600, "devices": devices(study.finished)}
    return f"{BEGIN}\n{fill_in('readme-template.md', **values)}{END}"


def with_results(readme: str, block: str) -> str:
    """Replace what is between the two marks in the README's text. ValueError if the marks are missing."""
    text, found = re.subn(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, readme, flags=re.DOTALL)
    if not found:
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r} around the results")
    return text


def write_all(study: Study, output: Path) -> list[str]:
    """Write README.md, report/ and poster/ under `output`. Return a line about each document."""
    facts, lines = gather(study), []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (output / "README.md").write_text(with_results(readme, results_block(study)), encoding="utf-8")
    for name in ("report", "poster"):
        pdf, pages = compile_typst(ROOT / name / f"{name}.typ", facts, study.results)
        if name == "poster" and pages != 1:
            raise RuntimeError(f"poster/poster.typ: expected one page, got {pages}: something on it is too long")
        (output / name).mkdir()
        (output / name / f"{name}.pdf").write_bytes(pdf)
        lines.append(f"{name}/{name}.pdf, pages: {pages}")
    build_page(study, output / "report")
    scale = describe_scale(load_facts(), load_profile("imagenet"))
    (output / "report" / "scale.md").write_text(scale, encoding="utf-8")
    return [*lines, "report/index.html", "report/scale.md", "README.md"]


@app.command()
def main(
    study: Annotated[str, typer.Argument(help="name or file of a profile")] = DEFAULT,
    results: Annotated[Path, typer.Option(help="folder of results", show_default=False)] = RESULTS,
    output: Annotated[Path, typer.Option(help="where README.md, report/ and poster/ go", show_default=False)] = ROOT,
    keep_figures: Annotated[bool, typer.Option("--keep-figures", help="use tables and figures as they are")] = False,
) -> None:
    """Make tables and figures from the runs' records, under --results, then README, report, poster and page, under
    --output. The exit status is 1 if the analysis of a study failed."""
    print_any_text()
    profile, results = load_profile(study), results.absolute()
    failures = {} if keep_figures else make_figures(load_study(profile, results))
    found = load_study(profile, results, failures)  # with the new tables
    with tempfile.TemporaryDirectory() as folder:  # so that all documents are replaced, or none
        lines = write_all(found, Path(folder))
        shutil.rmtree(output / "report" / "notebooks", ignore_errors=True)  # also of studies that are gone
        shutil.copytree(folder, output, dirs_exist_ok=True)
    print("\n".join(lines))
    for each in (found, *found.extensions):
        for gap in each.missing:
            print(f"{each.name}, missing: {gap}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
