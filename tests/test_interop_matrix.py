"""Every method's folders in every direction between us and HF PEFT; docs/interop.md is made of it: `make interop`."""

import warnings
from collections.abc import Iterator

import pytest
from interop_matrix import FAST, PAIRS, Matrix, check, measure


@pytest.fixture(scope="module")
def matrix() -> Iterator[Matrix]:
    found = Matrix()
    yield found
    found.check_docs()


@pytest.mark.parametrize(
    ("row", "arch"),
    [pytest.param(*pair, marks=[] if pair[1] in FAST else pytest.mark.slow, id=" on ".join(pair)) for pair in PAIRS],
)
def test_round_trips(row, arch, matrix, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = measure(row, arch, tmp_path)
    check(row, arch, outcome)
    matrix.outcomes[row, arch] = outcome
