"""Zero-cost scores of a network alone, each one number; the networks given are copies and may be changed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkd.errors import WorkError
from visionkd.models.network import Network, main_logits
from visionkd.search._passes import Batch, placed, seeded

#: Activations that are open above zero; timm's own classes have the same names.
_ACTIVATIONS = {
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish", "Mish",
    "Hardswish", "HardSwish", "HardSwishMe", "HardMish",
}  # fmt: skip


def nwot(network: Network, batch: Batch) -> float:
    """NASWOT: how differently the activations are open for the images of a batch, ``log |det K|``.

    With ``c_i`` the code of image i, 1 where the input of an activation is above 0, ``K_ij`` is the number of
    activations at which ``c_i`` and ``c_j`` agree, over all activation layers. Smooth activations (GELU, SiLU) are read
    by the sign of their input as ReLU is. One forward pass.

    Mellor, Turner, Storkey and Crowley, "Neural Architecture Search without Training", ICML 2021, arXiv 2006.04647.

    Raises:
        WorkError: If there is no activation, or two images have the same code.
    """
    image, _ = placed(network, batch)
    agreeing: list[Tensor] = []

    def count(_: nn.Module, given: tuple[Any, ...]) -> None:
        code = (given[0].flatten(1) > 0).float()
        # open in both, and closed in both
        agreeing.append(code @ code.T + (1.0 - code) @ (1.0 - code).T)

    handles = [
        module.register_forward_pre_hook(count)
        for module in network.net.modules()
        if type(module).__name__ in _ACTIVATIONS
    ]
    try:
        with torch.no_grad(), seeded(batch.seed):
            network.train()(image)
    finally:
        for handle in handles:
            handle.remove()
    if not agreeing:
        raise WorkError(f"'{network.architecture}' has no activation that opens at zero")
    matrix = torch.stack([each for each in agreeing if len(each) == len(image)]).double().sum(0)
    sign, log_det = torch.linalg.slogdet(matrix)
    if sign <= 0:
        raise WorkError(f"'{network.architecture}' opens the same activations for two images")
    return float(log_det)


def synflow(network: Network, batch: Batch) -> float:
    """SynFlow: ``log sum_theta |theta * dR / d theta|`` with ``R = 1^T f_|theta|(1)``.

    ``f_|theta|`` is the network with the absolute values of its parameters, on one image of ones; batch norms in eval
    mode with fresh statistics are close to the identity. ``R`` is a product over the layers that leaves float32 in deep
    networks, so it is computed in float64, and its logarithm, which ranks the same, is returned. One forward and one
    backward pass; the data is not looked at.

    Tanaka, Kunin, Yamins and Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
    flow", NeurIPS 2020, arXiv 2006.05467; as a score of architectures: Abdelfattah, Mehrotra, Dudziak and Lane,
    "Zero-Cost Proxies for Lightweight NAS", ICLR 2021, arXiv 2101.08134.
    """
    net = network.net.double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        for parameter in net.parameters():
            parameter.abs_()
    device = next(net.parameters()).device
    ones = torch.ones(1, 3, *network.input.img_size, dtype=torch.float64, device=device)
    output = net(ones)
    main_logits(output).sum().backward()
    flow = sum((p * p.grad).abs().sum() for p in net.parameters() if p.grad is not None)
    return float(torch.as_tensor(flow).detach().log())


def grad_norm(network: Network, batch: Batch) -> float:
    """Gradient norm: sum over convolutions and linear layers of ``||dL / dW||_2``, L the mean cross-entropy of a batch.

    One forward and one backward pass, batch norms in train mode.

    Abdelfattah, Mehrotra, Dudziak and Lane, "Zero-Cost Proxies for Lightweight NAS", ICLR 2021, arXiv 2101.08134.
    """
    image, target = placed(network, batch)
    layers = [module for module in network.net.modules() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))]
    with seeded(batch.seed):
        logits = network.train()(image).logits
        assert logits is not None
        F.cross_entropy(logits, target).backward()
    norms = [layer.weight.grad.norm() for layer in layers if layer.weight.grad is not None]
    return float(torch.stack(norms).sum())
