"""The GPU benchmarks on a toy, so that they run when they are needed."""

import argparse
import importlib
import json
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_peft.core.quantized import Frozen4bit
from lit_peft.demo.text import unlabelled_text
from lit_peft.methods.lora import LoRADelta


@pytest.fixture()
def qlora(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("qlora")


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning", "ignore:.*not supported on CPU.*")
def test_rows_of_qlora_share_one_base_and_train(qlora, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(LoRADelta, "fused_from", 0)  # what a large layer takes
    out = tmp_path / "rows.jsonl"
    rows = [
        "floor",
        "hf-float32",
        "hf-bfloat16*",
        "ours-float32",
        "ours-float32-autocast",
        "ours-float32+c*",
        "ours-bfloat16",
    ]
    qlora.main(
        ["--shape", "tiny", "--device", "cpu", "--no-liger", "--rows", *rows, "--rounds", "2", "--out", str(out)]
    )
    first, *lines, setting = [json.loads(line) for line in out.read_text().splitlines()]
    names = {line["row"] for line in lines}
    assert {"hf-bfloat16+checkpointing", "ours-float32-autocast"} <= names
    assert len(lines) == 2 * len(names)
    assert len({line["loss"][0] for line in lines}) == 1  # B is 0, and what stood there before is off again
    trained = {line["row"]: line for line in lines if line["row"] != "floor"}
    assert all(line["loss"][-1] < line["loss"][0] for line in trained.values())
    assert len({line["trainable"] for line in trained.values()}) == 1
    taken = first["turns"]["ours-bfloat16"]
    assert taken.keys() == {"ours-bfloat16", "hf-bfloat16"} and all(len(times) == 2 for times in taken.values())
    assert len(setting["agreement"]) == 3 and setting["build"]["layers"] == 14
    assert "| ours-bfloat16 | bfloat16 |" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning", "ignore:.*not supported on CPU.*")
def test_the_paged_run_of_a_large_shape(qlora, monkeypatch, capsys):
    monkeypatch.setitem(qlora.SHAPES, "65b", qlora.SHAPES["tiny"])
    words = ["--device", "cpu", "--no-liger", "--length", "16", "--steps", "3", "--r", "8", "--plan"]
    qlora.main(["--shape", "65b", *words])
    out = capsys.readouterr().out
    (planned,) = [line for line in out.splitlines() if line.startswith("| ours-float32+checkpointing | 0.00 | 0.06 |")]
    setting = json.loads(out.splitlines()[-1])
    assert planned.endswith("|  |  |")  # nothing is measured on a CPU
    assert setting["arguments"]["paged"] and setting["arguments"]["alpha"] == 16


def test_an_unknown_row_is_told(qlora, capsys):
    with pytest.raises(SystemExit):
        qlora.main(["--rows", "theirs"])
    assert "no row 'theirs'; there are floor, hf-float32" in capsys.readouterr().err


def test_rows_of_hf_peft_run_on_the_layers_of_bitsandbytes_and_ours_on_the_same_tensors(qlora):
    args = argparse.Namespace(r=4, alpha=8, liger=False)
    models = qlora.by_library(qlora.build("tiny", 16, "cpu").model, args)

    def classes(model):
        return {type(layer) for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)}

    assert classes(models["hf"]) == {bnb.nn.Linear4bit}
    assert all(issubclass(cls, Frozen4bit) for cls in classes(models["ours"]))
    a, b = (dict(models[library].named_parameters()) for library in ("ours", "hf"))
    assert a.keys() == b.keys() and all(a[name] is b[name] for name in a)
    with qlora.adapted(models, qlora.ROWS["hf-bfloat16"], args) as outer:
        wrapped = [m for m in outer.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert len(wrapped) == 14 and {type(m) for m in wrapped} == {peft.tuners.lora.bnb.Linear4bit}
        assert {p.dtype for p in outer.parameters() if p.requires_grad} == {torch.bfloat16}


def test_a_decoder_is_made_of_local_text(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script, text = importlib.import_module("pretrain_gpt2_mini"), tmp_path / "reviews.txt"
    text.write_text("\n".join(unlabelled_text(300)) + "\n\n")
    small = ["--layers", "1", "--width", "64", "--pieces", "400", "--positions", "32", "--device", "cpu"]
    script.main(["--text", str(text), "--out", str(tmp_path / "model"), "--steps", "30", "--log-every", "15", *small])
    first, last = (float(line.split()[6]) for line in capsys.readouterr().out.splitlines()[1:3])
    assert last < first < 6  # log(400)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    line = "The film is not dull."
    ids = tokenizer(line, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == line and model(ids).logits.shape == (1, ids.shape[1], 400)
    assert model.config.n_positions == tokenizer.model_max_length == 32 and model.dtype == torch.float32
    with pytest.raises(SystemExit, match="exists"):
        script.main(["--text", str(text), "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit, match="no column 'body'; it has text"):
        script.main(["--text", str(text), "--column", "body", "--out", str(tmp_path / "other")])
