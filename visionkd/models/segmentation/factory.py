"""From a configured name to a segmentation network, with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torchvision.models import get_model_weights

from visionkd.config.schema import NetworkConfig
from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.models.arguments import unknown_args
from visionkd.models.building import TORCH_CACHE, build_timm, default_network, fetch_timm, guarded, weights_or_none
from visionkd.models.download import advice, url_access
from visionkd.models.input_size import timm_input
from visionkd.models.names import Resolved, quiet_libraries
from visionkd.models.network import Network, check_img_size, head_names
from visionkd.models.normalize import Normalize
from visionkd.models.segmentation import nets
from visionkd.models.segmentation.heads import SPECS
from visionkd.models.segmentation.names import split_name
from visionkd.models.segmentation.network import SegmentationNetwork
from visionkd.models.weights import infer_num_classes, load_tensors, strip_prefixes
from visionkd.types import InputSpec

_NUM_CLASSES = 21  # of Pascal VOC, where nobody says how many
_IMG_SIZE = (512, 512)


def create(
    resolved: Resolved,
    config: NetworkConfig,
    *,
    num_classes: int | None,
    in_training: bool,
    load: Callable[[str], Network],
) -> SegmentationNetwork:
    """Build the segmentation network that ``config`` names; see :func:`visionkd.models.factory.create_network`.

    Args:
        resolved: What its name stands for.
        config: Its configuration.
        num_classes: Classes; None takes those of its published weights.
        in_training: Whether it will be trained.
        load: Loads the MODEL that ``config.backbone`` names.
    """
    if problems := args_problems(resolved, config):
        raise RequestError(problems)
    if resolved.source == "torchvision":
        network = _torchvision(resolved, config, num_classes, in_training)
    else:
        network = _own(resolved, config, num_classes, in_training)
    if config.backbone is not None:
        take_backbone(network, load(config.backbone), config.backbone)
    return network


def from_file(resolved: Resolved, config: NetworkConfig, tensors: Mapping[str, Tensor]) -> SegmentationNetwork:
    """Build the segmentation network whose weights a file holds: classes and auxiliary head are those of the file.

    Raises:
        RequestError: If the weights do not fit, or an argument is wrong.
    """
    source, architecture = resolved.library, resolved.architecture
    if problems := args_problems(resolved, config):
        raise RequestError(problems)
    args = dict(config.args) if source == "torchvision" else nets.complete_args(architecture, config.args)
    args = {"in_chans": 3, **args, "num_classes": _NUM_CLASSES}
    args["aux"] = any(name in key for key in tensors for name in SegmentationNetwork.auxiliary)
    notes: tuple[str, ...] = ()
    if source != "torchvision" and "output_stride" not in args:
        args["output_stride"], notes = _own_stride(config, resolved, args)
    with torch.device("meta"):  # shapes and names alone: nothing is allocated
        skeleton = guarded(config, lambda: nets.rebuild(source, architecture, args))
    tensors = strip_prefixes(tensors, skeleton.state_dict())
    args["num_classes"] = infer_num_classes(tensors, head_names(skeleton, source)) or _NUM_CLASSES
    net = guarded(config, lambda: nets.rebuild(source, architecture, args))
    load_tensors(net, tensors, path=resolved.path, architecture=architecture)
    known = InputSpec()
    if source != "torchvision":
        known = timm_input(get_pretrained_cfg(split_name(architecture)[1]).to_dict(), None)
    note = f"'{resolved.path}' does not carry its input statistics: those of {architecture} are taken"
    return SegmentationNetwork(
        net, architecture=architecture, source=source, model_args=args, notes=(*notes, note),
        input=_input(known, size_of(config) or _IMG_SIZE, args["in_chans"]),
    )  # fmt: skip


def args_problems(resolved: Resolved, config: NetworkConfig) -> list[Problem]:
    """Return which arguments of a segmentation network are wrong, by key; nothing is allocated to find out."""
    own = resolved.source != "torchvision"
    taken = nets.OWN_ARGS if own else nets.TORCHVISION_ARGS
    problems = [_problem(config, name, value) for name, value in config.args.items() if name in taken]
    problems = [problem for problem in problems if problem is not None]
    rest = {name: value for name, value in config.args.items() if name not in taken}
    if not rest:
        return problems
    if own:
        backbone = NetworkConfig(name=split_name(resolved.architecture)[1], args=rest)
        unknown = {problem.key.removeprefix("args.") for problem in unknown_args(backbone, default_network)}
    else:
        unknown = set(rest)
    for name in rest:
        if name in unknown:
            rest_of = "" if not own else ", and what its backbone takes"
            hint = did_you_mean(name, taken) or f"It has: {', '.join(sorted(taken))}{rest_of}"
            message = f"'{config.name}' has no such argument (given: {rest[name]!r})"
            problems.append(Problem(f"args.{name}", message, hint))
    return problems


def _problem(config: NetworkConfig, name: str, value: Any) -> Problem | None:
    """Return what is wrong with the value of one of our own arguments."""
    whole = type(value) is int
    allowed = {
        "aux": (isinstance(value, bool), "true or false"),
        "separable": (isinstance(value, bool), "true or false"),
        "output_stride": (value is None or value in nets.OUTPUT_STRIDES, "8, 16 or 32"),
        "in_chans": (whole and value >= 3, "a whole number from 3 up: red, green, blue and further planes"),
        "channels": (whole and value >= 1, "a whole number from 1 up"),
        "dropout": (isinstance(value, (int, float)) and 0 <= value < 1, "a number from 0 to below 1"),
        "plane_std": (isinstance(value, (int, float)) and value >= 0, "a number from 0 up"),
    }
    fine, words = allowed[name]
    if not fine:
        return Problem(f"args.{name}", f"'{config.name}' does not take {value!r}", f"It takes {words}.")
    if name == "aux" and value and config.name.rpartition("/")[2].startswith("lraspp"):
        return Problem("args.aux", f"'{config.name}' has no auxiliary head", "Leave it out.")
    return None


# HEAD_BACKBONE --------------------------------------------------------------------------------------------------------


def _own(resolved: Resolved, config: NetworkConfig, num_classes: int | None, in_training: bool) -> SegmentationNetwork:
    head, name = split_name(resolved.architecture)
    notes: tuple[str, ...] = ()
    if not in_training:
        weights_or_none(config, published=False, in_training=False)  # its head has no published weights: refused
    args = nets.complete_args(resolved.architecture, config.args)
    args["num_classes"] = _NUM_CLASSES if num_classes is None else num_classes
    tagged = name if resolved.tag is None else f"{name}.{resolved.tag}"
    known = get_pretrained_cfg(tagged)
    if known.fixed_input_size and config.img_size is not None:
        args["img_size"] = size_of(config)
    if "output_stride" not in args:
        args["output_stride"], notes = _own_stride(config, resolved, args)
    pretrained, more = (False, ()) if config.backbone else weights_or_none(config, known.has_weights, in_training)
    backbone_config = NetworkConfig(name=tagged, pretrained=pretrained, args=nets.backbone_args(args))
    kwargs = {"features_only": True, **backbone_config.args}
    backbone = (
        fetch_timm(tagged, known, kwargs, backbone_config, in_training)
        if pretrained
        else build_timm(tagged, kwargs, backbone_config, pretrained=False)
    )
    net = guarded(config, lambda: nets.build(resolved.architecture, args, backbone=backbone))
    spec = _input(timm_input(known.to_dict(), None), size_of(config) or _IMG_SIZE, args["in_chans"])
    _check_size(net, spec.img_size, config)
    return SegmentationNetwork(
        net, architecture=resolved.architecture, source="visionkd", input=spec, model_args=args,
        notes=(*notes, *more),
    )  # fmt: skip


def _own_stride(config: NetworkConfig, resolved: Resolved, args: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return the output stride that the head wants if the backbone can be dilated to it, or else 32 with a note."""
    head, _ = split_name(resolved.architecture)
    wanted = SPECS[head].output_stride
    if wanted == 32:
        return 32, ()
    try:
        with quiet_libraries(), torch.device("meta"):
            nets.build(resolved.architecture, {**args, "output_stride": wanted})
    except Exception:  # a backbone that has no such argument, or not this value; other mistakes show without it too
        return 32, (f"the backbone of '{config.name}' cannot be dilated: its deepest map keeps its own stride",)
    return wanted, ()


# torchvision ----------------------------------------------------------------------------------------------------------


def _torchvision(
    resolved: Resolved, config: NetworkConfig, num_classes: int | None, in_training: bool
) -> SegmentationNetwork:
    architecture = resolved.architecture
    known = get_model_weights(architecture)
    record = known.DEFAULT if resolved.tag is None else known[resolved.tag]
    args = {"aux": False, "in_chans": 3, **config.args}
    pretrained = config.pretrained and config.backbone is None
    fresh = num_classes is not None and not pretrained
    args["num_classes"] = num_classes if fresh else len(record.meta["categories"])
    net = guarded(config, lambda: nets.build_torchvision(architecture, {**args, "in_chans": 3}))
    if pretrained:
        steps = advice(f"torchvision/{architecture}", page=record.url, cache=TORCH_CACHE, untrained=in_training)
        with url_access(config.name, record.url, advice=steps):
            state = record.get_state_dict(progress=False, check_hash=True)
        wanted = net.state_dict()
        net.load_state_dict({name: value for name, value in state.items() if name in wanted})
    nets.widen_input(net, args["in_chans"], args.get("plane_std", nets.PLANE_STD))
    preset = record.transforms()
    side = preset.resize_size[0]
    statistics = InputSpec(mean=tuple(preset.mean), std=tuple(preset.std))
    spec = _input(statistics, size_of(config) or (side, side), args["in_chans"])
    _check_size(net, spec.img_size, config)
    return SegmentationNetwork(
        net,
        architecture=architecture,
        source="torchvision",
        input=spec,
        model_args=args,
        classes=tuple(record.meta["categories"]) if pretrained else None,
        pretrained_tag=record.name if pretrained else None,
    )


# Parts ----------------------------------------------------------------------------------------------------------------


def size_of(config: NetworkConfig) -> tuple[int, int] | None:
    """Return height and width of the input that a configuration asks for."""
    size = config.img_size
    return (size, size) if isinstance(size, int) else size


def _input(spec: InputSpec, img_size: tuple[int, int], in_chans: int) -> InputSpec:
    """Return an input without a margin, since every pixel has a label, that leaves planes beside RGB as they are."""
    more = in_chans - 3
    return InputSpec(img_size, (*spec.mean[:3], *[0.0] * more), (*spec.std[:3], *[1.0] * more), "bilinear", 1.0)


def _check_size(net: nn.Module, img_size: tuple[int, int], config: NetworkConfig) -> None:
    check_img_size(net, img_size, config.name, in_chans=config.args.get("in_chans", 3))


@torch.no_grad()
def take_backbone(network: SegmentationNetwork, source: Network, name: str) -> None:
    """Give the backbone of ``network`` the weights that ``source`` has for it, and its input statistics.

    Args:
        network: What begins with the weights.
        source: A classifier of the same architecture, or a segmentation network with the same backbone.
        name: What the user called it.

    Raises:
        RequestError: If its weights are those of another architecture.
    """
    tensors = source.net.state_dict()
    if source.task == "segmentation":
        tensors = {key.removeprefix("backbone."): value for key, value in tensors.items() if "backbone." in key}
    wanted = network.net.backbone.state_dict()
    taken, absent = {}, []
    for key, value in wanted.items():
        found = named_tensor(tensors, key)
        if found is None or (found.shape != value.shape and not _narrower(found, value)):
            absent.append(key)
            continue
        taken[key] = found if found.shape == value.shape else torch.cat([found, value[:, found.shape[1] :]], 1)
    if absent:
        some = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        raise RequestError(
            Problem(
                "backbone",
                f"the weights of '{name}' ({source.architecture}) are not those of the backbone of"
                f" '{network.architecture}': {some} are absent or have another shape",
                _same_backbone(network, source),
            )
        )
    network.net.backbone.load_state_dict(taken)
    network.input = _input(source.input, network.input.img_size, network.in_chans)
    network.normalize = Normalize(network.input.mean, network.input.std)
    network.notes = (*network.notes, f"the backbone of {network.architecture} begins with the weights of {name}")


def named_tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor | None:
    """Return the tensor that a backbone calls ``key``, which a whole network may call otherwise."""
    flat = key.replace("_", ".", 1)  # stages_0.blocks is stages.0.blocks
    for name in (key, flat, f"features.{key}", key.removeprefix("model.")):
        if name in tensors:
            return tensors[name]
    return None


def _narrower(found: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor is the first convolution's, for images without the further planes."""
    return found.ndim == 4 and found.shape[1] == 3 < wanted.shape[1] and found.shape[2:] == wanted.shape[2:]


def _same_backbone(network: Network, source: Network) -> str:
    head, own = split_name(network.architecture) or ("", "")
    if source.task == "segmentation" or source.source != "timm" or not head:
        return f"Name a model with the backbone {own or network.architecture.partition('_')[2]}."
    return f"Take '{head}_{source.architecture}' as the network."
