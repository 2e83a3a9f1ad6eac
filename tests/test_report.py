"""Report, poster and README: they say what results/ has, to readers who cannot see too, and name what is missing.

Most tests use the study of made_up.py, which never took place.
"""

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from statistics import mean

import nbformat
import pandas as pd
import pytest
import typer
from documents import load, plain, text_of
from made_up import write_profiles
from pypdf import PdfReader

from effnet_study.analysis.tables import extensions
from effnet_study.documents import compose
from effnet_study.documents.compose import (
    BEGIN,
    DEFAULT,
    END,
    compile_typst,
    gather,
    main,
    make_figures,
    results_block,
    with_results,
    write_all,
)
from effnet_study.documents.evidence import Study, alternative_texts, outcome, pilot_table
from effnet_study.documents.templates import capital, number
from effnet_study.files import NOTEBOOKS, RESULTS, ROOT
from effnet_study.methods import listed
from effnet_study.profile import load_profile

pytest_plugins = ["documents"]
REPORT, POSTER = ROOT / "report" / "report.typ", ROOT / "poster" / "poster.typ"
DRAWN = shutil.ignore_patterns("notebooks", "*.svg", "*.png")  # what no PDF needs


@pytest.fixture
def copied(study, tmp_path) -> Study:
    """The made-up study, with tables in a copy that a test may change."""
    shutil.copytree(study.results, tmp_path / "results", ignore=DRAWN)
    return dataclasses.replace(study, results=tmp_path / "results")


def compiled(source: Path, study: Study) -> str:
    """The words of a document made of a study."""
    return plain(text_of(io.BytesIO(compile_typst(source, gather(study), study.results)[0])))


# ---- the committed files are what results/ gives -------------------------------------------------------------------


@pytest.fixture
def committed_results():
    """Skip the test where results/ has runs that are not committed: its documents are made when they are."""
    command = ["git", "status", "--porcelain", "--", "results"]
    if shutil.which("git") and subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout:
        pytest.skip("results/ has changes that are not committed")


@pytest.mark.slow
def test_committed_documents_are_those_that_results_give(tmp_path, committed_results):
    main(output=tmp_path, keep_figures=True)
    made = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert not {path.relative_to(ROOT) for path in (ROOT / "report" / "notebooks").rglob("*.html")} - set(made)
    old = [
        str(path)
        for path in made
        if not (ROOT / path).is_file() or (ROOT / path).read_bytes() != (tmp_path / path).read_bytes()
    ]
    assert not old, f"not what results/ gives: {', '.join(old)}. Run make report and commit what it writes"


def test_committed_readme_and_tables_are_those_of_the_records(committed_results):
    one = load(DEFAULT, RESULTS)
    for each in (one, *one.extensions):
        assert not each.stale, f"{each.name}: run make report and commit what it writes"
    assert results_block(one) in (ROOT / "README.md").read_text(encoding="utf-8"), "run make report, commit README.md"


@pytest.mark.parametrize("name", ["report", "poster"])
def test_committed_documents_have_title_language_and_tags(name):
    pdf = PdfReader(ROOT / name / f"{name}.pdf")
    root = pdf.trailer["/Root"]
    assert "compound scaling" in pdf.metadata.title and root["/Lang"] == "en" and "/StructTreeRoot" in root


# ---- what the documents say ----------------------------------------------------------------------------------------


def test_all_documents_are_written(rebuilt):
    made = {path.relative_to(rebuilt).as_posix() for path in rebuilt.rglob("*") if path.is_file()}
    assert {"README.md", "report/report.pdf", "report/index.html", "report/scale.md", "poster/poster.pdf"} < made
    assert len(PdfReader(rebuilt / "report" / "report.pdf").pages) <= 6
    assert len((rebuilt / "README.md").read_text().splitlines()) <= 150  # of a finished study, with its extensions


def test_scores_are_the_means_of_the_records(rebuilt, study, report, poster):
    """Read from run.json here, by other code than the analysis."""
    readme, scores = plain((rebuilt / "README.md").read_text()), {}
    for path in sorted((study.study_dir / "runs").glob("*/run.json")):
        record = json.loads(path.read_text())
        scores.setdefault(record["method"], []).append(record["test"]["top1"])
    assert len(scores) == 9
    for method, values in scores.items():
        name, top1 = method.replace("_", " "), mean(values)
        assert re.search(rf"\| {name} \| [\d,]+ \| {len(values)} \| {top1:.2f} \|", readme)
        assert re.search(rf"{name} [\d.]+ {top1:.1f} ", poster)
        assert re.search(rf"{name} ([\d.]+ ){{7}}{len(values)} {top1:.2f} ", report)


def test_every_column_of_table_7_is_printed(rebuilt, study, report, poster):
    readme = plain((rebuilt / "README.md").read_text())
    for row in pd.read_csv(study.study_dir / "tables" / "table7.csv").itertuples():
        name, flops = row.method.replace("_", " "), f"{row.flops / 1e6:.3f}"
        between, paper = f"{row.top1_low:.2f} to {row.top1_high:.2f}", f"{row.paper_top1:.1f}".replace("nan", "–")
        paper_flops = f"{row.paper_flops / 1e9:.1f}".replace("nan", "–")
        said = f"{name} {row.d:.2f} {row.w:.2f} {row.r:.2f} {row.resolution} {row.params / 1e6:.2f} {flops} "
        said += f"{row.activations / 1e6:.3f} {row.n} {row.top1:.2f} {between} {row.top1_sd:.2f} {row.top5:.2f}"
        assert f"{said} {paper_flops} {paper}" in report
        on_poster = f"{name} {row.flops / 1e6:.1f} {row.top1:.1f} {row.top1_low:.1f} to {row.top1_high:.1f} {paper}"
        assert on_poster in poster
        assert f"| {name} | {row.flops:,} | {row.n} | {row.top1:.2f} | {between} | {row.top1_sd:.2f} |" in readme


def test_the_sign_of_compounds_surplus_is_told_here_and_at_the_papers_size(rebuilt, study):
    flops = study.table("table7").set_index("method")["flops"]
    here = 100 * (flops["compound"] / flops[["depth", "width", "resolution"]] - 1)
    said = f"by {here.min():+.0f} % to {here.max():+.0f} % here, and by +14 % to +24 % at the paper's 224 px"
    assert said in plain((rebuilt / "README.md").read_text())


def test_the_headline_is_printed_everywhere(rebuilt, study, report, poster):
    found = outcome(study)
    assert found["headline"] == (
        "Undecided at pocket scale: at matched FLOPs on Digits (made up), compound minus depth is +2.57 points "
        "(interval −9.10 to +14.25: unclear), minus width +1.57 (−10.10 to +13.25: unclear) "
        "and minus resolution +1.43 (−2.17 to +5.03: unclear)."
    )
    assert plain(found["headline"]) in report and found["prefix"] in report
    for words in (found["prefix"], found["lead"], capital(found["detail"])):
        assert plain(words) in poster
    assert found["headline"] in (rebuilt / "README.md").read_text()


def test_every_contrast_is_printed_with_its_interval_and_word(study, report):
    for row in pd.read_csv(study.study_dir / "tables" / "contrasts.csv").itertuples():
        assert f"{row.difference:+.2f} {row.low:+.2f} to {row.high:+.2f}" in report and row.outcome in report
    for row in pd.read_csv(study.study_dir / "tables" / "length_contrasts.csv").itertuples():
        said = f"{row.n} {row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f}) {row.outcome}"
        change = (
            "" if math.isnan(row.change) else f" {row.change:+.2f} ({row.change_low:+.2f} to {row.change_high:+.2f})"
        )
        assert f"{said}{change}" in report
    said = report.replace("- ", "")  # words are hyphenated
    for claim in study.claims[:2]:  # those of compound scaling, in the summary
        assert f"{capital(claim['title'])}: {claim['status']}." in said
    assert said.count("compared, without a verdict") >= 5  # in the summary and in the list; a page may end in one
    assert "Mini, twice the FLOPs, pocket scale" in report and "each single axis at about 2 times" in report
    row = pd.read_csv(study.results / "mini-x2" / "tables" / "contrasts.csv").iloc[0]
    assert f"compound x2 - width x2 {row.n} {row.difference:+.2f} {row.low:+.2f} to {row.high:+.2f}" in report
    assert "Holm" not in report and "ootstrap" not in report and "p value" not in report


def test_the_answer_on_the_length_of_training_is_told(copied, report):
    assert "All 3 changes are unclear." in report
    path = copied.study_dir / "tables" / "length_contrasts.csv"
    table = pd.read_csv(path)
    table.loc[(table["epochs"] == 4) & (table["other"] == "width_matched"), ["change", "change_word"]] = [-2.5, "below"]
    table.to_csv(path, index=False)
    said = "Clear changes: compound minus width matched at 4 epochs, -2.50 (below). Unclear: the other 2."
    assert said in compiled(REPORT, copied)


def test_only_hyphens_before_numbers_become_minus_signs(copied):
    path = copied.study_dir / "tables" / "mistakes.csv"
    path.write_text("mistake,measure,here,with it\none seed,top-1 differs,-2.42 points,from -1.63\n")
    said = text_of(io.BytesIO(compile_typst(REPORT, gather(copied), copied.results)[0]))
    assert "top-1 differs" in said and "−2.42 points" in said and "from −1.63" in said


def test_headings_of_results_name_the_scale(rebuilt, poster):
    pdf = PdfReader(rebuilt / "report" / "report.pdf")
    titles = [text.casefold() for text in outlines(pdf.outline)]
    results = titles.index("results at pocket scale")
    assert "pocket scale" in pdf.metadata.title
    wanted = ("what the rules say", "length of training", "mini, twice the flops", "fast compound scaling")
    wanted += ("what changes of the recipe do",)
    assert titles[results + 1 : results + 6] == [f"{title}, pocket scale" for title in wanted]
    assert "Figure 8, pocket scale" in poster and "Table 7, pocket scale" in poster


def outlines(entries) -> list[str]:
    """The titles of a PDF's outline, without their numbers."""
    titles = []
    for entry in entries:
        titles += outlines(entry) if isinstance(entry, list) else [str(entry.title).lstrip("0123456789. ")]
    return titles


def test_what_a_change_of_the_recipe_does_is_printed(study, report):
    for row in pd.read_csv(study.results / "mini-low-lr" / "tables" / "ablation.csv").itertuples():
        assert f"{row.as_it_is:.2f} {row.changed:.2f} {row.difference:+.2f}" in report
    assert "lr 0.2 to 0.1" in report


def test_start_surplus_and_computing_time_are_printed(report):
    """14, 24 and 17 % are worth 0.16, 0.26 and 0.21 points by the slopes of the paper's own table. 18 runs of 360
    seconds are 1.8 hours."""
    assert "the norm of the gradient without it grows from 3.5 to 36.9" in report and "from 1.8 to 1.8" in report
    assert "14 to 24 % more FLOPs" in report and "0.84 to 0.90 points for each doubling" in report
    assert "about 0.16, 0.26 and 0.21 points" in report and "0.33 to 0.53 points" in report
    assert "18 of 18 planned runs are finished. They took 1.8 hours of computing on box" in report


def test_runs_that_overfit_are_counted(study, report, tmp_path):
    assert "In none of the 18 finished runs was the loss on minival lower after an earlier epoch" in report
    losses = pd.DataFrame({"minival_loss": [2.0, 1.5, 1.6]})
    losses.to_json(tmp_path / "history.jsonl", orient="records", lines=True)
    runs = study.runs.copy()
    runs.loc[runs.index[-2:], "run_dir"] = tmp_path
    assert "In 2 of the 18 finished runs was the loss" in compiled(REPORT, dataclasses.replace(study, runs=runs))


def test_seeds_of_a_pilot_are_one_row_and_the_best_is_first(study):
    table = pilot_table(study)
    assert [(row["asks"], row["scores"]) for row in table[:2]] == [
        ("baseline", [24.0, 25.0]),
        ("baseline", [23.0, 24.0]),
    ]
    assert [row["words"] for row in table] == [
        "depth 0.5, width 0.5, base resolution 32, epochs 2",
        "depth 0.5, width 0.5, base resolution 24, epochs 2",
        "epochs 2, lr 0.4",
        "epochs 2, lr 0.1",
        "epochs 2, optimizer rmsprop, weight decay 1e-05",
    ]
    assert [row["mean"] for row in table] == [24.5, 23.5, 30.4, 30.1, 25.0]
    assert [row["taken"] for row in table] == [False, True, False, False, False]


def test_pilots_are_printed(report):
    assert "base resolution 32, epochs 2" in report and "24.50 24.00, 25.00" in report and "30.40 30.40" in report


# ---- for people who do not see -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", [REPORT, POSTER], ids=["report", "poster"])
def test_documents_pass_the_rules_of_pdf_ua(source, study):
    """Headings in order, a title, an alternative text for every figure and equation: typst refuses what has none."""
    pdf, _ = compile_typst(source, gather(study), study.results, figures="svg", standards=["ua-1"])
    assert PdfReader(io.BytesIO(pdf)).trailer["/Root"]["/MarkInfo"]["/Marked"]


def test_every_figure_of_a_notebook_has_an_alternative_text():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "plt.subplots(" in cell.source:
                assert len(cell.metadata.get("alt", "")) > 40, f"{path.name}, {cell.id}: no alt in its metadata"
    shown = {"figure8", "contrasts", "lengths", "learning_curves", "zero_init", "flops_mismatch", "five_networks"}
    shown |= {path.stem for path in RESULTS.glob("*/figures/*.pdf")}
    assert shown <= set(alternative_texts())
    assert "FLOPs" in alternative_texts()["figure8"] and "epoch" in alternative_texts()["learning_curves"]


# ---- the outcome in words ------------------------------------------------------------------------------------------

WORDS = {"reproduced": ["above"] * 3, "contradicted": ["above", "equal", "below"], "inconclusive": ["unclear"] * 3}


def decided(folder: Path, verdict: str | None, purpose: str = "evidence", n: int = 5, **changes) -> Study:
    """A study of n seeds that says this of its headline: compound minus depth, width, resolution."""
    profile = load_profile("pocket").replace(purpose=purpose, **({} if purpose == "evidence" else {"protocol": None}))
    tables = folder / profile.name / "tables"
    tables.mkdir(parents=True)
    words = WORDS[verdict or "inconclusive"]
    rows = [
        {"claim": "compound_matched", "target": "compound", "other": f"{axis}_matched", "difference": difference}
        | {"n": n, "outcome": word, "low": difference - 1, "high": difference + 1}
        for axis, word, difference in zip(("depth", "width", "resolution"), words, (3, 2.25, -1), strict=True)
    ]
    pd.DataFrame(rows).to_csv(tables / "contrasts.csv", index=False)
    claim = {"key": "compound_matched", "title": "compound wins", "open": "", "seeds": n}
    claim |= {"outcome": verdict, "sentences": [], **changes}
    (tables / "verdict.json").write_text(json.dumps({"claims": [claim]}))
    runs = pd.DataFrame({"method": "compound", "seed": range(5), "data": "Images"})
    runs["status"] = ["finished"] * n + ["missing"] * (5 - n)
    return Study(profile, folder, runs)


@pytest.mark.parametrize(
    ("verdict", "purpose", "n", "still", "prefix", "lead", "status"),
    [
        (
            *("reproduced", "evidence", 5, "", "[Re]"),
            *("Compound scaling beats each single axis at pocket scale: at matched FLOPs on Images,", "reproduced"),
        ),
        (
            *("contradicted", "evidence", 5, "", "[¬Re]"),
            *("Compound scaling beats depth, but not width or resolution at pocket scale: at", "contradicted"),
        ),
        (
            *("inconclusive", "evidence", 5, "", "[Re: undecided]"),
            *("Undecided at pocket scale: at matched FLOPs on Images,", "inconclusive"),
        ),
        (
            *("inconclusive", "evidence", 4, "16 of its 20 planned runs have ended", "[Re: undecided]"),
            *("Undecided at pocket scale: at matched", "inconclusive (16 of its 20 planned runs have ended)"),
        ),
        (
            *("inconclusive", "evidence", 5, "it needs more seeds", "[Re: undecided]"),
            *("Undecided at pocket scale: at matched", "inconclusive (it needs more seeds)"),
        ),
        (
            *(None, "exploratory", 5, "", "[Re: undecided]"),
            *("Undecided at pocket scale: at matched", "compared, without a verdict"),
        ),
    ],
)
def test_title_and_headline_follow_from_the_verdict(tmp_path, verdict, purpose, n, still, prefix, lead, status):
    one = decided(tmp_path / "images", verdict, purpose, n, open=still)
    found = outcome(one)
    assert found["prefix"] == prefix
    assert found["headline"].startswith(lead)
    assert found["headline"] == f"{found['lead']}: {found['detail']}"
    words = WORDS[verdict or "inconclusive"]
    said = f"minus depth is +3.00 points (interval +2.00 to +4.00: {words[0]}), "
    said += f"minus width +2.25 (+1.25 to +3.25: {words[1]}) and minus resolution −1.00 (−2.00 to +0.00: {words[2]})"
    said += f", so far with {n} of 5 seeds." if n < 5 else ". It needs more seeds." if still else "."
    assert found["headline"].endswith(said)
    mixed = " (above depth, equal to width, below resolution)" if verdict == "contradicted" else ""
    status += f" at pocket scale{mixed}" if status in ("reproduced", "contradicted") else ""
    assert [claim["status"] for claim in one.claims if claim["key"] == "compound_matched"] == [status]
    others = [claim["status"] for claim in one.claims if claim["key"] != "compound_matched"]
    assert others == (["not tested yet"] * 3 if purpose == "evidence" else [])


@pytest.mark.parametrize(
    ("words", "lead"),
    [
        (["above", "above", "below"], "Compound scaling beats depth and width, but not resolution"),
        (["equal", "below", "below"], "Compound scaling does not beat depth, width or resolution"),
        (["above", "unclear", "below"], "Compound scaling does not beat resolution"),
    ],
)
def test_what_compound_does_not_beat_is_named(tmp_path, words, lead):
    one = decided(tmp_path / "images", "contradicted")
    path = one.study_dir / "tables" / "contrasts.csv"
    pd.read_csv(path).assign(outcome=words).to_csv(path, index=False)
    assert outcome(one)["lead"] == f"{lead} at pocket scale"


def test_a_finished_comparison_is_told_until_the_deciding_one_has_as_many_seeds(tmp_path):
    one = decided(tmp_path / "images", "inconclusive", n=1, seeds=0, open="5 of its 20 planned runs have ended")
    tables = one.study_dir / "tables"
    rows = pd.read_csv(tables / "contrasts.csv")
    both = pd.concat([rows.iloc[:1], rows.assign(claim="compound_published", n=5, difference=9, low=8, high=10)])
    both.to_csv(tables / "contrasts.csv", index=False)
    claim = json.loads((tables / "verdict.json").read_text())["claims"][0]
    published = claim | {"key": "compound_published", "seeds": 5, "open": ""}
    (tables / "verdict.json").write_text(json.dumps({"claims": [claim, published]}))
    assert "which decide, are not finished yet. At the published coefficients on Images" in outcome(one)["headline"]
    failed = dataclasses.replace(one, runs=one.runs.assign(status=["finished", *["failed"] * 4]))
    claim["open"] = ""
    (tables / "verdict.json").write_text(json.dumps({"claims": [claim, published]}))
    said = outcome(failed)["headline"]
    assert said.startswith("Undecided at pocket scale: at matched FLOPs") and said.endswith(", with only 1 of 5 seeds.")


def test_matched_flops_are_the_headline_before_the_published_coefficients(tmp_path):
    one = decided(tmp_path / "images", "reproduced")
    more = pd.DataFrame({"method": "depth_matched", "seed": range(5), "status": "missing", "data": "Images"})
    one = dataclasses.replace(one, runs=pd.concat([one.runs, more]))
    path, contrasts = one.study_dir / "tables" / "verdict.json", one.study_dir / "tables" / "contrasts.csv"
    claim, table = json.loads(path.read_text())["claims"][0], pd.read_csv(contrasts)
    both = pd.concat([table.assign(claim="compound_published", difference=9, low=8, high=10), table])
    published = claim | {"key": "compound_published"}
    for claims, words in (
        (
            [published, claim],
            "beats each single axis at pocket scale: at matched FLOPs on Images, compound minus depth is +3.00 points",
        ),
        (
            [published],  # reproduced or not: it does not decide
            "Undecided at pocket scale: the networks at matched FLOPs, which decide, are not finished yet. "
            "At the published coefficients on Images, compound minus depth is +9.00 points",
        ),
        ([claim | {"key": "axes_help"}], "the networks that the claim compares are not finished yet"),
    ):
        path.write_text(json.dumps({"claims": claims}))
        both[both["claim"].isin([claim["key"] for claim in claims])].to_csv(contrasts, index=False)
        found = outcome(dataclasses.replace(one))
        assert words in found["headline"] and (found["prefix"] == "[Re]") == ("beats" in words)


def test_the_headline_tells_the_seeds_of_methods_that_have_not_equally_many(tmp_path):
    one = decided(tmp_path / "images", "inconclusive", n=3, open="4 of its 6 planned runs have ended")
    fewer = one.runs.assign(method="width_matched", status=["finished", *["missing"] * 4])
    some = dataclasses.replace(one, runs=pd.concat([one.runs, fewer]))
    assert outcome(some)["headline"].endswith(", so far with 1 to 3 of 5 seeds.")


def test_a_comparison_without_a_verdict_says_what_was_found_and_what_is_open(tmp_path):
    one = decided(tmp_path / "images", "reproduced")
    path = one.study_dir / "tables" / "verdict.json"
    claim = json.loads(path.read_text())["claims"][0]
    fast = {"key": "fast_compound", "outcome": None, "sentences": ["fast is -1.00 points away: below (n = 2)"]}
    for still, words in (("", ""), ("7 of its 10 runs have ended", "; 7 of its 10 runs have ended")):
        path.write_text(json.dumps({"claims": [claim, claim | fast | {"open": still}]}))
        told = {each["key"]: each["status"] for each in dataclasses.replace(one).claims}["fast_compound"]
        assert told == "fast is −1.00 points away: below (n = 2)" + words


def test_a_study_without_a_headline_says_so(tmp_path):
    one = decided(tmp_path / "images", "reproduced")
    other = dataclasses.replace(one, profile=one.profile.replace(groups=(("baseline", "depth"),), more_seeds=None))
    assert outcome(other)["headline"].endswith(": the study does not compare compound scaling with single axes.")


def test_a_network_is_not_compared_with_itself(tmp_path):
    one = decided(tmp_path / "images", "reproduced")
    path = one.study_dir / "tables" / "contrasts.csv"
    table = pd.read_csv(path)
    table.loc[0, "outcome"] = "same network"
    table.to_csv(path, index=False)
    said = "compound minus width is +2.25 points (interval +1.25 to +3.25: above) and minus resolution −1.00"
    assert said in outcome(one)["headline"]


def test_tables_of_other_runs_decide_nothing(tmp_path):
    one = decided(tmp_path / "images", "reproduced")
    path = one.study_dir / "tables" / "table7.csv"
    for n, prefix in ((3, "[Re: undecided]"), (5, "[Re]")):
        pd.DataFrame({"method": ["compound"], "n": [n]}).to_csv(path, index=False)
        again = dataclasses.replace(one)
        assert outcome(again)["prefix"] == prefix
        assert ("the tables are of other runs" in outcome(again)["headline"]) == (n == 3)
        assert ("tables of the runs as they are now; to make them: make report" in again.missing) == (n == 3)


def test_only_baselines_smaller_than_b0_are_called_pocket_scale():
    assert load_profile("pocket").scale == "pocket scale"
    assert load_profile("imagenet").scale == ""


def test_what_an_extension_changes_decides_where_it_is_shown(study):
    kinds = {each.name: each.kind for each in study.extensions}
    assert study.kind is None and kinds == {"mini-half": "length", "mini-x2": "budget", "mini-low-lr": "ablation"}
    assert [*kinds] == ["mini-half", "mini-low-lr", "mini-x2"]  # by epochs, then by name
    kinds = {p.name: Study(p, Path(), pd.DataFrame()).kind for p in extensions(load_profile(DEFAULT))}
    assert kinds["pocket-half"] == "length" and kinds["pocket-x2"] == "budget"
    assert kinds["pocket-unannealed"] == kinds["pocket-se-expanded"] == "ablation"
    half = load_profile("pocket-half")
    both = half.replace(train={**half.train, "lr": 0.1})  # epochs and another setting
    assert Study(both, Path(), pd.DataFrame()).kind == "ablation"


# ---- what is missing is said ---------------------------------------------------------------------------------------


def test_documents_without_results_say_so(tmp_path):
    name, results = write_profiles(tmp_path / "profiles", 5), tmp_path / "results"
    one = load(name, results)
    facts = gather(one)
    said = "Undecided at pocket scale: no run of the study is finished yet."
    report, pages = compile_typst(REPORT, facts, results)
    report = text_of(io.BytesIO(report))
    assert said in report and "Nothing is finished yet" in report and "45 runs are planned" in report and pages < 8
    assert "No pilot is finished" in report and "A claim is decided when all of its own runs have ended" in report
    poster, pages = compile_typst(POSTER, facts, results)
    assert "No run of the study is finished yet." in text_of(io.BytesIO(poster)) and pages == 1
    assert said in results_block(one) and "0 pilots" in results_block(one)
    assert one.missing == [f"no run of mini is finished; to run it: effnet study {name} --results {results}"]


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="nonesuch"):
        main("nonesuch")


def test_part_of_the_runs_with_one_seed_is_called_so_everywhere(copied):
    """The second seed has diverged or is missing, depth matched and width are depth's network, and three files are not
    there."""
    tables, runs = copied.study_dir / "tables", copied.runs.copy()
    runs.loc[runs["seed"] == 1, "status"] = "missing"
    runs.loc[(runs["seed"] == 1) & (runs["method"] == "compound"), "status"] = "diverged"
    for name in ("table7", "contrasts"):
        frame = pd.read_csv(tables / f"{name}.csv").assign(n=1)
        frame[[column for column in frame if column.endswith(("low", "high"))]] = None
        if name == "table7":
            frame["same_as"] = frame["method"].map({"depth_matched": "depth", "width": "depth"})
        frame.to_csv(tables / f"{name}.csv", index=False)
    for name in ("verdict.json", "table7_cost.csv", "lengths.csv"):
        (tables / name).unlink()
    one = dataclasses.replace(copied, runs=runs)
    said = "Unfinished: 10 of 18 planned runs have ended. A claim is decided when all of its own runs have ended."
    assert one.unfinished == said and said in results_block(one)
    more = dataclasses.replace(one, profile=one.profile.replace(more_seeds=[2]))
    assert more.unfinished == said[:-1] + "; more seeds can still change its numbers."
    others = "baseline, depth, width, resolution, depth matched, width matched, resolution matched and fast compound"
    assert one.missing == [
        "the verdict (tables/verdict.json); to make it: make report",
        f"{others}: seed 1 (missing)",
        "compound: seed 1 (diverged)",
    ]
    report = compiled(REPORT, one)
    assert report.count(said[:-1]) >= 5  # at the top, and in the captions of results
    assert "Missing: the verdict (tables/verdict.json)" in report and "No table of costs" in report
    assert "By rounding, depth matched is the same network as depth" in report and "one seed" in report
    assert "width (same network as depth)" in results_block(one)
    poster = compiled(POSTER, one)
    assert said in poster and "one seed" in poster


TABLES = ("table7.csv", "contrasts.csv", "verdict.json", "table7_cost.csv", "lengths.csv", "zero_init.csv")


def test_missing_tables_are_named_and_not_used(copied):
    for name in TABLES:
        (copied.study_dir / "tables" / name).unlink()
        assert copied.table(name.removesuffix(".csv")) is None
    assert "Table 7 (tables/table7.csv); to make it: make report" in copied.missing
    assert copied.claims == [] and not copied.stale
    assert outcome(copied)["headline"].startswith("Undecided at pocket scale: the networks that the claim compares")
    assert BEGIN in results_block(copied) and "| method" not in results_block(copied)
    files = gather(copied)["study"]["files"]
    assert "figures/figure8.pdf" in files and not {f"tables/{name}" for name in TABLES} & {*files}
    for source in (REPORT, POSTER):
        assert "Undecided" in compiled(source, copied)


def test_the_measured_time_of_fast_compound_is_told(copied):
    folder = copied.results / "throughput" / "some-gpu"
    folder.mkdir(parents=True)
    times = {"network": ["compound", "fast_compound"], "relative_time": [1, 0.8], "ratio_q25": [1, 0.75]}
    pd.DataFrame(times | {"ratio_q75": [1, 0.85], "profile": copied.name}).to_csv(folder / "fast.csv", index=False)
    (folder / "device.json").write_text('{"device": {"name": "Some GPU"}}')
    said = r"on Some GPU, its training step takes 0.80 times as long as compound.s \(quartiles 0.75 to 0.85;"
    assert re.search(said, compiled(REPORT, copied))


def test_a_caption_tells_that_an_extension_is_unfinished(copied):
    said = "Mini, twice the FLOPs: 3 of 4 planned runs are finished."
    assert said not in compiled(REPORT, copied)
    x2 = next(each for each in copied.extensions if each.name == "mini-x2")
    x2 = dataclasses.replace(x2, runs=x2.runs.assign(status=["missing", *x2.runs["status"][1:]]))
    assert said in compiled(REPORT, dataclasses.replace(copied, extensions=(x2,)))


def test_what_has_not_begun_is_named_also_beside_a_complete_study(copied):
    x2 = next(each for each in copied.extensions if each.name == "mini-x2")
    x2 = dataclasses.replace(x2, runs=x2.runs.assign(status="missing"))
    assert not copied.unfinished and "Not begun" not in results_block(copied)
    assert "Not begun: mini-x2 (" in results_block(dataclasses.replace(copied, extensions=(x2,)))


def test_the_poster_holds_all_of_its_verdicts(copied):
    """With nine rows in its table they once overlapped with the note and left their panel."""
    facts = gather(copied)
    facts["study"]["data"] = "Tiny ImageNet (the first 100 classes of its 200, by their order in wnids.txt)"
    for claim in facts["study"]["claims"]:
        claim["status"] = "contradicted at pocket scale (above depth and width, below resolution)"
    pdf, _ = compile_typst(POSTER, facts, copied.results)
    lines = []
    PdfReader(io.BytesIO(pdf)).pages[0].extract_text(
        visitor_text=lambda text, page, at, *_: text.strip() and lines.append((text.strip(), at[5] * page[3] + page[5]))
    )
    words, heights = zip(*lines, strict=True)
    rules, below = words.index("By the rules:"), words.index("The same cost? Not as printed")
    assert heights[rules - 1] - heights[rules] > 40  # points, a line at least
    assert words[below - 1].endswith("resolution)") and heights[below - 1] - heights[below] > 140


def test_a_damaged_table_is_named(copied):
    (copied.study_dir / "tables" / "table7.csv").write_text("")
    with pytest.raises(ValueError, match="tables/table7.csv is damaged .*; delete it, then run make report"):
        copied.table("table7")


def test_a_baseline_that_diverged_is_a_row_less(copied):
    for table in ("table7.csv", "contrasts.csv"):
        path = copied.study_dir / "tables" / table
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "baseline" not in line))
    runs = copied.runs.copy()
    runs.loc[runs["method"] == "baseline", "status"] = "diverged"
    one = dataclasses.replace(copied, runs=runs)
    assert one.missing == ["baseline: seeds 0 and 1 (diverged)"] and one.unfinished == ""
    for source in (REPORT, POSTER):
        assert "compound" in compiled(source, one)


def test_a_poster_of_two_pages_is_refused(study, tmp_path, monkeypatch):
    """A text that is too long would continue on a second page without a word."""
    facts = gather(study)
    facts["outcome"] |= {"lead": "A very long headline. " * 60}
    assert compile_typst(POSTER, facts, study.results)[1] > 1
    monkeypatch.setattr(compose, "compile_typst", lambda source, *arguments: (b"", 2))
    with pytest.raises(RuntimeError, match="expected one page, got 2"):
        write_all(study, tmp_path)


def test_warnings_of_typst_are_errors(tmp_path):
    source = tmp_path / "plain.typ"
    for font, fails in (("DejaVu Sans", False), ("No Such Font", True)):
        source.write_text(f'#set text(font: "{font}")\nWords\n#metadata(3) <pages>')
        if fails:
            with pytest.raises(RuntimeError, match="no such font"):
                compile_typst(source, {"repository": None}, tmp_path)
        else:
            assert compile_typst(source, {"repository": "https://example.org"}, tmp_path)[1] == 3


# ---- make report ---------------------------------------------------------------------------------------------------


def test_a_failed_analysis_is_named_and_the_rest_is_made(made_up, study, tmp_path, monkeypatch, capsys):
    name, results = made_up
    asked, written = [], []

    def fail(notebook, output, parameters, threads):
        assert parameters["profile"].endswith(".yaml") and parameters["results"] == str(results)
        asked.append(notebook)
        raise RuntimeError(f"a cell of {notebook} failed")

    def write(study, output):
        written.append(study)
        (output / "made").touch()
        return ["a document"]

    monkeypatch.setattr(compose, "run_notebook", fail)
    monkeypatch.setattr(compose, "write_all", write)
    old = tmp_path / "report" / "notebooks" / "gone.html"
    old.parent.mkdir(parents=True)
    old.touch()
    with pytest.raises(typer.Exit) as ended:
        main(str(name), results, tmp_path)
    assert ended.value.exit_code == 1 and asked == ["05_analysis"] * 4
    (one,) = written
    assert (tmp_path / "made").is_file() and not old.exists()
    for each in (one, *one.extensions):
        assert each.missing[-1] == "an analysis of these runs: a cell of 05_analysis failed"
    said = capsys.readouterr()
    assert "a document" in said.out and "mini-half, missing: an analysis of these runs" in said.err


def test_architecture_is_executed_where_its_table_is_missing(copied, monkeypatch):
    (copied.study_dir / "tables" / "table7_cost.csv").unlink()
    asked = []
    monkeypatch.setattr(compose, "run_notebook", lambda notebook, output, *rest, **options: asked.append(notebook))
    monkeypatch.setattr(compose.shutil, "rmtree", lambda path: None)
    one = dataclasses.replace(copied, extensions=(), runs=copied.runs.assign(status="missing"))
    monkeypatch.setattr(Path, "replace", lambda path, target: None)
    assert make_figures(one) == {} and asked == ["00_architecture"]


@pytest.mark.parametrize(("change", "expected"), [(False, "kept"), (True, "new")])
def test_an_executed_notebook_stays_as_long_as_the_tables_are_the_same(copied, monkeypatch, change, expected):
    one, table = dataclasses.replace(copied, extensions=()), copied.study_dir / "tables" / "table7.csv"

    def run(notebook, output, parameters, threads):
        output.parent.mkdir(parents=True)
        output.write_text("new")
        if change:
            table.write_text(table.read_text() + "\n")

    monkeypatch.setattr(compose, "run_notebook", run)
    executed = one.study_dir / "notebooks" / "05_analysis.ipynb"
    executed.parent.mkdir()
    executed.write_text("kept")
    assert make_figures(one) == {}
    assert executed.read_text() == expected
    assert {path.stem for path in executed.parent.iterdir()} == {"05_analysis", "08_trained_networks"}


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="README.md: expected the lines"):
        with_results("# No marks", "block")
    assert with_results(f"a\n{BEGIN}\nold\n{END}\nb", f"{BEGIN}\nnew\n{END}") == f"a\n{BEGIN}\nnew\n{END}\nb"


def test_lists_numbers_and_sentences_read_well():
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [number(2.345), number(float("nan")), number(1234.5, ",.0f")] == ["2.35", "–", "1,235"]
    assert number(-2.345) == "−2.35"
    assert capital("compound and Depth") == "Compound and Depth" and capital("") == ""
