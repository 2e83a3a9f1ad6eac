"""The benchmarks, as small as they can be: what they measure, beside what, and how they say so."""

import json

import pandas as pd
import pytest
import torch

import effnet_study as study
from effnet_lib import TABLE7, scaled_cost
from effnet_speed import Contender, measure


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """06_throughput, as small as it can be: its folder."""
    place = tmp_path_factory.mktemp("bench")
    parameters = {"device": "cpu", "rounds": 1, "batch_size": 4, "resolutions": [32], "results": str(place)}
    study.run_notebook("06_throughput", place / "06_throughput.ipynb", parameters)
    return study.throughput_folder(study.torch.device("cpu"), place)


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
    inputs = pd.read_csv(benched / "input.csv").set_index("path")
    assert {path.partition(",")[0].partition(":")[0] for path in inputs.index} == {"PIL", "ours"}
    assert (inputs["images_per_second"] > 0).all() and inputs["over_memory"]["PIL, images in memory, 2 workers"] == 1
    for figure in ("peers", "split", "predictors", "input"):
        assert (benched / "figures" / f"{figure}.svg").stat().st_size > 5000


def test_every_row_of_table_7_is_counted_to_fit_24_gb(benched):
    memory = pd.read_csv(benched / "memory.csv")
    assert memory["network"].tolist() == list(TABLE7)
    assert (memory["GB_then"] < 24).all() and (memory["GB_checkpointing"] < 24).all()


def test_the_benchmark_says_whether_a_gpu_was_there(benched):
    said = (benched.parents[1] / "06_throughput.ipynb").read_text()
    assert "No GPU has measured any of this yet" in said
    assert json.loads((benched / "device.json").read_text())["device"]["type"] == "cpu"


def test_a_contender_that_fails_is_named():
    with pytest.raises(ValueError, match="unknown source 'tim'.*Did you mean 'timm'"):
        Contender("tim")
    with pytest.raises(RuntimeError, match="benchmark of wrong: .*batch_size"):
        measure({"wrong": Contender(resolution=32, batch_size=1)}, "cpu", rounds=1)


def test_the_models_are_counted_and_timed(tmp_path):
    parameters = {"networks": ["b0", "densenet201"], "seconds": 0.05, "results": str(tmp_path), "device": "cpu"}
    study.run_notebook("07_models", tmp_path / "07.ipynb", parameters)
    folder = study.throughput_folder(torch.device("cpu"), tmp_path)
    models = pd.read_csv(folder / "models.csv").set_index("network")
    assert models["params"].to_dict() == {"b0": 5_288_548, "densenet201": 20_013_928}
    assert models["published_top1"]["b0"] == 77.692
    assert (models[["inference_ms", "training_ms_per_image"]] > 0).all().all()
    assert (folder / "figures" / "models.svg").exists()
