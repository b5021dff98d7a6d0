"""The bundled decoder from the command line: trained, asked, and asked again from its adapter alone."""

import json
from pathlib import Path

import pytest
from test_cli import fit, run

from lit_peft.arguments import resolve
from lit_peft.demo.text import VERDICTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    less = ("--data.limit_train", "720", "--data.limit_val", "8", "--data.limit_test", "8", "--trainer.max_epochs", "1")
    root = tmp_path_factory.mktemp("decoder")
    return fit(root, "--config", "quickstart_lm", *less, "--model.learning_rate", "1e-2")


def test_perplexity_falls(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["base/test/perplexity"] > 4 > 2 > metrics["test/perplexity"] > 1
    assert metrics["test/ece"] < 0.06  # were the words of summaries interchangeable to the decoder: .11
    assert "test/word_perplexity" not in metrics  # an end of a completion is no word
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000


@pytest.mark.parametrize("source", ["run", "adapter"])
def test_it_sums_up_what_it_is_given(folder, source, capsys):
    texts = ["A witty, elegant comedy, and the ending is a delight.", "A tedious, clumsy drama. The plot is a mess."]
    where = ["--run", str(folder)] if source == "run" else ["--adapter", str(folder / "adapter")]
    run([*resolve(["predict", *where, *(word for text in texts for word in ("--text", text))])])
    lines = capsys.readouterr().out.splitlines()
    assert [texts[0] + VERDICTS[1], texts[1] + VERDICTS[0]] == [line for line in lines if " As a whole" in line]
