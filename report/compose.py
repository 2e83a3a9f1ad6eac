"""make report: tables and figures from the runs' records; then README, report, poster and page from those.

    python report/compose.py [STUDY ...] [--results DIR] [--output DIR] [--keep-figures]

Without STUDY: all whose results are kept. Tables and figures are written under --results, the rest under --output.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import nbformat
import pypandoc
import segno
import typst
import yaml

import effnet_study as study
from evidence import Study, find_studies, listed, outcome, spoken, unknown_results
from page import build_page
from scale import build_scale

ROOT = study.ROOT
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # the figures' own: typst brings no sans
BEGIN, END = "<!-- results: made by make report -->", "<!-- results: end -->"


# ---- 1. Tables and figures -----------------------------------------------------------------------------------------


def make_figures(studies: Sequence[Study], results: Path) -> dict[str, str]:
    """Tables, figures and README.md of every study that has a finished run, by 05_analysis, two at a time.
    Returns, by the study's name, why that failed where it did."""

    elsewhere = {} if results == study.RESULTS else {"results": str(results)}  # a path of this machine

    def tables(one: Study) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (one.folder / "tables").glob("*") if path.is_file()}

    def analyse(one: Study) -> str | None:
        executed = one.folder / "notebooks" / "05_analysis.ipynb"
        new, before = executed.parent / "new" / executed.name, tables(one)
        try:
            study.run_notebook("05_analysis", new, {"profile": one.source, **elsewhere}, threads=1)
        except RuntimeError as error:
            return str(error)
        # With the same tables the executed notebook stays: here images or weights for its Figure 7 may be wanting.
        if not executed.is_file() or tables(one) != before:
            new.replace(executed)
        shutil.rmtree(new.parent)
        return None

    chosen = [one for one in studies if not one.finished.empty]
    with ThreadPoolExecutor(2) as pool:
        failures = dict(zip([one.name for one in chosen], pool.map(analyse, chosen), strict=True))
    return {name: why for name, why in failures.items() if why}


# ---- 2. What the documents get -------------------------------------------------------------------------------------


def alternative_texts() -> dict[str, str]:
    """Figure name to its text for people who do not see it, as the notebook cell that draws it has it."""
    texts = {}
    for path in sorted(study.NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if name := re.search(r'"figures" / "(\w+)"', cell.source):
                texts[name[1]] = cell.metadata.get("alt", "")
    return texts


def protocol(names: Sequence[str]) -> dict[str, str]:
    """Sections of PROTOCOL.md by their heading, in typst's markup: the general ones and those of the studies named."""
    text = (ROOT / "report" / "PROTOCOL.md").read_text(encoding="utf-8")
    sections = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        named = re.match(r"Study `(.+?)`", heading)
        if not named or named[1] in names:
            body = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", body)  # such links lead nowhere from a PDF
            options = {"format": "gfm", "extra_args": ["--wrap=none"]}
            sections[heading.replace("`", "")] = pypandoc.convert_text(body, "typst", **options)
    return sections


def describe(one: Study) -> dict:
    """A study as lib.typ knows it: names, what is missing, files that can be read, and from its records the recipe."""
    files = (
        path.relative_to(one.folder).as_posix()
        for kind in ("tables", "figures")
        for path in one.folder.glob(f"{kind}/*")
    )
    told = {
        "name": one.name,
        "title": one.title,
        "data": one.data,
        "purpose": one.profile.purpose if one.profile else None,
        "stamp": one.profile.stamp if one.profile else "unknown",
        "ablation_of": one.profile.ablation_of if one.profile else None,
        "missing": one.missing,
        "files": sorted(filter(one.has, files)),
        "record": None,
        "search": None,
    }
    if not one.finished.empty:
        record = study.read_record(one.finished["directory"].iloc[0])
        told["record"] = {name: record[name] for name in ("dataset", "config", "data", "versions")}
        told["record"]["commits"] = sorted({str(commit)[:10] for commit in one.finished["commit"]})
        told["devices"] = sorted(one.finished["device"].unique())
    if one.has(study.COEFFICIENTS):
        best = json.loads((one.folder / study.COEFFICIENTS).read_text(encoding="utf-8"))
        told["search"] = {
            "words": study.describe_search(best),
            **{k: best[k] for k in ("alpha", "beta", "gamma", "seeds")},
        }
    return told


def gather(studies: Sequence[Study], results: Path) -> dict:
    """What lib.typ calls facts: studies and their files, the outcome, colours, alternative texts, the protocol."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    repository = citation.get("repository-code")
    address, title = (
        (f"{repository}#readme", "README") if repository else (citation["references"][0]["url"], "the paper")
    )
    devices = [
        {"name": path.name, "files": sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())}
        for path in sorted((results / "throughput").glob("*"))
    ]
    methods = {*study.COLORS, *(method for one in studies if one.runs is not None for method in one.runs["method"])}
    return {
        "studies": [describe(one) for one in studies],
        "throughput": devices,
        "outcome": outcome(studies),
        "colors": {method: study.color(method) for method in sorted(methods)},
        "alt": alternative_texts(),
        "protocol": protocol([one.name for one in studies]),
        "repository": repository,
        "link": {"address": address, "title": title},
        "margin": study.MARGIN,
        "paper": {method: {"flops": flops, "top1": top1} for method, (flops, top1) in study.PAPER_TABLE7.items()},
    }


# ---- 3. The documents ----------------------------------------------------------------------------------------------


def compile_typst(
    source: Path, facts: Mapping, results: Path, figures: str = "pdf", standards: Sequence[str] = ()
) -> tuple[bytes, int]:
    """SOURCE.typ as a PDF, and its number of pages. What typst only warns of, say an unknown font, is an error."""
    code = segno.make(facts["link"]["address"], error="m", micro=False).svg_inline(border=2, scale=4)
    inputs = {"facts": json.dumps(facts), "results": results.resolve().as_posix(), "qr": code, "figures": figures}
    options = {"root": "/", "font_paths": [str(FONTS)], "ignore_system_fonts": True, "sys_inputs": inputs}
    pdf, warnings = typst.compile_with_warnings(str(source), format="pdf", pdf_standards=list(standards), **options)
    if warnings:
        raise RuntimeError("\n".join(f"{source}: {warning.message}" for warning in warnings))
    pages = json.loads(typst.query(str(source), "<pages>", field="value", one=True, **options))
    return pdf, pages


def results_block(studies: Sequence[Study], found: Mapping) -> str:
    """What the README says of the outcome, in Markdown."""
    lines = [BEGIN, f"**{found['headline']}**", ""]
    one = next((one for one in studies if one.name == found["study"]), None)
    if one:
        folder = f"results/{one.name}"
        lines += [
            f"This is {one.profile.stamp}. All of it: [report](report/report.pdf), [poster](poster/poster.pdf),",
            f"the page [report/index.html](report/index.html) with every run, and [{folder}]({folder}/README.md).",
            "",
            *table7_in_markdown(one),
            "",
        ]
        if one.has("figures/figure8.png"):
            lines += [f"![{alternative_texts()['figure8']}]({folder}/figures/figure8.png)", ""]
        lines += [f"Not there: {'; '.join(one.missing)}.", ""] if one.missing else []
    others = [
        f"[{other.title}](results/{other.name}/README.md) ({other.profile.stamp})"
        for other in studies
        if other is not one and other.profile and not other.finished.empty
    ]
    lines += [f"Also: {listed(others)}.", ""] if others else []
    if not any(other.profile and other.profile.purpose == "evidence" and not other.finished.empty for other in studies):
        lines += ["No study that could count as evidence has been run yet.", ""]
    return "\n".join([*lines[:-1], END])


def table7_in_markdown(one: Study) -> list[str]:
    """Lines of Table 7, ours beside the paper's."""
    table = one.table("table7")
    if table is None:
        return []
    heads = [
        "method",
        "FLOPs (million)",
        "n",
        "top-1 (%)",
        "95 % interval",
        "paper's FLOPs (billion)",
        "paper's top-1 (%)",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in table.itertuples():
        interval = f"{row.top1_low:.2f} to {row.top1_high:.2f}" if row.n > 1 else "one seed"
        paper = [f"{row.paper_flops / 1e9:.1f}", f"{row.paper_top1:.1f}"] if row.paper_top1 > 0 else ["", ""]
        cells = [spoken(row.method), f"{row.flops / 1e6:,.1f}", str(row.n), f"{row.top1:.2f}", interval, *paper]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def with_results(readme: str, block: str) -> str:
    """The README's text with the block between its two marks put in; ValueError if they are not there."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}, between which the results go")
    return before + block + after


def write_all(studies: Sequence[Study], results: Path, folder: Path) -> list[str]:
    """README.md, report/ and poster/ of these studies under `folder`; returns a line on each document."""
    facts = gather(studies, results)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(with_results(readme, results_block(studies, facts["outcome"])), encoding="utf-8")
    lines = []
    for name in ("report", "poster"):
        pdf, pages = compile_typst(ROOT / name / f"{name}.typ", facts, results)
        if name == "poster" and pages != 1:
            raise RuntimeError(
                f"poster/poster.typ: expected one page, got {pages}: something on it has become too long"
            )
        (folder / name).mkdir()
        (folder / name / f"{name}.pdf").write_bytes(pdf)
        lines.append(f"{name}/{name}.pdf: {pages} page{'s' * (pages > 1)}")
    build_page(studies, facts["outcome"], folder / "report", results)
    build_scale(folder / "report", results)
    return [*lines, "report/index.html", "report/scale.md", "README.md"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 if the analysis of a study failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="names or files of profiles")
    parser.add_argument("--results", type=Path, default=study.RESULTS, help="folder of results")
    parser.add_argument("--output", type=Path, default=ROOT, help="where README.md, report/ and poster/ are written")
    parser.add_argument("--keep-figures", action="store_true", help="take tables and figures as they are")
    chosen = parser.parse_args(arguments)
    names = chosen.studies or None
    failures = {} if chosen.keep_figures else make_figures(find_studies(names, chosen.results), chosen.results)
    studies = [
        dataclasses.replace(one, troubles=(f"an analysis of these runs: {failures[one.name]}",))
        if one.name in failures
        else one
        for one in find_studies(names, chosen.results)
    ]
    with tempfile.TemporaryDirectory() as folder:  # all of it or nothing
        lines = write_all(studies, chosen.results, Path(folder))
        shutil.rmtree(chosen.output / "report" / "notebooks", ignore_errors=True)  # also those of studies that are gone
        shutil.copytree(folder, chosen.output, dirs_exist_ok=True)
    print("\n".join(lines))
    for one in studies:
        for gap in one.missing:
            print(f"{one.name}, not there: {gap}", file=sys.stderr)
    if names is None and (unknown := unknown_results(chosen.results)):
        print(f"left out, name their profiles to tell of them: {', '.join(unknown)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
