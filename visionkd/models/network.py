"""One face for every network: images in [0, 1] in, typed outputs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionkd.errors import RequestError, WorkError, first_line
from visionkd.models.classes import counted
from visionkd.models.modes import evaluating
from visionkd.models.normalize import Normalize, resize
from visionkd.types import InputSpec, Output, TaskName

Family = Literal["cnn", "transformer", "mlp", "hybrid"]
#: What attention layers call their projections, whatever they are called themselves.
_ATTENTION_PARTS = ("qkv", "qk", "kv", "q", "q_proj", "query")


class Network(nn.Module):
    """A network of timm or torchvision that brings its images to its own size and statistics: here a classifier.

    ``network.net`` is the plain module: its state dict loads into ``timm.create_model(architecture, **model_args)``.

    Args:
        net: The plain module.
        architecture: Its name, without the weight tag.
        source: ``timm`` or ``torchvision``; ``visionkd`` where this project joined it of a backbone and a head.
        input: Size and statistics that the network was trained with.
        model_args: Arguments that rebuild ``net``, ``num_classes`` included.
        classes: Class names in the order of the outputs, if known.
        pretrained_tag: Name of the published weights it started from, if any.
        notes: Choices made on the user's behalf, to be said aloud.
    """

    #: What its outputs serve.
    task: TaskName = "classification"
    #: Whether it has to be shown the targets in training: detectors work out their own losses.
    needs_targets: bool = False
    #: Beginnings of the names of parameters that only help training.
    auxiliary: tuple[str, ...] = ()
    #: Patterns of the names of layers that are not quantised at all: eight bits are too coarse.
    precise: tuple[str, ...] = ()

    def __init__(
        self,
        net: nn.Module,
        *,
        architecture: str,
        source: Literal["timm", "torchvision", "visionkd"],
        input: InputSpec,
        model_args: Mapping[str, Any],
        classes: tuple[str, ...] | None = None,
        pretrained_tag: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.architecture = architecture
        self.source = source
        self.input = input
        self.model_args = dict(model_args)
        self.pretrained_tag = pretrained_tag
        #: Whether its weights come from a training, rather than from chance.
        self.trained = pretrained_tag is not None
        self.notes = notes
        self.normalize = Normalize(input.mean, input.std)
        self.num_classes = int(self.model_args["num_classes"])
        self.classes = classes
        if classes is not None and len(classes) != self.num_classes:
            outputs, names = counted(self.num_classes, "output"), counted(len(classes), "class name")
            raise WorkError(f"'{architecture}' has {outputs}, but {names}")
        self.family: Family = family(net)
        self._embedding_dim: int | None = None
        #: How ``net`` is quantised, as written into its package; None in float. ``net`` is then a traced graph, or
        #: holds what few bits give.
        self.quantization: dict[str, Any] | None = None
        #: What the package holds in place of the state dict, where weights of few levels are stored with few bits.
        self.packed: dict[str, Tensor] | None = None
        #: What a masked pre-training left beside it (:class:`visionkd.models.masked_decoder.SavedDecoder`).
        self.masked_decoder: Any = None
        #: Texts beside its images, after contrastive training (:class:`visionkd.models.text_encoder.SavedTexts`).
        self.image_text: Any = None
        #: Names of the layers that give the logits, where ``net`` cannot tell any more.
        self.heads: tuple[str, ...] = ()

    @property
    def in_chans(self) -> int:
        """Planes of its images: red, green, blue, and others that a teacher alone may see."""
        return len(self.input.mean)

    # Running ----------------------------------------------------------------------------------------------------------

    def prepare(self, image: Tensor) -> Tensor:
        """Bring ``image``, B x 3 x H x W in [0, 1], to the size and statistics that the bare network takes."""
        return self.normalize(resize(image, self.input.img_size, self.input.interpolation))

    def forward(self, image: Tensor) -> Output:
        """Return the logits for ``image``, B x 3 x H x W in [0, 1]."""
        return Output(logits=main_logits(self.net(self.prepare(image))))

    def auxiliary_logits(self, answer: Any) -> tuple[Tensor, ...]:
        """Return the logits of auxiliary heads in what the bare network answers; classifiers are trained without."""
        return ()

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the last feature map (or the tokens, B x N x D, of a transformer) before pooling."""
        if self.heads:
            raise WorkError(
                f"the feature maps of a quantised '{self.architecture}' are not to be had", hint="Use its float model."
            )
        image = self.prepare(image)
        if self.source == "timm":
            return self.net.forward_features(image)
        return _captured(self.net, *_feature_module(self.net), image)

    def embed(self, image: Tensor) -> Tensor:
        """Return the pooled embedding in front of the classifier, B x D, for ``image``, B x 3 x H x W in [0, 1]."""
        image = self.prepare(image)
        if self.heads:
            embedding = _captured(self.net, self.net.get_submodule(self.heads[0]), "input", image)
        elif self.source == "timm":
            embedding = self.net.forward_head(self.net.forward_features(image), pre_logits=True)
        else:
            embedding = _captured(self.net, _last_linear(self.net)[1], "input", image)
        return embedding.mean((2, 3)) if embedding.ndim == 4 else embedding

    @property
    def embedding_dim(self) -> int:
        """Width D of :meth:`embed`."""
        if self._embedding_dim is None:
            heads = _heads(self)
            if heads:
                self._embedding_dim = heads[0].weight.shape[1]
            else:
                parameter = next(self.net.parameters())
                blank = torch.zeros(1, 3, *self.input.img_size, device=parameter.device, dtype=parameter.dtype)
                with torch.no_grad(), evaluating(self):
                    self._embedding_dim = self.embed(blank).shape[1]
        return self._embedding_dim

    def core(self) -> nn.Module:
        """Return the part that computes, as a plain graph: what is counted and quantised. Here all of ``net``."""
        return self.net

    def take_graph(self, graph: nn.Module) -> None:
        """Put a graph of :meth:`core`, under the same names of parameters, in the place of ``net``."""
        self.net = graph

    # The classifier ---------------------------------------------------------------------------------------------------

    def reset_classifier(self, num_classes: int, classes: tuple[str, ...] | None = None) -> None:
        """Put a fresh classifier with ``num_classes`` outputs in place of the present one."""
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for {num_classes} outputs")
        if self.heads:
            raise WorkError(
                f"the classifier of a quantised '{self.architecture}' cannot be replaced by one with"
                f" {counted(num_classes, 'output')}",
                hint="Train its float model on this data, then quantise the result.",
            )
        parameter = next(self.net.parameters())
        if hasattr(self.net, "reset_classifier"):
            self.net.reset_classifier(num_classes)
        else:
            name, old = _last_linear(self.net)
            if isinstance(old, nn.Conv2d):
                new: nn.Module = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None)
            else:
                new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
            self.net.set_submodule(name, new)
        self.net.to(device=parameter.device, dtype=parameter.dtype)
        self.num_classes = num_classes
        self.model_args["num_classes"] = num_classes
        self.classes = classes

    @torch.no_grad()
    def set_classifier(self, weight: Tensor, bias: Tensor, classes: tuple[str, ...] | None = None) -> None:
        """Make ``embed(image) @ weight.T + bias`` the network's logits.

        Args:
            weight: C x D, on the embedding.
            bias: C.
            classes: Names of the C classes.
        """
        self.reset_classifier(weight.shape[0], classes)
        heads = _heads(self)
        fitting = [head for head in heads if head.weight.numel() == weight.numel() and head.bias is not None]
        if not heads or len(fitting) != len(heads):
            raise self._no_linear_head("no probe can take its place")
        for head in heads:  # distilled DeiTs average two heads; equal ones give the average embedding's logits
            head.weight.copy_(weight.reshape(head.weight.shape))
            head.bias.copy_(bias)

    @torch.no_grad()
    def select_classes(self, columns: Sequence[int], classes: tuple[str, ...] | None = None) -> None:
        """Keep the outputs in ``columns``, in this order, and forget the others.

        Args:
            columns: Indices of the outputs to keep.
            classes: Their names; None takes those that the outputs have.

        Raises:
            WorkError: If the classifier is not made of linear layers.
        """
        columns = list(columns)
        heads = _heads(self)
        if not heads or any(head.weight.shape[0] != self.num_classes for head in heads):
            raise self._no_linear_head("single classes cannot be picked from it")
        if classes is None and self.classes is not None:
            classes = tuple(self.classes[column] for column in columns)
        kept = [(head.weight[columns], None if head.bias is None else head.bias[columns]) for head in heads]
        self.reset_classifier(len(columns), classes)
        for head, (weight, bias) in zip(_heads(self), kept, strict=True):
            head.weight.copy_(weight)
            if bias is not None:
                head.bias.copy_(bias)

    def class_layers(self) -> tuple[str, ...]:
        """Return the names of the layers of ``net`` whose outputs stand for classes."""
        return head_names(self.net, self.source)

    def _no_linear_head(self, consequence: str) -> WorkError:
        return WorkError(
            f"the classifier of '{self.architecture}' is not a linear layer on its embedding, so {consequence}",
            hint="Train the whole teacher on the data's classes instead: --fit-teacher finetune",
        )

    def extra_repr(self) -> str:
        height, width = self.input.img_size
        return f"{self.source}/{self.architecture}, {self.num_classes} classes, {height} x {width} px"


def main_logits(output: Any) -> Tensor:
    """Return the main logits of a network that answers with several (Inception's auxiliary heads)."""
    return output[0] if isinstance(output, tuple) else output


def _heads(network: Network) -> list[nn.Module]:
    """Return the linear layers (or 1 x 1 convolutions) that give the logits; empty if there are others."""
    if network.heads:
        return []
    if not hasattr(network.net, "get_classifier"):
        modules: tuple[Any, ...] = (_last_linear(network.net)[1],)
    else:
        found = network.net.get_classifier()
        modules = tuple(found) if isinstance(found, (tuple, list, nn.ModuleList)) else (found,)
    fine = all(type(module) in (nn.Linear, nn.Conv2d) for module in modules)
    return list(modules) if fine else []


def _last_linear(net: nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of torchvision's classifier: the last linear layer, or SqueezeNet's last convolution."""
    candidates = [(name, module) for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    # Auxiliary heads (Inception, GoogLeNet) are declared before the main one, so that the last is always the main one.
    return candidates[-1]


def _feature_module(net: nn.Module) -> tuple[nn.Module, Literal["input", "output"]]:
    """Return the torchvision module whose input or output is the last feature map."""
    for name in ("permute", "features", "encoder", "blocks", "layers", "conv5"):  # Swin, most, ViT, MaxViT, ...
        module = getattr(net, name, None)
        if isinstance(module, nn.Module):
            return module, "output"
    return net.get_submodule("avgpool"), "input"


def _captured(net: nn.Module, module: nn.Module, which: Literal["input", "output"], image: Tensor) -> Tensor:
    """Run ``net`` and return what ``module`` took or gave."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0] if which == "input" else output)

    handle = module.register_forward_hook(keep)
    try:
        net(image)
    finally:
        handle.remove()
    return seen[-1]


def family(net: nn.Module) -> Family:
    """Classify a network by its layers: which of attention and spatial convolution does the work.

    Patch embeddings (stride equal to the kernel) do not count as convolutions, nor squeeze-and-excite as attention.
    """
    attentions = convolutions = 0
    for module in net.modules():
        if isinstance(module, nn.MultiheadAttention) or any(hasattr(module, name) for name in _ATTENTION_PARTS):
            attentions += 1
        elif isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and module.stride != module.kernel_size:
            convolutions += 1
    if attentions <= 1 and convolutions > 4:
        return "cnn"  # one attention layer at most is a pooling head
    if attentions:
        return "transformer" if 2 * convolutions <= attentions else "hybrid"
    return "cnn" if convolutions else "mlp"


def check_img_size(net: nn.Module, img_size: tuple[int, int], name: str, *, in_chans: int = 3) -> None:
    """Run ``net`` on the meta device, which costs nothing, to see whether it takes ``img_size``.

    Raises:
        RequestError: If it does not.
    """
    import copy

    try:
        twin = copy.deepcopy(net).to("meta").eval()
        with torch.no_grad():
            twin(torch.empty(1, in_chans, *img_size, device="meta"))
    except NotImplementedError:
        return  # an operator that the meta device lacks says nothing about the size
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RequestError(
            f"'{name}' does not take images of {img_size[0]} x {img_size[1]} pixels: {first_line(error)}",
            hint="Choose another img_size, usually a multiple of 32, or leave it out to take the network's own.",
        ) from error


def head_names(net: nn.Module, source: str) -> tuple[str, ...]:
    """Return the dotted names of the layers that give the logits of a bare network."""
    if source == "torchvision" and not hasattr(net, "get_classifier"):
        return (_last_linear(net)[0],)
    found = net.get_classifier()
    modules = tuple(found) if isinstance(found, (tuple, list, nn.ModuleList)) else (found,)
    names = {id(module): name for name, module in net.named_modules()}
    return tuple(names[id(module)] for module in modules if id(module) in names)
