"""The `effnet` command: one function per command. Its docstring is the help; it returns the exit status or None.

TO ADD A COMMAND, write such a function, and a row in docs/command-line.md.
"""

import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer
import typer.exceptions

from effnet_lib import VARIANTS, unknown_name
from effnet_study import progress, speed, use
from effnet_study import run as runs
from effnet_study.analysis.recipes import load_pilots
from effnet_study.coefficients import describe_search, load_coefficients
from effnet_study.data.decode import DamagedImages
from effnet_study.data.inspect import describe_data, inspect_data, sample_grid
from effnet_study.data.load import data_root, load_data
from effnet_study.data.sources import NAMES, DataSettings
from effnet_study.execution.notebook import TRY_AGAIN
from effnet_study.files import RunLocked, holder_of, print_any_text, write_json
from effnet_study.machine import choose_device
from effnet_study.methods import METHOD_NAMES, network_costs, parse_method
from effnet_study.model_run import plan_model
from effnet_study.pretrained import TORCHVISION_MODELS
from effnet_study.profile import load_profile, read_yaml
from effnet_study.search import all_candidates
from effnet_study.stop import ProcessKilled
from effnet_study.study import Launcher
from effnet_study.study import plan as plan_study

BY_NAME = (*VARIANTS, *TORCHVISION_MODELS)
NOTHING_LEFT = "Nothing left to run: all runs that can start have ended."
app = typer.Typer(
    help="A reproduction study of EfficientNet's compound scaling.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def duration(text: str) -> float:
    """Return the seconds of 90, 90s, 9m or 1h30m."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", f"{text}s" if text.isdecimal() else text)
    if not text or match is None:
        raise ValueError(f"expected a time such as 90s, 9m or 1h30m, got {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def settings(words: Iterable[str]) -> dict[str, object]:
    """Return NAME=VALUE words as settings, their values read as in a profile."""
    read = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"expected NAME=VALUE, such as lr=0.05, got {word!r}")
        if name in read:
            raise ValueError(f"{name} is given twice")
        read[name] = read_yaml(value, word)
    return read


def check_tensorboard(wanted: bool) -> bool:
    """Raise ModuleNotFoundError if event files are requested but TensorBoard is not installed."""
    return wanted and bool(importlib.import_module("tensorboard"))


# ---- 1. Arguments and options --------------------------------------------------------------------------------------


def _option(text: str, metavar: str | None = None, **options: object):
    return typer.Option(help=text, metavar=metavar, show_default=False, **options)


def _argument(metavar: str, text: str | None = None):
    return typer.Argument(metavar=metavar, help=text, show_default=False)


stopping = f"such as 9m: stop in time, with checkpoints and exit status {TRY_AGAIN}; the same command continues"
trained = "a finished run's folder, or the name of a network, with its ImageNet weights"
chosen = "settings of the data set, such as size=32, classes=10, or for a folder minival=0.2 test=0.3"
trying = "settings of the recipe, such as lr=0.05, base_resolution=48, or 'baseline={depth: 1, width: 0.35}'"

Name = Annotated[str, _argument("PROFILE", "a name in notebooks/profiles, or a .yaml file")]
Record = Annotated[str, _argument("RECORD", "a run.json")]
Changes = Annotated[list[str] | None, _argument("NAME=VALUE", trying)]
Choice = Annotated[list[str] | None, _argument("NAME=VALUE", chosen)]
Trained = Annotated[str, _argument("RUN", trained)]
Files = Annotated[list[str], _argument("IMAGE")]
Variant = Annotated[str, _argument("MODEL", ", ".join(BY_NAME))]
Images = Annotated[str, _argument("NAME", ", ".join(NAMES))]

Results = Annotated[Path | None, _option("where results go, instead of results/", "DIR")]
Again = Annotated[Path, _option("where results go (default: rerun/)", "DIR")]
Device = Annotated[str | None, _option("cpu or cuda (default: a GPU if there is one)", "DEVICE")]
Retry = Annotated[bool, _option("train again what failed or diverged")]
Jobs = Annotated[int | None, _option("notebooks at a time (default: one per GPU, on a CPU one per core)", "N", min=1)]
Threads = Annotated[int | None, _option("CPU threads of each notebook (default: the cores, shared)", "N", min=1)]
Tensorboard = Annotated[bool, _option("write event files for TensorBoard too", callback=check_tensorboard)]
Budget = Annotated[float | None, _option(stopping, "TIME", parser=duration)]
Watch = Annotated[bool, _option("update the table until all runs have ended")]
Rounds = Annotated[int, _option("rounds of measurements of 06_throughput (default: 15)", "N", min=1)]
Models = Annotated[bool, _option("instead: cost and speed of b0 to b7 and other networks")]
Quick = Annotated[bool, _option("B0's step alone: plain, compiled, captured, and timm's compiled; minutes on a GPU")]
Seed = Annotated[int, _option("of the run (default: 0)", "N")]
Root = Annotated[str | None, _option("where data lies (default: $EFFNET_DATA, else ./data)", "DIR")]
Report = Annotated[Path | None, _option("for NAME.json and NAME.png, a grid (default: reports/ in there)", "DIR")]
Top = Annotated[int, _option("how many classes (default: 5)", "N")]
Output = Annotated[str | None, _option("NAME.onnx, .pt2 or .safetensors (default: model.onnx of the run)", "FILE")]
Limit = Annotated[int | None, _option("only so many, drawn at random (default: all 50,000)", "N")]


def deadline_of(budget: float | None) -> float | None:
    """Return the Unix time at which a time budget ends. At the latest then this process is interrupted, whatever it
    does: a compiler, for example, does not look at the clock."""
    if budget is None:
        return None
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, budget)
    return time.time() + budget


# ---- 2. A study ----------------------------------------------------------------------------------------------------

executors = (
    "where notebooks are executed: local, on this machine (default); ray, on the cluster at $RAY_ADDRESS or one of "
    "this machine alone; slurm, as one array job, queued again when its --time-budget (default: 1h) is up"
)


@app.command()
def study(
    profile: Name,
    results: Results = None,
    methods: Annotated[list[str] | None, _option("only these methods of the profile", "METHOD ...")] = None,
    seeds: Annotated[list[int] | None, _option("only these seeds of the profile", "SEED ...")] = None,
    device: Device = None,
    retry: Retry = False,
    analysis: Annotated[bool | None, _option("execute the analysis, or not (default: if it is not up to date)")] = None,
    jobs: Jobs = None,
    threads: Threads = None,
    executor: Annotated[Literal["local", "ray", "slurm"], _option(executors)] = "local",
    tensorboard: Tensorboard = False,
    time_budget: Budget = None,
):
    """Execute all notebooks of a profile."""
    asked = {"methods": methods, "seeds": seeds, "retry": retry, "analysis": analysis, "tensorboard": tensorboard}
    launcher = Launcher(load_profile(profile), results, **asked, device=device, jobs=jobs, threads=threads)
    if executor != "slurm":
        return replace(launcher, executor=executor, deadline=deadline_of(time_budget)).study()
    if not (submitted := launcher.submit(time_budget or 3600)):
        print(NOTHING_LEFT)
        return
    print(f"submitted {len(submitted)} jobs: {', '.join(job.job_id for job in submitted)}; how far they are: ", end="")
    print(f"{launcher.profile.command('status', results)} --watch")


@app.command()
def status(profile: Name, results: Results = None, watch: Watch = False):
    """List a profile's runs with state, epochs, scores and time left."""
    (progress.watch if watch else progress.print_status)(runs.plan_runs(load_profile(profile), results))


@app.command()
def plan(
    profile: Name,
    results: Results = None,
    device: Device = None,
    jobs: Jobs = None,
    threads: Threads = None,
    seconds: Annotated[float, _option("time to spend on measuring (default: 60)", min=0)] = 60,
):
    """List the runs left to do, with their cost and time here."""
    place = {"device": device, "jobs": jobs, "threads": threads}
    table, jobs = plan_study(load_profile(profile), results, **place, seconds=seconds)
    if table.empty:
        print(NOTHING_LEFT)
        return
    numbers = {"flops": lambda count: f"{count / 1e6:,.1f}", "activations": lambda count: f"{count / 1e6:.3f}"}
    numbers["seconds"] = lambda seconds: str(timedelta(seconds=round(seconds)))
    header = ["method", "seed", "status", "px", "FLOPs (M)", "activations (M)", "time"]
    print(table.to_string(index=False, header=header, formatters=numbers))
    total, together = (timedelta(seconds=round(table["seconds"].sum() / many)) for many in (1, jobs))
    print(f"{len(table)} runs, {total} one after the other, about {together} at {jobs} at a time", flush=True)


@app.command()
def search(
    profile: Name,
    results: Results = None,
    device: Device = None,
    threads: Threads = None,
    retry: Retry = False,
    time_budget: Budget = None,
):
    """Search for alpha, beta and gamma on the profile's baseline."""
    loaded, deadline = load_profile(profile), deadline_of(time_budget)
    candidates = all_candidates(loaded, results)
    with progress.live_table(candidates):
        done = Launcher(loaded, results, device=device, threads=threads, retry=retry, deadline=deadline).search()
    if not done:
        return 1 if holder_of(candidates[0].study_dir / "search") is None else TRY_AGAIN
    found = load_coefficients(loaded, candidates[0].study_dir)
    print(f"{describe_search(found)} ({found['stamp']})")


@app.command()
def bench(
    device: Device = None, rounds: Rounds = 15, models: Models = False, quick: Quick = False, results: Results = None
):
    """Time training steps of ours, torchvision's and timm's B0."""
    if quick:
        print(speed.quick_bench(results, device=device).to_string(index=False))
        return
    speed.bench(results, device=device, rounds=rounds, models=models)


# ---- 3. Single runs ------------------------------------------------------------------------------------------------

changing = "or PROFILE MODEL; for a model also settings as NAME=VALUE, such as epochs=5 or test=0.3"


@app.command()
def train(
    words: Annotated[list[str] | None, _argument("PROFILE METHOD", changing)] = None,
    model: Annotated[str | None, _option(f"instead of METHOD: {', '.join(BY_NAME)}")] = None,
    dataset: Annotated[str | None, _option(f"instead of PROFILE: a profile, or {', '.join(NAMES)}")] = None,
    pretrained: Annotated[bool, _option("begin with torchvision's ImageNet weights and a new classifier")] = False,
    freeze: Annotated[bool, _option("train the classifier alone")] = False,
    resolution: Annotated[int | None, _option("pixels of a model's input (default: the profile's)")] = None,
    results: Results = None,
    seed: Seed = 0,
    tensorboard: Tensorboard = False,
    time_budget: Budget = None,
    device: Device = None,
):
    """Train one run of a profile, or a network by name."""
    deadline, given = deadline_of(time_budget), words or []
    given += ["pretrained=true"] * pretrained + ["freeze=true"] * freeze
    changes = settings(word for word in given if "=" in word)
    named = [word for word in given if "=" not in word] + [word for word in (dataset, model) if word]
    if len(named) != 2:
        ways = "PROFILE METHOD, or --model NAME --dataset NAME, which mean the same; give one of them"
        raise ValueError(f"train: expected {ways}, got {' '.join(named)!r}")
    dataset, name = named
    if name in BY_NAME:
        run = plan_model(name, dataset, results, seed=seed, pixels=resolution, changes=changes)
    else:
        try:
            parse_method(name)
        except ValueError:
            raise unknown_name("method or model", name, [*METHOD_NAMES, *BY_NAME]) from None
        if changes or resolution is not None:
            raise ValueError(f"train: {name} is a method and has its profile's recipe; copy the profile to change it")
        run = runs.Run.plan(dataset, name, seed, results)
    run.train(load_data(**run.profile.data.given()), device, deadline, tensorboard or None)
    if os.environ.get("RANK", "0") == "0":  # the first process under torchrun
        print(f"written to {run.run_dir}")


@app.command()
def pilot(profile: Name, changes: Changes = None, results: Results = None, seed: Seed = 0, device: Device = None):
    """Score changed settings of the recipe on minival."""
    loaded = load_profile(profile)
    runs.pilot(loaded, settings(changes or ()), results, device, seed)
    print(load_pilots(loaded, results).to_string(index=False, na_rep="-"))


@app.command()
def rerun(record: Record, results: Again = Path("rerun"), device: Device = None):
    """Train again what a run.json describes, and compare."""
    print(runs.rerun(record, results, device).to_string(na_rep="-"))


# ---- 4. Networks and data ------------------------------------------------------------------------------------------

counted = "b0 to b7, a Table 7 row such as compound, or resnet50, resnet152, densenet201"


@app.command()
def cost(
    networks: Annotated[list[str], _argument("NETWORK", counted)],
    by_stage: Annotated[bool, _option("a row for each part, and their sum")] = False,
):
    """Count parameters, FLOPs (multiply-adds) and activations."""
    numbers = dict.fromkeys(["params", "flops", "activations"], "{:,}".format)
    print(network_costs(networks, by_stage).to_string(index=False, formatters=numbers))


@app.command()
def data(name: Images, changes: Choice = None, root: Root = None, output: Report = None):
    """Fetch, check and describe a data set.

    The exit status is 2 if images are damaged.
    """
    try:
        if "name" in (given := settings(changes or ())):
            raise ValueError(f"name is given twice: {name} and {given['name']}")
        loaded = load_data(root=root, **DataSettings(name=name, **given).given())
    except DamagedImages as error:
        print("\n".join(f"{path}: {reason}" for path, reason in error.files))
        print(f"{len(error.files)} damaged; repair or remove what is named above")
        return 2
    folder = output or data_root(root) / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{len(loaded.classes)}-{loaded.images.shape[1]}px"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-")
    facts = inspect_data(loaded)
    print(describe_data(facts))
    write_json(folder / f"{stem}.json", facts)
    sample_grid(loaded).savefig(folder / f"{stem}.png", dpi=150)
    print(f"  written to {folder / stem}.json and .png")
    return 2 if facts["cache"] and facts["cache"]["damaged_blocks"] else 0


@app.command()
def predict(network: Trained, files: Files, top: Top = 5, device: Device = None):
    """Classify images: the likeliest classes with their probabilities.

    The exit status is 2 if a file cannot be read.
    """
    outcome = 0
    for file, answer in use.predict(use.load_classifier(network), files, top, choose_device(device)):
        if isinstance(answer, Exception):
            outcome = 2
            print(f"effnet: {file} cannot be read as an image: {answer}", file=sys.stderr)
        else:
            print("\n".join([str(file), *(f"  {100 * share:6.2f} %  {name}" for name, share in answer)]))
    return outcome


@app.command()
def export(network: Trained, output: Output = None):
    """Write a trained network as ONNX or torch.export program, or a run's weights in half precision."""
    folder = Path(network).parent if network.endswith("run.json") else Path(network)
    output = output or (folder / "model.onnx" if folder.is_dir() else f"{network}.onnx")
    if str(output).endswith(".safetensors"):
        use.write_half(folder, output)
        print(f"written to {output}")
        return
    difference = use.export(network, output)
    print(f"written to {output}; its logits differ from the network's by {difference:.1e} of the greatest")


@app.command()
def evaluate(model: Variant, root: Root = None, images: Limit = None, device: Device = None):
    """Score pretrained weights on ImageNet's validation images."""
    scores = use.check_on_imagenet(model, root, images=images, device=device)
    print("{images:,} images: top-1 {top1:.3f} %, top-5 {top5:.3f} %".format(**scores))
    print("published by torchvision: top-1 {published_top1:.3f} %, top-5 {published_top5:.3f} %".format(**scores))


# ---- 5. The command ------------------------------------------------------------------------------------------------


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt("the time is up" if number == signal.SIGALRM else "interrupted")


def repeat_options(arguments: Sequence[str]) -> list[str]:
    """Write `--methods A B` as `--methods A --methods B`, and the same for --seeds: typer takes one value at a time."""
    repeated, option = [], None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in ("--methods", "--seeds") else None
        elif option is not None and repeated[-1] != option:
            repeated.append(option)
        repeated.append(argument)
    return repeated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `effnet` command. Return its exit status: 0; 1 if a run of a study or search, or the analysis, is not
    finished; 2 after an error; 75 if it stopped in time, another process is at work, or a GPU failed: the same command
    continues."""
    print_any_text()
    # A scheduler's SIGTERM must reach the kernels as an interrupt; a background shell starts us with SIGINT ignored
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command, words = typer.main.get_command(app), repeat_options(sys.argv[1:] if arguments is None else arguments)
    try:  # not command.main(), which turns an interrupt into an exception without its reason
        with command.make_context("effnet", words) as context:
            return command.invoke(context) or 0
    except typer.Exit as end:  # after --help
        return end.exit_code
    except (RunLocked, ProcessKilled) as error:
        print(f"effnet: {error}", file=sys.stderr)
        return TRY_AGAIN
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError, typer.exceptions.TyperException) as error:
        words = error.format_message() if isinstance(error, typer.exceptions.TyperException) else str(error)
        if isinstance(error, ModuleNotFoundError):
            words += "; all that this project needs: pip install -r requirements.txt"
        print(f"effnet: {words.replace('Value error, ', '')}", file=sys.stderr)  # pydantic's, in an option's error
        return 2
    except KeyboardInterrupt as error:
        print(f"effnet: {str(error) or 'interrupted'}; the same command continues", file=sys.stderr)
        return TRY_AGAIN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
