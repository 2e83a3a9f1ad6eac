"""Report, poster and README: as results/ has it, whole for those who do not see, honest about what is missing."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from pypdf import PdfReader

import effnet_study as study
from compose import (
    BEGIN,
    END,
    alternative_texts,
    compile_typst,
    gather,
    main,
    make_figures,
    protocol,
    results_block,
    with_results,
)
from evidence import Study, find_studies, listed, outcome

ROOT = study.ROOT
REPORT, POSTER = ROOT / "report" / "report.typ", ROOT / "poster" / "poster.typ"
CLAIM = "compound scaling beats each single axis at the published coefficients"


def text_of(pdf: bytes) -> str:
    """All words of a PDF in one line."""
    return " ".join(" ".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages).split())


@pytest.fixture(scope="module")
def facts():
    return gather(find_studies(), study.RESULTS)


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """A folder with everything that `make report` writes, from tables and figures as they are committed."""
    folder = tmp_path_factory.mktemp("rebuilt")
    main(["--keep-figures", "--output", str(folder)])
    return folder


# ---- the committed files are those that results/ gives -------------------------------------------------------------


def test_committed_documents_are_those_that_results_give(rebuilt):
    made = [path.relative_to(rebuilt) for path in sorted(rebuilt.rglob("*")) if path.is_file()]
    assert {Path("report/report.pdf"), Path("poster/poster.pdf"), Path("report/index.html"), Path("README.md")} < set(
        made
    )
    old = [
        str(path)
        for path in made
        if not (ROOT / path).is_file() or (ROOT / path).read_bytes() != (rebuilt / path).read_bytes()
    ]
    assert not old, f"not as results/ gives them: {', '.join(old)}. Run make report and commit what it writes"


def test_committed_tables_are_those_that_the_records_give(tmp_path):
    name = "cifar10-cpu"
    shutil.copytree(study.RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("notebooks", "*.pdf", "*.svg"))
    for table in (tmp_path / name / "tables").iterdir():
        if table.stem in ("table7", "contrasts", "verdict", "mistakes"):
            table.unlink()
    make_figures(find_studies([name], tmp_path), tmp_path)
    for table in ("table7", "contrasts", "mistakes"):
        new, old = (pd.read_csv(folder / name / "tables" / f"{table}.csv") for folder in (tmp_path, study.RESULTS))
        pd.testing.assert_frame_equal(new, old)
    new, old = (json.loads((f / name / "tables" / "verdict.json").read_text()) for f in (tmp_path, study.RESULTS))
    assert new["claims"] == old["claims"] and new["words"] == old["words"]
    assert (tmp_path / name / "figures" / "figure8.pdf").is_file()


def test_every_score_of_table_7_is_printed(rebuilt, facts):
    report, poster = (text_of((rebuilt / name / f"{name}.pdf").read_bytes()) for name in ("report", "poster"))
    table = pd.read_csv(study.RESULTS / facts["outcome"]["study"] / "tables" / "table7.csv")
    for row in table.itertuples():
        assert f"{row.top1:.2f}" in report and f"{row.top1_low:.2f}" in report and f"{row.flops / 1e6:.1f}" in report
        assert f"{row.top1:.1f}" in poster
        assert f"| {row.top1:.2f} |" in (rebuilt / "README.md").read_text()
    for words in (facts["outcome"]["headline"], facts["outcome"]["prefix"]):
        assert words in report and words.rstrip(".") in poster


def test_protocol_is_printed_whole():
    sections = protocol(["cifar10-cpu"])
    assert {"The question", "What holds for every study", "Deviations"} < set(sections)
    assert not any("tiny-imagenet" in heading for heading in sections)
    assert "[1.9, 2.1]" in "".join(sections.values()).replace("\\", "")


# ---- for people who do not see ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [REPORT, POSTER], ids=["report", "poster"])
def test_documents_pass_the_rules_of_pdf_ua(source, facts):
    """Headings in order, a title, an alternative text for every figure and equation: typst refuses what has none."""
    pdf, _ = compile_typst(source, facts, study.RESULTS, figures="svg", standards=["ua-1"])
    assert PdfReader(io.BytesIO(pdf)).trailer["/Root"]["/MarkInfo"]["/Marked"]


@pytest.mark.parametrize("name", ["report", "poster"])
def test_committed_documents_have_title_language_and_tags(name):
    pdf = PdfReader(ROOT / name / f"{name}.pdf")
    root = pdf.trailer["/Root"]
    assert "compound scaling" in pdf.metadata.title and root["/Lang"] == "en" and "/StructTreeRoot" in root


def test_every_figure_of_a_notebook_has_an_alternative_text():
    for path in sorted(study.NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "plt.subplots(" in cell.source:
                assert len(cell.metadata.get("alt", "")) > 40, f"{path.name}, {cell.id}: no alt in its metadata"
    drawn = {path.stem for path in study.RESULTS.glob("*/figures/*.pdf")}
    assert drawn <= set(alternative_texts())


# ---- the outcome in words ------------------------------------------------------------------------------------------


def made_study(folder: Path, verdicts: list[str], purpose: str = "evidence") -> Study:
    """A study with the verdicts of compound minus depth, width, resolution."""
    (folder / "tables").mkdir(parents=True)
    rows = [
        {"contrast": f"compound - {axis}", "claim": CLAIM, "verdict": verdict}
        for axis, verdict in zip(("depth", "width", "resolution"), verdicts, strict=True)
    ]
    pd.DataFrame(rows).to_csv(folder / "tables" / "contrasts.csv", index=False)
    (folder / "tables" / "verdict.json").write_text(json.dumps({"claims": {CLAIM: study.overall(verdicts)}}))
    profile = dataclasses.replace(study.load_profile("cifar10-cpu"), purpose=purpose, title="Images")
    return Study("images", folder, profile, pd.DataFrame({"status": ["missing"], "method": "depth", "seed": 0}))


@pytest.mark.parametrize(
    ("verdicts", "purpose", "prefix", "headline"),
    [
        (
            ["reproduced"] * 3,
            "evidence",
            "[Re]",
            "Compound scaling wins on Images: compound scaling beats depth, width and resolution.",
        ),
        (
            ["reproduced", "inconclusive", "not reproduced"],
            "evidence",
            "[¬Re]",
            "Compound scaling does not win on Images: compound scaling beats depth, and does not beat resolution, and "
            "cannot be told from width.",
        ),
        (
            ["reproduced", "reproduced", "inconclusive"],
            "evidence",
            "[Re: undecided]",
            "Undecided on Images: compound scaling beats depth and width, and cannot be told from resolution.",
        ),
        (
            ["reproduced"] * 3,
            "exploratory",
            "[Re: undecided]",
            "Undecided on Images: compound scaling beats depth, width and resolution.",
        ),
    ],
)
def test_title_and_headline_follow_from_the_verdict(tmp_path, verdicts, purpose, prefix, headline):
    found = outcome([made_study(tmp_path / "images", verdicts, purpose)])
    assert (found["prefix"], found["headline"]) == (prefix, headline)


def test_evidence_decides_before_exploration(tmp_path):
    weak = made_study(tmp_path / "weak", ["reproduced"] * 3, "exploratory")
    strong = made_study(tmp_path / "strong", ["not reproduced"] * 3)
    assert outcome([strong, weak])["prefix"] == "[¬Re]"
    assert [one.profile.purpose for one in find_studies()] == sorted(
        (one.profile.purpose for one in find_studies()), key=["evidence", "exploratory", "check"].index
    )


def test_new_verdicts_rewrite_title_and_summary(tmp_path, facts):
    """Another verdict.json, and nothing else, gives another report."""
    name = facts["outcome"]["study"]
    shutil.copytree(study.RESULTS / name, tmp_path / name)
    for table, old in (("contrasts.csv", "inconclusive"), ("verdict.json", "inconclusive")):
        path = tmp_path / name / "tables" / table
        path.write_text(path.read_text().replace(old, "reproduced"))
    changed = gather(find_studies([name], tmp_path), tmp_path)
    pdf, _ = compile_typst(REPORT, changed, tmp_path)
    assert "at the published coefficients: reproduced" in text_of(pdf)
    assert "at the published coefficients: inconclusive" not in text_of(pdf)


# ---- what is missing is said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nonesuch"], "There is no profile nonesuch."),
        (["food101"], "No run of food101 is finished. To run it: make study PROFILE=food101"),
        ([], "nothing to decide yet"),
    ],
)
def test_documents_without_results_say_so(tmp_path, names, said):
    studies = find_studies(names, tmp_path)
    empty = gather(studies, tmp_path)
    report, pages = compile_typst(REPORT, empty, tmp_path)
    assert said in text_of(report) and "No study has" in text_of(report) and pages < 8
    poster, pages = compile_typst(POSTER, empty, tmp_path)
    assert "nothing to decide yet" in text_of(poster) and pages == 1
    assert "nothing to decide yet" in results_block(studies, empty["outcome"])


def test_one_seed_and_missing_tables_are_told(tmp_path):
    name = "cifar10-smoke"
    shutil.copytree(study.RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("notebooks", "verdict.json"))
    studies = find_studies([name], tmp_path)
    assert any("the verdict (tables/verdict.json) is not there" in gap for gap in studies[0].missing)
    assert any("One seed alone, so no interval: baseline, depth" in gap for gap in studies[0].missing)
    for source in (REPORT, POSTER):
        pdf, _ = compile_typst(source, gather(studies, tmp_path), tmp_path)
        assert "one seed" in text_of(pdf).lower()


def test_a_poster_that_overflows_is_noticed(facts):
    """Too long a text goes on silently on a second page; compose.py refuses it by this number."""
    long = facts | {"outcome": facts["outcome"] | {"headline": "A very long headline. " * 60}}
    assert compile_typst(POSTER, long, study.RESULTS)[1] > 1


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="README.md: expected the lines"):
        with_results("# No marks", "block")
    assert with_results(f"a\n{BEGIN}\nold\n{END}\nb", f"{BEGIN}\nnew\n{END}") == f"a\n{BEGIN}\nnew\n{END}\nb"


def test_lists_read_like_sentences():
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
