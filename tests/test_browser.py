"""The notebooks as a reader uses them, in JupyterLab in a real, headless browser: `make test-slow`.

Copies of the notebooks lie in a foreign folder, results go to another: neither the sources nor results/ are touched.
EFFNET_SCREENSHOTS names a folder for pictures of what was seen.
"""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import yaml
from conftest import SMALL_PROFILE

import effnet_study as study
from effnet_lib import compound_scaling

pytestmark = pytest.mark.browser

TINY = SMALL_PROFILE | {"methods": ["baseline", "depth", "compound"], "search": {"step": 0.4, "train": {"epochs": 1}}}
SLOW = SMALL_PROFILE | {"title": "Slow", "data": SMALL_PROFILE["data"] | {"train_per_class": 40}}
SLOW |= {"train": SMALL_PROFILE["train"] | {"epochs": 6, "batch_size": 5}}  # long enough to be watched and stopped
BENCH = {"device": "cpu", "rounds": 1, "batch_size": 4, "resolutions": [32]}
MODELS = {"device": "cpu", "networks": ["b0", "densenet201"], "seconds": 0.05}
FIGURES = {  # in the order in which a reader runs them, and with how many pictures each
    "01_baseline_b0": 4,
    "02_single_axis_scaling": 1,
    "03_coefficient_search": 2,
    "04_compound_scaling": 1,
    "05_analysis": 3,
    "06_throughput": 4,
    "07_models": 1,
    "08_trained_networks": 3,
}
SETTINGS = {  # the news would cover the notebook; cells off the screen would not be drawn
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
IDLE = "Python 3 (ipykernel) | Idle"
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
NUMBERS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => Number(e.textContent.slice(1, -2)))"
SHOWN = """figures => figures === [...document.querySelectorAll('.jp-OutputArea-output img')]
    .filter(image => image.checkVisibility() && image.naturalWidth > 100).length"""
CORNER = """images => images.map(image => {
    const canvas = document.createElement('canvas').getContext('2d');
    canvas.drawImage(image, 0, 0);
    return [...canvas.getImageData(0, 0, 1, 1).data].join();
})"""
# Words in outputs and texts (but not JupyterLab's own colours of code) whose contrast is below the 4.5 that WCAG asks
FAINT = """() => {
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => parts(color).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const clear = element => (parts(getComputedStyle(element).backgroundColor)[3] ?? 1) < 0.5;
    const faint = [];
    for (const area of document.querySelectorAll('.jp-OutputArea-output, .jp-MarkdownOutput')) {
        const walk = document.createTreeWalker(area, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) {
            let element = walk.currentNode.parentElement, behind = element;
            if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue;
            if (element.closest('style, mjx-container, pre code')) continue;
            while (behind.parentElement && clear(behind)) behind = behind.parentElement;
            const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
            const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            if (contrast < 4.5) faint.push(`${contrast.toFixed(1)}: ${walk.currentNode.data.trim()}`);
        }
    }
    return faint;
}"""


class Lab(NamedTuple):
    """A running JupyterLab and its folders."""

    address: str
    token: str
    notebooks: Path
    settings: Path
    results: Path
    screenshots: Path


def put(settings: Path, name: str, values: dict) -> None:
    """Write a user's settings for one of JupyterLab's extensions."""
    path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def copy(place: Path, name: str, to: str | None = None, **values) -> None:
    """Write a notebook with other values in its cell of parameters, as a reader would edit it."""
    book = nbformat.read(study.NOTEBOOKS / f"{name}.ipynb", 4)
    (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    for key, value in values.items():
        line = f"{key} = {value!r}"
        cell.source, count = re.subn(rf"^{key} = .*$", lambda _, line=line: line, cell.source, flags=re.MULTILINE)
        assert count == 1, f"{name} has no parameter {key}"
    nbformat.write(book, place / f"{to or name}.ipynb")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):  # browser: none, no JupyterLab either
    """JupyterLab on loopback with a token and settings of its own, over copies of the notebooks."""
    pytest.importorskip("jupyterlab", reason="no JupyterLab here: pip install jupyterlab")
    place = tmp_path_factory.mktemp("lab")
    notebooks, settings, results = (place / name for name in ("my notebooks", "settings", "results"))
    screenshots = Path(os.environ.get("EFFNET_SCREENSHOTS") or place / "screenshots").resolve()
    for folder in (notebooks, screenshots, place / "home"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, values in SETTINGS.items():
        put(settings, name, values)
    for profile in (TINY, SLOW):
        (notebooks / f"{profile['title'].lower()}.yaml").write_text(yaml.safe_dump(profile))
    given, others = {"profile": str(notebooks / "tiny.yaml"), "results": str(results)}, {"results": str(results)}
    for name in ("00_architecture", *FIGURES):
        copy(notebooks, name, **({"06": others | BENCH, "07": others | MODELS}.get(name[:2], given)))
    copy(notebooks, "01_baseline_b0", "slow", **given | {"profile": str(notebooks / "slow.yaml")})

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, home = secrets.token_hex(), str(place / "home")
    private = {"HOME": home, "JUPYTER_CONFIG_DIR": home, "JUPYTER_DATA_DIR": home, "JUPYTER_RUNTIME_DIR": home}
    private |= {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": home, "IPYTHONDIR": home}
    private |= {"TORCH_HOME": os.environ.get("TORCH_HOME") or str(Path("~/.cache/torch").expanduser())}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={notebooks}"]
    said = (place / "lab.log").open("w+")
    server = subprocess.Popen(command, env=os.environ | private | {"JUPYTER_TOKEN": token}, stdout=said, stderr=said)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except OSError:
                late = server.poll() is not None or time.monotonic() > deadline
                assert not late, f"JupyterLab did not start: {Path(said.name).read_text()}"
                time.sleep(0.2)
        yield Lab(address, token, notebooks, settings, results, screenshots)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
        said.close()


@pytest.fixture
def visit(lab, browser):
    """A function that opens a copied notebook by its address and waits for its kernel. Errors of the page fail the
    test; the kernel goes with it."""
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    context.set_default_timeout(300_000)
    wrong = []

    def go(name: str):
        page = context.new_page()
        put(lab.settings, "apputils-extension/themes", {"theme": "JupyterLab Light"})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{lab.address}/lab/tree/{name}.ipynb?token={lab.token}&reset")  # else the last one opens beside it
        page.get_by_text(IDLE).wait_for()  # before that, Run All asks for a kernel and waits for ever
        return page

    yield go
    key = {"Authorization": f"token {lab.token}"}
    for session in context.request.get(f"{lab.address}/api/sessions", headers=key).json():
        context.request.delete(f"{lab.address}/api/sessions/{session['id']}", headers=key)
    context.close()
    assert not wrong


def run_all(page) -> int:
    """Choose Run All Cells; returns the number of the last cell that ran before."""
    before = max(page.evaluate(NUMBERS))
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    return before


def finish(page, before: int = 0, seconds: float = 900) -> None:
    """Wait until every cell of code has a new number. No cell may show an error."""
    ended = f"errors => document.querySelector(errors) || {NUMBERS}.every(number => number > {before})"
    page.wait_for_function(ended, arg=ERRORS, timeout=1000 * seconds)
    assert page.locator(ERRORS).all_text_contents() == []
    page.get_by_text(IDLE).wait_for()


def save(page, path: Path) -> nbformat.NotebookNode:
    """Save by keyboard and wait for the file."""
    old = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    deadline = time.monotonic() + 120
    while path.stat().st_mtime_ns == old or not any(c.get("outputs") for c in nbformat.read(path, 4).cells):
        assert time.monotonic() < deadline, f"{path.name} was not saved"
        page.wait_for_timeout(200)
    return nbformat.read(path, 4)


def photograph(page, path: Path) -> None:
    """Take a picture of the whole notebook, on a screen as tall as it. Chromium draws 16,000 pixels at most."""
    notebook = page.locator(".jp-WindowedPanel-outer")
    tall = notebook.evaluate("e => e.scrollHeight")
    page.set_viewport_size({"width": 1300, "height": min(tall + 120, 16_000)})
    notebook.evaluate("e => e.scrollTo(0, 0)")
    page.screenshot(path=path)
    page.set_viewport_size({"width": 1300, "height": 1000})


def darken(page) -> None:
    """Choose the dark theme, as a reader does."""
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Theme", exact=True).hover()
    page.get_by_text("JupyterLab Dark", exact=True).click()
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")


def check(page, lab: Lab, name: str, figures: int, in_widgets: int = 0) -> None:
    """Check that all cells ran, that all pictures are there, on the screen and in the saved file (except those in
    widgets), and that all words are readable in the light theme and in the dark one."""
    finish(page)
    page.wait_for_function(SHOWN, arg=figures + in_widgets)
    photograph(page, lab.screenshots / f"{name}.png")
    cells = [cell for cell in save(page, lab.notebooks / f"{name}.ipynb").cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == figures
    assert page.evaluate(FAINT) == []
    darken(page)
    photograph(page, lab.screenshots / f"{name}_dark.png")
    assert page.evaluate(FAINT) == []
    corners = page.locator(".jp-OutputArea-output img").evaluate_all(CORNER)
    assert set(corners) == {"255,255,255,255"}  # white, not transparent: axes and words are black


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_from_top_to_bottom(visit, lab, name):
    page = visit(name)
    run_all(page)
    check(page, lab, name, FIGURES[name])


def test_the_explorer_redraws(visit, lab):
    page = visit("00_architecture")
    run_all(page)
    sliders, last = page.locator(".widget-slider .noUi-handle"), page.locator(".jp-CodeCell").last
    check(page, lab, "00_architecture", figures=10, in_widgets=1)
    assert sliders.count() == 4
    before = last.locator("img").get_attribute("src")
    sliders.nth(1).press("PageUp")  # depth; a key moves a slider by steps, as the mouse would
    changed = "old => ![null, old].includes(document.querySelector('.widget-output img')?.src ?? null)"
    page.wait_for_function(changed, arg=before)
    before = last.locator("img").get_attribute("src")
    sliders.first.press("PageUp")  # phi, which moves the three others
    expected = ",".join(f"{value:.2f}" for value in (0.5, *vars(compound_scaling(0.5)).values()))
    read = "e => [...document.querySelectorAll('.widget-readout')].map(readout => readout.textContent).join() === e"
    page.wait_for_function(read, arg=expected)
    page.wait_for_function(changed, arg=before)
    page.get_by_text(IDLE).wait_for()
    photograph(page, lab.screenshots / "explorer.png")


def test_training_shows_itself_stops_and_goes_on(visit, lab):
    page = visit("slow")
    run_all(page)
    cell = page.locator(".jp-CodeCell").filter(has_text="run.train(data, device)")
    said, bar = cell.locator(".jp-Cell-outputArea"), cell.locator(".effnet-live[data-state=running] progress")
    bar.wait_for()
    grown = "value => document.querySelector('.effnet-live progress')?.value > value"
    page.wait_for_function(grown, arg=bar.evaluate("e => e.value"))
    cell.screenshot(path=lab.screenshots / "running.png")

    page.get_by_role("button", name="Interrupt the kernel").click()
    cell.locator(".effnet-live[data-state=stopped]").wait_for()
    said.get_by_text("Run the cell again to go on").wait_for()
    cell.screenshot(path=lab.screenshots / "stopped.png")
    record = study.Run.plan(lab.notebooks / "slow.yaml", "baseline", 0, lab.results).run_dir / "run.json"
    assert not record.exists()

    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Shift+Enter")
    said.get_by_text(re.compile("continues (after|in) epoch")).wait_for()
    cell.locator(".effnet-live[data-state=finished]").wait_for(timeout=900_000)

    ended = record.stat().st_mtime_ns
    finish(page, run_all(page))
    assert record.stat().st_mtime_ns == ended and not re.search(r"epoch +\d+", said.text_content())
    photograph(page, lab.screenshots / "again.png")
