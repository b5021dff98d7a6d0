"""benchmarks/quantized_inference.py, on tiny models: that it runs, and that what it compares is what it says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "quantized_inference", Path(__file__).parents[1] / "benchmarks" / "quantized_inference.py"
)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

TINY = "--device cpu --layers 2 --width 64 --vocabulary 500 --batches 1 2 --length 8 --prefill 16 --rounds 1"


def test_forms_differ_by_what_they_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantized_inference.py", *TINY.split(), "--repeats", "1"])
    benchmark.main()
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert {(row["model"], row["pass"]) for row in rows} == {
        *(("encoder", "1 x 8"), ("encoder", "2 x 8"), ("llama", "prefill 16"), ("llama", "decode 1")),
    }
    for adapted, bf16, merged, small in zip(*(rows[i::4] for i in range(4)), strict=True):
        assert [row["form"] for row in (adapted, bf16, merged, small)] == list(benchmark.FORMS)
        assert adapted["difference"] == 0.0 < merged["difference"] < min(bf16["difference"], small["difference"])
        assert small["weights_bytes"] < merged["weights_bytes"] < bf16["weights_bytes"]
        assert small["weights_bytes"] < adapted["weights_bytes"] < bf16["weights_bytes"]
        assert all(row["ms"] > 0 and row["spread_ms"][0] == pytest.approx(row["ms"]) for row in (adapted, merged))
