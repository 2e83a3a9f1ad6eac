"""make report: tables and figures from the runs' records; then README, report, poster and page from those.

    python report/compose.py [STUDY ...] [--results DIR] [--output DIR] [--keep-figures]

Without STUDY: all whose results are kept. With --output nothing of the repository is written but what lies under DIR.
"""

import argparse
import json
import re
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
from effnet_lib import replace_file
from evidence import Study, find_studies, listed, outcome, spoken
from page import build_page

ROOT = study.ROOT
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # the figures' own: typst brings no sans
BEGIN, END = "<!-- results: made by make report -->", "<!-- results: end -->"


def make_figures(studies: Sequence[Study], results: Path) -> None:
    """Tables, figures and README.md of every study that has a finished run, by 05_analysis; two at a time."""

    def analyse(one: Study) -> None:
        with tempfile.TemporaryDirectory() as folder:
            parameters = {"profile": one.name, "results": str(results)}
            study.run_notebook("05_analysis", Path(folder) / "05_analysis.ipynb", parameters, threads=1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(analyse, [one for one in studies if not one.finished.empty]))


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
            sections[heading.replace("`", "")] = pypandoc.convert_text(
                body, "typst", format="gfm", extra_args=["--wrap=none"]
            )
    return sections


def gather(studies: Sequence[Study], results: Path) -> dict:
    """What lib.typ calls facts: studies and their files, the outcome, colours, alternative texts, the protocol."""
    described = []
    for one in studies:
        files = sorted(
            path.relative_to(one.folder).as_posix()
            for kind in ("tables", "figures", "runs", ".")
            for path in (one.folder / kind).glob("*")
            if path.is_file()
        )
        record = {} if one.finished.empty else study.read_record(one.finished["directory"].iloc[0])
        described.append(
            {
                "name": one.name,
                "title": one.title,
                "data": one.data,
                "claim": one.claim,
                "purpose": one.profile.purpose if one.profile else None,
                "stamp": one.profile.stamp if one.profile else "unknown",
                "files": files,
                "missing": one.missing,
                "dataset": record.get("dataset"),
                "config": record.get("config"),
                "versions": record.get("versions"),
                "devices": [] if one.finished.empty else sorted(one.finished["device"].unique()),
                "search": study.describe_search(json.loads((one.folder / study.COEFFICIENTS).read_text()))
                if one.has(study.COEFFICIENTS)
                else None,
            }
        )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    repository = citation.get("repository-code")
    address, title = (
        (f"{repository}#readme", "README") if repository else (citation["references"][0]["url"], "the paper")
    )
    devices = [
        {"name": path.name, "files": sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())}
        for path in sorted((results / "throughput").glob("*"))
    ]
    return {
        "studies": described,
        "throughput": devices,
        "outcome": outcome(studies),
        "colors": study.COLORS,
        "alt": alternative_texts(),
        "protocol": protocol([one.name for one in studies]),
        "repository": repository,
        "link": {"address": address, "title": title},
        "margin": study.MARGIN,
        "paper": {m: {"flops": f, "top1": t} for m, (f, t) in study.PAPER_TABLE7.items()},
    }


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
    one = next((one for one in studies if one.name == found["study"]), None)
    lines = [BEGIN, f"**{found['headline']}**", ""]
    if one:
        folder = f"results/{one.name}"
        lines += [
            f"So far this is {one.profile.stamp}. All of it: [report](report/report.pdf), [poster](poster/poster.pdf),",
            f"the page [report/index.html](report/index.html) with every run, and [{folder}]({folder}/README.md).",
            "",
            *table7_in_markdown(one),
            "",
            f"![{alternative_texts()['figure8']}]({folder}/figures/figure8.png)",
            "",
        ]
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="names of profiles; all whose results are kept")
    parser.add_argument("--results", type=Path, default=study.RESULTS, help="folder of results")
    parser.add_argument("--output", type=Path, default=ROOT, help="where report/, poster/ and README.md are written")
    parser.add_argument("--keep-figures", action="store_true", help="take tables and figures as they are")
    chosen = parser.parse_args(arguments)
    studies = find_studies(chosen.studies or None, chosen.results)
    if not chosen.keep_figures:
        make_figures(studies, chosen.results)
        studies = find_studies(chosen.studies or None, chosen.results)
    facts = gather(studies, chosen.results)
    write(
        chosen.output / "README.md",
        with_results(
            (ROOT / "README.md").read_text(encoding="utf-8"), results_block(studies, facts["outcome"])
        ).encode(),
    )
    for name in ("report", "poster"):
        pdf, pages = compile_typst(ROOT / name / f"{name}.typ", facts, chosen.results)
        if name == "poster" and pages != 1:
            raise RuntimeError(
                f"poster/poster.typ: expected one page, got {pages}: something on it has become too long"
            )
        write(chosen.output / name / f"{name}.pdf", pdf)
        print(f"{name}/{name}.pdf: {pages} page{'s' * (pages > 1)}")
    build_page(studies, facts["outcome"], chosen.output / "report", chosen.results)
    print("report/index.html, README.md")
    for one in studies:
        for gap in one.missing:
            print(f"{one.name}: {gap}", file=sys.stderr)


def write(path: Path, data: bytes) -> None:
    """The file whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write_bytes(data))


if __name__ == "__main__":
    main()
