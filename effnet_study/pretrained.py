"""Networks by name, and torchvision's ImageNet weights for them.

b0 to b7 are ours (effnet_lib). A few other networks are torchvision's, so that they can be trained by the same recipe.
"""

import hashlib
import io
import re
import reprlib
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from effnet_lib import VARIANTS, EfficientNet, efficientnet, unknown_name

# RGB in [0, 1], as pretrained weights expect it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Other networks, from torchvision, and the name of their first convolution, whose stride is the stem's
TORCHVISION_MODELS = {"resnet50": "conv1", "resnet152": "conv1", "densenet201": "features.conv0"}

# Keys under which other projects keep a state dict, and prefixes that wrappers such as DDP add to its names
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
PREFIX = re.compile(r"(?<![^.])(?:module|_orig_mod|model|net|network)\.")
# The file of DenseNet's weights has older names, which torchvision translates in the same way
OLDER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")

Weights = str | Path | Mapping  # a state dict with torchvision's names or ours, or what wraps one, or its file


def create_model(
    name: str, num_classes: int = 1000, *, pretrained: bool | Weights = False, new_head: bool = False, **options
) -> nn.Module:
    """Build b0 to b7, or one of TORCHVISION_MODELS, by name. `options` are those of `EfficientNet`.

    pretrained: True for torchvision's ImageNet weights, or other weights: a state dict with torchvision's names or
        ours, or a file with one (safetensors or torch.save), also inside a checkpoint of another project. With
        torchvision's names, batch norm's eps is torchvision's, too. Use `load_run` for a run that was fine-tuned.
    new_head: with pretrained, keep a new classifier, for other classes than those of the weights.
    ValueError if the weights do not fit; FileNotFoundError if the ImageNet weights cannot be fetched."""
    check_name(name)
    if name in VARIANTS:
        model = efficientnet(name, num_classes, **options)
    else:
        model = _torchvision_model(name, num_classes, new_head, **options)
    if pretrained is not False:
        from torchvision.models import get_model

        weights = read_weights(imagenet_weights(name) if pretrained is True else pretrained)
        with torch.device("meta"):  # torchvision's network has the same tensors in the same order
            theirs = get_model(_torchvision_name(name), weights=None).state_dict()
        ours = dict(zip(theirs, model.state_dict(), strict=True))
        load_weights(model, {ours.get(key, key): value for key, value in weights.items()}, new_head)
        if name in VARIANTS and theirs.keys() & weights.keys():  # networks from scratch have the paper's
            set_torchvision_eps(model)
    return model


def _torchvision_model(
    name: str,
    num_classes: int,
    new_head: bool,
    *,
    stem_stride: int = 2,
    dropout: float = 0.0,
    norm_momentum: float = 0.1,
    se_expanded: bool = False,
    drop_path: float = 0.0,
    zero_init_residual: bool = False,
) -> nn.Module:
    """Build a network of torchvision's. It ignores drop_path and zero_init_residual, which it does not have."""
    if se_expanded:
        raise ValueError(f"se_expanded: {name} has no squeeze-and-excitation; leave it out")
    from torchvision.models import get_model

    model = get_model(name, weights=None)
    model.get_submodule(TORCHVISION_MODELS[name]).stride = (stem_stride, stem_stride)
    head, linear = list(model.named_children())[-1]
    if num_classes != 1000 or new_head:
        linear = nn.Linear(linear.in_features, num_classes)
    setattr(model, head, nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = norm_momentum
    return model


def _torchvision_name(name: str) -> str:
    return f"efficientnet_{name}" if name in VARIANTS else name


def check_name(name: str) -> None:
    """Raise ValueError for the name of a network that `create_model` does not know."""
    if name not in VARIANTS and name not in TORCHVISION_MODELS:
        raise unknown_name("model", name, [*VARIANTS, *TORCHVISION_MODELS])


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Freeze all parts but the last, the classifier. Frozen parts keep their weights and batch norm statistics, and
    have no dropout, in training too."""

    def rest(part: nn.Module, inputs: tuple) -> None:
        if part.training:
            part.eval()

    *backbone, _ = (child for child in model.children() if not isinstance(child, nn.Dropout))
    for part in backbone:
        part.requires_grad_(False).register_forward_pre_hook(rest)
    return model


# ---- Weights -------------------------------------------------------------------------------------------------------


def published_weights(name: str):
    """Return torchvision's entry for a network's ImageNet weights: address, preparation of images, accuracy."""
    check_name(name)
    from torchvision.models import get_model_weights

    return get_model_weights(_torchvision_name(name)).DEFAULT


def imagenet_weights(name: str) -> Path:
    """Return torchvision's ImageNet weights as a file in torch's cache ($TORCH_HOME/hub/checkpoints). Fetch it if it is
    not there; verify its checksum every time. FileNotFoundError says what to do without a network."""
    url = published_weights(name).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    expected = path.stem.rpartition("-")[2]  # the name ends in the first digits of its sha256
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), expected, progress=sys.stderr.isatty())
        except Exception as error:  # of the address, the network or the checksum
            raise FileNotFoundError(
                f"the ImageNet weights of {name} are not at {path}, and fetching them failed ({type(error).__name__}: "
                f"{error}). Put {url} there by hand, or do without pretrained weights"
            ) from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(expected):
        raise ValueError(f"{path} is damaged: its sha256 begins with {digest[:8]}, expected {expected}; delete it")
    return path


def read_weights(source: Weights, sha256: str | None = None) -> Mapping[str, Tensor]:
    """Return the state dict of a file, or of a checkpoint that wraps one. The file is one of safetensors or torch.save.
    Pickled code is never executed.

    OSError if it cannot be read; ValueError if there is no state dict in it, or it does not have the `sha256`."""
    found, expected = source, "expected safetensors, or what torch.save(model.state_dict(), FILE) writes"
    if not isinstance(source, Mapping):
        body = Path(source).read_bytes()
        if sha256 not in (None, hashlib.sha256(body).hexdigest()):
            raise ValueError(f"{source} is damaged: its sha256 is not the recorded one; restore it")
        try:  # a safetensors file begins with the length of its header, in eight bytes
            safe = body[8:9] == b"{"
            found = safetensors.torch.load(body) if safe else torch.load(io.BytesIO(body), "cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a torn or foreign file
            why = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
            raise ValueError(f"{source} has no weights, or is damaged ({why}); {expected}") from None
    for key in WRAPPERS * 2:  # one may be in another
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    entries = found.items() if isinstance(found, Mapping) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        where = "weights" if isinstance(source, Mapping) else source
        raise ValueError(f"{where}: found {reprlib.repr(found)}; {expected}")
    return {OLDER.sub(r"\1\2.", PREFIX.sub("", key)): value for key, value in found.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], new_head: bool = False) -> None:
    """Load a state dict with the model's names. new_head: keep the model's own classifier, the last two tensors."""
    head = dict([*model.state_dict().items()][-2:])
    try:
        model.load_state_dict({**weights, **(head if new_head else {})})
    except RuntimeError as error:
        first = textwrap.shorten(str(error).splitlines()[1], 200)
        hint = f"is it the same network? The weights have {', '.join([*weights][:3])}, ..."
        hint = "to fine-tune on other classes: new_head=True" if any(f"for {key}:" in first for key in head) else hint
        raise ValueError(f"weights do not fit: {first} {hint}") from None


def set_torchvision_eps(model: EfficientNet) -> None:
    """Set batch norm's eps, which no state dict carries, as torchvision trained: 1e-3 for b5 to b7, else 1e-5."""
    large = [(VARIANTS[name].depth, VARIANTS[name].width) for name in ("b5", "b6", "b7")]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3 if (model.scaling.depth, model.scaling.width) in large else 1e-5
