"""Networks in PyTorch, ready to be timed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Literal

import torch

from visionkd.benchmark.complexity import measure_complexity
from visionkd.benchmark.latency import Runner
from visionkd.errors import RequestError
from visionkd.models.network import Network


def torch_runner(
    network: Network,
    *,
    name: str,
    batch_size: int = 1,
    threads: int = 1,
    img_size: tuple[int, int] | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] = "cpu",
) -> Runner:
    """Make a runner for a network in PyTorch, in float32 and eval mode.

    Convolutional networks run in channels-last layout, which is the faster one for them.

    Args:
        network: Left as it is; a copy is timed.
        name: Name for the table.
        batch_size: Images in a batch.
        threads: Threads within an operator.
        img_size: Height and width of the images; None takes the network's own, to which others are resized.
        accelerator: ``gpu`` for the first CUDA device, ``auto`` for it where there is one.
    """
    cost = measure_complexity(network)
    gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not gpu:
        raise RequestError("--accelerator gpu: PyTorch sees no GPU here", hint="Pass --accelerator cpu.")
    device = torch.device("cuda" if gpu and accelerator != "cpu" else "cpu")
    layout = torch.channels_last if network.family == "cnn" else torch.contiguous_format
    copied = copy.deepcopy(network).float().to(device=device, memory_format=layout).eval()
    size = img_size or network.input.img_size
    image = torch.rand(batch_size, 3, *size).to(device=device, memory_format=layout)

    def call() -> None:
        with torch.inference_mode():
            copied(image)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Runner(
        model=name,
        backend="torch",
        call=call,
        threads=threads,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        batch_size=batch_size,
        img_size=size,
        params_m=cost.params_m,
        macs_g=cost.macs_g,
        size_mb=cost.size_mb,
        setting=lambda: _threads(threads),
    )


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
