"""The benchmarks, as small as possible: what they measure, what they compare, and what they say about it."""

import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from effnet_lib import TABLE7, SqueezeExcitation, count_cost
from effnet_study import speed, trainers
from effnet_study.analysis import throughput
from effnet_study.cpu_kernels import CpuConv2d, CpuSqueezeExcitation
from effnet_study.execution.notebook import run_notebook
from effnet_study.methods import scaled_cost
from effnet_study.run import Run
from effnet_study.speed import Contender, estimate_seconds, measure, throughput_folder, time_part
from effnet_study.trainers import prepare_trainer


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """The folder of 06_throughput, executed as small as possible."""
    place = tmp_path_factory.mktemp("bench")
    parameters = {"device": "cpu", "rounds": 1, "batch_size": 4, "resolutions": [32], "results": str(place)}
    run_notebook("06_throughput", place / "06_throughput.ipynb", parameters)
    return throughput_folder(torch.device("cpu"), place)


@pytest.mark.slow
def test_the_benchmark_times_ours_and_others(benched):
    peers = pd.read_csv(benched / "peers.csv").set_index("network")
    assert {"ours", "torchvision, default layout, as it comes", "timm, channels-last, as it comes"} <= set(peers.index)
    assert (peers["images_per_second"] > 0).all() and peers["ours_is_faster"]["ours"] == 1
    assert (peers["first_step_seconds"] > 0).all() and (peers["peak_memory_GiB"] > 0.1).all()
    methods = pd.read_csv(benched / "methods.csv").set_index("network")
    assert list(methods.index) == [*TABLE7, "torchvision's B0", "timm's B0"]
    assert methods["activations"]["baseline"] == scaled_cost(TABLE7["baseline"], 32).activations
    assert (methods[["forward_ms", "data_ms"]].loc[list(TABLE7)] > 0).all().all()
    assert methods["data_percent"][list(TABLE7)].between(0, 100).all()
    fast = pd.read_csv(benched / "fast.csv").set_index("network")
    assert fast["relative_time"]["compound"] == 1 and fast["relative_time"]["fast_compound"] > 0
    assert fast["activations"]["fast_compound"] < fast["activations"]["compound"]
    inputs = pd.read_csv(benched / "input.csv").set_index("path")
    assert {path.partition(",")[0].partition(":")[0] for path in inputs.index} == {"PIL", "ours"}
    assert (inputs["images_per_second"] > 0).all() and inputs["over_memory"]["PIL, images in memory, 2 workers"] == 1
    for figure in ("peers", "split", "predictors", "input"):
        assert (benched / "figures" / f"{figure}.svg").stat().st_size > 5000


@pytest.mark.slow
def test_every_row_of_table_7_is_counted_to_fit_24_gb(benched):
    memory = pd.read_csv(benched / "memory.csv")
    assert memory["network"].tolist() == list(TABLE7)
    assert (memory["GB_then"] < 24).all()


@pytest.mark.slow
def test_the_benchmark_says_whether_a_gpu_was_there(benched):
    said = (benched.parents[1] / "06_throughput.ipynb").read_text()
    assert "No GPU has measured any of this yet" in said
    assert json.loads((benched / "device.json").read_text())["device"]["type"] == "cpu"


@pytest.mark.slow
def test_a_contender_gives_its_memory_back_and_one_that_fails_is_named():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        contender = Contender(resolution=96, batch_size=64)
        answer = process.submit(time_part, contender, "cpu", 1, "gradient", 1, False).result()
        status = Path(f"/proc/{next(iter(process._processes))}/status").read_text()
    now = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 2**20  # GiB
    assert answer["peak_memory_GiB"] > now + 0.5  # the backward pass needs 1.2 GiB
    with pytest.raises(RuntimeError, match="benchmark of wrong: .*batch_size"):
        measure({"wrong": Contender(resolution=32, batch_size=0)}, "cpu", rounds=1)


def test_contenders_are_timed_in_turns_and_the_first_round_is_left_out(monkeypatch):
    """Processes are replaced by calls here, and time by a count of the images of all calls so far."""

    class Process:
        def __init__(self, *arguments):
            pass

        __enter__, __exit__ = lambda self: self, lambda *error: None

        def submit(self, work, *arguments):
            return SimpleNamespace(result=lambda: work(*arguments))

    begun, clock = [], [0.0]

    def parts(contender, device):
        def step():
            begun.append(contender.batch_size)
            clock[0] += contender.batch_size

        return {"step": step, "mode": lambda: "never"}

    monkeypatch.setattr(speed, "ProcessPoolExecutor", Process)
    monkeypatch.setattr(speed, "built", parts)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    times, about = measure({"a": Contender(batch_size=3), "b": Contender(batch_size=5)}, "cpu", rounds=4, repeat=2)
    assert sorted(times["round"]) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert times.groupby("contender")["seconds"].unique().map(list).to_dict() == {"a": [3.0], "b": [5.0]}
    assert about["first_step_seconds"].to_dict() == {"a": 3, "b": 5}
    assert begun[:2] == [3, 5] and len(begun) == 2 + 5 * 2 * (1 + 2)  # warmed before two calls, in five rounds
    assert len(set(times.groupby("round")["contender"].agg("".join))) == 2  # both orders occur


def test_a_contender_can_be_a_planned_run(profile_file):
    run = Run.plan(profile_file(methods=["baseline", "compound"]), "compound", 0)
    step = Contender(resolution=run.config.resolution, batch_size=4, run=run).parts(torch.device("cpu"))["step"]
    trainer = step.func.__self__
    assert count_cost(trainer.model, run.config.resolution) == run.cost and step().isfinite()
    assert trainer.config == run.config.replace(batch_size=4)


def test_the_quick_benchmark_compares_each_mode_with_the_limit_of_memory(monkeypatch, tmp_path):
    """Measurement is replaced: step k of a contender takes k seconds, and a copy moves 1 GB/s."""

    def measure(contenders, device, rounds, repeat):
        times = [(name, turn, "step", k + 1.0) for k, name in enumerate(contenders) for turn in range(rounds)]
        about = {name: {"mode": contender.compile} for name, contender in contenders.items()}
        columns = ["contender", "round", "part", "seconds"]
        return pd.DataFrame(times, columns=columns), pd.DataFrame.from_dict(about, orient="index")

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)
    table = speed.quick_bench(tmp_path, device="cpu", batches={64: 8, 32: 16}).set_index(["px", "network"])
    names = ["ours, never", "ours, blocks", "ours, graph", "timm, compiled"]
    assert table.index.tolist() == [(px, name) for px in (64, 32) for name in names]
    assert table["mode"].tolist() == ["never", "blocks", "graph", "blocks"] * 2
    assert table["images_per_second"].tolist() == pytest.approx([8, 4, 8 / 3, 2, 16, 8, 16 / 3, 4])
    moved = 14 * scaled_cost(TABLE7["baseline"], 64).activations * 4  # bytes of an image
    assert table["limit_percent"].iloc[0] == pytest.approx(100 * 8 / (1e9 / moved))
    saved = pd.read_csv(throughput_folder(torch.device("cpu"), tmp_path) / "quick.csv")
    assert saved["network"].tolist() == names * 2


@pytest.mark.parametrize(
    "source, kernels, layout",
    [("ours", {CpuConv2d, CpuSqueezeExcitation}, torch.channels_last), ("torchvision", set(), torch.contiguous_format)],
)
def test_a_step_of_a_contender_trains_and_a_gradient_does_not(source, kernels, layout):
    contender = Contender(source, resolution=32, batch_size=2, layout=layout)
    parts = contender.parts(torch.device("cpu"))
    used = [cell.cell_contents for cell in parts["forward"].__closure__]
    (model,), (images,) = ([x for x in used if isinstance(x, kind)] for kind in (nn.Module, torch.Tensor))
    assert images.is_contiguous(memory_format=layout)
    assert parts["forward"]().shape == (2, 1000)
    assert kernels <= {type(module) for module in model.modules()}
    before = [p.clone() for p in model.parameters()]
    parts["gradient"]()
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    parts["step"]()
    assert not torch.equal(next(model.parameters()), before[0])


@pytest.mark.parametrize("accelerated", [True, False])
def test_the_contender_without_short_cuts_has_torchs_own_kernels(tiny_model, recipe, accelerated):
    trainer = prepare_trainer(tiny_model(), recipe(), torch.device("cpu"), accelerated=accelerated)
    kinds = {type(module) for module in trainer.model.modules()}
    assert (CpuConv2d in kinds) == accelerated and (nn.Conv2d in kinds) != accelerated
    assert (CpuSqueezeExcitation in kinds) == accelerated and (SqueezeExcitation in kinds) != accelerated


def test_the_time_of_a_run_is_estimated_from_a_few_steps(recipe, monkeypatch):
    """A first step of 10 s, further ones of 2 s; 25 images are scored in 9 s at first, then in 3 s."""
    clock, taken, scored, shards = [0.0], [], [], []

    def step(images, labels, epoch, step, steps):
        clock[0] += 2 if taken else 10
        taken.append((epoch, step, steps))
        return torch.zeros(())

    class Network:
        def eval(self):
            return self

        def __call__(self, images):
            clock[0] += 3 if scored else 9
            scored.append(len(images))
            return torch.zeros(len(images))

    class Data:
        def __init__(self):
            self.counts = {"train": 105, "minival": 30, "test": 50}

        def to(self, device):
            return self

        def train_batches(self, config, epoch, shard):
            shards.append(shard)
            return iter([(None, None)] * 10)

        def eval_batches(self, split, resolution, batch_size):
            return iter([(torch.zeros(25), None)])

    trainer = SimpleNamespace(step=step, ema=Network())
    modes = []
    monkeypatch.setattr(speed, "prepare_trainer", lambda model, config, device: modes.append(config.compile) or trainer)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    config = recipe(batch_size=10, epochs=4)
    seconds = estimate_seconds(None, Data(), config, torch.device("cpu"), budget=4)
    # 4 epochs of 10 steps; minival 4 times and test twice, with the average and with the last weights
    assert seconds == pytest.approx(10 + 4 * 10 * 2 + (4 * 30 + 2 * 50) * 3 / 25)
    assert taken == [(0, 0, 10), (0, 1, 10), (0, 2, 10)]  # until 80 % of the 4 s are over, after the first step
    estimate_seconds(None, Data(), config, torch.device("cpu"), processes=2)
    assert shards == [(0, 1), (0, 2)]  # of several GPUs, one's share is timed
    monkeypatch.setattr(trainers, "can_compile", lambda: True)
    for processes in (1, 2):
        estimate_seconds(None, Data(), config, torch.device("cuda"), processes=processes)
    assert modes[-2:] == ["graph", "blocks"]  # which several processes cannot capture
    with pytest.raises(ValueError, match="batch_size: 128 exceeds the training set's 105 images"):
        estimate_seconds(None, Data(), config.replace(batch_size=128), torch.device("cpu"))


# ---- Tables, with medians and quartiles by hand


def timed(**seconds):
    """Return times as `measure` does: contender_part = the seconds of each round."""
    rows = []
    for name, values in seconds.items():
        contender, part = name.split("_")
        rows += [{"contender": contender, "round": i + 1, "part": part, "seconds": v} for i, v in enumerate(values)]
    return pd.DataFrame(rows)


def test_a_peer_is_compared_with_ours_round_by_round():
    times = timed(peer_step=[2.0, 6.0, 2.0], ours_step=[1.0, 2.0, 4.0])  # ratios 2, 3 and 0.5
    about = pd.DataFrame({"first_step_seconds": [7.0, 8.0]}, index=["ours", "peer"])
    table = throughput.peers_table(times, about, batch_size=12).set_index("network")
    assert list(table.index) == ["ours", "peer"] and (table.loc["ours", "ours_is_faster":"ratio_q75"] == 1).all()
    expected = {"images_per_second": 6, "ms_per_step": 2000, "ours_is_faster": 2, "ratio_q25": 1.25, "ratio_q75": 2.5}
    assert table.loc["peer"].to_dict() == expected | {"first_step_seconds": 8}


def test_the_parts_of_a_step_are_medians_of_differences():
    parts = {"net_forward": [1.0, 2.0, 3.0], "net_gradient": [5.0, 3.0, 4.0], "net_step": [6.0, 6.0, 6.0]}
    others = {name.replace("net", "peer"): [1.0, 1.0, 1.0] for name in parts}
    about = pd.DataFrame({"mode": ["never", "never"]}, index=["net", "peer"])
    table = throughput.steps_table(timed(**parts, **others), about, {"net": 2.0}, batch_size=12).set_index("network")
    expected = {"images_per_second": 2, "data_ms": 2000, "data_percent": 25, "forward_ms": 2000, "backward_ms": 1000}
    assert table.loc["net"].to_dict() == expected | {"optimizer_ms": 2000, "mode": "never"}
    assert table.loc["peer"].isna().sum() == 2 and table["images_per_second"]["peer"] == 12
    table.loc["net", "optimizer_ms"] = -600
    fig = throughput.draw_steps(table.reset_index(), 12, "a title")
    widths = [bar.get_width() for bars in fig.axes[0].containers for bar in bars]  # data, forward, backward, optimizer
    assert widths == pytest.approx([2000 / 12, 0, 2000 / 12, 1000 / 12, 1000 / 12, 0, 0, 0])


def test_paths_of_input_are_compared_with_pil_round_by_round():
    speeds = {"PIL, images in memory": [10, 20, 40], "PIL, JPEG files": [5, 5, 5], "ours: crop": [20, 20, 20]}
    rows = [
        {"path": path, "round": i, "images_per_second": value}
        for path, values in speeds.items()
        for i, value in enumerate(values)
    ]
    table = throughput.input_table(pd.DataFrame(rows)).set_index("path")
    assert table["over_files"].to_dict() == {"PIL, JPEG files": 1, "PIL, images in memory": 4, "ours: crop": 4}
    assert table["over_memory"].to_dict() == {"PIL, JPEG files": 0.25, "PIL, images in memory": 1, "ours: crop": 1}
    assert table["images_per_second"]["PIL, images in memory"] == 20


def test_a_devices_folder_has_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "device_name", lambda device: "Intel(R) Xeon(R), 2 threads")
    folder = throughput_folder(torch.device("cpu"), tmp_path)
    assert folder == tmp_path / "throughput" / "intel-r-xeon-r-2-threads"


def test_what_predicts_time_is_the_count_whose_rate_differs_least():
    steps = pd.DataFrame({"images_per_second": [10.0, 5.0], "flops": [1, 4], "activations": [3, 6]})
    assert throughput.time_spread(steps, "flops") == 2  # 0.1 s and 0.05 s per FLOP
    assert throughput.time_spread(steps, "activations") == pytest.approx(1)


@pytest.mark.slow
def test_the_models_are_counted_and_timed(tmp_path):
    parameters = {"networks": ["b0", "densenet201"], "seconds": 0.05, "results": str(tmp_path), "device": "cpu"}
    run_notebook("07_models", tmp_path / "07.ipynb", parameters)
    folder = throughput_folder(torch.device("cpu"), tmp_path)
    models = pd.read_csv(folder / "models.csv").set_index("network")
    assert models["params"].to_dict() == {"b0": 5_288_548, "densenet201": 20_013_928}
    assert models["published_top1"]["b0"] == 77.692
    assert (models[["inference_ms", "training_ms_per_image"]] > 0).all().all()
    assert (folder / "figures" / "models.svg").exists()
