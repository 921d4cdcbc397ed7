"""One process for each GPU, as `torchrun` starts them; without it, one process and no more."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str) -> torch.device:
    """Join the other processes that `torchrun` has started, if it has, and pick this one's GPU."""
    chosen = torch.device(device)
    if "LOCAL_RANK" not in os.environ:
        return chosen
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def check_device(name: str) -> None:
    """Raise a ValueError if torch has no device of that name here."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        devices = ["cpu"]
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        devices += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).split(". ")[0].splitlines()[0]
        raise ValueError(
            f"--device: expected one of {', '.join(devices)} here, but got {name!r}: {reason[:99]}"
        ) from error


def started() -> int:
    """Return the number of processes that `torchrun` has started, also before they have joined."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def stop() -> None:
    """Leave the other processes, all at once: the first may still be writing the report."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return True in the process that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes, in a new tensor without a graph."""
    values = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first: running statistics differ between them."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
