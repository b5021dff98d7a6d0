"""The GPU benchmarks on a toy, so that they run when they are needed."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import bitsandbytes as bnb
import lightning.pytorch as pl
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_peft.core.quantized import Frozen4bit
from lit_peft.demo.text import unlabelled_text
from lit_peft.methods import LoRA
from lit_peft.methods.lora import LoRADelta
from lit_peft.tasks import CausalLanguageModeling


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


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning", "ignore:.*not supported on CPU.*")
def test_turns_with_a_process_of_another_environment(benchmarks, tmp_path, capsys):
    other = tmp_path / "other"
    other.write_text(
        f"""#!{sys.executable}
import json, os, sys
folder = sys.argv[sys.argv.index("--folder") + 1]
assert {{"config.json", "tokenizer.json"}} <= set(os.listdir(folder)) and "PYTHONPATH" not in os.environ
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)
ones = all(bool((p == 1).all()) == (p.dim() == 1) for p in model.parameters())
open({str(tmp_path / "seen")!r}, "w").write("ones: " + str(ones and model.config.intermediate_size == 192))
print(json.dumps({{"trainable": 7, "static_gib": 1.0}}), flush=True)
for line in sys.stdin:
    steps = {{"step_ms": [2.0] * int(line), "peak_gib": 3.0, "loss": 4.0}}
    print(json.dumps(steps), flush=True)
"""
    )
    other.chmod(0o755)
    small = ["--shape", "tiny", "--device", "cpu", "--no-liger", "--batch", "1", "--length", "16", "--turns", "3"]
    words = ["--unsloth", str(other), "--rows", "*autocast", *small, "--warmup", "1", "--steps", "2"]
    benchmarks("unsloth_turns").main(words)
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line == "| unsloth | 2.0 | 2.0 to 2.0 | 1.000 | 1.00 | 3.00 | 4.00 | 7 |"
    ours, theirs = json.loads(last)["rows"]
    assert "ones: True" in (tmp_path / "seen").read_text()
    assert len(ours["step_ms"]) == len(theirs["step_ms"]) == 6 and ours["trainable"] > 0
    other.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="ended with 3"):
        benchmarks("unsloth_turns").main(words)
    with pytest.raises(SystemExit):
        benchmarks("unsloth_turns").main([*words, "--rows", "theirs"])
    assert "no row is named theirs; there are ours-float32-autocast" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("reviews.txt", None, r"--text .*reviews.txt does not exist"),
        ("reviews.txt", b"", "reviews.txt is empty"),
        ("reviews.txt", b" \n\n", "only blank texts"),
        ("reviews.txt", b"One line.\n", "has 1 text, expected two or more"),
        ("reviews.txt", b"<br />\n<br />\n", "has 0 texts, expected two or more"),
        ("reviews.txt", "caf\xe9\nbar\n".encode("latin-1"), "UTF-8"),
        ("reviews.csv", b"body\nGood.\nBad.\n", "No column 'text' in .*reviews.csv; there are: body"),
        ("reviews.jsonl", b'{"text": "Good."}\n{"text": null}\n', "1 text of null, the first in row 2 of 2"),
        ("folder/test.txt", b"Good.\nBad.\n", "no split 'train'; it has 'test'"),
    ],
)
def test_text_that_no_decoder_can_be_made_of_is_told(name, content, message, benchmarks, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if content is not None:
        file.write_bytes(content)
    text = file.parent if "folder" in name else file
    with pytest.raises(SystemExit, match=message):
        benchmarks("pretrain_gpt2_mini").main(["--text", str(text), "--out", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


@pytest.fixture()
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


STUDY = {
    "name": "toy",
    "recipe": "wikitext2/lora_causal",
    "scores": {"nll": 4, "acc": 4},
    "select": "val/nll",
    "methods": ("lora", "bitfit"),
    "theirs": ("lora",),
    "rates": {"bitfit": (5e-3,)},
    "common_rates": (1e-3, 2e-3),
    "several_seeds": ("lora",),
    "retests": {"again": ("", ("--data.stride", "8"))},
    "base_of": ("lora",),
}


def test_a_comparison_goes_on_past_runs_that_fail_and_writes_each_as_it_ends(benchmarks, monkeypatch, tmp_path, capsys):
    comparison = benchmarks("comparison")
    commands: list[list[str]] = []

    def execute(command, root, deadline):
        commands.append(command)
        rate = command[command.index("--model.learning_rate") + 1] if "test" not in command else "1e-3"
        if "--method.biases=none" in command:
            return {"error": "it failed"}
        if rate == "0.005":
            return {"diverged": True}
        scores = {"val/nll": float(rate), "test/nll": 0.25, "test/acc": 0.5, "time/test_s": 3.0}
        if "--base_test" in command and command[command.index("--base_test") + 1] == "true":
            scores |= {"base/test/nll": 2.0, "base/test/acc": 0.125}
        return {"metrics": scores, "run": str(root / "version_0")}

    monkeypatch.setattr(comparison, "execute", execute)
    study = comparison.Study(**STUDY)
    options = comparison.parser(None, study)
    comparison.add_runs(options, study, sweep_train=8)
    words = ["--methods", "lora", "bitfit", "bitfit:biases=none@1e-2", "--out", str(tmp_path), "--parallel", "2"]
    words += ["--extra", "bitfit --model.optimizer torch.optim.SGD", "--", "--data.limit_val", "4", "--method.r", "2"]
    with pytest.raises(SystemExit) as left:
        comparison.compare(study, options.parse_args(words))
    assert str(left.value).startswith("bitfit: no rate of the sweep is left") and "it failed" in str(left.value)
    out = capsys.readouterr().out
    assert "| lora | 0.001: 0.0010, 0.002: 0.0020 |\n| bitfit | 0.005: diverged |" in out
    rows = {line.split(" | ")[0]: line for line in out.splitlines() if line.startswith("|")}
    assert rows["| base"] == "| base |  |  | 2.0000 | 0.1250 |  |"
    assert rows["| lora, again"] == rows["| lora"].replace("lora", "lora, again")
    assert rows["| HF PEFT lora"] == "| HF PEFT lora | 0.001 | 3 | 0.2500 ± 0.0000 | 0.5000 ± 0.0000 | 3.0 |"
    assert json.loads(out.splitlines()[-1])["lora/2"]["test/nll"] == 0.25
    theirs = [command for command in commands if "peft_worker.py" in command[1]]
    assert len(theirs) == 3 and not any("--method.r" in command or "2" in command[-1:] for command in theirs)
    assert all("--data.limit_val" in command for command in theirs)
    assert [c[c.index("--model.optimizer") + 1] for c in commands if "--model.optimizer" in c] == [
        "torch.optim.SGD"
    ] * 2
    lines = tmp_path / "lines.jsonl"
    assert len(lines.read_text().splitlines()) == 3 + 3 * 2 + 1 + 3
    comparison.compare(study, options.parse_args(["--report", str(lines)]))
    again = capsys.readouterr().out
    assert sorted(again.splitlines()[:-1]) == sorted(out.splitlines()[:-1])


def test_a_run_ends_when_time_is_over_or_says_why_it_failed(benchmarks, tmp_path):
    execute, now = benchmarks("comparison").execute, time.monotonic()
    assert execute(["sleep", "60"], tmp_path, now + 0.2) == {"error": "its time was over", "curve": []}
    leaves = f'echo \'{{"curve": [{{"step": 1}}]}}\' > {tmp_path / "monitor.json"}; sleep 60'
    killed = execute(["sh", "-c", leaves], tmp_path, time.monotonic() + 0.5)
    assert killed == {"error": "its time was over", "curve": [{"step": 1}]}
    assert execute(["sleep", "60"], tmp_path, now) == {"error": "no time was left for it"}
    assert execute(["sh", "-c", "echo why; exit 3"], tmp_path)["error"].endswith("exit 3'\nwhy\n")
    assert execute(["sh", "-c", "echo 'Has the training diverged?'; exit 1"], tmp_path) == {"diverged": True}
    assert "error" in execute(["true"], tmp_path)  # it left nothing


def test_hf_peft_trains_a_decoder_by_the_recipe_of_ours(benchmarks, tmp_path, capsys):
    """From equal tensors, without dropout, the losses of both are the same at every step."""
    worker = benchmarks("peft_worker")
    text = unlabelled_text(200)
    for name, part in (("train", text[:160]), ("validation", text[160:180]), ("test", text[180:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part) + "\n")
    words = ["--config", "wikitext2/lora_causal", "--model.backbone", "demo", "--data.path", str(tmp_path)]
    words += ["--data.block_size", "32", "--data.stride", "16", "--data.limit_train", "40", "--data.batch_size", "8"]
    words += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path / "run")]
    recipe = worker.settings(words)
    assert recipe["model"]["init_args"]["learning_rate"] == 1e-3 and recipe["early_stopping"]["patience"] == 3
    ours = CausalLanguageModeling(**recipe["model"]["init_args"])
    theirs, data = worker.task_and_data("lora", recipe)
    factors: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, module):
            self.losses = []
            layers = [m for m in module.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
            if not layers:
                factors.extend(p.detach().clone() for name, p in module.named_parameters() if name.endswith("lora_A"))
            for layer, factor in zip(layers, factors, strict=bool(layers)):
                layer.lora_A["default"].weight.data.copy_(factor)
                layer.lora_dropout["default"].p = 0.0

        def on_train_batch_end(self, trainer, *args):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    losses = []
    for model, method in ((ours, [LoRA(dropout=0.0)]), (theirs, [])):
        pl.seed_everything(0, verbose=False)
        watch = Watch()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        pl.Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, callbacks=[*method, watch], **quiet).fit(
            model, data
        )
        losses.append(watch.losses)
    assert len(losses[0]) == 5 and losses[0][0] != losses[0][-1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len({sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)}) == 1

    worker.main(["lora", *words, "--trainer.accelerator", "cpu"])
    metrics, monitor = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("metrics", "monitor"))
    assert metrics["test/word_perplexity"] > 1 and monitor["metrics"]["steps"] == 5 and len(monitor["curve"]) == 1
    with pytest.raises(ValueError, match=r"--method\.r is no option"):
        worker.settings([*words, "--method.r", "4"])
