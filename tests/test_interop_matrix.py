"""Every method's folders in every direction between us and HF PEFT; docs/interop.md is made of it: `make interop`."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
from interop_matrix import DIRECTIONS, FAST, PAIRS, Matrix, Outcome, check, measure
from interop_rows import ROWS

from lit_peft import LoRA, SparseLoRA


@pytest.fixture(scope="module")
def matrix() -> Iterator[Matrix]:
    found = Matrix()
    yield found
    found.check_docs()


def quietly(row: str, arch: str, folder) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measure(row, arch, folder)


@pytest.mark.parametrize(
    ("row", "arch"),
    [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow, id=" on ".join(pair)) for pair in PAIRS],
)
def test_round_trips(row, arch, matrix, tmp_path):
    outcome = quietly(row, arch, tmp_path)
    check(row, arch, outcome)
    matrix.outcomes[row, arch] = outcome


def test_a_fault_in_what_is_read_is_seen(tmp_path, monkeypatch):
    read = LoRA.from_hf_peft.__func__
    louder = lambda cls, options, paths: read(cls, options | {"lora_alpha": 6.0005}, paths)  # noqa: E731
    monkeypatch.setattr(LoRA, "from_hf_peft", classmethod(louder))
    monkeypatch.setitem(ROWS, "LoRA", replace(ROWS["LoRA"], ours=None))  # our record would contradict it
    with pytest.raises(AssertionError, match=r"^HF PEFT, ours: "):
        check("LoRA", "BERT", quietly("LoRA", "BERT", tmp_path))


def test_a_rank_that_is_lost_is_seen(tmp_path, monkeypatch):
    exported = SparseLoRA.exported

    def less(self, sites):
        form, left = exported(self, sites)
        left[0][1].lora_A.data[0] = 0
        return form, left

    monkeypatch.setattr(SparseLoRA, "exported", less)
    with pytest.raises(AssertionError, match=r"^ours, ours: "):
        check("SparseLoRA (structured)", "BERT", quietly("SparseLoRA (structured)", "BERT", tmp_path))


def test_an_adapter_that_is_not_heard_or_a_hole_that_is_none_is_seen():
    fine = dict.fromkeys(DIRECTIONS, 0.0)
    check("LoRA", "BERT", Outcome(fine, 1.0, {}))
    with pytest.raises(AssertionError, match=r"changes the logits by 0.009 alone"):
        check("LoRA", "BERT", Outcome(fine, 0.009, {}))
    with pytest.raises(AssertionError, match=r"open.* of PTuning on BERT works now"):
        check("PTuning", "BERT", Outcome(fine, 1.0, {}))
    with pytest.raises(KeyError, match="surprise"):
        check("LoRA", "BERT", Outcome({}, 1.0, {"load": KeyError("surprise")}))
