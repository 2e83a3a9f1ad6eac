"""One notebook: its parameters are checked, and papermill executes it in a process of its own."""

import ast
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from effnet_lib import unknown_name
from effnet_study.files import NOTEBOOKS, ROOT, RunLocked, print_any_text
from effnet_study.methods import TRAINED_BY, base_method
from effnet_study.stop import Interrupted, ProcessKilled

GRACE = 20  # seconds in which a notebook that was asked to stop must end
TRY_AGAIN = os.EX_TEMPFAIL  # exit status 75: stopped in time, the same command continues
KILLED = os.EX_SOFTWARE  # exit status 70 of papermill_process.py: the kernel died
LOCKED = os.EX_UNAVAILABLE  # exit status 69 of papermill_process.py: another process trains the run
PAPERMILL = Path(__file__).with_name("papermill_process.py")

# ---- 1. Parameters -------------------------------------------------------------------------------------------------


def _assignments(source: str) -> dict[str, object]:
    """Return the NAME = literal lines of a cell."""
    lines = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def check_parameters(notebook: str, values: Mapping[str, object]) -> dict[str, object]:
    """Return the defaults in NOTEBOOK's cell tagged "parameters", updated by `values`. ValueError if there is no such
    cell, or it does not declare one of them, or with another type; papermill only warns."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        ignored = ", ".join(values) or "its parameters"
        raise ValueError(f"{ignored} of {notebook}: expected one cell with the tag 'parameters', found {len(tagged)}")
    declared = _assignments(tagged[0])
    for name, value in values.items():
        if name not in declared:
            raise unknown_name(f"parameter of {notebook}", name, declared)
        default = declared[name]
        # A parameter whose default is None takes text
        allowed = {float: (int, float), type(None): (str, type(None))}.get(type(default), type(default))
        if not isinstance(value, allowed) or (isinstance(value, bool) and type(default) is not bool):
            raise ValueError(f"parameter {name} of {notebook}: expected a value like {default!r}, got {value!r}")
    return declared | dict(values)


def check_notebook(notebook: str, namespace: Mapping[str, object]) -> None:
    """Refuse unknown or ill-typed parameters of this notebook. A notebook's second cell calls it with its globals().

    What papermill was given is read from the cell that it injected: other variables of the notebook are no parameters.
    """
    injected = [_assignments(cell) for cell in namespace.get("In", ()) if cell.startswith("# Parameters\n")]
    given = injected[-1] if injected else {}
    declared = check_parameters(notebook, given)
    for name, value in given.items():
        if namespace[name] != value:
            used = f"{value!r} was given, but the notebook sets {namespace[name]!r} afterwards"
            raise ValueError(f"parameter {name} of {notebook}: {used}; does its cell still have the tag 'parameters'?")
    values = check_parameters(notebook, {name: namespace[name] for name in declared})
    if "method" in values and (trained_by := TRAINED_BY[base_method(values["method"])]) != notebook:
        raise ValueError(f"method {values['method']!r} is trained by {trained_by}, not by {notebook}")


# ---- 2. Execution --------------------------------------------------------------------------------------------------


def run_notebook(
    notebook: str,
    output: Path,
    parameters: Mapping[str, object],
    *,
    threads: int | None = None,
    stop: Path | None = None,
    deadline: float | None = None,
    tensorboard: bool = False,
    environment: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> None:
    """Execute notebooks/NOTEBOOK.ipynb into `output`, which appears only if every cell succeeded. What its cells print
    is printed at once.

    threads: CPU threads of torch (default: all cores). deadline: Unix time before which training stops. tensorboard:
    training writes event files. environment: further variables of the kernel. cwd: its working folder (default: that of
    this process). An interrupt of this process, or a file that appears at `stop`, stops training; what has not ended
    GRACE seconds later is killed.

    Raises RuntimeError if a cell failed, and ProcessKilled if the process was killed; the unfinished notebook is then
    NAME.partial.ipynb. Raises RunLocked if another process trains the run, Interrupted after a stop with a checkpoint.
    """
    check_parameters(notebook, parameters)
    print_any_text()
    unfinished = output.with_suffix(".partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"input_path": str(NOTEBOOKS / f"{notebook}.ipynb"), "output_path": str(unfinished)}
    arguments |= {"parameters": dict(parameters), "kernel_name": "python3", "language": "python"}
    kernel = ["--IPKernelApp.log_level=CRITICAL", "--IPKernelApp.ignore_cwd=True"]
    arguments |= {"cwd": str(cwd or os.getcwd()), "progress_bar": False, "extra_arguments": kernel}
    command = [sys.executable, str(PAPERMILL), json.dumps(arguments), str(os.getpid())]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a killed kernel may still write to it
        stop = stop or Path(folder) / "stop"
        given = {"OMP_NUM_THREADS": threads, "EFFNET_DEADLINE": deadline, "EFFNET_TENSORBOARD": int(tensorboard)}
        variables = {name: str(value) for name, value in (given | {"EFFNET_STOP": stop}).items() if value}
        status = _status_of(command, _surroundings(Path(folder)) | variables | (environment or {}), stop)
        stopped = stop.exists()
    if status in (TRY_AGAIN, LOCKED):
        unfinished.unlink(missing_ok=True)
        if status == LOCKED:
            raise RunLocked(f"{notebook} is left to the process that trains its run")
        raise Interrupted(f"{notebook} stopped in time")
    if status in (KILLED, -signal.SIGKILL) and not stopped:
        raise ProcessKilled(f"{notebook}: its process was killed; see {unfinished}")
    if status != 0:
        raise RuntimeError(f"{notebook} failed; see {unfinished}")
    executed = json.loads(unfinished.read_text(encoding="utf-8"))
    # The paths of this machine are no result
    executed["metadata"]["papermill"] |= {"input_path": f"{notebook}.ipynb", "output_path": output.name}
    unfinished.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(output)


def _surroundings(folder: Path) -> dict[str, str]:
    """Return a kernel's environment: the user's, but with this Python, these modules, matplotlib as it comes, UTF-8,
    and without the user's start-up files, kernels and configuration. folder: for the kernel's own files."""
    spec = folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)  # ipykernel's own file starts a launcher, which removes the first modules' folder
    launch = [sys.executable, "-m", "ipykernel", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": launch, "display_name": "Python 3", "language": "python"}), encoding="utf-8")
    kept = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE")
    foreign = [name for name in os.environ if name.startswith(("PYTHON", "JUPYTER", "IPYTHON")) and name not in kept]
    modules, matplotlib = os.environ.get("PYTHONPATH"), Path(importlib.util.find_spec("matplotlib").origin).parent
    # SAFEPATH: neither the folder of papermill_process.py nor the working folder comes first among the modules
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{modules}" if modules else str(ROOT), "PYTHONSAFEPATH": "1"}
    own |= {"PYTHONUTF8": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    own |= {"MATPLOTLIBRC": str(matplotlib / "mpl-data")}
    places = ("CONFIG_DIR", "DATA_DIR", "PATH", "RUNTIME_DIR")
    own |= dict.fromkeys(["IPYTHONDIR", *(f"JUPYTER_{place}" for place in places)], str(folder))
    if not os.access(os.path.expanduser("~"), os.W_OK):  # in a container a user id may have no home, and no name
        own["HOME"] = str(folder)
    user = {"USER": str(os.getuid())}
    return user | {name: value for name, value in os.environ.items() if name not in foreign} | own


def _status_of(command: Sequence[str], environment: Mapping[str, str], stop: Path) -> int:
    """Run a command, print at once what it prints, and return its exit status. An interrupt creates the file `stop`,
    and is raised when the command has ended. Once `stop` exists, it has GRACE seconds; its kernel ends with it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    pairs = ((process.stdout, "stdout"), (process.stderr, "stderr"))
    printers = [threading.Thread(target=_print_lines, args=pair, daemon=True) for pair in pairs]
    for printer in printers:
        printer.start()
    interrupt, end = None, math.inf
    while process.poll() is None:
        try:
            if stop.exists():
                end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                process.kill()
            time.sleep(0.2)
        except BaseException as error:
            interrupt = error
            stop.touch()
    for printer in printers:  # not longer: a kernel that is about to end may keep the pipes open
        printer.join(timeout=2)
    if interrupt is not None:
        raise interrupt
    return process.returncode


def _print_lines(stream: TextIO, name: str) -> None:
    """Copy a stream to sys.stdout or sys.stderr as it is at that moment: a table in the terminal replaces both."""
    for line in stream:
        print(line, end="", file=getattr(sys, name), flush=True)
