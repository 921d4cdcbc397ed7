"""Threads that share the work of one call, each of which runs torch's operators alone.

Torch divides every single operation among its threads and waits for all of them. A call of many
operations waits many times, and long where another process holds a core. Here every thread goes
through all operations for its own part of the pixels, and a call waits once.

Torch keeps the number of threads of an operation for each thread. `torch.set_num_threads` sets it
for the calling thread, but also for every thread that starts later, whoever starts it. So the
runtime libraries under torch are called instead: what they set is the calling thread's alone.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")


def share_among_threads(work: Callable[[Iterator[Item]], None], items: Iterable[Item]) -> None:
    """Call ``work`` in as many threads as torch has, all of which draw from the same items.

    With one thread, or where its threads cannot be told to run alone, in the calling thread.
    """
    items = list(items)
    count = min(torch.get_num_threads(), len(items))
    if count <= 1 or _runtime() is None:
        work(iter(items))
        return

    shared = iter(items)  # of a list: its ``next`` is atomic

    def in_a_thread() -> None:
        # Gradients are off in the caller, but not in a new thread; and results that were allocated
        # in inference mode may be written in that mode alone.
        with torch.inference_mode():
            work(shared)

    pool = _pool(os.getpid(), torch.get_num_threads())
    futures = [pool.submit(in_a_thread) for _ in range(count)]
    wait(futures)  # all, also if one fails: they write to memory of the caller
    for future in futures:
        future.result()


@functools.cache
def _pool(process: int, size: int) -> ThreadPoolExecutor:
    """Return the threads of this process: after a fork, the child has none of its parent's."""
    return ThreadPoolExecutor(size, thread_name_prefix="anchorda", initializer=_run_alone)


def _run_alone() -> None:
    """Make torch divide no operation of the calling thread among others."""
    torch.get_num_threads()  # sets the thread up, which would otherwise undo what follows
    runtime = _runtime()
    assert runtime is not None
    runtime.omp_set_num_threads(1)
    if hasattr(runtime, "MKL_Set_Num_Threads_Local"):
        runtime.MKL_Set_Num_Threads_Local(1)


@functools.cache
def _runtime() -> ctypes.CDLL | None:
    """Return torch's own library, through which its OpenMP runtime is found, or None."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(folder / name))
        except OSError:
            continue
        if hasattr(library, "omp_set_num_threads"):
            return library
    return None
