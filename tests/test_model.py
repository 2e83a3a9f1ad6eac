"""The network: parity with torchvision, stochastic depth, squeeze-and-excitation, weights."""

import copy
import hashlib
import re
import shutil
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from effnet_lib import (
    TABLE7,
    EfficientNet,
    MBConv,
    Scaling,
    SqueezeExcitation,
    StochasticDepth,
    count_cost,
    efficientnet,
)
from effnet_study.cpu_kernels import CpuConv2d, CpuSqueezeExcitation, accelerate_on_cpu
from effnet_study.machine import compile_blocks
from effnet_study.methods import scaled_cost
from effnet_study.pretrained import (
    TORCHVISION_MODELS,
    create_model,
    freeze_backbone,
    imagenet_weights,
)
from effnet_study.use import class_activation_map


def torchvision_model(name: str) -> nn.Module:
    """Return a network whose batch norm has the statistics of a few random images, so that signals reach the logits."""
    torch.manual_seed(0)
    model = get_model(f"efficientnet_{name}", weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("name, eps", [("b0", 1e-5), ("b5", 1e-3)])
def test_logits_equal_torchvisions(name, eps):
    theirs = torchvision_model(name)
    ours = create_model(name, pretrained=theirs.state_dict()).eval()
    assert ours.stem.norm.eps == eps
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def distance(a, b):
        return (a - b).norm() / b.norm()

    with torch.no_grad():
        expected, got = theirs(images), ours(images)
        assert (expected[0] - expected[1]).abs().max() > 0.1  # else any two networks would agree
        assert distance(got, expected) < 3e-5
        wrong = copy.deepcopy(ours)
        for norm in (m for m in wrong.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eps = 1.01e-3 - eps
        assert distance(wrong(images), expected) > 3e-5
        # In fp32 torchvision's own network in another memory layout is as far from itself
        assert distance(ours.double()(images.double()), theirs.double()(images.double())) < 1e-12


@pytest.mark.parametrize("name", ["b3", "b4", "b6", "b7"])
def test_every_variant_takes_torchvisions_weights_and_has_its_eps(name):
    with torch.device("meta"):
        theirs = get_model(f"efficientnet_{name}", weights=None)
        ours = create_model(name, pretrained=theirs.state_dict())
    kinds = [{m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} for model in (theirs, ours)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 1


def test_our_own_weights_keep_our_eps():
    torch.manual_seed(0)
    ours = create_model("b0", 10)
    again = create_model("b0", 10, pretrained=ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.eval()(images), again.eval()(images))


@pytest.fixture
def published_weights(tmp_path, monkeypatch):
    """A function that publishes a state dict as the weights of every network, and returns where they will be kept."""

    def publish(state_dict):
        file = tmp_path / "published.pth"
        torch.save(state_dict, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        weights = SimpleNamespace(DEFAULT=SimpleNamespace(url=f"https://nowhere.example/network-{digest}.pth"))
        monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: weights)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

        def fetch(url, to, hash_prefix, progress):
            assert url == weights.DEFAULT.url and hash_prefix == digest
            shutil.copy(file, to)

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        return tmp_path / "hub" / "checkpoints" / f"network-{digest}.pth"

    return publish


def test_pretrained_weights_are_torchvisions_fetched_once_and_verified_every_time(published_weights, monkeypatch):
    theirs = torchvision_model("b0").state_dict()
    kept = published_weights(theirs)
    assert imagenet_weights("b0") == kept
    monkeypatch.setattr(torch.hub, "download_url_to_file", pytest.fail)
    ours = create_model("b0", pretrained=True)
    assert torch.equal(ours.classifier.weight, theirs["classifier.1.weight"])
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"network-\w+\.pth is damaged: its sha256 begins with .*; delete it"):
        create_model("b0", pretrained=True)


def test_without_a_network_pretrained_weights_say_what_to_do(published_weights, monkeypatch):
    kept = published_weights({})

    def offline(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=rf"not at {kept}.*Put https://nowhere.example/.* there by hand"):
        create_model("b0", pretrained=True)


@pytest.mark.parametrize(
    "weights, name, classes, message",
    [
        (
            "efficientnet_b0",
            "b0",
            10,
            r"classifier\.weight.*\[1000, 1280\].*\[10, 1280\].*to fine-tune .*new_head=True",
        ),
        ("efficientnet_b0", "b1", 1000, r"Missing key\(s\).*stages\.0\.1\.depthwise\.conv\..*is it the same network"),
        (
            "efficientnet_b1",
            "b0",
            1000,
            r"Unexpected key\(s\).*features\.1\.1\.block\.0\..*is it the same network",
        ),
        ("resnet50", "resnet50", 10, r"fc\.weight.*\[1000, 2048\].*\[10, 2048\].*to fine-tune .*new_head=True"),
        ("resnet50", "resnet152", 1000, r"Missing key\(s\).*layer2\.4\.conv1\.weight.*is it the same network"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(weights, name, classes, message):
    with torch.device("meta"):
        weights = get_model(weights, weights=None).state_dict()
        with pytest.raises(ValueError, match=f"weights do not fit: .*{message}"):
            create_model(name, classes, pretrained=weights)


def test_fine_tuning_keeps_the_backbone_and_begins_with_a_new_head():
    weights = get_model("efficientnet_b0", weights=None).state_dict()
    for classes in (10, 1000):
        ours = create_model("b0", classes, pretrained=weights, new_head=True)
        assert torch.equal(ours.stem.conv.weight, weights["features.0.0.weight"])
        assert ours.classifier.weight.shape == (classes, 1280) and ours.stem.norm.eps == 1e-5
    assert not torch.equal(ours.classifier.weight, weights["classifier.1.weight"])
    weights = get_model("resnet50", weights=None).state_dict()
    ours = create_model("resnet50", 10, pretrained=weights, new_head=True, dropout=0.2)
    assert torch.equal(ours.conv1.weight, weights["conv1.weight"]) and ours.fc[1].weight.shape == (10, 2048)


@pytest.mark.parametrize("name", ["b0", "resnet50"])
def test_a_frozen_backbone_learns_nothing_in_training(name):
    torch.manual_seed(0)
    model = freeze_backbone(create_model(name, 4, dropout=0.1)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    images = torch.randn(4, 3, 32, 32)
    model.eval()
    features = getattr(model, "features", nn.Identity())(images)
    model.train()
    F.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(("classifier.", "fc.")) for key in changed)
    if name == "b0":  # nor is anything dropped in it
        assert torch.allclose(model.train().features(images), features)


@pytest.mark.parametrize("name", ["resnet50", "densenet201"])
def test_other_networks_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = get_model(name, weights=None).eval()
    ours = create_model(name, pretrained=theirs.state_dict(), dropout=0.3, norm_momentum=0.02).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    assert {m.momentum for m in ours.modules() if isinstance(m, nn.BatchNorm2d)} == {0.02}
    assert [m.p for m in ours.modules() if isinstance(m, nn.Dropout)] == [0.3]


@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_other_networks_have_our_head_and_stem_stride(name):
    with torch.device("meta"):
        whole, small = create_model(name), create_model(name, 7, stem_stride=1)
        assert small(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert count_cost(small, 64).flops > 2 * count_cost(whole, 64).flops  # its maps are four times as large


def test_densenets_published_file_has_older_names():
    theirs = get_model("densenet201", weights=None).state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): w for key, w in theirs.items()}
    assert older.keys() != theirs.keys()
    ours = create_model("densenet201", pretrained=older)
    assert torch.equal(
        ours.features.denseblock1.denselayer1.conv2.weight, theirs["features.denseblock1.denselayer1.conv2.weight"]
    )


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_offered_as_weights_is_never_executed(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"stem.conv.weight": Malicious()}, path)
    with pytest.raises(ValueError, match="UnpicklingError"):
        create_model("b0", pretrained=path)


def test_weights_are_read_from_a_file(tmp_path):
    weights = torchvision_model("b0").state_dict()
    torch.save(weights, tmp_path / "b0.pt")
    ours = create_model("b0", pretrained=tmp_path / "b0.pt")
    assert torch.equal(ours.stem.conv.weight, weights["features.0.0.weight"])


def test_squeeze_and_excitation_is_sized_from_the_blocks_input():
    model = efficientnet("b0", num_classes=10)
    for block in model.modules():
        if isinstance(block, MBConv):
            first = block.expand if not isinstance(block.expand, nn.Identity) else block.depthwise
            assert block.se.reduce.out_channels == first.conv.in_channels // 4
    assert sum(p.numel() for p in model.parameters()) == 4_020_358


def test_the_common_mistake_in_squeeze_and_excitation_can_be_measured():
    model = efficientnet("b0", num_classes=10, se_expanded=True)
    assert model.stages[1][0].se.reduce.out_channels == 6 * 16 // 4
    cost = count_cost(model, 64)
    assert cost.params == 7_155_658  # that of a well-known reproduction
    assert cost == scaled_cost(TABLE7["baseline"], 64, 10, se_expanded=True)


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
    assert (y[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
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


def test_an_activation_map_by_hand():
    """Two channels on 1 x 3 pixels; class 0 sums them, class 1 subtracts the second."""
    features = torch.tensor([[[[1.0, 2.0, 3.0]], [[5.0, 0.0, 1.0]]]])  # class 0: 6, 2, 4; class 1: -4, 2, 2
    classifier = nn.Linear(2, 2)
    classifier.weight.data, classifier.bias.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.zeros(2)
    model = SimpleNamespace(eval=lambda: SimpleNamespace(features=lambda images: features), classifier=classifier)
    images = torch.zeros(1, 3, 1, 3)
    assert class_activation_map(model, images, torch.tensor([1])).tolist() == [[[0, 1, 1]]]
    assert class_activation_map(model, images).tolist() == [[[1, 0, 0.5]]]  # class 0 is predicted: 4 against 0


def test_a_map_of_one_pixel_looks_nowhere(tiny_model):
    """Enlarged, it is the same everywhere except for rounding, which must not look like a pattern."""
    model, images = tiny_model().eval(), torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model.features(images).shape[-2:] == (1, 1)
    model.classifier.weight.data *= 1e6  # as large as those of a network that has learnt
    maps = class_activation_map(model, images)
    assert (maps.amax((1, 2)) - maps.amin((1, 2))).max() < 0.5


# ---- The CPU's kernels: the same sums, faster


def gradients(output, *inputs):
    """Return the output, and the gradients of a sum of it with fixed weights."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 6), (5, 6), (3, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_equal_torchs_on_maps_of_every_size(kernel, groups, stride):
    torch.manual_seed(0)
    conv = CpuConv2d(6, 6, kernel, stride, kernel // 2, groups=groups, bias=False).double()
    for height in range(1, 8):
        for width in (1, 2, 3, 5, height):
            x = torch.randn(2, 6, height, width, dtype=torch.double, requires_grad=True)
            for images in (x, x.contiguous(memory_format=torch.channels_last)):
                expected = F.conv2d(images, conv.weight, None, stride, kernel // 2, groups=groups)
                with torch.no_grad():
                    torch.testing.assert_close(conv(images), expected)
                for got, wanted in zip(*(gradients(y, x, conv.weight) for y in (conv(images), expected)), strict=True):
                    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": "valid"}, {"dilation": 2}, {"padding_mode": "reflect"}]
)
def test_convolutions_of_other_kinds_are_torchs(options):
    conv, x = CpuConv2d(6, 6, 3, **({"padding": 1, "groups": 6, "bias": False} | options)), torch.randn(2, 6, 6, 6)
    torch.testing.assert_close(conv(x), nn.Conv2d.forward(conv, x))


def test_a_convolution_with_bias_on_a_small_map_equals_torchs():
    conv, x = CpuConv2d(5, 7, 1).double(), torch.randn(3, 5, 2, 2, dtype=torch.double, requires_grad=True)
    expected = F.conv2d(x, conv.weight, conv.bias)
    for got, wanted in zip(*(gradients(y, x, conv.bias) for y in (conv(x), expected)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_squeeze_and_excitation_is_the_papers_with_its_gradient():
    torch.manual_seed(0)
    gate, x = CpuSqueezeExcitation(6, 2).double(), torch.randn(3, 6, 4, 5, dtype=torch.double, requires_grad=True)
    hidden = F.silu(F.conv2d(x.mean((2, 3), keepdim=True), gate.reduce.weight, gate.reduce.bias))
    expected = x * torch.sigmoid(F.conv2d(hidden, gate.expand.weight, gate.expand.bias))
    pairs = zip(*(gradients(y, x, *gate.parameters()) for y in (gate(x), expected)), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(gate(x), expected)


def test_a_network_uses_the_kernels_once_it_is_asked_to(tiny_model):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {CpuConv2d, CpuSqueezeExcitation}
    assert accelerate_on_cpu(model) is model
    kinds = {type(module) for module in model.modules()}
    assert {CpuConv2d, CpuSqueezeExcitation} <= kinds and not kinds & {nn.Conv2d, SqueezeExcitation}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_leaves_the_logits_whole(tiny_model):
    model = tiny_model().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features, logits = model.features(torch.randn(2, 3, 32, 32)), model(torch.randn(2, 3, 32, 32))
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32


@pytest.mark.parametrize("resolution, accelerated", [(32, True), (47, True), (64, True), (64, False)])
def test_a_training_step_equals_torchvisions(resolution, accelerated):
    """Logits, gradients and running statistics in training, where maps are small enough for every kernel."""
    theirs = get_model("efficientnet_b0", weights=None, dropout=0.0, stochastic_depth_prob=0.0).double().train()
    ours = create_model("b0", pretrained=theirs.state_dict(), dropout=0.0, drop_path=0.0).double().train()
    if accelerated:
        accelerate_on_cpu(ours)
    for norm in (m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.1
    images = torch.randn(4, 3, resolution, resolution, dtype=torch.double)
    results = []
    for model in (theirs, ours):
        logits = model(images)
        F.cross_entropy(logits, torch.arange(4)).backward()
        results.append((logits, [p.grad for p in model.parameters()], list(model.buffers())))
    (logits, grads, buffers), (our_logits, our_grads, our_buffers) = results
    torch.testing.assert_close(our_logits, logits)
    scale = torch.stack([g.norm() for g in grads]).norm()
    for got, wanted in zip(our_grads, grads, strict=True):
        assert (got - wanted).norm() <= 1e-6 * wanted.norm() + 1e-9 * scale
    ours_kept = [b for b in our_buffers if b.ndim or b.dtype == torch.long]  # without stochastic depth's constants
    for got, wanted in zip(ours_kept, buffers, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_kernels_leave_the_count_of_flops_alone():
    model = accelerate_on_cpu(efficientnet("b0").eval())
    with FlopCounterMode(display=False) as done, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert done.get_total_flops() // 2 < count_cost(model, 32).flops == 9_742_048


@pytest.mark.slow
def test_equal_blocks_share_compiled_code_whatever_the_depth():
    """Stochastic depth's probability differs from block to block, which must not make the code another."""
    graphs = []
    for depth in (2, 3):
        torch._dynamo.reset()
        counter, model = CompileCounter(), EfficientNet(Scaling(depth=depth, width=0.25), 10)
        compile_blocks(model, backend=counter)
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] <= 18
