from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from visionkd.benchmark.complexity import measure_complexity
from visionkd.config.schema import NetworkConfig
from visionkd.errors import RequestError, WorkError
from visionkd.hub.package import load_package, save_package
from visionkd.models.factory import Network, args_problems, create_network
from visionkd.models.features import extract, stages
from visionkd.models.initial import network_from
from visionkd.models.names import resolve_name
from visionkd.models.segmentation import nets
from visionkd.models.segmentation.blocks import GridMean
from visionkd.models.segmentation.network import SegmentationNetwork
from visionkd.quantization.trace import check_same, trace

CLASSES = ("road", "sky", "tree")
SIZE = (48, 64)
SMALL = "fpn_cifar_resnet8"


def make(
    name: str, *, in_training: bool = True, classes: tuple[str, ...] | None = CLASSES, **values: object
) -> Network:
    config = NetworkConfig(name=name, pretrained=False, **{"img_size": SIZE, **values})
    torch.manual_seed(0)
    return create_network(config, classes=classes, in_training=in_training)


@pytest.mark.parametrize(
    ("name", "stride", "args"),
    [
        ("fcn_test_resnet", 16, {}),
        ("pspnet_test_resnet", 8, {"output_stride": 8}),
        ("deeplabv3_test_resnet", 32, {"output_stride": 32}),
        ("deeplabv3plus_test_resnet", 4, {"aux": True}),
        ("fpn_test_resnet", 4, {"channels": 16, "separable": False}),
        ("lraspp_mobilenet_v3_large", 8, {}),
    ],
)
def test_each_head_gives_logits_at_its_stride_learns_and_comes_back(
    name: str, stride: int, args: dict, tmp_path: Path
) -> None:
    network = make(name, args=args)
    assert isinstance(network, SegmentationNetwork) and network.task == "segmentation" and network.family == "cnn"
    assert network.stride == stride and network.input.img_size == SIZE and network.training
    image = torch.rand(2, 3, 96, 64)  # a training crop has a size of its own
    output = network(image)
    assert output.logits.shape == (2, 3, 96 // stride, 64 // stride)
    assert len(output.aux) == bool(args.get("aux"))
    loss = sum(
        F.cross_entropy(each, torch.zeros(each[:, 0].shape, dtype=torch.long)) for each in (output.logits, *output.aux)
    )
    loss.backward()
    without = [name for name, parameter in network.net.named_parameters() if parameter.grad is None]
    assert not without
    save_package(network, tmp_path / "model", task="segmentation", classes=None, metrics={}, origin={})
    again, card = load_package(tmp_path / "model")
    assert card["task"] == "segmentation" and card["architecture"] == name and again.input == network.input
    network.eval()
    with torch.no_grad():
        assert torch.equal(again(image).logits, network(image).logits) and again(image).aux == ()
        assert again.at_input_size(again(torch.rand(1, 3, *SIZE))).shape == (1, 3, *SIZE)
    assert again.classes == CLASSES and again.stride == stride
    other = create_network(NetworkConfig(name=str(tmp_path / "model")), classes=("a", "b"), in_training=True)
    assert other(image).logits.shape[1] == 2 and all(each.shape[1] == 2 for each in other(image).aux)


@pytest.mark.parametrize("name", ["deeplabv3plus_test_resnet", "pspnet_test_resnet", "fcn_test_resnet", SMALL])
def test_torch_fx_follows_a_network_at_any_size_and_leaves_the_auxiliary_head_out(name: str) -> None:
    network = make(name, args={"aux": True}).eval()
    graph = trace(network)
    check_same(network, graph)
    image = network.prepare(torch.rand(1, 3, 40, 56))
    with torch.no_grad():
        torch.testing.assert_close(graph(image), network.net(image))
    assert not any(key.startswith("aux_head") for key in graph.state_dict())


def test_a_new_plane_keeps_what_the_others_do_and_is_zero_where_there_is_none(tmp_path: Path) -> None:
    plain, wide = make(SMALL).eval(), make(SMALL, args={"in_chans": 4, "plane_std": 0.5}).eval()
    assert wide.in_chans == 4 and len(wide.input.mean) == 4 and wide.net.backbone.conv1.weight.shape[1] == 4
    new = wide.net.backbone.conv1.weight[:, 3]
    assert 0.3 < float(new.detach().std()) < 0.7
    missing = wide.net.load_state_dict(
        {k: v for k, v in plain.net.state_dict().items() if "backbone.conv1" not in k}, strict=False
    )
    assert missing.missing_keys == ["backbone.conv1.weight"]
    with torch.no_grad():
        wide.net.backbone.conv1.weight[:, :3] = plain.net.backbone.conv1.weight
        image, labels = torch.rand(2, 3, *SIZE), torch.randn(2, 1, *SIZE)
        torch.testing.assert_close(wide(image).logits, plain(image).logits)
        seen = torch.cat([image, labels], 1)
        assert torch.equal(wide.prepare(seen)[:, 3:], labels), "the plane comes in as it is"
        assert not torch.allclose(wide(seen).logits, plain(image).logits)
    with pytest.raises(ValueError, match="4 planes, not of 5"):
        wide(torch.rand(1, 5, *SIZE))
    save_package(wide, tmp_path / "wide", task="segmentation", classes=None, metrics={}, origin={})
    again, _ = load_package(tmp_path / "wide")
    with torch.no_grad():
        assert torch.equal(again(seen).logits, wide(seen).logits)
    assert measure_complexity(again).macs_g > measure_complexity(plain).macs_g


def test_planes_of_published_weights_are_copied() -> None:
    net = nets.build(SMALL, {"num_classes": 2})
    before = net.backbone.conv1.weight.detach().clone()
    nets.widen_input(net, 5, 0.1)
    assert torch.equal(net.backbone.conv1.weight[:, :3], before) and net.backbone.conv1.in_channels == 5


def test_the_backbone_begins_with_the_weights_of_a_model(tmp_path: Path) -> None:
    classifier = create_network(NetworkConfig(name="cifar_resnet8", pretrained=False), num_classes=10, in_training=True)
    save_package(classifier, tmp_path / "model", task="classification", classes=None, metrics={}, origin={})
    torch.save(classifier.net.state_dict(), tmp_path / "weights.pt")
    weights = classifier.net.state_dict()
    for backbone in (str(tmp_path), str(tmp_path / "model"), f"cifar_resnet8@{tmp_path / 'weights.pt'}"):
        network = make(SMALL, backbone=backbone)
        for name, value in network.net.backbone.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert network.input.mean == classifier.input.mean and backbone in " ".join(network.notes)
    save_package(network, tmp_path / "pixels", task="segmentation", classes=None, metrics={}, origin={})
    wide = make("fcn_cifar_resnet8", backbone=str(tmp_path / "pixels"), args={"in_chans": 4})
    assert torch.equal(wide.net.backbone.conv1.weight[:, :3], weights["conv1.weight"]), "of a segmentation network too"
    with pytest.raises(RequestError) as raised:
        make("fpn_cifar_resnet14", backbone=str(tmp_path))
    assert "'fpn_cifar_resnet8'" in str(raised.value) and "fpn_cifar_resnet14" in str(raised.value)
    with pytest.raises(RequestError, match="is a classifier"):
        make("resnet18", backbone=str(tmp_path), img_size=32)
    with pytest.raises(RequestError, match="brings its own backbone"):
        make(str(tmp_path / "pixels"), backbone=str(tmp_path))


def test_flattened_names_find_their_weights() -> None:
    classifier = timm.create_model("convnext_atto")
    network = make("fpn_convnext_atto")
    from visionkd.models.segmentation.factory import take_backbone

    source = create_network(NetworkConfig(name="convnext_atto", pretrained=False), in_training=True)
    source.net.load_state_dict(classifier.state_dict())
    take_backbone(network, source, "convnext_atto")
    theirs = classifier.stages[2].blocks[0].conv_dw.weight
    assert torch.equal(network.net.backbone.stages_2.blocks[0].conv_dw.weight, theirs)


def test_a_weights_file_says_how_many_classes_it_has(tmp_path: Path) -> None:
    network = make(SMALL, args={"aux": True}).eval()
    torch.save({"model": network.net.state_dict()}, tmp_path / "weights.pt")
    config = NetworkConfig(name=f"{SMALL}@{tmp_path / 'weights.pt'}", img_size=SIZE)
    again = create_network(config, in_training=False)
    assert again.num_classes == 3 and again.net.aux_head is not None
    image = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(again(image).logits, network(image).logits)
    with pytest.raises(RequestError, match="does not fit"):
        create_network(NetworkConfig(name=f"fcn_cifar_resnet8@{tmp_path / 'weights.pt'}"), in_training=False)


def test_torchvisions_published_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    published = torchvision.models.get_model_builder("deeplabv3_mobilenet_v3_large")(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    record = torchvision.models.get_model_weights("deeplabv3_mobilenet_v3_large").DEFAULT
    monkeypatch.setattr(type(record), "get_state_dict", lambda *_, **__: published.state_dict())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (folder / Path(record.url).name).touch()
    network = create_network(NetworkConfig(name="deeplabv3_mobilenet_v3_large", img_size=64), in_training=False)
    assert network.pretrained_tag == "COCO_WITH_VOC_LABELS_V1" and network.classes[15] == "person"
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        theirs = published.eval()(network.prepare(image))["out"]
        torch.testing.assert_close(network.at_input_size(network(image)), theirs)
    aux = create_network(
        NetworkConfig(name="deeplabv3_mobilenet_v3_large", img_size=64, args={"aux": True}), in_training=True
    )
    assert torch.equal(aux.net.aux_classifier[0].weight, published.aux_classifier[0].weight)


def test_stages_end_with_the_map_that_the_classifier_reads() -> None:
    network = make("deeplabv3plus_test_resnet", args={"aux": True})
    found = stages(network)
    assert [stage.name for stage in found][-1] == "head" and found[-1].channels == 128
    image = torch.rand(2, 3, *SIZE)
    output = extract(network, image, [-1, 2])
    assert output.features[0].shape == (2, 128, SIZE[0] // 4, SIZE[1] // 4) and len(output.aux) == 1
    network.eval()
    output = extract(network, image, [-1])
    with torch.no_grad():
        torch.testing.assert_close(network.net.classifier(output.features[0]), network(image).logits)


def test_complexity_leaves_out_what_only_trains() -> None:
    plain, aux = measure_complexity(make(SMALL)), measure_complexity(make(SMALL, args={"aux": True}))
    assert (plain.params_m, plain.macs_g, plain.size_mb) == (aux.params_m, aux.macs_g, aux.size_mb)
    assert plain.params_m > 0.08


def test_one_image_and_small_maps_can_be_trained_on() -> None:
    for name in ("pspnet_test_resnet", "deeplabv3plus_test_resnet"):
        network = make(name, args={"output_stride": 32})
        assert torch.isfinite(network(torch.rand(1, 3, 64, 64)).logits).all()


@pytest.mark.parametrize(("side", "bins"), [(12, 6), (12, 3), (7, 3), (2, 6), (9, 1)])
def test_grid_means(side: int, bins: int) -> None:
    x = torch.randn(1, 2, side, side)
    found = GridMean(bins)(x)
    assert found.shape[-1] == min(side, bins)
    if side % bins == 0 or side < bins:
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(x, min(side, bins)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deeplabv3plus_resnet51", ["no backbone 'resnet51'", "resnet50"]),
        ("deeplabv3pls_resnet50", ["no segmentation head 'deeplabv3pls'", "'deeplabv3plus'", "pspnet"]),
        ("fcn_resnet51", ["no backbone", "resnet50"]),
        ("torchvision/fcn_resnet5", ["'torchvision/fcn_resnet50'"]),
    ],
)
def test_unknown_heads_and_backbones_are_answered_with_the_nearest(name: str, words: list[str]) -> None:
    with pytest.raises(RequestError) as raised:
        resolve_name(name)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("name", "source", "architecture", "tag"),
    [
        ("fcn_resnet50", "torchvision", "fcn_resnet50", None),
        ("torchvision/fcn_resnet50.COCO_WITH_VOC_LABELS_V1", "torchvision", "fcn_resnet50", "COCO_WITH_VOC_LABELS_V1"),
        ("visionkd/fcn_resnet50", "visionkd", "fcn_resnet50", None),
        ("deeplabv3plus_resnet50.a1_in1k", "visionkd", "deeplabv3plus_resnet50", "a1_in1k"),
        ("fpn_mobilenetv3", "visionkd", "fpn_mobilenetv3_large_100", None),
    ],
)
def test_names(name: str, source: str, architecture: str, tag: str | None) -> None:
    found = resolve_name(name)
    assert (found.source, found.architecture, found.tag) == (source, architecture, tag)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        (SMALL, {"output_strid": 8}, ["args.output_strid", "output_stride"]),
        (SMALL, {"output_stride": 12}, ["8, 16 or 32"]),
        (SMALL, {"in_chans": 1}, ["from 3 up"]),
        (SMALL, {"num_classes": 3}, ["the data decides it"]),
        ("fcn_resnet50", {"output_stride": 8}, ["no such argument", "aux"]),
        ("lraspp_mobilenet_v3_large", {"aux": True}, ["no auxiliary head"]),
    ],
)
def test_wrong_arguments_are_named(name: str, args: dict, words: list[str]) -> None:
    problems = args_problems(NetworkConfig(name=name, args=args))
    text = " ".join(f"{problem.key} {problem.message} {problem.hint}" for problem in problems)
    assert all(word in text for word in words), text
    with pytest.raises(RequestError):
        make(name, args=args)


def test_arguments_of_the_backbone_reach_it() -> None:
    assert args_problems(NetworkConfig(name=SMALL, args={"width": 2.0, "aux": True})) == []
    assert make(SMALL, args={"width": 2.0}).net.backbone.conv1.out_channels == 32
    with pytest.raises(RequestError, match="output_stride|cannot be built"):
        make(SMALL, args={"output_stride": 8})
    assert "cannot be dilated" in " ".join(make("fcn_cifar_resnet8").notes)


def test_rectangles_are_for_segmentation() -> None:
    with pytest.raises(RequestError, match="takes square images"):
        make("cifar_resnet8")


def test_a_classifier_gets_a_head_where_the_data_has_maps(tmp_path: Path) -> None:
    config = NetworkConfig(name="cifar_resnet8", pretrained=False, img_size=SIZE)
    network = create_network(config, classes=CLASSES, in_training=True, task="segmentation")
    assert (
        network.architecture == "deeplabv3plus_cifar_resnet8" and "puts a segmentation head on it" in network.notes[0]
    )
    trained = create_network(NetworkConfig(name="cifar_resnet8", pretrained=False), num_classes=7, in_training=True)
    save_package(trained, tmp_path / "model", task="classification", classes=None, metrics={}, origin={})
    first = trained.net.conv1.weight
    run = NetworkConfig(name=str(tmp_path), img_size=SIZE)
    network = create_network(run, classes=CLASSES, in_training=True, task="segmentation")
    assert torch.equal(network.net.backbone.conv1.weight, first)
    initial = network_from(
        str(tmp_path), NetworkConfig(name=SMALL, img_size=SIZE), classes=CLASSES, task="segmentation"
    )
    assert initial.architecture == SMALL and torch.equal(initial.net.backbone.conv1.weight, first)
    assert args_problems(NetworkConfig(name="cifar_resnet8", args={"aux": True}), task="segmentation") == []
    assert args_problems(NetworkConfig(name="cifar_resnet8", args={"aux": True}))


def test_training_goes_on_from_another_segmentation_network(tmp_path: Path) -> None:
    first = make(SMALL, args={"aux": True})
    save_package(first, tmp_path / "model", task="segmentation", classes=None, metrics={}, origin={})
    config = NetworkConfig(name=str(tmp_path), img_size=SIZE)
    network = network_from(str(tmp_path), config, classes=("a", "b"), task="segmentation")
    assert network.num_classes == 2 and torch.equal(
        network.net.head.laterals[0].weight, first.net.head.laterals[0].weight
    )


def test_an_untrained_network_cannot_be_used_as_it_is() -> None:
    with pytest.raises(RequestError, match="untrained network"):
        create_network(NetworkConfig(name=SMALL), in_training=False)
    with pytest.raises(WorkError, match="names pixels"):
        make(SMALL).embed(torch.rand(1, 3, *SIZE))


def test_classes_can_be_picked() -> None:
    network = make(SMALL).eval()
    image = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        before = network(image).logits
        network.select_classes([2, 0])
        torch.testing.assert_close(network(image).logits, before[:, [2, 0]])
    assert network.classes == ("tree", "road")


@pytest.mark.parametrize("size", [0, [], [48, 64, 3], [48, "a"], "wide", [48, 0], True])
def test_an_input_size_is_one_number_or_two(size: object) -> None:
    with pytest.raises(ValidationError, match="height and width") as raised:
        NetworkConfig.model_validate({"name": SMALL, "img_size": size})
    assert raised.value.error_count() == 1


def test_an_input_size_reads_lists_and_numbers() -> None:
    assert NetworkConfig(name=SMALL, img_size=[48, 64]).img_size == (48, 64)
    assert NetworkConfig(name=SMALL, img_size=48).img_size == 48 and NetworkConfig(name=SMALL).img_size is None
