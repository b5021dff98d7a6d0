"""Shared fixtures: tiny models of every architecture, and one pair of gloo ranks for all distributed checks."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's package is imported

import datasets
import torch
from data_helpers import save_tokenizer

from lit_peft.testing import ranks

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


@pytest.fixture(scope="session")
def two_ranks() -> Callable[..., list[Any]]:
    """`two_ranks(function, *args)` runs `function(rank, *args)` on both ranks and returns both results."""
    return ranks.two_ranks
