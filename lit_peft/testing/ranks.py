"""Two processes for all checks that need two ranks, started on first use and kept to the end."""

import atexit
import functools
import importlib
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `function(rank, *args)` on both of two gloo ranks, seeded, and returns both results.

    Args:
        function: Found there by its name, so that it stands in a module and not in another function.
        *args: What can be pickled.

    Raises:
        RuntimeError: With the traceback of a rank that raised, or when it takes longer than two minutes.
    """
    ends = _start()
    for end in ends:
        end.send((function.__module__, function.__name__, args))
    results = []
    for end in ends:
        if not end.poll(120):
            raise RuntimeError(f"{function.__name__} hangs on two ranks.")
        results.append(end.recv())
    for ok, value in results:
        if not ok:
            raise RuntimeError(value)
    return [value for _, value in results]


@functools.cache
def _start() -> list[Any]:
    """The pair's pipes."""
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_work, args=(rank, port, there), daemon=True) for rank, (_, there) in enumerate(pipes)
    ]
    before = os.environ.get("PYTHONHASHSEED")
    for rank, process in enumerate(processes):
        os.environ["PYTHONHASHSEED"] = str(rank + 1)  # sets come in another order on each rank, as they do elsewhere
        process.start()
    os.environ.pop("PYTHONHASHSEED") if before is None else os.environ.update(PYTHONHASHSEED=before)

    def stop() -> None:
        for end, _ in pipes:
            end.send(None)
        for process in processes:
            process.join(10)

    atexit.register(stop)
    return [end for end, _ in pipes]


def _work(rank: int, port: int, pipe: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(address | place, HF_HUB_OFFLINE="1")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    while (job := pipe.recv()) is not None:
        module, name, args = job
        torch.manual_seed(0)
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
