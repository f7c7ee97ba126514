"""From a configured name to a detector, with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights

from visionkd.config.schema import NetworkConfig
from visionkd.errors import Problem, RequestError, did_you_mean, first_line
from visionkd.models.arguments import unknown_args
from visionkd.models.building import TORCH_CACHE, build_timm, default_network, fetch_timm, guarded, weights_or_none
from visionkd.models.detection import nets
from visionkd.models.detection.names import split_name
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.download import advice, url_access
from visionkd.models.input_size import timm_input
from visionkd.models.names import Resolved
from visionkd.models.network import Network
from visionkd.models.normalize import Normalize
from visionkd.models.segmentation.factory import named_tensor, size_of
from visionkd.models.weights import load_tensors, strip_prefixes
from visionkd.types import InputSpec

_NUM_CLASSES = 80  # of COCO, where nobody says how many
_IMG_SIZE = (320, 320)
_GRID = 32
_NO_CLASS = ("__background__", "N/A")
#: Published with batch norm that is not trained.
_FROZEN = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
)


def create(
    resolved: Resolved,
    config: NetworkConfig,
    *,
    num_classes: int | None,
    in_training: bool,
    load: Callable[[str], Network],
) -> DetectionNetwork:
    """Build the detector that ``config`` names; see :func:`visionkd.models.factory.create_network`.

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
        network = _torchvision(resolved, config, num_classes)
    else:
        network = _own(resolved, config, num_classes, in_training)
    if config.backbone is not None:
        take_backbone(network, load(config.backbone), config.backbone)
    return network


def from_file(resolved: Resolved, config: NetworkConfig, tensors: Mapping[str, Tensor]) -> DetectionNetwork:
    """Build the detector whose weights a file holds; it has the classes of the file.

    Raises:
        RequestError: If the weights do not fit, or an argument is wrong.
    """
    source, architecture = resolved.library, resolved.architecture
    if problems := args_problems(resolved, config):
        raise RequestError(problems)
    own = source != "torchvision"
    args = nets.complete_args(architecture, config.args) if own else dict(config.args)
    args["num_classes"] = _NUM_CLASSES
    with torch.device("meta"):  # shapes and names alone: nothing is allocated
        skeleton = guarded(config, lambda: nets.rebuild(source, architecture, args))
    tensors = strip_prefixes(tensors, skeleton.state_dict())
    weight = tensors.get(f"{nets.class_layers(skeleton)[0]}.weight")
    if weight is not None:
        rows = weight.shape[0] // nets.outputs_per_class(skeleton)[0]
        args["num_classes"] = max(1, rows - int(nets.has_background(skeleton)))
    net = guarded(config, lambda: nets.rebuild(source, architecture, args))
    load_tensors(net, tensors, path=resolved.path, architecture=architecture)
    spec = _published_input(architecture) if not own else _timm_spec(split_name(architecture)[1])
    note = f"'{resolved.path}' does not carry its input statistics: those of {architecture} are taken"
    return DetectionNetwork(
        net, architecture=architecture, source=source, model_args=args, notes=(note,),
        input=_input(spec, size_of(config) or spec.img_size),
    )  # fmt: skip


def args_problems(resolved: Resolved, config: NetworkConfig) -> list[Problem]:
    """Return which arguments of a detector are wrong, by key; nothing is allocated to find out."""
    own = resolved.source != "torchvision"
    taken = nets.OWN_ARGS if own else nets.TORCHVISION_ARGS
    if own:
        other = "head_convs" if split_name(resolved.architecture)[0] == "fasterrcnn" else "head_dim"
        taken = tuple(name for name in taken if name != other)
    problems = [_problem(config, name, value) for name, value in config.args.items() if name in taken]
    found = [problem for problem in problems if problem is not None]
    rest = {name: value for name, value in config.args.items() if name not in taken}
    if not rest:
        return found
    unknown = set(rest)
    if own:
        backbone = NetworkConfig(name=split_name(resolved.architecture)[1], args=rest)
        unknown = {problem.key.removeprefix("args.") for problem in unknown_args(backbone, default_network)}
    for name in sorted(unknown & set(rest)):
        rest_of = ", and what its backbone takes" if own else ""
        hint = did_you_mean(name, taken) or f"It has: {', '.join(sorted(taken))}{rest_of}"
        found.append(Problem(f"args.{name}", f"'{config.name}' has no such argument (given: {rest[name]!r})", hint))
    return found


def _problem(config: NetworkConfig, name: str, value: Any) -> Problem | None:
    """Return what is wrong with the value of one of our own arguments."""
    whole, number = type(value) is int, isinstance(value, (int, float)) and not isinstance(value, bool)
    allowed = {
        "channels": (whole and value > 0 and value % nets.GROUP == 0, f"a multiple of {nets.GROUP}"),
        "head_convs": (whole and 1 <= value <= 4, "a whole number from 1 to 4"),
        "head_dim": (whole and value >= 1, "a whole number from 1 up"),
        "min_stride": (value in (4, 8, 16), "4, 8 or 16"),
        "anchor_scale": (number and value > 0, "a number above 0: the side of an anchor in strides"),
        "frozen_norm": (isinstance(value, bool), "true or false"),
        "score_threshold": (number and 0 <= value < 1, "a number from 0 to below 1"),
        "nms_threshold": (number and 0 < value <= 1, "a number above 0, up to 1"),
        "max_detections": (whole and value >= 1, "a whole number from 1 up"),
    }
    fine, words = allowed[name]
    if fine:
        return None
    return Problem(f"args.{name}", f"'{config.name}' does not take {value!r}", f"It takes {words}.")


# DETECTOR_BACKBONE ----------------------------------------------------------------------------------------------------


def _own(resolved: Resolved, config: NetworkConfig, num_classes: int | None, in_training: bool) -> DetectionNetwork:
    _, name = split_name(resolved.architecture)
    if not in_training:
        weights_or_none(config, published=False, in_training=False)  # its heads have no published weights: refused
    args = nets.complete_args(resolved.architecture, config.args)
    args["num_classes"] = _NUM_CLASSES if num_classes is None else num_classes
    tagged = name if resolved.tag is None else f"{name}.{resolved.tag}"
    known = get_pretrained_cfg(tagged)
    size = size_of(config) or _IMG_SIZE
    if known.fixed_input_size:
        args["img_size"] = size
    pretrained, notes = (False, ()) if config.backbone else weights_or_none(config, known.has_weights, in_training)
    backbone = NetworkConfig(name=tagged, pretrained=pretrained, args=nets.backbone_args(args))
    kwargs = {"features_only": True, **backbone.args}
    body = (
        fetch_timm(tagged, known, kwargs, backbone, in_training)
        if pretrained
        else build_timm(tagged, kwargs, backbone, pretrained=False)
    )
    net = guarded(config, lambda: nets.build(resolved.architecture, args, body=body))
    spec = _input(_timm_spec(tagged), size)
    check_size(net, spec.img_size, config.name)
    return DetectionNetwork(
        net, architecture=resolved.architecture, source="visionkd", input=spec, model_args=args, notes=notes
    )


def _timm_spec(name: str) -> InputSpec:
    return _input(timm_input(get_pretrained_cfg(name).to_dict(), None), _IMG_SIZE)


# torchvision ----------------------------------------------------------------------------------------------------------


def _torchvision(resolved: Resolved, config: NetworkConfig, num_classes: int | None) -> DetectionNetwork:
    architecture = resolved.architecture
    known = get_model_weights(architecture)
    record = known.DEFAULT if resolved.tag is None else known[resolved.tag]
    categories = tuple(record.meta["categories"])
    pretrained = config.pretrained and config.backbone is None
    args = {**({"frozen_norm": True} if pretrained and architecture in _FROZEN else {}), **config.args}
    offset = 0 if architecture.startswith(("retinanet", "fcos")) else 1
    fresh = num_classes is not None and not pretrained
    args["num_classes"] = num_classes if fresh else len(categories) - offset
    net = guarded(config, lambda: nets.build_torchvision(architecture, args))
    if pretrained:
        steps = advice(f"torchvision/{architecture}", page=record.url, cache=TORCH_CACHE, untrained=True)
        with url_access(config.name, record.url, advice=steps):
            net.load_state_dict(record.get_state_dict(progress=False, check_hash=True))
    published = _published_input(architecture)
    network = DetectionNetwork(
        net,
        architecture=architecture,
        source="torchvision",
        input=_input(published, size_of(config) or published.img_size),
        model_args=args,
        pretrained_tag=record.name if pretrained else None,
    )
    if pretrained:
        named = [number for number, name in enumerate(categories[offset:]) if name not in _NO_CLASS]
        network.select_classes(named, tuple(categories[offset:][number] for number in named))
    check_size(net, network.input.img_size, config.name)
    return network


def _published_input(architecture: str) -> InputSpec:
    """Return the input of one of torchvision's detectors as a size that its own resizing keeps within."""
    with torch.device("meta"):
        theirs = get_model_builder(architecture)(weights=None, weights_backbone=None).transform
    if theirs.fixed_size is not None:
        width, height = theirs.fixed_size
        size = (int(height), int(width))
    else:
        short, long = max(theirs.min_size), theirs.max_size
        size = tuple(-(-side // _GRID) * _GRID for side in (short, long))
    return InputSpec(size, tuple(theirs.image_mean), tuple(theirs.image_std), "bilinear", 1.0)


# Parts ----------------------------------------------------------------------------------------------------------------


def _input(spec: InputSpec, img_size: tuple[int, int]) -> InputSpec:
    return InputSpec(tuple(img_size), spec.mean, spec.std, "bilinear", 1.0)


def check_size(net: nn.Module, img_size: tuple[int, int], name: str) -> None:
    """Run the backbone where nothing is computed, to see whether it takes images of ``img_size``.

    Raises:
        RequestError: If it does not.
    """
    import copy

    try:
        with torch.no_grad():
            copy.deepcopy(net.backbone).to("meta").eval()(torch.empty(1, 3, *img_size, device="meta"))
    except NotImplementedError:
        return  # an operator that the meta device lacks says nothing about the size
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RequestError(
            f"'{name}' does not take images of {img_size[0]} x {img_size[1]} pixels: {first_line(error)}",
            hint=f"Choose another img_size, a multiple of {_GRID}, or leave it out to take the network's own.",
        ) from error


@torch.no_grad()
def take_backbone(network: DetectionNetwork, source: Network, name: str) -> None:
    """Give the backbone of ``network`` the weights that ``source`` has for it, and its input statistics.

    Args:
        network: What begins with the weights.
        source: A classifier of the same architecture, or a network for pixels or boxes with the same backbone.
        name: What the user called it.

    Raises:
        RequestError: If its weights are those of another architecture.
    """
    body = getattr(network.net.backbone, "body", None)
    if body is None:
        hint = "Leave it out: all of its weights are published together."
        raise RequestError(Problem("backbone", f"'{network.architecture}' brings its own backbone", hint))
    tensors = source.net.state_dict()
    inner = {"segmentation": "backbone.", "detection": "backbone.body."}.get(source.task, "")
    tensors = {key.removeprefix(inner): value for key, value in tensors.items() if key.startswith(inner)}
    taken, absent = {}, []
    for key, value in body.state_dict().items():
        found = named_tensor(tensors, key)
        if found is not None and found.shape == value.shape:
            taken[key] = found
        elif not key.endswith("num_batches_tracked"):  # a counter that decides nothing
            absent.append(key)
    if absent:
        some = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        detector = network.architecture.partition("_")[0]
        hint = f"Take '{detector}_{source.architecture}' as the network." if source.source == "timm" else ""
        message = f"the weights of '{name}' ({source.architecture}) are not those of the backbone of"
        message += f" '{network.architecture}': {some} are absent or have another shape"
        raise RequestError(Problem("backbone", message, hint))
    body.load_state_dict(taken, strict=False)
    network.input = _input(source.input, network.input.img_size)
    network.normalize = Normalize(network.input.mean, network.input.std)
    network.notes = (*network.notes, f"the backbone of {network.architecture} begins with the weights of {name}")
