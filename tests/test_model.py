"""The network: parity with torchvision, stochastic depth, squeeze-and-excitation, weights."""

import pickle

import pytest
import torch
from torch import nn
from torchvision.models import get_model, get_model_weights

from effnet_lib import (
    EfficientNet,
    MBConv,
    Scaling,
    StochasticDepth,
    class_activation_map,
    efficientnet,
    load_torchvision_weights,
)


def torchvision_model(name: str) -> nn.Module:
    """With batch norm's statistics those of a few random images, so that signals reach the logits."""
    torch.manual_seed(0)
    model = get_model(f"efficientnet_{name}", weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("name, eps", [("b0", 1e-5), ("b3", 1e-5), ("b7", 1e-3)])
def test_logits_equal_torchvisions(name, eps):
    theirs = torchvision_model(name)
    ours = efficientnet(name, weights=theirs.state_dict()).eval()
    assert ours.stem.norm.eps == eps
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
        assert (expected[0] - expected[1]).abs().max() > 0.1  # else any two networks would agree
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        wrong = load_torchvision_weights(ours, theirs.state_dict(), norm_eps=1e-3 if eps == 1e-5 else 1e-5)
        assert not torch.allclose(wrong(images), expected, rtol=1e-5, atol=1e-5)


def test_default_weights_come_from_torchvision(monkeypatch):
    weights = get_model_weights("efficientnet_b0").DEFAULT
    theirs = torchvision_model("b0").state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **options: theirs)
    ours = efficientnet("b0", weights="DEFAULT")
    assert torch.equal(ours.classifier.weight, theirs["classifier.1.weight"])


def test_weights_that_do_not_fit_are_refused_by_name():
    weights = get_model("efficientnet_b0", weights=None).state_dict()
    with pytest.raises(ValueError, match=r"classifier\.weight has shape \(1000, 1280\), the model needs \(10, 1280\)"):
        efficientnet("b0", 10, weights=weights)
    with pytest.raises(ValueError, match="missing from the weights"):
        efficientnet("b1", weights=weights)
    with pytest.raises(ValueError, match="not in this model"):
        load_torchvision_weights(efficientnet("b0"), {**weights, "features.9.extra": torch.zeros(1)})


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_offered_as_weights_is_never_executed(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"stem.conv.weight": Malicious()}, path)
    with pytest.raises(pickle.UnpicklingError):
        efficientnet("b0", weights=path)


def test_weights_are_read_from_a_file(tmp_path):
    weights = torchvision_model("b0").state_dict()
    torch.save(weights, tmp_path / "b0.pt")
    ours = efficientnet("b0", weights=tmp_path / "b0.pt")
    assert torch.equal(ours.stem.conv.weight, weights["features.0.0.weight"])


def test_squeeze_and_excitation_is_sized_from_the_blocks_input():
    model = efficientnet("b0", num_classes=10)
    for block in model.modules():
        if isinstance(block, MBConv):
            first = block.expand if not isinstance(block.expand, nn.Identity) else block.depthwise
            assert block.se.reduce.out_channels == first.conv.in_channels // 4
    assert sum(p.numel() for p in model.parameters()) == 4_020_358  # 7.16 M with the common mistake


def test_stochastic_depth_ramps_linearly_from_zero():
    model = efficientnet("b0", drop_path=0.2)
    p = [block.drop_path.p for block in model.modules() if isinstance(block, MBConv)]
    assert p == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, 3)
    layer = StochasticDepth(0.3)
    y = layer.train()(x).flatten(1)
    assert torch.equal(y.amin(1), y.amax(1))
    assert y[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert y.mean() == pytest.approx(1, abs=0.05)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("stride, side", [(2, 2), (1, 4)])
def test_the_stem_stride_sets_the_last_feature_map(stride, side):
    model = EfficientNet(num_classes=10, stem_stride=stride).eval()
    with torch.no_grad():
        assert model.features(torch.zeros(1, 3, 64, 64)).shape == (1, 1280, side, side)


def test_names_and_numbers_that_are_wrong_are_refused():
    with pytest.raises(ValueError, match="unknown model 'b8'.*Valid: b0"):
        efficientnet("b8")
    with pytest.raises(ValueError, match="num_classes"):
        EfficientNet(num_classes=0)
    with pytest.raises(ValueError, match="stem_stride"):
        EfficientNet(stem_stride=3)
    with pytest.raises(ValueError, match="drop_path"):
        EfficientNet(drop_path=1.0)


def test_activation_maps_are_the_weighted_last_features():
    torch.manual_seed(0)
    model = EfficientNet(Scaling(width=0.25, depth=0.3), num_classes=3, stem_stride=1)
    images = torch.randn(2, 3, 32, 32)
    maps = class_activation_map(model, images, torch.tensor([0, 2]))
    assert maps.shape == (2, 32, 32)
    assert maps.amin((1, 2)).tolist() == [0, 0] and maps.amax((1, 2)).tolist() == pytest.approx([1, 1])
    assert not torch.allclose(maps, class_activation_map(model, images, torch.tensor([1, 1])))
    predicted = model(images).argmax(1)
    torch.testing.assert_close(class_activation_map(model, images), class_activation_map(model, images, predicted))
