"""From a configured name to a network: timm, torchvision, packaged models and weight files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

from visionkd import registry
from visionkd.config.schema import NetworkConfig
from visionkd.errors import DataError, Problem, RequestError
from visionkd.models import torchvision_zoo
from visionkd.models.arguments import misplaced_args, unknown_args
from visionkd.models.building import (
    HF_CACHE,
    TORCH_CACHE,
    bare,
    build_timm,
    default_network,
    fetch_timm,
    guarded,
    weights_or_none,
)
from visionkd.models.classes import counted, imagenet_classes
from visionkd.models.detection import factory as detection
from visionkd.models.detection.names import is_detector
from visionkd.models.detection.nets import OPEN_ARG
from visionkd.models.detection.network import DetectionNetwork
from visionkd.models.detection.open_network import OpenVocabularyDetector
from visionkd.models.download import advice, hub_access, url_access
from visionkd.models.input_size import timm_input, with_size
from visionkd.models.masked_decoder import DecoderSpec, SavedDecoder, split_decoder
from visionkd.models.names import Resolved, fetched, known_names, quiet_libraries, resolve_name
from visionkd.models.network import Network, check_img_size, head_names
from visionkd.models.package_file import DECODER_FILE, TEXT_FILE, read_card, verified_weights
from visionkd.models.segmentation import factory as segmentation
from visionkd.models.segmentation.names import DEFAULT_HEAD, is_segmentation
from visionkd.models.segmentation.naming import for_task
from visionkd.models.segmentation.network import SegmentationNetwork
from visionkd.models.text_encoder import SavedTexts, TextSpec
from visionkd.models.weights import infer_num_classes, json_or_none, load_tensors, read_tensors, strip_prefixes
from visionkd.types import InputSpec, TaskName

__all__ = ["Network", "Resolved", "create_network", "known_names", "load_packaged", "resolve_name"]


def create_network(
    config: NetworkConfig,
    *,
    num_classes: int | None = None,
    classes: tuple[str, ...] | None = None,
    in_training: bool,
    task: TaskName | None = None,
) -> Network:
    """Build the network that ``config`` names, with its weights.

    Args:
        config: Name, whether to start from published weights, input size and further arguments.
        num_classes: Outputs wanted; None keeps the network's own classifier. Another number than the weights were made
            for puts a fresh classifier in place.
        classes: Names of the outputs; ``num_classes`` may then be left out.
        in_training: The network will be trained: it starts in train mode, and from random weights (with a note) where
            none are published. A network to be used as it is refuses that.
        task: What it is to serve: for segmentation, the name of a classifier stands for the default head on it.

    Raises:
        RequestError: The name or an argument is unknown, or the weights do not fit.
        DownloadError: The published weights cannot be had.
        DataError: A file is damaged.
    """
    if classes is not None:
        if num_classes not in (None, len(classes)):
            raise ValueError(f"{len(classes)} class names for {num_classes} outputs")
        num_classes = len(classes)
    config, note = (config, None) if task is None else for_task(config, task)
    resolved = resolve_name(config.name)
    if problems := _misplaced(resolved, config):
        raise RequestError(problems)
    path = fetched(resolved) if config.pretrained or resolved.source == "package" else None
    if resolved.source == "package":
        network, _ = load_packaged(path)
    elif resolved.source == "file":
        network = _from_file(resolved, config)
    elif (family := _family(resolved)) is not None:
        network = family.create(resolved, config, num_classes=num_classes, in_training=in_training, load=_as_it_is)
    elif resolved.library == "torchvision":
        network = _from_torchvision(resolved, config, num_classes, in_training)
    else:
        network = _from_timm(resolved, config, num_classes, in_training)
    network.trained |= resolved.source in ("package", "file")
    if in_training:
        network.masked_decoder = network.image_text = None  # they belong to the weights as they were
    network.notes = (*filter(None, (note, resolved.note)), *network.notes)
    if resolved.source in ("package", "file") and config.img_size is not None:
        _resize_input(network, config)
    _fit_head(network, num_classes, classes)
    return network.train(in_training)


def args_problems(config: NetworkConfig, *, task: TaskName | None = None) -> list[Problem]:
    """Return which arguments of a network are wrong, by key; nothing is fetched or allocated to find out.

    ``task`` is as in :func:`create_network`.

    Raises:
        RequestError: If the network's name is unknown.
    """
    config = config if task is None else for_task(config, task)[0]
    resolved = resolve_name(config.name)
    problems = _misplaced(resolved, config)
    family = _family(resolved)
    if resolved.source not in ("package", "file") and family is not None:
        return problems + family.args_problems(resolved, config)
    misplaced = {problem.key.removeprefix("args.") for problem in problems}
    rest = {name: value for name, value in config.args.items() if name not in misplaced}
    if not rest or resolved.source not in ("timm", "torchvision") or ":" in str(resolved.architecture):
        return problems
    try:
        with quiet_libraries(), torch.device("meta"):
            bare(resolved.library, resolved.architecture, dict(rest))
    except TypeError:
        problems += unknown_args(NetworkConfig(name=config.name, args=rest), default_network)
    except Exception:  # a value it objects to; create_network says which
        return problems
    return problems


def load_packaged(directory: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Return the network of a packaged model, in eval mode, and the content of its ``model.json``.

    Raises:
        DataError: If a file is damaged or missing.
    """
    directory = Path(directory)
    card = read_card(directory)
    tensors, _ = read_tensors(verified_weights(directory, card))
    spec = card.get("quantization")
    if spec is None:
        network = _rebuild(card, tensors, path=directory)
        if card.get("decoder") is not None:
            decoder, _ = read_tensors(verified_weights(directory, card, DECODER_FILE))
            network.masked_decoder = SavedDecoder(DecoderSpec(**card["decoder"]), decoder)
        if card.get("text") is not None:
            texts, _ = read_tensors(verified_weights(directory, card, TEXT_FILE))
            network.image_text = SavedTexts(TextSpec.from_dict(card["text"]), texts)
        return network, card
    network = _rebuild(card, None, path=directory)
    # by name, as models/ stands above quantization/
    restore = registry.load("visionkd.quantization", "restore", key="quantization").restore
    return restore(network, spec, tensors).eval(), card


# Sources --------------------------------------------------------------------------------------------------------------


def _from_timm(resolved: Resolved, config: NetworkConfig, num_classes: int | None, in_training: bool) -> Network:
    name = resolved.architecture if resolved.tag is None else f"{resolved.architecture}.{resolved.tag}"
    kwargs = dict(config.args)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if ":" in name:  # hf-hub: and local-dir: bring their own configuration
        if config.img_size is not None:
            kwargs["img_size"] = config.img_size
        repository = name.partition(":")[2]
        page = f"https://huggingface.co/{repository}"
        steps = advice("ARCHITECTURE", page=page, cache=HF_CACHE, untrained=in_training)
        with hub_access(config.name, repository, advice=steps):
            net = build_timm(name, kwargs, config, pretrained=config.pretrained)
        cfg, notes = net.pretrained_cfg, ()
        kwargs = {**getattr(net, "pretrained_model_args", {}), **kwargs}
        architecture, pretrained, tag = cfg["architecture"], config.pretrained, repository
    else:
        known = get_pretrained_cfg(name)
        pretrained, notes = weights_or_none(config, known.has_weights, in_training)
        if config.img_size is not None and known.fixed_input_size:
            kwargs["img_size"] = config.img_size
        net = (
            fetch_timm(name, known, kwargs, config, in_training)
            if pretrained
            else build_timm(name, kwargs, config, pretrained=False)
        )
        cfg, architecture, tag = net.pretrained_cfg, resolved.architecture, net.pretrained_cfg.get("tag")
    kwargs["num_classes"] = net.num_classes
    spec = timm_input(cfg, config.img_size)
    if config.img_size is not None:
        check_img_size(net, spec.img_size, config.name)
    own_head = pretrained and net.num_classes == cfg["num_classes"]
    return Network(
        net,
        architecture=architecture,
        source="timm",
        input=spec,
        model_args=kwargs,
        classes=imagenet_classes(net.num_classes) if own_head else None,
        pretrained_tag=tag if pretrained else None,
        notes=notes,
    )


def _from_torchvision(resolved: Resolved, config: NetworkConfig, num_classes: int | None, in_training: bool) -> Network:
    weights = torchvision_zoo.weights(resolved.architecture, resolved.tag)
    pretrained, notes = weights_or_none(config, weights is not None, in_training)
    state = None
    if pretrained:
        wanted = f"torchvision/{resolved.architecture}"
        steps = advice(wanted, page=weights.url, cache=TORCH_CACHE, untrained=in_training)
        with url_access(config.name, weights.url, advice=steps):
            state = weights.get_state_dict(progress=False, check_hash=True)
    kwargs = {**torchvision_zoo.fixed_args(resolved.architecture, pretrained), **config.args}
    spec = torchvision_zoo.input_spec(weights)
    if config.img_size is not None:
        if torchvision_zoo.fixed_size(resolved.architecture):
            kwargs["image_size" if resolved.architecture.startswith("vit") else "input_size"] = (
                config.img_size if resolved.architecture.startswith("vit") else (config.img_size, config.img_size)
            )
        spec = with_size(spec, (config.img_size, config.img_size))
    kwargs["num_classes"] = num_classes if num_classes is not None and not pretrained else 1000
    net = guarded(config, lambda: torchvision_zoo.build(resolved.architecture, kwargs))
    if state is not None:
        guarded(config, lambda: torchvision_zoo.load(net, state))
    if config.img_size is not None:
        check_img_size(net, spec.img_size, config.name)
    return Network(
        net,
        architecture=resolved.architecture,
        source="torchvision",
        input=spec,
        model_args=kwargs,
        classes=imagenet_classes(1000) if pretrained else None,
        pretrained_tag=weights.name if pretrained else None,
        notes=notes,
    )


def _from_file(resolved: Resolved, config: NetworkConfig) -> Network:
    tensors, metadata = read_tensors(resolved.path)
    if resolved.architecture is None:
        if "architecture" not in metadata:
            raise RequestError(
                f"'{resolved.path}' does not say which architecture its weights are for",
                hint=f"Write ARCHITECTURE@FILE, for example resnet18@{resolved.path}",
            )
        card = _card_in(metadata)
        if card["model_args"] is None or card["input"] is None:
            raise RequestError(
                f"'{resolved.path}' lacks the arguments of its architecture",
                hint=f"Write {metadata['architecture']}@{resolved.path}",
            )
        return _rebuild(card, tensors, path=resolved.path)
    architecture, library = resolved.architecture, resolved.library
    if metadata.get("architecture") == architecture and metadata.get("source") == library and not config.args:
        return _rebuild(_card_in(metadata), tensors, path=resolved.path)
    if (family := _family(resolved)) is not None:
        return family.from_file(resolved, config, tensors)
    kwargs = dict(config.args)
    if library == "timm":
        if config.img_size is not None and get_pretrained_cfg(architecture).fixed_input_size:
            kwargs["img_size"] = config.img_size
    else:
        # Files published by torchvision hold auxiliary heads, and expect what goes with them.
        published = any(torchvision_zoo.is_auxiliary(key) for key in tensors)
        kwargs = {**torchvision_zoo.fixed_args(architecture, published), **kwargs}
        tensors = {key: value for key, value in tensors.items() if not torchvision_zoo.is_auxiliary(key)}
    with torch.device("meta"):  # shapes and names alone: nothing is allocated
        skeleton = guarded(config, lambda: bare(library, architecture, kwargs))
    tensors = strip_prefixes(tensors, skeleton.state_dict())
    tensors, decoder = split_decoder(tensors)
    default = skeleton.num_classes if library == "timm" else 1000
    heads = head_names(skeleton, library)
    if isinstance(skeleton, VisionTransformer) and not any(name.startswith(heads) for name in tensors):
        default = 0  # an encoder from pre-training has no classifier
    kwargs["num_classes"] = infer_num_classes(tensors, heads) or default
    net = guarded(config, lambda: bare(library, architecture, kwargs))
    load_tensors(net, tensors, path=resolved.path, architecture=architecture)
    if library == "timm":
        spec = timm_input(net.pretrained_cfg, kwargs.get("img_size"))
    else:
        spec = torchvision_zoo.input_spec(torchvision_zoo.weights(architecture, resolved.tag))
    note = f"'{resolved.path}' does not carry its input statistics: those of {architecture} are taken"
    network = Network(net, architecture=architecture, source=library, input=spec, model_args=kwargs, notes=(note,))
    network.masked_decoder = decoder
    return network


def _card_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the metadata of a safetensors file says about its network."""
    card = {name: json_or_none(metadata.get(name)) for name in ("model_args", "num_classes", "classes", "input")}
    return {**card, "architecture": metadata["architecture"], "source": metadata.get("source", "timm")}


def _rebuild(card: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None, *, path: Path) -> Network:
    """Build the network that a card describes, and load its weights unless another does that."""
    architecture, source = card["architecture"], card["source"]
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in card["model_args"].items()}
    kwargs["num_classes"] = card["num_classes"] or kwargs.get("num_classes")
    try:
        with quiet_libraries():
            net = bare(source, architecture, kwargs)
    except Exception as error:
        raise DataError(
            f"'{path}' needs the architecture '{architecture}' of {source}, which is not to be built here: {error}",
            hint="Update the library it comes from: pip install --upgrade timm torchvision",
        ) from error
    if tensors is not None:
        load_tensors(net, tensors, path=path, architecture=architecture)
    classes = card.get("classes")
    kind = SegmentationNetwork if is_segmentation(source, architecture) else Network
    if is_detector(source, architecture):
        kind = OpenVocabularyDetector if OPEN_ARG in kwargs else DetectionNetwork
    return kind(
        net,
        architecture=architecture,
        source=source,
        input=InputSpec.from_dict(card["input"]),
        model_args=kwargs,
        classes=tuple(classes) if classes else None,
        pretrained_tag=card.get("pretrained_tag"),
    ).eval()


# Parts ----------------------------------------------------------------------------------------------------------------


def _family(resolved: Resolved) -> Any:
    """Return the module that builds the networks of a task that puts a head on a backbone; None for classifiers."""
    if is_segmentation(resolved.library, resolved.architecture):
        return segmentation
    return detection if is_detector(resolved.library, resolved.architecture) else None


def _as_it_is(model: str) -> Network:
    """Load the MODEL whose weights another one begins with."""
    return create_network(NetworkConfig(name=model), in_training=False)


def _misplaced(resolved: Resolved, config: NetworkConfig) -> list[Problem]:
    """Return what a configuration sets in the wrong place, or for a network that has no use for it."""
    fresh = resolved.source not in ("package", "file")
    named = _family(resolved) is not None
    # what a package or a lone file holds is known once it is read
    problems = misplaced_args(config, dense=named or resolved.architecture is None)
    if config.backbone is not None and not (named and fresh):
        why = "brings its own backbone" if named or not fresh else "is a classifier"
        hint = f"Leave backbone out, or name what stands on a backbone, such as {DEFAULT_HEAD}_mobilenetv3_large_100."
        problems.append(Problem("backbone", f"'{config.name}' {why} (given: {config.backbone})", hint))
    return problems


def _resize_input(network: Network, config: NetworkConfig) -> None:
    """Give a loaded network another input size, resampling its positions where it has them."""
    size = segmentation.size_of(config)
    if size == tuple(network.input.img_size):
        return
    if network.source == "timm" and get_pretrained_cfg(network.architecture).fixed_input_size:
        if not hasattr(network.net, "set_input_size"):
            height, width = network.input.img_size
            raise RequestError(
                f"'{config.name}' was built for {height} x {width} pixels and cannot change",
                hint="Leave img_size out: images are resized to what the network takes.",
            )
        guarded(config, lambda: network.net.set_input_size(img_size=size))
        network.model_args["img_size"] = config.img_size
    if network.task == "detection":
        detection.check_size(network.net, size, config.name)
    else:
        check_img_size(network.net, size, config.name, in_chans=network.in_chans)
    network.input = with_size(network.input, size)


def _fit_head(network: Network, num_classes: int | None, classes: tuple[str, ...] | None) -> None:
    if num_classes is not None and network.num_classes != num_classes:
        # Silent where the head was published with the weights: everybody expects it to go.
        if network.pretrained_tag is None:
            outputs = counted(network.num_classes, "output")
            note = f"'{network.architecture}' has {outputs}: a fresh classifier has {num_classes}"
            network.notes = (*network.notes, note)
        network.reset_classifier(num_classes, classes)
    elif classes is not None:
        if network.classes is not None and network.classes != classes and network.pretrained_tag is None:
            note = (
                f"'{network.architecture}' was trained for other classes: a fresh classifier takes the place of its own"
            )
            network.notes = (*network.notes, note)
            network.reset_classifier(num_classes, classes)
        network.classes = classes
