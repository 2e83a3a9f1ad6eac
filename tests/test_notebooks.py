"""The notebooks: clean in the repository, and executed from end to end on a small study."""

import contextlib
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

import effnet_study as study
from effnet_lib import TABLE7
from effnet_study.analysis import tables
from effnet_study.cli import main
from effnet_study.execution.notebook import check_parameters, run_notebook
from effnet_study.files import ROOT, read_progress
from effnet_study.run import plan_runs

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
    assert all(words in notebook.cells[0].source for words in ("How long:", "At the end you will know"))
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    return done, place / "results" / "small", command


@pytest.mark.slow
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
        assert str(ROOT) not in path.read_text()


@pytest.mark.slow
def test_the_study_prints_a_line_per_epoch_and_a_closing_table(executed):
    done, folder, _ = executed
    lines = [line for line in done.stdout.splitlines() if "  epoch " in line]
    assert len(lines) == 6 * 2 + 3  # and one of each candidate of the search
    (first,) = [line for line in lines if line.startswith("baseline") and "1/2" in line]
    assert all(word in first for word in ("seed 0", "loss", "top-1", "images/s", "left"))
    assert done.stdout.count("finished") >= 6 and "pipeline check, not evidence" in done.stdout
    *_, claim, contrast, last = done.stdout.splitlines()
    assert claim.startswith("- the searched coefficients beat the published ones")  # a terminal shows no Markdown
    # The search may find the published ones
    assert contrast.startswith("  - compound searched ") and (": unclear" in contrast or "same network" in contrast)
    assert last.endswith(f"All of it: {folder / 'README.md'}")


@pytest.mark.slow
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
    figures = ["figure8", "learning_curves", "flops_mismatch", "b0_stages", "b0", "mbconv", "growth", "five_networks"]
    figures += ["squeeze_excitation", "stochastic_depth", "search"]
    for figure in figures:
        for suffix in ("svg", "pdf", "png"):
            assert (folder / "figures" / f"{figure}.{suffix}").stat().st_size > 5000
    verdict = json.loads((folder / "tables" / "verdict.json").read_text())
    keys = ["compound_published", "axes_help", "searched", "searched_vs_published"]
    assert [claim["key"] for claim in verdict["claims"]] == keys
    assert all(claim["outcome"] is None and claim["sentences"] for claim in verdict["claims"])  # not of a check
    contrasts = pd.read_csv(folder / "tables" / "contrasts.csv").set_index("claim")["outcome"]
    assert (contrasts.drop("searched_vs_published") == "unclear").all()  # one seed
    mistakes = pd.read_csv(folder / "tables" / "mistakes.csv", index_col="mistake")
    params = mistakes.loc["squeeze-and-excitation of expanded channels", ["here", "with the mistake"]]
    assert params.tolist() == ["4,020,358", "7,155,658"]  # the second is that of a well-known reproduction
    assert "one seed" not in mistakes.index  # there is no more than one
    page = (folder / "README.md").read_text()
    assert "pipeline check, not evidence" in page and f"{table['top1'][4]:.2f}" in page


@pytest.mark.slow
def test_trained_networks_are_shown(executed, tmp_path):
    _, folder, command = executed
    where = {"profile": command[4], "results": str(folder.parent)}
    run_notebook("08_trained_networks", tmp_path / "08.ipynb", where)
    for figure in ("figure7", "per_class", "calibration"):
        assert (folder / "figures" / f"{figure}.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_analysis_of_a_whole_study_with_other_lengths_and_budgets(profile_file, tmp_path):
    """On made-up scores, whose tables test_analysis.py checks: 05 runs through, and draws what there is."""
    top1 = {"baseline": 70, "depth": 74, "width": 74.5, "resolution": 73.5, "compound": 77, "fast_compound": 76.5}
    top1 |= {"depth_matched": 74.5, "width_matched": 77, "resolution_matched": 74}
    twice = {"depth_x2": 72, "width_x2": 72.5, "resolution_x2": 71, "compound_x2": 73}
    path = profile_file(methods=list(top1), seeds=[0, 1, 2], purpose="exploratory")
    for name, methods, train in (
        ("twice", twice, ""),
        ("long", [*top1][-3:], "epochs: 2"),
        ("hot", ["baseline"], "lr: 0.1"),
    ):
        text = f"title: {name}\nextends: tiny.yaml\nmethods: [{', '.join(methods)}]\ntrain: {{{train}}}\n"
        path.with_name(f"{name}.yaml").write_text(text)
    rng = np.random.default_rng(0)
    for name in ("tiny", "twice", "long", "hot"):
        for run in plan_runs(study.load_profile(path.with_name(f"{name}.yaml")), tmp_path):
            score = (top1 | twice)[run.method] + 0.05 * (run.seed - 1)
            write_record(run, score, cost={"params": 1000, "flops": 2000 + int(score), "activations": 3000})
            np.save(run.run_dir / "test_correct.npy", rng.random(1000) < score / 100)
            rows = [{"epoch": 1, "train_loss": 2.0, "minival_top1": score, "lr": run.config.lr}]
            (run.run_dir / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_notebook("05_analysis", tmp_path / "05.ipynb", {"profile": str(path), "results": str(tmp_path)})
    folder = tmp_path / "tiny"
    claims = json.loads((folder / "tables" / "verdict.json").read_text())["claims"]
    assert [c["key"] for c in claims] == ["compound_matched", "compound_published", "fast_compound", "axes_help"]
    contrasts = pd.read_csv(folder / "tables" / "contrasts.csv").set_index(["target", "other"])
    assert contrasts["difference"]["compound", "depth"] == pytest.approx(3)
    assert contrasts["outcome"]["compound", "width_matched"] == "equal"
    assert pd.read_csv(folder / "tables" / "lengths.csv")["epochs"].unique().tolist() == [1, 2]
    assert set(pd.read_csv(folder / "tables" / "length_contrasts.csv")["epochs"]) == {1}  # there is no longer compound
    for figure in ("figure8", "figure8_matched", "contrasts", "lengths", "learning_curves"):
        assert (folder / "figures" / f"{figure}.svg").stat().st_size > 5000, figure
    assert "depth_x2" not in (folder / "README.md").read_text() and not (folder / "tables" / "ablation.csv").exists()
    long = study.load_profile(path.with_name("long.yaml"))  # its own analysis has neither lengths nor an ablation
    assert tables.lengths(long, tmp_path).empty and set(tables.recipe_changes(long)) == {"epochs"}


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_notebook_with_sliders_does_without_them(tmp_path, monkeypatch):
    """00 where ipywidgets is not installed: its pictures are static."""
    (tmp_path / "ipywidgets.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    run_notebook("00_architecture", tmp_path / "00.ipynb", {"results": str(tmp_path)})
    last = [cell for cell in nbformat.read(tmp_path / "00.ipynb", 4).cells if cell.cell_type == "code"][-2:]
    assert any("image/png" in output.get("data", {}) for output in last[0].outputs)
    assert "Without ipywidgets" in str(last[1].outputs)


@pytest.mark.slow
def test_a_study_makes_no_widgets(executed):
    """A client that answers no widget, as papermill's, waits for ever for its cell now and then."""
    _, folder, _ = executed
    book = nbformat.read(folder / "notebooks" / "00_architecture.ipynb", 4)
    assert "widgets" not in book.metadata and "Without sliders" in str(book.cells[-2].outputs)


@pytest.mark.slow
def test_the_architecture_notebook_finds_the_mismatch_of_table_7(executed):
    _, folder, _ = executed
    costs = pd.read_csv(folder / "tables" / "table7_cost.csv").set_index("method")
    extra = costs["compound_extra_percent"]
    assert extra[["depth", "width", "resolution"]].round().tolist() == [14, 24, 17]
    assert (costs["matched_residual_percent"].dropna().abs() < 3).all()
    variants = pd.read_csv(folder / "tables" / "variants.csv").set_index("model")
    assert variants["flops"]["b3"] == 1_827_141_392


@pytest.mark.slow
def test_a_second_study_trains_nothing(executed):
    _, folder, command = executed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0 and "  epoch " not in done.stdout
    assert "0 of 6 runs to do" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_an_ablation_is_printed_and_has_a_page(executed):
    _, folder, command = executed
    results, path = folder.parent, folder.parents[1] / "gentle.yaml"
    path.write_text("title: Gentle\nextends: small.yaml\nmethods: [baseline]\ntrain: {lr: 0.02}\n")
    words = [*command[:4], str(path), "--results", str(results)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(results / "gentle" / "tables" / "ablation.csv")
    assert table["what"].tolist() == ["baseline", "baseline"] and (table["change"] == "lr 0.05 to 0.02").all()
    words = f"{table['difference'][0]:+.2f} points"
    assert f"baseline (moving average): {words} by lr 0.05 to 0.02" in done.stdout
    page = (results / "gentle" / "README.md").read_text()
    assert "## What the change does" in page and words in page and "figures/ablation.png" in page
    assert (
        "Verdict" not in page and "nothing to decide" in page and "ablation" not in (folder / "README.md").read_text()
    )


@pytest.mark.slow
def test_a_failing_notebook_fails_the_study_and_is_kept(profile_file, tmp_path, capfd):
    path = profile_file(methods=["compound"])
    run = study.Run.plan(study.load_profile(path), "compound", 0, tmp_path)
    (run.run_dir / "weights.safetensors").mkdir(parents=True)  # in the way of a file
    assert main(["study", str(path), "--results", str(tmp_path)]) == 1
    said = capfd.readouterr().err
    assert "04_compound_scaling failed" in said and "Is a directory" in said
    assert run.executed.with_suffix(".partial.ipynb").exists() and not run.executed.exists()
    assert run.state() == "interrupted" and not run.executed.with_stem("05_analysis").exists()


def test_a_study_stops_at_sigterm_and_the_same_command_completes_it(profile_file, tmp_path, capsys):
    """From the command to the page, through papermill: two notebooks side by side, stopped in their first epoch; then
    the same command trains the rest and executes the analysis."""
    train = {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "lr": 0.01, "norm_momentum": 0.1, "save_seconds": 1000.0}
    data = {"name": "digits", "size": 16, "train_per_class": 60}
    # 01 shows more before it trains than 02: depth takes long enough to be still in its epoch then
    path = profile_file(methods=["baseline", "depth"], base_resolution=8, data=data, train=train)
    words = ["study", str(path), "--results", str(tmp_path), "--jobs", "2"]
    runs = plan_runs(study.load_profile(path), tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "effnet_study", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        while not all(read_progress(run.run_dir) for run in runs):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=600) == 75 and "the same command continues" in process.stderr.read()
    finally:
        process.kill()
    folder = tmp_path / "tiny"
    for run in runs:
        assert run.state() == "interrupted"
        progress = torch.load(run.run_dir / "checkpoint.pt", weights_only=True)["progress"]
        assert progress["step"] > 0 and not progress["history"]
    assert not list((folder / "notebooks").iterdir())
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("continues in epoch 1 after step") == 2 and said.count("  epoch ") == 2
    names = [
        "00_architecture",
        "01_baseline_b0_baseline_seed0",
        "02_single_axis_scaling_depth_seed0",
        "05_analysis",
    ]
    assert sorted(path.stem for path in (folder / "notebooks").iterdir()) == names
    table = pd.read_csv(folder / "tables" / "table7.csv").set_index("method")
    for run in runs:
        correct = np.load(run.run_dir / "test_correct.npy")
        assert table["top1"][run.method] == pytest.approx(100 * correct.mean())
        assert f"{100 * correct.mean():.2f}" in (folder / "README.md").read_text()
    for path in (folder / "notebooks").iterdir():
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        assert outputs and not any(output.output_type == "error" for output in outputs)
        assert str(ROOT) not in path.read_text()
    assert said.splitlines()[-1].endswith(f"All of it: {folder / 'README.md'}")


def test_a_notebook_runs_by_papermill_alone_from_its_own_folder(profile_file, tmp_path):
    path = profile_file(methods=["width"])
    words = ["-p", "profile", str(path), "-p", "method", "width", "-p", "results", str(tmp_path)]
    command = [sys.executable, "-m", "papermill", "02_single_axis_scaling.ipynb", str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, *words], cwd=study.NOTEBOOKS, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert study.Run.plan(study.load_profile(path), "width", 0, tmp_path).state() == "finished"


@pytest.mark.slow
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
    assert study.Run.plan(study.load_profile(tmp_path / "tiny.yaml"), "depth", 0, results).state() == "finished"
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
        check_parameters("01_baseline_b0", values)


def test_the_explorer_can_be_switched_off():
    assert check_parameters("00_architecture", {"explorer": False})["explorer"] is False


def test_papermill_itself_fails_on_a_wrong_parameter(tmp_path):
    """Not only through the study: papermill alone would warn of an unknown parameter and go on."""
    source = study.NOTEBOOKS / "01_baseline_b0.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(tmp_path / "out.ipynb"), "-k", "python3"]
    done = subprocess.run(
        [*command, "-p", "sed", "1"], cwd=study.NOTEBOOKS, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode != 0 and "unknown parameter of 01_baseline_b0 'sed'" in done.stderr


@pytest.mark.parametrize(
    "injected, edited, message",
    [
        ({"sed": 1}, {}, "unknown parameter of 01_baseline_b0 'sed'. Did you mean 'seed'"),
        ({"seed": "one"}, {}, "parameter seed of 01_baseline_b0: expected a value like 0, got 'one'"),
        ({"method": "depth"}, {}, "method 'depth' is trained by 02_single_axis_scaling, not by 01_baseline_b0"),
        ({"method": "dept"}, {}, "unknown method 'dept'.*Did you mean 'depth'"),
        ({}, {"seed": 1.5}, "parameter seed of 01_baseline_b0: expected a value like 0, got 1.5"),
        ({"seed": 1}, {"method": "width"}, "method 'width' is trained by 02_single_axis_scaling"),
        ({"seed": 3, "results": "there"}, {"sed": 4, "device": "cpu"}, None),  # a variable of the notebook's own
    ],
)
def test_a_notebook_checks_its_parameters(injected, edited, message):
    """injected: by papermill, in a cell of its own. edited: by hand in the notebook, or defined by it."""
    values = {"profile": "quick", "method": "baseline", "seed": 0, "results": None, "device": None}
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in injected.items())
    namespace = values | injected | edited | {"In": ["", "seed = 0", *[cell] * bool(injected)]}
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        study.check_notebook("01_baseline_b0", namespace)


def test_every_notebooks_own_parameters_are_accepted():
    for path in SOURCES:
        namespace: dict = {}
        exec(nbformat.read(path, as_version=4).cells[1].source, namespace)
        study.check_notebook(path.stem, namespace)


@pytest.mark.slow
def test_a_run_on_several_devices_goes_through_its_notebook(profile_file, tmp_path):
    """Two processes on this CPU follow one process with two micro-batches, step by step."""
    train = {"epochs": 2, "batch_size": 24, "accumulation": 2, "optimizer": "sgd", "lr": 0.02, "norm_momentum": 0.1}
    common = {"methods": ["baseline"], "data": {"name": "digits", "size": 16, "train_per_class": 8}, "train": train}
    losses = []
    for devices in (1, 2):
        path = profile_file(f"on_{devices}", devices=devices, **common)
        run = study.Run.plan(study.load_profile(path), "baseline", 0, tmp_path)
        parameters = {"profile": str(path), "results": str(tmp_path), "device": "cpu"}
        run_notebook("01_baseline_b0", run.executed, parameters, threads=1)
        assert run.executed.read_text().count("minival top-1") == 2  # a line per epoch: one process speaks
        record = study.read_record(run.run_dir)
        assert record["devices"] == devices and record["micro_batch"] == 12
        losses.append(study.load_history(run.run_dir)["train_loss"].tolist())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
