"""A trained network put to use: by name, pretrained, fine-tuned; predictions, export, the check on ImageNet."""

import dataclasses
import hashlib
import json
import pickle
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_record
from PIL import Image
from torchvision.models import get_model, get_model_weights

import effnet_data
import effnet_model
import effnet_study as study
import effnet_use
from effnet_data import load_data
from effnet_lib import NEIGHBOURS, create_model, evaluate, read_record

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
    assert study.main([*words, "epochs=4", "batch_size=12", "--results", str(place), "--seed", "3"]) == 0
    (run,) = (place / "pictures" / "models").iterdir()
    return run, place / "pictures"


def test_a_network_is_trained_by_name_on_a_folder(trained):
    run, _ = trained
    record = read_record(run)
    assert run.name == "b0_16px_seed3" and record["status"] == "finished" and record["model"] == "b0"
    assert record["dataset"]["class_names"] == ["ant", "bee"] and record["config"]["epochs"] == 4
    answers = np.load(run / "test_predictions.npz")
    assert answers["label"].tolist() == [0] * 4 + [1] * 4
    assert ((answers["predicted"] == answers["label"]) == np.load(run / "test_correct.npy")).all()
    assert (answers["confidence"] >= 0.5).all() and (answers["confidence"] <= 1).all()


def test_predictions_for_files_are_those_of_the_scoring(trained):
    run, pictures = trained
    answers = np.load(run / "test_predictions.npz")
    files = sorted(pictures.glob("test/*/*.png"))
    found = list(study.predict(study.load_classifier(run), files, top=2))
    for (file, classes), expected, sure in zip(found, answers["predicted"], answers["confidence"], strict=True):
        assert file in files and classes[0][0] == ("ant", "bee")[expected]
        assert classes[0][1] == pytest.approx(float(sure), abs=2e-3)
        assert sum(p for _, p in classes) == pytest.approx(1, abs=1e-5)


def test_predict_prints_classes_and_names_what_it_cannot_read(trained, tmp_path, capsys):
    run, pictures = trained
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [str(pictures / "test" / "ant" / "0.png"), str(broken), str(tmp_path / "gone.png")]
    assert study.main(["predict", str(run), *files, "--top", "1"]) == 2
    said = capsys.readouterr()
    assert "0.png" in said.out and " %  " in said.out and said.out.count("\n") == 2
    assert f"{broken} cannot be read as an image: no image that Pillow knows" in said.err
    assert "gone.png cannot be read as an image: it is gone" in said.err


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_exported_network_gives_the_same_logits(trained, suffix, tmp_path, capsys):
    run, _ = trained
    path = tmp_path / f"model.{suffix}"
    assert study.main(["export", str(run), "--output", str(path)]) == 0
    assert "logits differ" in capsys.readouterr().out
    model, record = study.load_run(run)
    images = torch.randint(0, 256, (5, 3, 16, 16)).float()
    mean, std = (torch.tensor(record["dataset"][name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = model((images - mean) / std)
    if suffix == "onnx":
        session = onnxruntime.InferenceSession(path)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        about = session.get_modelmeta().custom_metadata_map
        assert json.loads(about["classes"]) == ["ant", "bee"] and about["resolution"] == "16"
    else:
        got = torch.export.load(path).module()(images).detach().numpy()
    assert np.abs(got - expected.numpy()).max() < 1e-4 * expected.abs().max().item()


def test_an_export_that_differs_is_not_kept(trained, tmp_path, monkeypatch):
    wrong = lambda program, output, metadata, images: output.write_bytes(b"") or torch.zeros(len(images), 2)  # noqa: E731
    monkeypatch.setattr(effnet_use, "_to_onnx", wrong)
    with pytest.raises(RuntimeError, match="its logits differ from the network's"):
        study.export(trained[0], tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--model", "b9", "--dataset", "quick"], "unknown method or model 'b9'. Did you mean"),
        (["train", "quick", "dept"], "Did you mean 'depth'?"),
        (["train", "quick"], "train: expected PROFILE METHOD, or --model NAME --dataset NAME"),
        (["train", "quick", "depth", "lr=0.1"], "depth is a method of the study, whose recipe is its profile's"),
        (["train", "quick", "depth_x0.5"], "unknown method or model 'depth_x0.5'. Did you mean 'depth_x8'?"),
        (["train", "quick", "b0", "--model", "b1"], "say the same; give one of them"),
        (["train", "quick", "b0", "lrr=0.1"], "unknown training setting 'lrr'. Did you mean 'lr'?"),
        (
            ["train", "quick", "b0", "--freeze"],
            "a backbone that has learnt nothing cannot be frozen; use it with pretrained",
        ),
        (["train", "--model", "b0", "--dataset", "cifar-10"], "unknown data set 'cifar-10'"),
        (["train", "--model", "b0", "--dataset", "folder:nowhere"], "no such folder"),
        (["predict", "nowhere", "x.png"], "unknown network 'nowhere'"),
        (["export", ".", "--output", "x.onnx"], "expected the folder of a finished run"),
        (["evaluate", "b0", "--root", "nowhere"], "put ImageNet's validation images there"),
        (["evaluate", "b0", "--images", "0"], "images: expected a whole number of at least 1, got 0"),
        (["train", "quick", "b0", "resolution=64"], "resolution is no setting of the recipe; give it by --resolution"),
        (["train", "--model", "b0", "--dataset", "quick", "seed=1"], "give it by --seed"),
    ],
)
def test_bad_words_are_answered_clearly(words, message, capsys):
    assert study.main(words) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_put_to_use_says_why(trained, profile_file, tmp_path, capsys):
    run, _ = trained
    assert study.main(["export", str(run), "--output", str(tmp_path / "x.h5")]) == 2
    assert "ends in .onnx or .pt2, got" in capsys.readouterr().err
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        list(study.predict(study.load_classifier(run), [], top=0))
    older = study.Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(older)
    with pytest.raises(ValueError, match=r"does not say its coefficients: it is of an older version; train it again"):
        study.load_classifier(older.directory)
    write_record(older, status="diverged", diverged={"epoch": 1, "step": 2, "lr": 0.1})
    with pytest.raises(ValueError, match="expected a finished run, this one is diverged"):
        study.load_run(older.directory / "run.json")


def test_settings_may_stand_anywhere_among_the_words(profile_file, tmp_path):
    path = profile_file(retry_lr=0.5)  # which is the study's alone
    words = ["train", "epochs=2", "--dataset", str(path), "lr=0.03", "--model", "b0", "--seed", "1", "batch_size=20"]
    assert study.main([*words, "--results", str(tmp_path)]) == 0
    record = read_record(tmp_path / "tiny" / "models" / "b0_16px_seed1")
    assert [record["config"][name] for name in ("epochs", "lr", "batch_size")] == [2, 0.03, 20]
    with pytest.raises(SystemExit):
        study.main([*words, "--lr", "0.1"])


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_train_by_the_same_trainer(name, profile_file, tmp_path, capsys):
    path = profile_file()
    words = ["train", "--model", name, "--dataset", str(path), "--resolution", "32", "--results", str(tmp_path)]
    assert study.main([*words, "lr=0.01"]) == 0
    folder = tmp_path / "tiny" / "models" / f"{name}_32px_seed0"
    record = read_record(folder)
    assert record["cost"]["params"] == sum(p.numel() for p in create_model(name, 10).parameters())
    model, _ = study.load_run(folder)
    test = load_data(**study.load_profile(path).data)
    assert evaluate(model, test, "test", 32)["top1"] == pytest.approx(record["test"]["top1"], abs=0.3)


@pytest.fixture
def published_b0(tmp_path, monkeypatch):
    """torchvision's B0 with random weights, as if they were the published ones."""
    torch.manual_seed(0)
    theirs = get_model("efficientnet_b0", weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    monkeypatch.setattr(effnet_model, "imagenet_weights", lambda name: tmp_path / "b0.pth")
    return theirs


@pytest.mark.parametrize("frozen", [True, False])
def test_fine_tuning_begins_with_the_published_weights(frozen, published_b0, trained, tmp_path):
    data = f"folder:{trained[1]}"
    words = ["train", "--model", "b0", "--dataset", data, "--pretrained", *["--freeze"] * frozen, "--resolution", "16"]
    assert (
        study.main([*words, "epochs=1", "batch_size=18", "lr=0.05", "ema_decay=0.0", "--results", str(tmp_path)]) == 0
    )
    (folder,) = (tmp_path / "pictures" / "models").iterdir()
    assert folder.name == f"b0_pretrained{'_frozen' * frozen}_16px_seed0"
    record = read_record(folder)
    assert np.allclose(
        record["dataset"]["mean"], [255 * m for m in (0.485, 0.456, 0.406)]
    )  # ImageNet's, not the folder's
    model, theirs = study.load_run(folder)[0], published_b0.features[0]
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
    baseline = study.Run.plan(profile_file(train=train), "baseline", 0, tmp_path)
    assert torch.equal(baseline.model(10).stem.conv.weight, published_b0.features[0][0].weight)
    with pytest.raises(ValueError, match=r"pretrained: there are no ImageNet weights of d4.00_w1.00_r1.00"):
        dataclasses.replace(baseline, method="depth").model(10)


def test_pretrained_weights_are_checked_on_imagenet_as_torchvision_does(published_b0, tmp_path, monkeypatch, capsys):
    weights, rng = get_model_weights("efficientnet_b0").DEFAULT, np.random.default_rng(0)
    transform, right = weights.transforms(), []
    for number in range(1000):
        folder = tmp_path / "imagenet" / "val" / f"n{number:08}"
        folder.mkdir(parents=True)
    for number in range(3):
        for i in range(2):
            pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            file = tmp_path / "imagenet" / "val" / f"n{number:08}" / f"{i}.png"
            Image.fromarray(pixels).save(file)
            with torch.no_grad():
                logits = published_b0(transform(Image.open(file))[None])[0]
            right.append((number in logits.topk(1).indices, number in logits.topk(5).indices))
    folder = partial(torchvision.datasets.ImageFolder, allow_empty=True)
    monkeypatch.setattr("torchvision.datasets.ImageFolder", folder)
    scores = effnet_use.check_on_imagenet("b0", tmp_path, workers=0)
    assert [scores["top1"], scores["top5"]] == pytest.approx((100 * np.mean(right, 0)).tolist())
    assert scores["images"] == 6 and scores["published_top1"] == 77.692
    assert study.main(["evaluate", "b0", "--root", str(tmp_path), "--images", "4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 images: top-1 ") and "published by torchvision: top-1 77.692 %" in said
    (tmp_path / "imagenet" / "val" / "n00000999").rmdir()
    with pytest.raises(ValueError, match="has 999 class folders, expected 1000"):
        effnet_use.check_on_imagenet("b0", tmp_path)


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
    monkeypatch.setitem(effnet_data.PER_CLASS, "food101", (20, 1))
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


@pytest.mark.parametrize("name, write", [("cifar100", write_cifar100), ("food101", write_food101)])
def test_transfer_runs_from_the_archive_to_a_prediction(name, write, published, tmp_path, monkeypatch, capsys):
    published(name, write(tmp_path / "site", monkeypatch))
    monkeypatch.setenv("EFFNET_DATA", str(tmp_path / "data"))
    words = ["train", "--model", "b0", "--dataset", name, "--resolution", "16", "--results", str(tmp_path)]
    assert study.main([*words, "epochs=1", "batch_size=300", "optimizer=sgd", "lr=0.02"]) == 0
    folder = tmp_path / name / "models" / "b0_16px_seed0"
    record, profile = read_record(folder), study.load_profile(name)
    assert record["dataset"]["classes"] == len(record["dataset"]["class_names"]) == profile.num_classes
    assert record["config"]["norm_momentum"] == profile.train["norm_momentum"]  # the profile's recipe
    assert record["dataset"]["counts"]["test"] == profile.num_classes
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image)
    capsys.readouterr()
    assert study.main(["predict", str(folder), str(image), "--top", "3"]) == 0
    assert capsys.readouterr().out.count(" %  ") == 3
