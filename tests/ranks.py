"""Processes of a test, as many as ranks; a hang is a failure."""

import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

from torch.multiprocessing.spawn import start_processes

SECONDS = 120  # A collective may take half of this, a rank all.
# Imported once, not in each process: torch needs seconds for what its optimizers import.
PRELOADED = ["torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]


def forkserver() -> ForkServerContext:
    """Return a context whose processes start with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(
    world: int, main: Callable[..., None], *arguments: object, seconds: float = SECONDS
) -> None:
    """Call ``main(rank, *arguments)`` in that many processes, and wait for them."""
    forkserver()
    context = start_processes(main, arguments, world, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{world} ranks have not ended in {seconds} s"
    finally:
        for process in context.processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
