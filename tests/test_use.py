"""A trained network put to use: by name, pretrained, fine-tuned; predictions, export, the check on ImageNet."""

import dataclasses
import hashlib
import json
import math
import pickle
import shutil
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_record
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, get_model_weights

from effnet_lib import EfficientNet, Scaling, TrainConfig, evaluate
from effnet_study import pretrained, record, use
from effnet_study.cli import main
from effnet_study.data import sources
from effnet_study.data.load import load_data
from effnet_study.files import ROOT
from effnet_study.model_run import ModelRun
from effnet_study.pretrained import TORCHVISION_MODELS, create_model
from effnet_study.profile import load_profile
from effnet_study.record import read_record
from effnet_study.run import Run
from effnet_study.use import Classifier, export, load_classifier, load_run, predict

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """B0 trained on a folder of images for a moment by the command: (its folder, the folder of its images)."""
    place, rng = tmp_path_factory.mktemp("use"), np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 4)):
        for name, level in (("ant", 60), ("bee", 190)):
            folder = place / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8) + level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    words = ["train", "--model", "b0", "--dataset", f"folder:{place / 'pictures'}", "--resolution", "16"]
    words += ["epochs=8", "batch_size=12", "optimizer=sgd", "lr=0.02", "norm_momentum=0.3", "ema_decay=0.0"]
    assert main([*words, "zero_init_residual=true", "--results", str(place), "--seed", "3"]) == 0
    (run,) = place.glob("pictures*/models/*")
    return run, place / "pictures"


CLASSES, MEAN, STD = [f"class {i}" for i in range(7)], (120.0, 110.0, 100.0), (60.0, 65.0, 70.0)


def calibrated(model, images):
    """Give a network's batch norm the statistics of some normalised images, so that its answers differ."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def patterns(n, side):
    """Return n different images (n, side, side, 3), each of 4 x 4 random colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(side // 4, 1).repeat(side // 4, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run that never took place: images stored at 24 px, a network of 7 classes at 20 px."""
    folder = tmp_path_factory.mktemp("made") / "run"
    config = TrainConfig(resolution=20, optimizer="sgd", lr=0.1)
    dataset = {"title": "T", "classes": 7, "class_names": CLASSES, "counts": {"train": 9, "minival": 9, "test": 9}}
    dataset |= {"stored_pixels": [24, 24], "mean": MEAN, "std": STD}
    scaling = {"coefficients": {"depth": 0.3, "width": 0.25, "resolution": 1.0}, "stem_stride": 1}
    write_record(SimpleNamespace(run_dir=folder, config=config, seed=0), dataset=dataset, **scaling)
    torch.manual_seed(0)
    network = EfficientNet(Scaling(depth=0.3, width=0.25), 7, stem_stride=1)
    save_file(calibrated(network, normalised(patterns(32, 20))).state_dict(), folder / "weights.safetensors")
    return folder


def normalised(images):
    """Normalise (N, H, W, 3) in [0, 255] by MEAN and STD, to (N, 3, H, W)."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((torch.as_tensor(images).float() - mean) / std).permute(0, 3, 1, 2)


def test_a_network_is_trained_by_name_on_a_folder(trained):
    run, _ = trained
    record = read_record(run)
    assert run.name == "b0_16px_seed3" and record["status"] == "finished" and record["model"] == "b0"
    assert record["dataset"]["class_names"] == ["ant", "bee"] and record["config"]["epochs"] == 8
    answers = np.load(run / "test_predictions.npz")
    assert answers["label"].tolist() == [0] * 4 + [1] * 4
    assert len({*answers["predicted"].tolist()}) == 2  # else the next tests could not fail
    assert ((answers["predicted"] == answers["label"]) == np.load(run / "test_correct.npy")).all()
    assert (answers["confidence"] >= 0.5).all() and (answers["confidence"] <= 1).all()


def test_predictions_for_files_are_those_of_the_scoring(trained):
    run, pictures = trained
    answers = np.load(run / "test_predictions.npz")
    files = sorted(pictures.glob("test/*/*.png"))
    found = list(predict(load_classifier(run), files, top=2))
    for (file, classes), expected, sure in zip(found, answers["predicted"], answers["confidence"], strict=True):
        assert file in files and classes[0][0] == ("ant", "bee")[expected]
        assert classes[0][1] == pytest.approx(float(sure), abs=2e-3)
        assert sum(p for _, p in classes) == pytest.approx(1, abs=1e-5)


def test_predictions_are_the_networks_for_each_file(made, tmp_path):
    images, expected = patterns(6, 24), []
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    model, record = load_run(made)
    small = F.interpolate(torch.tensor(images).permute(0, 3, 1, 2).float(), size=20, mode="bilinear", antialias=True)
    with torch.no_grad():
        shares = model(normalised(small.permute(0, 2, 3, 1))).softmax(1)
    assert record["seed"] == 0 and len(set(shares.argmax(1).tolist())) > 2  # the answers differ
    for row in shares.tolist():
        expected.append(sorted(zip(CLASSES, row, strict=True), key=lambda pair: -pair[1])[:3])
    found = list(predict(load_classifier(made), sorted(tmp_path.glob("*.png")), top=3))
    assert [file.name for file, _ in found] == [f"{i}.png" for i in range(6)]
    for (_, answer), pairs in zip(found, expected, strict=True):
        assert [name for name, _ in answer] == [name for name, _ in pairs]
        assert [p for _, p in answer] == pytest.approx([p for _, p in pairs], abs=1e-4)
    assert len(next(predict(load_classifier(made), [tmp_path / "0.png"], top=9))[1]) == 7


def test_probabilities_are_the_softmax_of_the_logits(tmp_path):
    class Channels(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) / 100

    def prepare(file):
        return torch.tensor([0.0, 200.0, 100.0]).view(3, 1, 1).expand(3, 2, 2)

    classifier = Classifier(Channels(), ("red", "green", "blue"), 2, prepare, {})
    ((_, answer),) = predict(classifier, [tmp_path], top=2)
    total = math.exp(0) + math.exp(2) + math.exp(1)
    assert [name for name, _ in answer] == ["green", "blue"]
    assert [p for _, p in answer] == pytest.approx([math.exp(2) / total, math.exp(1) / total])


# ---- Files of every kind, beside Pillow. The right pixels: x from the left, y from the top

Y, X = np.mgrid[:256, :256]
COLOURS = np.stack([X, Y, (X + Y) // 2], 2).astype(np.uint8)
GREYS = ((X + 2 * Y) // 3).astype(np.uint8)
SIDEWAYS = {2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1]}  # EXIF's orientations as stored
WHITE_LEFT = np.where(X[..., None] < 64, 255, COLOURS)


def oriented(orientation):
    stored = COLOURS[SIDEWAYS[orientation]] if orientation < 5 else np.rot90(COLOURS, 1 if orientation == 6 else -1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(np.ascontiguousarray(stored)), {"exif": exif}


def transparent(mode):
    alpha = np.where(X < 64, 0, 255).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([COLOURS, alpha])), {}
    if mode == "LA":
        return Image.fromarray(np.dstack([GREYS, alpha]), "LA"), {}
    return Image.fromarray(np.where(X < 64, 3, 4).astype(np.uint8), "L"), {"transparency": 3}


FILES = {
    "upright.png": (lambda: (Image.fromarray(COLOURS), {}), COLOURS),
    "mirrored.png": (lambda: oriented(2), COLOURS),
    "upside down.png": (lambda: oriented(3), COLOURS),
    "phone.png": (lambda: oriented(6), COLOURS),
    "phone.tif": (lambda: oriented(8), COLOURS),
    "grey 16.png": (lambda: (Image.fromarray(GREYS.astype(np.uint16) * 257), {}), GREYS),
    "grey 16.tif": (lambda: (Image.fromarray(GREYS.astype(np.uint16) * 257), {}), GREYS),
    "transparent.png": (lambda: transparent("RGBA"), WHITE_LEFT),
    "transparent grey.png": (lambda: transparent("LA"), np.where(X < 64, 255, GREYS)),
    "one transparent grey.png": (lambda: transparent("L"), np.where(X < 64, 255, 4)),
    "palette.gif": (lambda: (Image.fromarray(GREYS), {}), GREYS),
    "print.tif": (lambda: (Image.fromarray(COLOURS).convert("CMYK"), {}), COLOURS),
}


@pytest.fixture(scope="module")
def imagenet_b0(tmp_path_factory):
    """`load_classifier("b0")` with random weights in place of the published ones."""
    file = tmp_path_factory.mktemp("weights") / "b0.pth"
    torch.save(get_model("efficientnet_b0", weights=None).state_dict(), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "imagenet_weights", lambda name: file)
        return load_classifier("b0")


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_are_read_upright_and_in_their_colours(name, imagenet_b0, tmp_path):
    make, expected = FILES[name]
    image, options = make()
    image.save(tmp_path / name, **options)
    expected = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    got = imagenet_b0.prepare(tmp_path / name).permute(1, 2, 0).numpy()
    assert got.shape == (224, 224, 3) and np.abs(got - expected[16:240, 16:240]).max() < 0.5


def test_a_photograph_is_prepared_as_torchvision_does(imagenet_b0, tmp_path):
    wide = Image.fromarray(COLOURS).resize((640, 400), Image.Resampling.BICUBIC)
    wide.save(tmp_path / "wide.png")
    transform = get_model_weights("efficientnet_b0").DEFAULT.transforms()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    expected = 255 * (transform(wide) * std + mean)
    got = imagenet_b0.prepare(tmp_path / "wide.png")
    assert (got - expected).abs().max() < 1e-3
    model = imagenet_b0.model  # normalises pixels by 255 times ImageNet's mean and deviation, as published
    assert model.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])


def test_predict_prints_classes_and_names_what_it_cannot_read(made, tmp_path, capsys):
    broken, sound = tmp_path / "broken.png", tmp_path / "sound.png"
    broken.write_bytes(b"no image")
    Image.fromarray(patterns(1, 24)[0]).save(sound)
    assert main(["predict", str(made), str(sound), str(broken), str(tmp_path / "gone.png"), "--top", "1"]) == 2
    said = capsys.readouterr()
    assert "sound.png" in said.out and " %  class " in said.out and said.out.count("\n") == 2
    assert f"{broken} cannot be read as an image: no image that Pillow knows" in said.err
    assert "gone.png cannot be read as an image: [Errno 2] No such file or directory" in said.err


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_exported_network_gives_the_same_logits(made, suffix, tmp_path, capsys):
    path = tmp_path / f"model.{suffix}"
    assert main(["export", str(made), "--output", str(path)]) == 0
    assert "logits differ" in capsys.readouterr().out
    images = patterns(5, 20)
    with torch.no_grad():
        expected = load_run(made)[0](normalised(images))
    assert len(set(expected.argmax(1).tolist())) > 1  # else a network that answers one class would pass
    images = torch.tensor(images).permute(0, 3, 1, 2).float()
    if suffix == "onnx":
        session = onnxruntime.InferenceSession(path)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        about = session.get_modelmeta().custom_metadata_map
    else:
        about = {"classes": "", "resolution": "", "about": ""}
        got = torch.export.load(path, extra_files=about).module()(images).detach().numpy()
    assert json.loads(about["classes"]) == CLASSES and about["resolution"] == "20"
    assert np.abs(got - expected.numpy()).max() < 1e-4 * expected.abs().max().item()


def test_an_export_that_differs_is_not_kept(made, tmp_path, monkeypatch):
    wrong = lambda program, output, metadata, images: output.write_bytes(b"") or torch.zeros(len(images), 7)  # noqa: E731
    monkeypatch.setattr(use, "_to_onnx", wrong)
    monkeypatch.setattr(torch.export, "export", lambda *arguments, **options: None)
    with pytest.raises(RuntimeError, match="its logits differ from the network's"):
        export(made, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--model", "b9", "--dataset", "quick"], "unknown method or model 'b9'. Did you mean"),
        (["train", "quick", "dept"], "Did you mean 'depth'?"),
        (["train", "quick"], "train: expected PROFILE METHOD, or --model NAME --dataset NAME"),
        (["train", "quick", "depth", "lr=0.1"], "depth is a method and has its profile's recipe"),
        (["train", "quick", "depth_x0.5"], "unknown method or model 'depth_x0.5'. Did you mean 'depth_x8'?"),
        (["train", "quick", "b0", "--model", "b1"], "mean the same; give one of them"),
        (["train", "quick", "b0", "lrr=0.1"], "train: unknown setting 'lrr'. Did you mean 'lr'?"),
        (
            ["train", "quick", "b0", "--freeze"],
            "freeze: a backbone without pretrained weights cannot be frozen; use pretrained: true",
        ),
        (["train", "--model", "b0", "--dataset", "cifar-10"], "unknown data set 'cifar-10'"),
        (["train", "--model", "b0", "--dataset", "folder:nowhere"], "no such folder"),
        (["predict", "nowhere", "x.png"], "unknown network 'nowhere'"),
        (["export", ".", "--output", "x.onnx"], "expected the folder of a finished run"),
        (["evaluate", "b0", "--root", "nowhere"], "put ImageNet's validation images there"),
        (["evaluate", "b0", "--images", "0"], "images: expected a whole number of at least 1, got 0"),
        (["train", "quick", "b0", "resolution=64"], "resolution is no setting of the recipe; give it by --resolution"),
        (["train", "--model", "b0", "--dataset", "quick", "seed=1"], "give it by --seed"),
        (["train", "quick", "b0", "lr=[0.1"], "lr=[0.1: cannot be read: while parsing a flow sequence"),
        (["train", "quick", "b0", "flip=no"], "flip: expected a valid boolean, got 'no'; in YAML write true or false"),
        (["train", "quick", "b0", "lr=0.1", "lr=0.2"], "lr is given twice"),
        (["data", "digits", "name=cifar10"], "name is given twice: digits and cifar10"),
        (["train", "quick", "b0", "freeze=false", "--freeze"], "freeze is given twice"),
        (["train", "quick", "b0", "batch_size=1"], "batch_size: expected a value greater than or equal to 2, got 1"),
        (["train", "quick", "b0", "--seed", "-1"], "seed: expected a value greater than or equal to 0, got -1"),
        (["train", "quick", "b0", "--seed", "9" * 30], "seed: expected a value less than"),
        (
            ["train", "--model", "b0", "--dataset", "mine.yml"],
            "mine.yml: expected a profile's name, or a file that ends",
        ),
        (["data", "digits", "minivall=0.2"], "unknown setting 'minivall'. Did you mean 'minival'"),
        (["data", "digits", "test=0.2"], "test: digits has a test set of its own"),
        (
            ["train", "quick", "b0", "--resolution", "0"],
            "resolution: expected a value greater than or equal to 1, got 0",
        ),
        (["bench", "--rounds", "0"], "'--rounds'"),
        (["evaluate", "b9"], "unknown model 'b9'"),
        (["evaluate", "tests"], "unknown model 'tests'"),
        (
            ["predict", "pyproject.toml", "x.png"],
            "pyproject.toml: expected the folder of a finished run, or its run.json",
        ),
        (
            ["export", "pyproject.toml"],
            "create_model(NAME, CLASSES, pretrained=FILE) reads weights that have no record",
        ),
        (["rerun", "pyproject.toml"], "expected a run.json, or a folder with one"),
    ],
)
def test_bad_words_are_answered_clearly(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def saved(content, path):
    torch.save(content, path)
    return path.read_bytes()


DAMAGES = {
    "cut off": (lambda body, path: body[: len(body) // 2], "weights.safetensors has no weights, or is damaged"),
    "empty": (lambda body, path: b"", "weights.safetensors has no weights, or is damaged"),
    "a text": (lambda body, path: b"version https://git-lfs.github.com/spec/v1\n", "has no weights, or is damaged"),
    "a network": (lambda body, path: saved(nn.Linear(2, 2), path), "has no weights, or is damaged (UnpicklingError"),
    "a list": (lambda body, path: saved([1, 2], path), "weights.safetensors: found [1, 2]; expected safetensors"),
    "numbered": (lambda body, path: saved({1: torch.ones(2)}, path), "found {1: tensor([1., 1.])}; expected"),
    "a step count": (lambda body, path: saved({"step": 3}, path), "found {'step': 3}; expected safetensors"),
    "another network": (lambda body, path: saved({"conv1.weight": torch.ones(2)}, path), "weights do not fit: Missing"),
    "a folder": (None, "Is a directory"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_bad_file_of_weights_is_named(command, damage, message, made, tmp_path, capsys):
    run = shutil.copytree(made, tmp_path / "run")
    path = run / "weights.safetensors"
    body = path.read_bytes()
    if damage is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damage(body, path))
    assert main([command, str(run), *["x.png"] * (command == "predict")]) == 2
    assert message in capsys.readouterr().err


def test_a_flipped_bit_of_the_weights_is_noticed(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "run")
    path = run / "weights.safetensors"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    assert main(["predict", str(run), "x.png"]) == 2
    assert f"{path} is damaged: its sha256 is not the recorded one" in capsys.readouterr().err


CHECKPOINTS = {
    "wrapped": lambda weights: {"state_dict": weights, "epoch": 3},
    "of a trainer": lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {"state": {}}},
    "of torchvision's reference": lambda weights: {"model": weights, "args": {}},
    "of DataParallel": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "compiled": lambda weights: {f"_orig_mod.{key}": value for key, value in weights.items()},
    "of Lightning": lambda weights: {"state_dict": {f"model._orig_mod.{k}": v for k, v in weights.items()}},
    "nested": lambda weights: {"model": {"state_dict": {f"module.{k}": v for k, v in weights.items()}}},
}


@pytest.mark.parametrize("wrap", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("ours", [True, False])
def test_a_checkpoint_that_wraps_a_state_dict_is_read(wrap, ours, tmp_path, monkeypatch):
    theirs = get_model("efficientnet_b0", weights=None, num_classes=3)
    expected = create_model("b0", 3, pretrained=theirs.state_dict())
    torch.save(wrap((expected if ours else theirs).state_dict()), tmp_path / "checkpoint.pth")
    read = create_model("b0", 3, pretrained=tmp_path / "checkpoint.pth").state_dict()
    assert all(torch.equal(read[key], value) for key, value in expected.state_dict().items())


def test_weights_are_read_from_safetensors_whatever_the_file_is_called(tmp_path):
    theirs = get_model("resnet50", weights=None).state_dict()
    save_file(theirs, tmp_path / "weights.pth")
    read = create_model("resnet50", pretrained=tmp_path / "weights.pth")
    assert torch.equal(read.conv1.weight, theirs["conv1.weight"])


def test_the_names_of_another_projects_weights_are_said(tmp_path):
    torch.save({"state_dict": {"conv_stem.weight": torch.zeros(2), "bn1.bias": torch.zeros(2)}}, tmp_path / "timm.pth")
    with pytest.raises(ValueError, match="weights do not fit: .*The weights have conv_stem.weight, bn1.bias"):
        create_model("b0", pretrained=tmp_path / "timm.pth")
    with pytest.raises(OSError, match=r"nowhere\.pth"):
        create_model("b0", pretrained=tmp_path / "nowhere.pth")
    with pytest.raises(OSError, match="Is a directory"):
        create_model("b0", pretrained=tmp_path)


@pytest.mark.parametrize("content", [b"{no json", b"\xff\xfe", b"[]", b"{}", None], ids=str)
@pytest.mark.parametrize("command", ["predict", "export", "rerun"])
def test_a_bad_record_is_named(command, content, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_bytes(content) if content is not None else path.mkdir()
    assert main([command, str(tmp_path), *["x.png"] * (command == "predict")]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def test_a_folder_is_no_image_and_a_file_no_folder(made, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    assert main(["predict", str(made), str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be read as an image" in capsys.readouterr().err
    assert main(["export", str(made), "--output", str(tmp_path / "file" / "x.onnx")]) == 2
    assert "file" in capsys.readouterr().err
    assert main(["data", "digits", "--root", str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert main(["train", "quick", "b0", "--results", str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_the_shares_of_a_folder_are_chosen_by_the_command(image_folder, tmp_path, monkeypatch, capsys):
    """Of classes with five images, as many as each split needs."""
    folder, trained = image_folder(parts=["all"], count=5) / "all", []
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ModelRun, "train", lambda run, data, *arguments: trained.append((run, data)))
    words = ["train", "--model", "b0", "--dataset", f"folder:{folder}", "minival=0.5", "test=0.2", "batch_size=2"]
    assert main([*words, "--resolution", "16", "--results", str(tmp_path)]) == 0
    ((run, data),) = trained
    assert data.counts == {"train": 4, "minival": 4, "test": 2}
    assert (run.profile.data.minival, run.profile.data.test, run.config.batch_size) == (0.5, 0.2, 2)
    assert main(["data", f"folder:{folder}", "minival=0.5", "size=16", "--output", str(tmp_path)]) == 0
    assert "minival          4 images" in capsys.readouterr().out


def test_what_cannot_be_put_to_use_says_why(made, profile_file, tmp_path, capsys):
    assert main(["export", str(made), "--output", str(tmp_path / "x.h5")]) == 2
    assert "ends in .onnx or .pt2, got" in capsys.readouterr().err
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        list(predict(load_classifier(made), [], top=0))
    older = Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(older)
    with pytest.raises(ValueError, match=r"does not say its coefficients: it is of an older version; train it again"):
        load_classifier(older.run_dir)
    write_record(older, status="diverged", diverged={"epoch": 1, "step": 2, "lr": 0.1})
    with pytest.raises(ValueError, match="expected a finished run, this one is diverged"):
        load_run(older.run_dir / "run.json")


def test_settings_may_stand_anywhere_among_the_words(profile_file, tmp_path, capsys, monkeypatch):
    path, trained = profile_file(), []
    monkeypatch.setattr(ModelRun, "train", lambda run, *arguments: trained.append(run))
    words = ["train", "epochs=2", "--dataset", str(path), "lr=0.03", "--model", "b0", "--seed", "1", "batch_size=20"]
    assert main([*words, "--results", str(tmp_path)]) == 0
    (run,) = trained
    assert run.run_dir == tmp_path / "tiny" / "models" / "b0_16px_seed1" and run.seed == 1
    assert (run.config.epochs, run.config.lr, run.config.batch_size) == (2, 0.03, 20)
    assert main([*words, "--lr", "0.1"]) == 2 and "--lr" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_torchvisions_networks_train_by_the_same_trainer(name, profile_file, tmp_path, capsys):
    path = profile_file()
    words = ["train", "--model", name, "--dataset", str(path), "--resolution", "32", "--results", str(tmp_path)]
    assert main([*words, "lr=0.01"]) == 0
    folder = tmp_path / "tiny" / "models" / f"{name}_32px_seed0"
    record = read_record(folder)
    assert record["cost"]["params"] == sum(p.numel() for p in create_model(name, 10).parameters())
    model, _ = load_run(folder)
    test = load_data(**load_profile(path).data.given())
    assert evaluate(model, test, "test", 32)["loss"] == pytest.approx(record["test"]["loss"], rel=1e-4)


def test_half_precision_serves_where_the_full_weights_are_missing(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    images, (whole, about) = torch.rand(4, 3, 16, 16), load_run(run)
    assert main(["export", str(run), "--output", str(run / "weights_half.safetensors")]) == 0
    full = run / "weights.safetensors"
    assert main(["export", str(run), "--output", str(run / "x" / ".." / "weights.safetensors")]) == 2
    assert "has the full weights, which would be lost" in capsys.readouterr().err and load_run(run)
    assert (run / "weights_half.safetensors").stat().st_size < 0.52 * full.stat().st_size
    full.rename(tmp_path / "away")
    half, _ = load_run(run)
    assert 0 < (half(images) - whole(images)).abs().max() < 0.1 * whole(images).abs().max()
    record.write_record(run, {name: value for name, value in about.items() if name != "sha256"} | {"seed": 8})
    with pytest.raises(ValueError, match="weights_half.safetensors has the weights of another run"):
        load_run(run)
    assert main(["export", str(run), "--output", str(tmp_path / "again.safetensors")]) == 2  # the full ones are away
    assert "finished run that has its weights.safetensors" in capsys.readouterr().err


KEPT = sorted((ROOT / "results").glob("*/runs/*/weights_half.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.parent.name)
def test_committed_weights_score_as_their_record_says(file, tmp_path):
    try:
        data = load_data(**read_record(file.parent)["data"], download=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, about = load_run(shutil.copytree(file.parent, tmp_path / "run", ignore=lambda *_: ["weights.safetensors"]))
    scores = evaluate(model, data, "test", about["config"]["resolution"], precision="fp32")
    assert scores["top1"] == pytest.approx(about["test"]["top1"], abs=0.1)


def test_committed_weights_take_at_most_16_mb():
    assert sum(file.stat().st_size for file in KEPT) <= 16.1e6


@pytest.fixture
def published_b0(tmp_path, monkeypatch):
    """torchvision's B0 with random weights, as if they were the published ones."""
    torch.manual_seed(0)
    theirs = get_model("efficientnet_b0", weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    monkeypatch.setattr(pretrained, "imagenet_weights", lambda name: tmp_path / "b0.pth")
    return theirs


@pytest.mark.parametrize("frozen", [True, False])
def test_fine_tuning_begins_with_the_published_weights(frozen, published_b0, trained, tmp_path):
    data = f"folder:{trained[1]}"
    words = ["train", "--model", "b0", "--dataset", data, "--pretrained", *["--freeze"] * frozen, "--resolution", "16"]
    assert main([*words, "epochs=1", "batch_size=18", "lr=0.05", "ema_decay=0.0", "--results", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("pictures*/models/*")
    assert folder.name == f"b0_pretrained{'_frozen' * frozen}_16px_seed0"
    record = read_record(folder)
    assert np.allclose(
        record["dataset"]["mean"], [255 * m for m in (0.485, 0.456, 0.406)]
    )  # ImageNet's, not the folder's
    model, theirs = load_run(folder)[0], published_b0.features[0]
    mean, std = (torch.tensor(record["dataset"][name]) for name in ("mean", "std"))
    images = dataclasses.replace(load_data(data, size=16), mean=mean, std=std)
    again = evaluate(model, images, "test", 16)  # batch norm's eps is not in the file of weights
    assert again["loss"] == pytest.approx(record["test"]["loss"], rel=1e-5)
    same = [
        torch.equal(model.stem.conv.weight, theirs[0].weight),
        torch.equal(model.stem.norm.running_mean, theirs[1].running_mean),
    ]
    assert same == [frozen, frozen]


def test_table_7s_networks_can_begin_with_the_weights_of_their_like(published_b0, profile_file, tmp_path):
    train = {"epochs": 1, "batch_size": 20, "pretrained": True}
    baseline = Run.plan(profile_file(train=train), "baseline", 0, tmp_path)
    assert torch.equal(baseline.model(10).stem.conv.weight, published_b0.features[0][0].weight)
    with pytest.raises(ValueError, match=r"pretrained: there are no ImageNet weights of d4.00_w1.00_r1.00"):
        dataclasses.replace(baseline, method="depth").model(10)


def test_pretrained_weights_are_checked_on_imagenet_as_torchvision_does(published_b0, tmp_path, monkeypatch, capsys):
    """Six images lie in the folders of the classes that the network ranks first, first, second, fifth, sixth, tenth."""
    transform, place = get_model_weights("efficientnet_b0").DEFAULT.transforms(), tmp_path / "imagenet" / "val"
    for number in range(1000):
        (place / f"n{number:08}").mkdir(parents=True)
    photos = [Image.fromarray(pixels[:40]) for pixels in patterns(6, 60)]
    images = torch.stack([transform(photo) for photo in photos])
    theirs = calibrated(published_b0, images)
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    with torch.no_grad():
        ranked = theirs(images).argsort(1, descending=True)
    assert len(set(ranked[:, 0].tolist())) > 2
    ranks = (0, 0, 1, 4, 5, 9)
    for i, rank in enumerate(ranks):
        photos[i].save(place / f"n{ranked[i, rank]:08}" / f"{i}.png")
    folder = partial(torchvision.datasets.ImageFolder, allow_empty=True)
    monkeypatch.setattr("torchvision.datasets.ImageFolder", folder)
    scores = use.check_on_imagenet("b0", tmp_path)
    assert [scores["top1"], scores["top5"]] == pytest.approx([100 * 2 / 6, 100 * 4 / 6])
    assert [scores[name] for name in ("images", "published_top1", "published_top5")] == [6, 77.692, 93.532]
    assert main(["evaluate", "b0", "--root", str(tmp_path), "--images", "4"]) == 0
    said = capsys.readouterr().out
    by_folder = sorted(range(6), key=lambda i: ranked[i, ranks[i]].item())
    drawn = [ranks[by_folder[i]] for i in (3, 2, 5, 4)]  # numpy's permutation of six by seed 0 begins so
    top1, top5 = (25 * sum(rank < k for rank in drawn) for k in (1, 5))
    assert (
        said.startswith(f"4 images: top-1 {top1:.3f} %, top-5 {top5:.3f} %")
        and "published by torchvision: top-1 77.692 %" in said
    )
    broken = place / "n00000998" / "broken.png"
    broken.write_bytes((place / f"n{ranked[0, 0]:08}" / "0.png").read_bytes()[:70])
    with pytest.raises(ValueError, match="broken.png cannot be read as an image: ") as caught:
        use.check_on_imagenet("b0", tmp_path)
    assert "\n" not in str(caught.value)
    (place / "n00000999").rmdir()
    with pytest.raises(ValueError, match="has 999 class folders, expected 1000"):
        use.check_on_imagenet("b0", tmp_path)


# ---- transfer: data sets in their real formats, from the publisher to a prediction


def write_cifar100(place, monkeypatch):
    """The published layout of CIFAR-100 with 10 training images and a test image of each class. Returns its archive."""
    folder, rng = place / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, each in (("train", 10), ("test", 1)):
        labels = [label for label in range(100) for _ in range(each)]
        pixels = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    cifar = torchvision.datasets.CIFAR100
    for part in ("train", "test"):
        monkeypatch.setattr(cifar, f"{part}_list", [[part, sums[part]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["meta"]})
    return _packed(folder, place / "cifar-100-python.tar.gz")


def write_food101(place, monkeypatch):
    """The published layout of Food-101 with 20 training photographs and a test photograph of each dish."""
    folder, rng, lists = place / "food-101", np.random.default_rng(0), {"train": {}, "test": {}}
    expected = dataclasses.replace(sources.DATA_SETS["food101"], per_class=(20, 1))
    monkeypatch.setitem(sources.DATA_SETS, "food101", expected)
    for name in (f"dish_{i:03}" for i in range(101)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(21):
            lists["train" if i < 20 else "test"].setdefault(name, []).append(f"{name}/{i}")
            pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.jpg")
    (folder / "meta").mkdir()
    for part, names in lists.items():
        (folder / "meta" / f"{part}.json").write_text(json.dumps(names))
    return _packed(folder, place / "food-101.tar.gz")


def _packed(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive


@pytest.mark.slow
@pytest.mark.parametrize("name, write", [("cifar100", write_cifar100), ("food101", write_food101)])
def test_transfer_runs_from_the_archive_to_a_prediction(name, write, published, tmp_path, monkeypatch, capsys):
    published(name, write(tmp_path / "site", monkeypatch))
    monkeypatch.setenv("EFFNET_DATA", str(tmp_path / "data"))
    words = ["train", "--model", "b0", "--dataset", name, "--resolution", "16", "--results", str(tmp_path)]
    assert main([*words, "epochs=1", "batch_size=300", "optimizer=sgd", "lr=0.02"]) == 0
    folder = tmp_path / name / "models" / "b0_16px_seed0"
    record, profile = read_record(folder), load_profile(name)
    assert record["dataset"]["classes"] == len(record["dataset"]["class_names"]) == profile.num_classes
    assert record["config"]["norm_momentum"] == profile.train["norm_momentum"]  # the profile's recipe
    assert record["dataset"]["counts"]["test"] == profile.num_classes
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image)
    capsys.readouterr()
    assert main(["predict", str(folder), str(image), "--top", "3"]) == 0
    assert capsys.readouterr().out.count(" %  ") == 3
