"""The notebooks: clean in the repository, and executed from end to end on a small study."""

import io
import json
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_record
from nbclient import NotebookClient
from pypdf import PdfReader

import effnet_study as study
from compose import compile_typst, gather
from effnet_lib import TABLE7
from evidence import find_studies
from page import build_page

SOURCES = sorted(study.NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_source_notebooks_hold_no_outputs_and_say_what_they_need(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "papermill" not in notebook.metadata and notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert "pip install" not in cell.source
    tags = [cell.metadata.get("tags") for cell in notebook.cells if cell.cell_type == "code"]
    assert tags[0] == ["parameters"] and not any(tags[1:])
    assert "How long:" in notebook.cells[0].source
    assert f'check_notebook("{path.stem}", globals())' in notebook.cells[2].source


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_heading_is_followed_by_code_of_its_own(path):
    asked = None
    for cell in nbformat.read(path, as_version=4).cells:
        headings = [line for line in cell.source.splitlines() if line.startswith("## ")]
        if cell.cell_type == "code":
            asked = None
            continue
        assert len(headings) <= 1 and not (asked and headings), f"nothing under {asked or headings[0]}"
        asked = headings[0] if headings else asked


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A whole study through the command, as a user runs it: (exit status, its text, the results folder)."""
    place = tmp_path_factory.mktemp("study")
    profile = place / "small.yaml"
    profile.write_text(
        """
title: Small
purpose: check
data: {name: digits, size: 16, train_per_class: 4}
base_resolution: 16
stem_stride: 2
methods: [baseline, depth, width, resolution, compound, compound_searched]
seeds: [0]
search: {step: 0.4, train: {epochs: 1}}
train: {epochs: 2, batch_size: 20, optimizer: sgd, lr: 0.05, norm_momentum: 0.1, flip: false}
"""
    )
    command = [sys.executable, "-m", "effnet_study", "study", str(profile), "--results", str(place / "results")]
    done = subprocess.run(command, cwd=study.ROOT, capture_output=True, text=True, timeout=1500)
    return done, place / "results" / "small", command


def test_the_study_executes_every_notebook(executed):
    done, folder, _ = executed
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [f"02_single_axis_scaling_{axis}_seed0" for axis in ("depth", "resolution", "width")]
    expected = ["00_architecture", "01_baseline_b0_baseline_seed0", *expected, "03_coefficient_search"]
    expected += ["04_compound_scaling_compound_searched_seed0", "04_compound_scaling_compound_seed0", "05_analysis"]
    assert sorted(path.stem for path in (folder / "notebooks").iterdir()) == expected
    for path in (folder / "notebooks").iterdir():
        assert not any(
            output.output_type == "error" for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])
        )
        assert str(study.ROOT) not in path.read_text()


def test_the_study_prints_a_line_per_epoch_and_a_closing_table(executed):
    done, folder, _ = executed
    lines = [line for line in done.stdout.splitlines() if "  epoch " in line]
    assert len(lines) == 6 * 2 + 3  # and one of each candidate of the search
    (first,) = [line for line in lines if line.startswith("baseline") and "1/2" in line]
    assert all(word in first for word in ("seed 0", "loss", "top-1", "images/s", "left"))
    assert done.stdout.count("finished") >= 6 and "pipeline check, not evidence" in done.stdout
    said = done.stdout.splitlines()[-2:]
    assert said[0].endswith(": inconclusive") and said[1].endswith(f"All of it: {folder / 'README.md'}")


def test_the_analysis_writes_tables_figures_verdict_and_a_page(executed):
    _, folder, _ = executed
    table = pd.read_csv(folder / "tables" / "table7.csv")
    assert table["method"].tolist() == [*TABLE7, "compound_searched"]
    assert table["paper_top1"].tolist()[:5] == [77.3, 79.0, 78.9, 79.1, 81.1]
    assert (table["purpose"] == "check").all() and (table["n"] == 1).all()
    for row in table.itertuples():
        directory = next((folder / "runs").glob(f"{row.method}_*"))
        record = json.loads((directory / "run.json").read_text())
        assert (row.params, row.flops) == (record["cost"]["params"], record["cost"]["flops"])
        assert row.top1 == pytest.approx(100 * np.load(directory / "test_correct.npy").mean())
    figures = ["figure8", "learning_curves", "cost_speed", "flops_mismatch", "b0_stages", "b0", "mbconv", "growth"]
    figures += [
        "squeeze_excitation",
        "stochastic_depth",
        "five_networks",
        "search",
        "figure7",
        "per_class",
        "calibration",
    ]
    for figure in figures:
        for suffix in ("svg", "pdf", "png"):
            assert (folder / "figures" / f"{figure}.{suffix}").stat().st_size > 5000
    verdict = json.loads((folder / "tables" / "verdict.json").read_text())
    assert set(verdict["claims"].values()) == {"inconclusive"}  # one seed decides nothing
    assert verdict["words"].keys() == verdict["claims"].keys() and all(verdict["words"].values())
    mistakes = pd.read_csv(folder / "tables" / "mistakes.csv", index_col="mistake")
    params = mistakes.loc["squeeze-and-excitation of expanded channels", ["here", "with the mistake"]]
    assert params.tolist() == ["4,020,358", "7,155,658"]  # the second is that of a well-known reproduction
    assert "one seed" not in mistakes.index  # there is no more than one
    page = (folder / "README.md").read_text()
    assert "pipeline check, not evidence" in page and f"{table['top1'][4]:.2f}" in page


def test_the_analysis_decides_by_the_rule_from_three_seeds(profile_file, tmp_path):
    """On made-up scores: compound ahead at the published coefficients, equal to width at matched FLOPs."""
    top1 = {"baseline": 70, "depth": 74, "width": 74.5, "resolution": 73.5, "compound": 77}
    top1 |= {"depth_matched": 74.5, "width_matched": 77, "resolution_matched": 74}
    top1 |= {"depth_x2": 72, "width_x2": 72.5, "resolution_x2": 71, "compound_x2": 73}
    path, rng = profile_file(methods=list(top1), seeds=[0, 1, 2], purpose="exploratory"), np.random.default_rng(0)
    for run in study.plan_runs(study.load_profile(path), tmp_path):
        score = top1[run.method] + 0.05 * (run.seed - 1)
        write_record(run, score, cost={"params": 1000, "flops": 2000 + int(score), "activations": 3000})
        np.save(run.directory / "test_correct.npy", rng.random(1000) < score / 100)
        first = {"epoch": 1, "train_loss": 2.0, "minival_top1": score + 1, "lr": run.config.lr}
        last = first | {"epoch": 2, "minival_top1": score, "lr": 0.01 * run.config.lr}
        (run.directory / "history.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(last) + "\n")
    study.run_notebook("05_analysis", tmp_path / "05.ipynb", {"profile": str(path), "results": str(tmp_path)})
    claims = json.loads((tmp_path / "tiny" / "tables" / "verdict.json").read_text())["claims"]
    assert list(claims.values()) == ["reproduced", "not reproduced", "reproduced", "reproduced"]
    assert [*claims][-1] == "compound scaling beats each single axis at about 2 times the baseline's FLOPs"
    table = pd.read_csv(tmp_path / "tiny" / "tables" / "table7.csv").set_index("method")
    assert (table["n"] == 3).all() and table["top1"].to_dict() == pytest.approx(top1)
    half = 4.302653 * 0.05 / 3**0.5
    assert table["top1_low"]["compound"] == pytest.approx(77 - half, abs=1e-4)
    contrasts = pd.read_csv(tmp_path / "tiny" / "tables" / "contrasts.csv").set_index("contrast")
    assert contrasts["difference"]["compound - depth"] == pytest.approx(3)
    mistakes = pd.read_csv(tmp_path / "tiny" / "tables" / "mistakes.csv").set_index("mistake")
    assert mistakes["with the mistake"]["one seed"].startswith("-0.10 to +0.10")  # compound minus width_matched
    assert mistakes["here"]["learning rate not annealed"] == "1.00000 %"
    assert mistakes.loc["best epoch by the scored images"].tolist()[1:] == ["69.95 %", "70.95 %"]
    assert "exploratory" in (tmp_path / "tiny" / "README.md").read_text()
    path = profile_file(methods=["baseline", "depth", "width", "resolution"], seeds=[0, 1, 2, 3])
    study.run_notebook("05_analysis", tmp_path / "05.ipynb", {"profile": str(path), "results": str(tmp_path)})
    claims = json.loads((tmp_path / "tiny" / "tables" / "verdict.json").read_text())["claims"]
    assert list(claims.values()) == ["inconclusive"]  # a seed is still to come


def test_searched_coefficients_are_trained_at_the_cost_of_compound(executed):
    _, folder, _ = executed
    found = json.loads((folder / "coefficients.json").read_text())
    assert found["candidates"] == 3 and found["finished"] == 3
    (record,) = (json.loads(path.read_text()) for path in folder.glob("runs/compound_searched_*/run.json"))
    scaling, phi = record["coefficients"], set()
    for name, axis in (("alpha", "depth"), ("beta", "width"), ("gamma", "resolution")):
        if found[name] > 1:
            phi.add(round(np.log(scaling[axis]) / np.log(found[name]), 6))
    assert len(phi) == 1


def test_a_notebook_with_sliders_does_without_them(tmp_path, monkeypatch):
    """00 where ipywidgets is not installed: its pictures are static."""
    (tmp_path / "ipywidgets.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    study.run_notebook("00_architecture", tmp_path / "00.ipynb", {"results": str(tmp_path)})
    last = nbformat.read(tmp_path / "00.ipynb", 4).cells[-2:]
    assert any("image/png" in output.get("data", {}) for output in last[0].outputs)
    assert "Without ipywidgets" in str(last[1].outputs)


def test_a_study_makes_no_widgets(executed):
    """A client that answers no widget, as papermill's, waits for ever for its cell now and then."""
    _, folder, _ = executed
    book = nbformat.read(folder / "notebooks" / "00_architecture.ipynb", 4)
    assert "widgets" not in book.metadata and "Without sliders" in str(book.cells[-1].outputs)


def test_the_architecture_notebook_finds_the_mismatch_of_table_7(executed):
    _, folder, _ = executed
    costs = pd.read_csv(folder / "tables" / "table7_cost.csv").set_index("method")
    extra = costs["compound_extra_percent"]
    assert extra[["depth", "width", "resolution"]].round().tolist() == [14, 24, 17]
    assert (costs["matched_residual_percent"].dropna().abs() < 3).all()
    variants = pd.read_csv(folder / "tables" / "variants.csv").set_index("model")
    assert variants["flops"]["b3"] == 1_827_141_392


def test_a_second_study_trains_nothing_and_says_who_ran_the_first(executed):
    _, folder, command = executed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    done = subprocess.run(command, cwd=study.ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0 and "  epoch " not in done.stdout
    assert "6 runs are finished: made here, not committed" in done.stdout and "--results DIR" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_was_killed_after_its_run_had_finished_is_made_up(executed):
    """An analysis, and the notebook of a run, that are missing though all runs are finished."""
    _, folder, command = executed
    lost = [folder / "notebooks" / name for name in ("05_analysis.ipynb", "01_baseline_b0_baseline_seed0.ipynb")]
    for path in lost:
        path.unlink()
    done = subprocess.run(command, cwd=study.ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0 and "  epoch " not in done.stdout and all(path.exists() for path in lost)


def test_an_ablation_is_set_beside_its_study_in_page_and_report(executed):
    _, folder, command = executed
    results, path = folder.parent, folder.parents[1] / "gentle.yaml"
    path.write_text("title: Gentle\nablation_of: small.yaml\nmethods: [baseline]\ntrain: {lr: 0.02}\n")
    words = [*command[:4], str(path), "--results", str(results)]
    done = subprocess.run(words, cwd=study.ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(results / "gentle" / "tables" / "ablation.csv")
    assert table["what"].tolist() == ["baseline", "baseline"] and (table["change"] == "lr 0.05 to 0.02").all()
    words = f"{table['difference'][0]:+.2f} points"
    assert f"baseline (moving average): {words} by lr 0.05 to 0.02" in done.stdout
    page = (results / "gentle" / "README.md").read_text()
    assert "## What the change does" in page and words in page and "figures/ablation.png" in page
    assert "Verdict" not in page and "ablation" not in (folder / "README.md").read_text()
    studies = find_studies([folder.parents[1] / "small.yaml", path], results)
    report, _ = compile_typst(study.ROOT / "report" / "report.typ", gather(studies, results), results)
    text = " ".join(" ".join(page.extract_text() for page in PdfReader(io.BytesIO(report)).pages).split())
    assert "lr 0.05 to 0.02" in text and "with the learning rate left high, nor with wrong gates" in text
    build_page(studies, gather(studies, results)["outcome"], folder.parents[1], results)
    assert (
        words.partition(" ")[0] in (folder.parents[1] / "index.html").read_text().partition("What the change does")[2]
    )


def test_a_failing_notebook_fails_the_study_and_the_others_go_on(profile_file, tmp_path):
    path = profile_file(methods=["compound", "baseline"], data={"name": "digits", "size": 16, "train_per_class": 4})
    run = study.Run.plan(path, "compound", 0, tmp_path)
    (run.directory / "weights.safetensors").mkdir(parents=True)  # in the way of a file
    command = [sys.executable, "-m", "effnet_study", "study", str(path), "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=study.ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 1
    assert "04_compound_scaling failed" in done.stderr and "Is a directory" in done.stderr
    assert run.executed.with_suffix(".partial.ipynb").exists() and not run.executed.exists()
    states = study.load_runs(path, tmp_path).set_index("method")["status"]
    assert states.to_dict() == {"compound": "interrupted", "baseline": "finished"}
    assert (tmp_path / "tiny" / "tables" / "table7.csv").exists()


def test_an_interrupted_study_continues(profile_file, tmp_path):
    """Two notebooks side by side, stopped in the middle of their first epoch: both have a checkpoint then."""
    train = {"epochs": 1, "batch_size": 4, "optimizer": "sgd", "lr": 0.02, "save_seconds": 1000.0}
    data = {"name": "digits", "size": 16, "train_per_class": 40}
    path = profile_file(methods=["baseline", "resolution"], base_resolution=8, data=data, train=train)
    command = [sys.executable, "-m", "effnet_study", "study", str(path), "--results", str(tmp_path), "--no-analysis"]
    runs = study.plan_runs(study.load_profile(path), tmp_path)
    process = subprocess.Popen([*command, "--jobs", "2"], cwd=study.ROOT, stderr=subprocess.PIPE, text=True)
    while not all((run.directory / ".holder").exists() for run in runs):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75 and "the same command continues" in process.stderr.read()
    for run in runs:
        assert run.state() == "interrupted" and not run.executed.exists()
        progress = torch.load(run.directory / "checkpoint.pt", weights_only=True)["progress"]
        assert progress["step"] > 0 and not progress["history"]
    done = subprocess.run(command, cwd=study.ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0 and done.stdout.count("continues in epoch 1 after step") == 2
    assert all(run.executed.exists() for run in runs)


def test_a_notebook_runs_by_papermill_alone_from_its_own_folder(profile_file, tmp_path):
    path = profile_file(methods=["width"])
    words = ["-p", "profile", str(path), "-p", "method", "width", "-p", "results", str(tmp_path)]
    command = [sys.executable, "-m", "papermill", "02_single_axis_scaling.ipynb", str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, *words], cwd=study.NOTEBOOKS, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert study.Run.plan(path, "width", 0, tmp_path).state() == "finished"


def test_a_copy_in_a_foreign_folder_runs_as_an_editor_runs_it(profile_file, tmp_path, monkeypatch):
    """No papermill, no injected cell; the kernel starts in the copy's folder, as VS Code and nbclient start it."""
    monkeypatch.setenv("VSCODE_PID", "1")
    monkeypatch.setenv("VSCODE_CWD", "/")
    folder, results = tmp_path / "another folder", tmp_path / "results"
    folder.mkdir()
    book = nbformat.read(study.NOTEBOOKS / "02_single_axis_scaling.ipynb", as_version=4)
    edited = book.cells[1].source.replace('"quick"', repr(str(profile_file(methods=["depth"]))))
    book.cells[1].source = edited.replace("results = None", f"results = {str(results)!r}")
    NotebookClient(book, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "test top-1" in str(outputs) and not any(output.get("name") == "stderr" for output in outputs)
    assert study.Run.plan(tmp_path / "tiny.yaml", "depth", 0, results).state() == "finished"
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sed": 1}, "unknown parameter of 01_baseline_b0 'sed'.*Did you mean 'seed'"),
        ({"seed": "0"}, "parameter seed of 01_baseline_b0: expected a value like 0, got '0'"),
        ({"seed": True}, "parameter seed"),
        ({"profile": 3}, "parameter profile"),
        ({"results": 3}, "parameter results"),
    ],
)
def test_parameters_that_a_notebook_does_not_declare_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        study.check_parameters("01_baseline_b0", values)


@pytest.mark.parametrize(
    "words, message",
    [
        (["-p", "sed", "1"], "unknown parameter of 01_baseline_b0 'sed'"),
        (["-p", "seed", "one"], "parameter seed of 01_baseline_b0"),
        (["-p", "method", "depth"], "method 'depth' is trained by 02_single_axis_scaling"),
    ],
)
def test_papermill_itself_fails_on_a_wrong_parameter(words, message, tmp_path):
    """Not only through the study: papermill alone would warn of an unknown parameter and go on."""
    source = study.NOTEBOOKS / "01_baseline_b0.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(tmp_path / "out.ipynb"), "-k", "python3", *words]
    done = subprocess.run(command, cwd=study.NOTEBOOKS, capture_output=True, text=True, timeout=1500)
    assert done.returncode != 0 and message in done.stderr


def test_a_run_on_several_devices_goes_through_its_notebook(profile_file, tmp_path):
    """Two processes on this CPU follow one process with two micro-batches, step by step."""
    train = {"epochs": 2, "batch_size": 24, "accumulation": 2, "optimizer": "sgd", "lr": 0.02, "norm_momentum": 0.1}
    common = {"methods": ["baseline"], "data": {"name": "digits", "size": 16, "train_per_class": 8}, "train": train}
    losses = []
    for devices in (1, 2):
        path = profile_file(f"on_{devices}", devices=devices, **common)
        run = study.Run.plan(path, "baseline", 0, tmp_path)
        parameters = {"profile": str(path), "results": str(tmp_path), "device": "cpu"}
        study.run_notebook("01_baseline_b0", run.executed, parameters, threads=1)
        assert run.executed.read_text().count("minival top-1") == 2  # a line per epoch: one process speaks
        record = study.read_record(run.directory)
        assert record["devices"] == devices and record["micro_batch"] == 12
        losses.append(study.load_history(run.directory)["train_loss"].tolist())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
