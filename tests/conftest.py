"""Shared fixtures: tiny models of every architecture, and one pair of gloo ranks for all distributed checks."""

import importlib
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's package is imported

import datasets
import torch
from data_helpers import save_tokenizer

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are prepared in a folder of the tests', not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer of a few words."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _worker(rank: int, port: int, pipe: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    while (job := pipe.recv()) is not None:
        module, name, args = job
        torch.manual_seed(0)
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Callable[..., list[Any]]]:
    """`two_ranks(function, *args)` runs `function(rank, *args)` on both ranks and returns both results.

    The two processes are started once for the whole run; functions must be importable from a test module.
    """
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ends, processes = [], []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(rank, port, there), daemon=True)
        process.start()
        ends.append(here)
        processes.append(process)

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        for end in ends:
            end.send((function.__module__, function.__name__, args))
        results = []
        for end in ends:
            assert end.poll(120), f"{function.__name__} hangs on two ranks"
            results.append(end.recv())
        for ok, value in results:
            assert ok, value
        return [value for _, value in results]

    yield run
    for end in ends:
        end.send(None)
    for process in processes:
        process.join(10)
