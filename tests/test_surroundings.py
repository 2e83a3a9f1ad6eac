"""Whatever surrounds the study: variables, locales, file systems, other users, names with any characters."""

import errno
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import filelock
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import write_record
from made_up import write_study
from markdown_it import MarkdownIt
from PIL import Image

import effnet_study as study
from effnet_study import cli
from effnet_study import record as records
from effnet_study.analysis import figures, summary, tables
from effnet_study.documents.compose import main
from effnet_study.documents.evidence import Study
from effnet_study.execution import notebook
from effnet_study.files import (
    ROOT,
    drawn,
    hold,
    holder_of,
    in_markdown,
    plain,
    print_any_text,
    replace_file,
    write_json,
)
from effnet_study.machine import git_state
from effnet_study.model_run import plan_model
from effnet_study.record import read_record

PROBE = """
import getpass, os, random, sys
import matplotlib, matplotlib.pyplot as plt
from pathlib import Path
import effnet_study
from effnet_study.data.load import data_root
found = {"python": sys.executable, "modules": str(Path(effnet_study.__file__).parent), "user": getpass.getuser()}
found |= {"home": os.access(Path.home(), os.W_OK), "data": str(data_root().absolute()), "method": method}
found |= {"optimized": not __debug__, "hard": matplotlib.rcParams["lines.linewidth"], "startup": "started" in globals()}
print("é, 猫")
print(found)
plt.plot([1]);
"""
NAMES = ["$5_$10", "100 %", "a & b", "<b>bold</b>", "a_b_c", "a|b", "back\\slash", "two\nlines", "x" * 300]
NAMES += ["קטן", "[a](b)", "caf\udce9", "--", "`code`", "*", "\\$x$", "\u202eabc"]


def book(*cells):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    made.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    for i, cell in enumerate(made.cells):
        cell.metadata.tags = ["parameters"] if i == 0 else []
    return made


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A notebook that was executed in bad surroundings: what it found, its outputs, what was printed, its folder."""
    place = tmp_path_factory.mktemp("bad é")
    for folder in ("books", "work/images", "jupyter/kernels/python3", "ipython/profile_default/startup", "matplotlib"):
        (place / folder).mkdir(parents=True)
    nbformat.write(book('method = "baseline"\nseed = 0', PROBE), place / "books" / "probe.ipynb")
    foreign = {"argv": ["/nowhere/python", "{connection_file}"], "display_name": "Foreign", "language": "python"}
    (place / "jupyter" / "kernels" / "python3" / "kernel.json").write_text(json.dumps(foreign))
    (place / "ipython" / "profile_default" / "startup" / "0.py").write_text("started = True")
    (place / "startup.py").write_text("started = True")
    (place / "work" / "random.py").write_text("raise ImportError('of the working folder')")
    (place / "matplotlib" / "matplotlibrc").write_text("lines.linewidth: 77")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    bad = {"MPLBACKEND": "Agg", "MPLCONFIGDIR": place / "matplotlib", "MATPLOTLIBRC": place / "matplotlib"}
    bad |= {"JUPYTER_PATH": place / "jupyter", "JUPYTER_DATA_DIR": place / "jupyter", "IPYTHONDIR": place / "ipython"}
    bad |= {"HOME": "/nowhere", "PYTHONSTARTUP": place / "startup.py", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    bad |= {"PYTHONOPTIMIZE": "1", "PYTHONWARNINGS": "error", "PYTHONHOME": "/nowhere", "PYTHONINSPECT": "1"}
    bad |= {"EFFNET_DATA": "images", "JUPYTER_RUNTIME_DIR": "/proc/nowhere"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bad.items():
            patch.setenv(name, str(value))
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            patch.delenv(name, raising=False)
        patch.chdir(place / "work")
        patch.setattr(notebook, "NOTEBOOKS", place / "books")
        patch.setattr(sys, "stdout", terminal)
        notebook.run_notebook("probe", place / "out.ipynb", {"method": "depth"})
    terminal.flush()
    outputs = nbformat.read(place / "out.ipynb", 4).cells[-1].outputs
    text = "".join(output.get("text", "") for output in outputs)
    found = eval(text.splitlines()[1])
    return SimpleNamespace(**found, outputs=outputs, printed=terminal.buffer.getvalue(), place=place, text=text)


def test_the_kernel_is_the_studys_whatever_kernels_and_startup_files_the_user_has(probed):
    assert probed.python == sys.executable and probed.modules == str(ROOT / "effnet_study")
    assert not probed.startup and not probed.optimized and probed.method == "depth"


def test_figures_appear_whatever_backend_and_settings_of_matplotlib_the_user_has(probed):
    assert any("image/png" in output.get("data", {}) for output in probed.outputs) and probed.hard == 1.5
    assert not [output for output in probed.outputs if output.get("name") == "stderr"]


def test_a_user_without_home_and_name_has_both_in_a_kernel(probed):
    assert probed.home and probed.user


def test_relative_paths_mean_the_same_in_a_kernel_as_in_the_command(probed):
    assert probed.data == str(probed.place / "work" / "images")


def test_text_of_any_script_reaches_a_terminal_of_any_encoding(probed):
    assert probed.text.startswith("é, 猫\n") and b"\\xe9, \\u732b\n" in probed.printed


def test_no_file_is_left_beside_the_user(probed):
    assert sorted(path.name for path in (probed.place / "work").iterdir()) == ["images", "random.py"]
    assert [path.name for path in (probed.place / "ipython").rglob("*") if path.is_file()] == ["0.py"]


@pytest.mark.parametrize("tags", [[[], []], [["parameters"], ["parameters"]]])
def test_a_parameters_cell_without_its_tag_is_an_error_by_name(tags, tmp_path, monkeypatch):
    made = book("seed = 0", "1")
    for cell, given in zip(made.cells, tags, strict=True):
        cell.metadata.tags = given
    nbformat.write(made, tmp_path / "lost.ipynb")
    monkeypatch.setattr(notebook, "NOTEBOOKS", tmp_path)
    with pytest.raises(ValueError, match=r"seed of lost: expected one cell with the tag 'parameters', found [02]"):
        notebook.run_notebook("lost", tmp_path / "out.ipynb", {"seed": 3})
    assert not (tmp_path / "out.partial.ipynb").exists()


def test_a_parameter_that_papermill_injected_before_the_notebooks_own_is_an_error_by_name():
    values = {"profile": "quick", "method": "baseline", "seed": 0, "results": None, "device": None}
    with pytest.raises(ValueError, match="parameter seed of 01_baseline_b0: 3 was given, but the notebook sets 0"):
        study.check_notebook("01_baseline_b0", values | {"In": ["", "# Parameters\nseed = 3\n", "seed = 0"]})


# ---- names


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is(name, tmp_path):
    fig, ax = plt.subplots()
    text = ax.set_title(drawn(name, 40))
    ax.set_xticks([0], [drawn(name, 40)])
    ax.plot([0], [1], label=f"of {drawn(name, 40)}")
    ax.legend()
    fig.savefig(tmp_path / "name.png")
    shown, is_math = text._preprocess_math(text.get_text())
    plt.close(fig)
    assert not is_math and shown == plain(name, 40) and shown.isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_markup_in_markdown(name):
    from html import unescape

    table = pd.DataFrame({"class": [in_markdown(name)]}).to_markdown(index=False)
    html = MarkdownIt("gfm-like", {"linkify": False}).render(f"of {in_markdown(name)}.\n\n{table}\n")
    assert html.startswith("<p>of ") and html.count("<td") == 1
    assert " ".join(unescape(html.partition("</p>")[0]).removeprefix("<p>").split()) == " ".join(
        f"of {plain(name)}.".split()
    )


def test_different_names_stay_different_and_usual_ones_as_they_are():
    assert plain("caf\udce9") == "caf\\xe9" != plain("caf\udce8") and plain("caf\udcc3\udca9") == "café"
    for name in ("Tiny ImageNet (100 classes)", "goldfish, Carassius", "हिन्दी", "می‌خواهم"):
        assert plain(name) == drawn(name) == in_markdown(name) == name


def test_figures_of_classes_and_data_sets_of_any_name(tmp_path):
    profile, methods = study.load_profile("quick"), ["baseline", "depth"]
    table = pd.DataFrame({"class": NAMES, "baseline": 50.0, "depth": np.linspace(40, 60, len(NAMES))})
    done = pd.DataFrame({"method": methods, "seed": 0, "top1": 50.0, "raw_top1": 40.0, "data": "$5_$10 \udce9"})
    image, title = np.zeros((4, 4, 3), np.uint8), "$5_$10: check"
    maps = {"depth": ([np.zeros((4, 4))] * 2, ["$5_$10", "\udce9"])}
    made = [figures.draw_per_class(profile, table), figures.draw_ablation(profile, "lr", methods, done, done)]
    made += [figures.draw_activation_maps([image] * 2, ["$5_$10", "b\udce9"], maps, title)]
    for number, fig in enumerate(made):
        study.save_figure(fig, tmp_path / str(number))
    assert made[2]._suptitle.get_text() == r"\$5_\$10: check"


def test_the_table_of_classes_holds_names_that_are_not_utf_8(profile_file, tmp_path):
    run = study.Run.plan(study.load_profile(profile_file(methods=["baseline"])), "baseline", 0, tmp_path)
    dataset = {"title": "T\udce9", "classes": 2, "counts": {"train": 9, "minival": 9, "test": 2}}
    write_record(run, dataset=dataset | {"class_names": ["a\udce9", "b|c\nd"]})
    done = pd.DataFrame({"method": ["baseline"], "run_dir": [run.run_dir]})
    answers = {"baseline": [{"label": np.array([0, 1]), "predicted": np.array([0, 0])}]}
    table = tables.per_class(answers, done)
    study.save_table(table, tmp_path / "per_class.csv")
    assert pd.read_csv(tmp_path / "per_class.csv")["class"].tolist() == ["a\\xe9", "b|c d"]
    runs = study.load_runs(run.profile, tmp_path)
    assert Study(run.profile, tmp_path, runs).data == "T\\xe9"
    assert "- Data: T\\\\xe9, 9 training" in "\n".join(summary._about(run.profile, runs))


@pytest.mark.slow
def test_the_documents_of_a_study_with_odd_names_are_whole(tmp_path):
    odd = "</script><!--<script>$5_$10 [x](y) | #a *b* & \\ 猫 קטן\udce9"
    path, results = write_study(tmp_path, seeds=1)
    for file in path.parent.glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(values | {"title": f"{plain(odd)} {file.stem}"}))
    for file in results.rglob("run.json"):
        record = read_record(file.parent)
        record["dataset"] |= {"title": odd, "class_names": [odd] * 10}
        record.pop("sha256")
        records.write_record(file.parent, record)
    (tmp_path / "out").mkdir()
    main(str(path), results, tmp_path / "out", keep_figures=True)
    page = BeautifulSoup((tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8"), "html.parser")
    assert json.loads(page.find("script", id="specs").string)["figure8"]["description"].startswith(plain(odd))
    assert page.find("h3").get_text() == plain(odd) and page.find("footer")
    assert f"on {in_markdown(odd)}, compound" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# ---- files and folders


def flushing(number, kind):
    def fsync(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_a_folder_ends_nothing(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", flushing(number, stat.S_ISDIR))
    write_json(tmp_path / "one.json", 1)
    assert json.loads((tmp_path / "one.json").read_text()) == 1


@pytest.mark.parametrize("kind, named", [(stat.S_ISREG, "one.json"), (stat.S_ISDIR, "")])
def test_what_could_not_be_flushed_is_named(kind, named, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", flushing(errno.EIO, kind))
    with pytest.raises(OSError, match="Input/output error") as caught:
        replace_file(tmp_path / "one.json", "1")
    assert Path(caught.value.filename) == tmp_path / named and not list(tmp_path.glob(".*partial"))


def repository(place):
    git = ["git", "-C", str(place), "-c", "user.name=n", "-c", "user.email=e@x"]
    (place / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "1"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_another_users_checkout_is_read(tmp_path, monkeypatch):
    commit = repository(tmp_path)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    plain = os.environ | {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }  # no safe.directory
    refused = subprocess.run(["git", "-C", str(tmp_path), "status"], env=plain, capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as git itself sets it for hooks
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_the_commit_of_a_repository_around_this_one_is_not_taken(tmp_path, monkeypatch):
    repository(tmp_path)
    (tmp_path / "inside").mkdir()
    monkeypatch.setenv("EFFNET_COMMIT", "abc")
    assert git_state(tmp_path / "inside") == {"commit": "abc", "dirty": None}


def test_a_checkout_whose_commit_cannot_be_read_is_not_passed_over(tmp_path, capsys):
    (tmp_path / ".git").mkdir()
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    assert "the record names no commit: fatal: not a git repository" in capsys.readouterr().err


def test_folders_of_images_have_distinct_results_inside_results(image_folder, tmp_path, monkeypatch):
    first, found = image_folder(), {}
    names = ["a b", "a-b", "café", "cafè", "猫", "हिन्दी", "..b", "-x", ".hidden", "$", "é" * 120]
    names += ["x\udce9", "x\ny", "nested/a b"]
    for name in names:
        place = Path(os.fsdecode(os.fsencode(tmp_path / "all" / name)))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(first) if name == "nested/a b" else subprocess.run(["cp", "-r", first, place], check=True)
        found[name] = plan_model("b0", f"folder:{place}", tmp_path / "results").run_dir
        assert found[name].resolve().parents[2] == (tmp_path / "results").resolve()
        assert all(len(os.fsencode(part)) <= 255 for part in found[name].parts)
        found[name].mkdir(parents=True)
    assert len(set(found.values())) == len(names)
    study_dirs = {name: path.parents[1].name for name, path in found.items()}
    for name, kept in {"café": "café", "猫": "猫", "हिन्दी": "हिन्दी", "a b": "a-b", "nested/a b": "pictures"}.items():
        assert study_dirs[name].startswith(f"{kept}-")
    monkeypatch.chdir(tmp_path)
    for same in ("all/猫", "./all/../all/猫", f"{tmp_path}/all/猫/"):
        assert plan_model("b0", f"folder:{same}", tmp_path / "results").run_dir == found["猫"]


def test_an_ended_run_in_a_folder_of_somebody_else_is_not_locked(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(PermissionError), hold(tmp_path):  # not ended
        pass
    (tmp_path / "run.json").write_text("{}")
    with hold(tmp_path):
        pass
    monkeypatch.setattr("builtins.open", refuse)
    assert holder_of(tmp_path) is None


def test_printing_needs_no_encoding_of_the_terminal(monkeypatch):
    expected = {"ascii": b"caf\\xe9 \\udce9", "latin-1": b"caf\xe9 \\udce9", "utf-8": b"caf\xc3\xa9 \\udce9"}
    for encoding in expected:
        terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", terminal)
        print_any_text()
        print("café \udce9", end="", flush=True)
        assert terminal.buffer.getvalue() == expected[encoding]
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=None))  # a notebook's has no reconfigure
    print_any_text()


# ---- the command


def complete(profile_file, tmp_path, **changes):
    """The command of a study whose run, notebooks and analysis are there, and the study's folder."""
    path = profile_file(methods=["baseline"], **changes)
    run = study.Run.plan(study.load_profile(path), "baseline", 0, tmp_path)
    write_record(run)
    for name in (run.executed, run.executed.with_stem("05_analysis")):
        name.parent.mkdir(exist_ok=True)
        name.touch()
    return ["study", str(path), "--results", str(tmp_path)], run.study_dir


def test_a_title_of_any_characters_is_printed_on_a_terminal_of_any_encoding(profile_file, tmp_path, monkeypatch):
    words, _ = complete(profile_file, tmp_path, title="[/bold] 猫 $5_$10")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(words) == 0
    terminal.flush()
    assert terminal.buffer.getvalue().count(b"[/bold] \\u732b $5_$10") == 2


def test_a_complete_study_of_another_user_is_read_and_not_written(profile_file, tmp_path, monkeypatch):
    words, folder = complete(profile_file, tmp_path)
    before = sorted(folder.rglob("*"))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert cli.main(words) == 0 and sorted(folder.rglob("*")) == before


def test_data_of_classes_of_any_name_are_described(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in (b"$5_$10", b"caf\xe9", "קטן".encode(), b"a\nb"):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"pics", name)))
        folder.mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    assert cli.main(["data", f"folder:{tmp_path / 'pics'}", "--root", str(tmp_path), "size=8"]) == 0
    assert (tmp_path / "reports").is_dir() and "4 classes" in capsys.readouterr().out
