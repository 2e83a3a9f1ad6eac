"""Report, poster and README: as results/ has it, whole for those who do not see, honest about what is missing."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import typst
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
    write_all,
)
from evidence import Study, find_studies, listed, outcome, unknown_results

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
    assert not {path.relative_to(ROOT) for path in (ROOT / "report" / "notebooks").rglob("*.html")} - set(made)
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
    executed = tmp_path / name / "notebooks" / "05_analysis.ipynb"
    assert executed.is_file() and not (executed.parent / "new").exists()
    executed.write_text("kept as long as the tables are the same")
    assert make_figures(find_studies([name], tmp_path), tmp_path) == {}
    assert executed.read_text().startswith("kept")


def test_every_score_of_table_7_is_printed(rebuilt, facts):
    report, poster = (text_of((rebuilt / name / f"{name}.pdf").read_bytes()) for name in ("report", "poster"))
    table = pd.read_csv(study.RESULTS / facts["outcome"]["study"] / "tables" / "table7.csv")
    for row in table.itertuples():
        assert f"{row.top1:.2f}" in report and f"{row.top1_low:.2f}" in report and f"{row.flops / 1e6:.1f}" in report
        assert f"{row.top1:.1f}" in poster
        assert f"| {row.top1:.2f} |" in (rebuilt / "README.md").read_text()
    for words in (facts["outcome"]["headline"], facts["outcome"]["prefix"]):
        assert words in report and words in poster
    assert 6 <= len(PdfReader(rebuilt / "report" / "report.pdf").pages) <= 10


def test_what_a_change_of_the_recipe_does_is_printed_beside_the_mistakes(rebuilt, facts):
    report, changed = text_of((rebuilt / "report" / "report.pdf").read_bytes()), False
    for path in sorted(study.RESULTS.glob("*/tables/ablation.csv")):
        for row in pd.read_csv(path).itertuples():
            changed = True
            assert f"{row.as_it_is:.2f} {row.changed:.2f} {row.difference:+.2f}".replace("-", "−") in report
        one = next(one for one in facts["studies"] if one["name"] == path.parents[1].name)
        assert one["ablation_of"] and facts["outcome"]["study"] != one["name"]
    assert ("with the learning rate left high" in report) != changed


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


def made_study(folder: Path, verdicts: list[str], purpose: str = "evidence", n: int = 5) -> Study:
    """A study of n seeds with the verdicts of compound minus depth, width, resolution."""
    (folder / "tables").mkdir(parents=True)
    rows = [
        {"contrast": f"compound - {axis}", "claim": CLAIM, "verdict": verdict, "n": n, "difference": difference}
        for axis, verdict, difference in zip(("depth", "width", "resolution"), verdicts, (3, 2.25, -1), strict=True)
    ]
    pd.DataFrame(rows).to_csv(folder / "tables" / "contrasts.csv", index=False)
    (folder / "tables" / "verdict.json").write_text(json.dumps({"claims": {CLAIM: study.overall(verdicts)}}))
    profile = dataclasses.replace(study.load_profile("cifar10-cpu"), purpose=purpose)
    runs = pd.DataFrame({"status": "finished", "method": "compound", "seed": range(n), "data": folder.name.title()})
    return Study(folder.name, folder, profile, runs)


SIDES = "is 3.0 points above depth, 2.2 above width and 1.0 below resolution."


@pytest.mark.parametrize(
    ("verdicts", "purpose", "n", "prefix", "lead"),
    [
        (
            ["reproduced"] * 3,
            "evidence",
            5,
            "[Re]",
            "Compound scaling wins on Images at the published coefficients: it",
        ),
        (["reproduced", "inconclusive", "not reproduced"], "evidence", 5, "[¬Re]", "Compound scaling does not win on"),
        (["reproduced", "reproduced", "inconclusive"], "evidence", 5, "[Re: undecided]", "Undecided on Images at the"),
        (["reproduced"] * 3, "evidence", 4, "[Re: undecided]", "Undecided on Images at the published coefficients:"),
        (["reproduced"] * 3, "exploratory", 5, "[Re: undecided]", "Undecided on Images at the published coefficients:"),
    ],
)
def test_title_and_headline_follow_from_the_verdict(tmp_path, verdicts, purpose, n, prefix, lead):
    found = outcome([made_study(tmp_path / "images", verdicts, purpose, n)])
    assert found["prefix"] == prefix
    assert found["headline"].startswith(lead) and found["headline"].endswith(SIDES)


def test_matched_flops_decide_before_published_coefficients_and_those_before_other_budgets(tmp_path):
    one = made_study(tmp_path / "images", ["reproduced"] * 3)
    at = "compound scaling beats each single axis at {}".format
    costs = ["the published coefficients", "matched FLOPs", "about 2 times the baseline's FLOPs"]
    costs += ["about 8 times the baseline's FLOPs"]
    for removed, expected in ((0, 1), (1, 0), (2, 3)):  # so many of: matched FLOPs, published coefficients
        left = [cost for cost in costs if cost not in ("matched FLOPs", "the published coefficients")[:removed]]
        claims = dict.fromkeys(map(at, left), "reproduced")
        (one.folder / "tables" / "verdict.json").write_text(json.dumps({"claims": claims}))
        assert dataclasses.replace(one).claim == at(costs[expected])


def test_evidence_decides_before_exploration(tmp_path):
    weak = made_study(tmp_path / "weak", ["reproduced"] * 3, "exploratory")
    strong = made_study(tmp_path / "strong", ["not reproduced"] * 3)
    assert outcome([weak, strong])["prefix"] == "[¬Re]" and outcome([weak, strong])["study"] == "strong"
    order = [one.profile.purpose for one in find_studies()]
    assert order == sorted(order, key=["evidence", "exploratory", "check"].index)


def test_studies_that_disagree_are_both_told(tmp_path):
    one, other = (
        made_study(tmp_path / name, [v] * 3) for name, v in (("sea", "reproduced"), ("sky", "not reproduced"))
    )
    found = outcome([one, other])
    assert found["prefix"] == "[Re: mixed]"
    assert "wins on Sea" in found["headline"] and "does not win on Sky" in found["headline"]


def test_tables_of_other_runs_decide_nothing(tmp_path):
    one = made_study(tmp_path / "images", ["reproduced"] * 3)
    pd.DataFrame({"method": ["compound"], "n": [3]}).to_csv(one.folder / "tables" / "table7.csv", index=False)
    assert outcome([one])["study"] is None and "tables of these very runs" in "; ".join(one.missing)


def test_new_verdicts_rewrite_summary_and_results(tmp_path, facts):
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
        (["nonesuch"], "there is no profile nonesuch; those there are"),
        (["food101"], "no run of food101 is finished; to run it: make study PROFILE=food101"),
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
    assert any(gap.startswith("the verdict (tables/verdict.json)") for gap in studies[0].missing)
    assert any("for want of a second seed: baseline, depth" in gap for gap in studies[0].missing)
    for source in (REPORT, POSTER):
        pdf, _ = compile_typst(source, gather(studies, tmp_path), tmp_path)
        assert "one seed" in text_of(pdf).lower()


@pytest.mark.parametrize("file", ["table7.csv", "contrasts.csv", "verdict.json", "table7_cost.csv"])
@pytest.mark.parametrize("content", [None, "", '{"claims": {"comp'])
def test_damaged_and_missing_tables_do_not_stop_the_documents(tmp_path, file, content):
    name = "cifar10-cpu"
    keep = shutil.ignore_patterns("notebooks", "search*", "pilots", "*.svg", "*.png")
    shutil.copytree(study.RESULTS / name, tmp_path / name, ignore=keep)
    path = tmp_path / name / "tables" / file
    path.unlink() if content is None else path.write_text(content)
    studies = find_studies([name], tmp_path)
    told = gather(studies, tmp_path)
    for source in (REPORT, POSTER):
        assert compile_typst(source, told, tmp_path)[1] >= 1
    if file != "table7_cost.csv" and not (file.endswith("csv") and content):
        assert any(file in gap for gap in studies[0].missing)


def test_a_baseline_that_diverged_is_a_row_less(tmp_path):
    name = "cifar10-cpu"
    shutil.copytree(study.RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("notebooks", "*.svg"))
    for table in ("table7.csv", "contrasts.csv"):
        path = tmp_path / name / "tables" / table
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "baseline" not in line))
    for run in (tmp_path / name / "runs").glob("baseline_*"):
        shutil.rmtree(run)
    studies = find_studies([name], tmp_path)
    assert "baseline, seeds 0, 1 and 2 (missing)" in studies[0].missing
    for source in (REPORT, POSTER):
        assert "compound" in text_of(compile_typst(source, gather(studies, tmp_path), tmp_path)[0])


def test_a_table_too_long_for_the_poster_is_set_smaller_or_refused(tmp_path):
    name = "cifar10-cpu"
    shutil.copytree(study.RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("notebooks", "*.svg"))
    path = tmp_path / name / "tables" / "table7.csv"
    table = pd.read_csv(path)
    told = gather(find_studies([name], tmp_path), tmp_path)
    pd.concat([table.head(7)] * 2).to_csv(path, index=False)  # what Figure 8's thirteen networks need, and one more
    assert compile_typst(POSTER, told, tmp_path)[1] == 1
    pd.concat([table] * 8).to_csv(path, index=False)
    with pytest.raises(typst.TypstError, match="too long"):
        compile_typst(POSTER, told, tmp_path)


def test_a_profile_of_ones_own_is_told_of(tmp_path):
    text = (study.NOTEBOOKS / "profiles" / "cifar10-smoke.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("title: ", "title: My "))
    shutil.copytree(study.RESULTS / "cifar10-smoke", tmp_path / "mine", ignore=shutil.ignore_patterns("*.svg"))
    assert unknown_results(tmp_path) == ["mine"]
    (one,) = find_studies([str(tmp_path / "mine.yaml")], tmp_path)
    assert one.name == "mine" and one.title.startswith("My ") and one.notebooks


def test_a_failed_analysis_is_told_and_the_rest_is_made(tmp_path):
    name = "cifar10-smoke"
    shutil.copytree(study.RESULTS / name, tmp_path / "results" / name, ignore=shutil.ignore_patterns("*.svg"))
    next((tmp_path / "results" / name / "runs").glob("compound_d*/history.jsonl")).unlink()
    status = main([name, "--results", str(tmp_path / "results"), "--output", str(tmp_path / "out")])
    assert status == 1 and (tmp_path / "out" / "report" / "report.pdf").is_file()
    assert "an analysis of these runs" in (tmp_path / "out" / "report" / "index.html").read_text()
    assert (tmp_path / "results" / name / "notebooks" / "new" / "05_analysis.partial.ipynb").is_file()


def test_a_poster_that_overflows_is_refused(tmp_path, monkeypatch):
    """Too long a text would go on silently on a second page."""
    found = outcome([]) | {"headline": "A very long headline. " * 60}
    monkeypatch.setattr("compose.outcome", lambda studies: found)
    with pytest.raises((RuntimeError, typst.TypstError), match="too long"):
        write_all([], tmp_path, tmp_path)


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="README.md: expected the lines"):
        with_results("# No marks", "block")
    assert with_results(f"a\n{BEGIN}\nold\n{END}\nb", f"{BEGIN}\nnew\n{END}") == f"a\n{BEGIN}\nnew\n{END}\nb"


def test_lists_read_like_sentences():
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
