"""`lit-peft merge --into`, `export` and `predict --adapter` of what was trained on a base in 4 bit."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import lightning.pytorch as pl
import peft
import pytest
import torch
import transformers as tf
from models import tiny
from test_cli import SMALL, fit
from test_handover import CPU, TEXTS, Net, Numbers, report, told
from test_merge_quantized import FEW, KINDS
from torch import Tensor

import lit_peft
from lit_peft import LoRA, cli
from lit_peft.core.quantize import make_quantizer, quantizer_of, recognise, stored_as
from lit_peft.demo import ENCODER
from lit_peft.handover import verifying
from lit_peft.handover.trainer import Trainer
from lit_peft.tasks import TextClassification
from lit_peft.testing.conformance import perturb

NF4 = {"mode": "nf4", "compute_dtype": "float32"}
PLAIN = tf.DistilBertForSequenceClassification


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    options = ["--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_epochs", "1"]
    return fit(tmp_path_factory.mktemp("quantised"), *options, "--method.quantize", json.dumps(NF4))


def encoded(texts: list[str] = verifying.TEXTS) -> dict[str, Tensor]:
    found = tf.AutoTokenizer.from_pretrained(ENCODER)(texts, return_tensors="pt", padding=True)
    return {key: found[key] for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def by_hand(run: Path, into: str) -> tuple[Tensor, Tensor]:
    """Logits of fixed texts, as trained and merged: layers dequantised by bitsandbytes' own function, plus s B A."""
    task = TextClassification.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    trained, plain = task.model, PLAIN.from_pretrained(ENCODER, num_labels=2).eval()
    values = {key: value for key, value in trained.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict({k: v for k, v in values.items() if v.is_floating_point()}, strict=False)
    for path in stored_as(trained):
        layer, target = trained.get_submodule(path), plain.get_submodule(path).weight
        state = layer.weight.quant_state
        if into != "original":
            target.copy_(bnb.functional.dequantize_4bit(layer.weight.data, state))
        if hasattr(layer, "peft"):
            delta = layer.peft["default"]
            target.add_(8 / 4 * delta.lora_B @ delta.lora_A)  # alpha is 2 r
            if into == "requantized":
                codes, state = bnb.functional.quantize_4bit(target, compress_statistics=True, quant_type="nf4")
                target.copy_(bnb.functional.dequantize_4bit(codes, state))
    return trained(**encoded()).logits, plain(**encoded()).logits


@pytest.mark.parametrize("into", ["dequantized", "requantized", "original"])
def test_the_difference_from_what_was_trained_is_that_by_hand(into, run, tmp_path, capsys):
    before, after = by_hand(run, into)
    cli.main(["merge", str(run), str(tmp_path / "out"), "--into", into, "--score", "false", *CPU])
    found = report(tmp_path / "out")
    assert found["max_logit_difference"] == pytest.approx((before - after).abs().max().item(), abs=2e-6)
    assert found["largest_logit"] == pytest.approx(before.abs().max().item(), abs=1e-6)
    assert (found["into"], found["base_quantization"]) == (into, {"nf4 in blocks of 64, double": 24})
    assert found["methods"]["default"]["init_args"]["quantize"]["mode"] == "nf4"
    assert (found["max_logit_difference"] < 1e-5) is (into == "dequantized")
    assert found["reloaded_max_logit_difference"] == 0.0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"into {into}: " in printed and "nf4 in blocks of 64, double at 24 layers" in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) is (into == "requantized") and config["dtype"] == "float32"
    if into != "requantized":
        plain = PLAIN.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(plain(**encoded()).logits, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["run", "adapter"])
def test_the_test_set_is_scored_as_trained_and_as_merged_into_the_original(source, run, tmp_path, monkeypatch):
    place = run if source == "run" else run / "adapter"
    cli.main(["merge", str(place), str(tmp_path / "out"), "--into", "original", *CPU])
    found = report(tmp_path / "out")
    scores = json.loads((run / "metrics.json").read_text())
    assert found["rows"] == 32 and found["measured_on"] == "test set"
    for key, value in found["metrics"]["before"].items():
        assert value == pytest.approx(scores[key], abs=1e-6)  # on 4 bit, as the fit scored it
        assert found["metrics"]["difference"][key] == found["metrics"]["after"][key] - value
    assert found["metrics"]["difference"]["test/nll"] != 0
    assert 1e-5 < found["max_logit_difference"] < 0.5


def test_what_is_not_said_is_told_before_the_base_is_read(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tf.AutoModelForSequenceClassification, "from_pretrained", None)
    answer = told(capsys, "merge", run, tmp_path / "out", *CPU)
    assert "say into what its adapter is to be folded (--into). dequantized: the base as training saw it" in answer
    answer = told(capsys, "merge", run, tmp_path / "out", "--into", "dequantised", *CPU)
    assert (
        "into: expected one of original, dequantized, requantized, not 'dequantised'. Did you mean 'dequantized'?"
        in answer
    )
    assert not list(tmp_path.iterdir())


def test_a_base_that_comes_in_4_bit_has_no_original(run, tmp_path, capsys):
    config = make_quantizer(NF4).loading_config(["classifier", "pre_classifier"])
    base = PLAIN.from_pretrained(ENCODER, num_labels=2, quantization_config=config)
    base.save_pretrained(tmp_path / "base")
    tf.AutoTokenizer.from_pretrained(ENCODER).save_pretrained(tmp_path / "base")
    LoRA(r=2, train_also=["pre_classifier", "classifier"]).attach(base)
    lit_peft.save(base, tmp_path / "adapter")
    words = ["merge", tmp_path / "adapter", tmp_path / "out", "--model.backbone", tmp_path / "base", *CPU]
    assert "say into what its adapter is to be folded" in told(capsys, *words)
    answer = told(capsys, *words, "--into", "original")
    assert "the base itself is stored quantised, nf4 in blocks of 64, double: its original weights are not" in answer
    cli.main([*map(str, words), "--into", "dequantized"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# ------------------------------------------------------------------------------------- modules of somebody's own


def trainer(method: pl.Callback) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return Trainer(callbacks=[method], accelerator="cpu", max_epochs=1, **quiet)


def lora(quantize: Any = NF4) -> LoRA:
    return LoRA(r=2, dropout=0.0, target_modules=["query"], train_also=["encoder.classifier"], quantize=quantize)


class Trained(Net):
    def training_step(self, batch, _):
        return self.encoder(input_ids=batch).logits.square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Rows(Numbers):
    train_dataloader = Numbers.test_dataloader


@pytest.mark.parametrize("kind", [kind for kind in FEW if kind != "int8"])
@pytest.mark.parametrize("into", ["dequantized", "requantized", "original"])
def test_a_module_that_is_built_at_once_is_merged_from_its_checkpoint(into, kind, tmp_path):
    module = Trained()
    runs = trainer(lora(KINDS[kind]))
    runs.fit(module, Rows())
    runs.save_checkpoint(tmp_path / "run.ckpt")
    trained: Any = module.eval().encoder
    expected = trained(input_ids=torch.arange(6)[None]).logits
    fresh: Any = Trained()
    trainer(lora(KINDS[kind])).merge(
        fresh, Rows(), str(tmp_path / "out"), into=into, ckpt_path=str(tmp_path / "run.ckpt")
    )
    found = report(tmp_path / "out")
    assert (found["rows"], found["into"]) == (8, into) and found["base_quantization"]
    again = tf.BertForSequenceClassification.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    if into == "original":
        query, layer = (m.bert.encoder.layer[0].attention.self.query for m in (again, trained))
        delta = layer.peft["default"]
        W = tiny("bert").bert.encoder.layer[0].attention.self.query.weight
        torch.testing.assert_close(query.weight, W + delta.scaling * delta.lora_B @ delta.lora_A)
    elif into == "dequantized":
        torch.testing.assert_close(again.eval()(torch.arange(6)[None]).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_no_file_holds_has_no_original(tmp_path):
    module, method = Net(), lora()
    with pytest.raises(ValueError, match="was trained in memory, and no checkpoint is given"):
        trainer(method).merge(module, Numbers(), str(tmp_path / "out"), into="original")
    method.attach(module)
    with pytest.raises(ValueError, match="is quantised already: its original weights are not in it"):
        trainer(method).merge(module, Numbers(), str(tmp_path / "out"), into="original", ckpt_path="run.ckpt")
    perturb(module)
    trainer(method).merge(module, Numbers(), str(tmp_path / "out"), into="dequantized")
    assert report(tmp_path / "out")["max_logit_difference"] < 1e-5


# --------------------------------------------------------------------------------------------- export and serving


def test_the_adapter_is_exported_for_hf_peft_on_a_base_of_bitsandbytes(run, tmp_path):
    cli.main(["export", str(run), str(tmp_path / "out"), *CPU])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    task = TextClassification.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    config = make_quantizer(NF4).loading_config(["classifier", "pre_classifier"])
    base = PLAIN.from_pretrained(ENCODER, num_labels=2, quantization_config=config)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    for layer in opened.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # or this machine would compute otherwise than another
    found = opened.eval()(**encoded()).logits
    torch.testing.assert_close(found, task(encoded()), rtol=1e-4, atol=1e-5)


def opened_by_the_lines(printed: str) -> tuple[str, Any]:
    """The first of the lines that `export` printed, and the model that the others make."""
    first, *code = printed[printed.index("Adapter: ") :].strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in code), names)
    return first, names["model"].eval()


def test_the_lines_that_export_prints_quantise_the_base_as_it_was(run, tmp_path, capsys):
    cli.main(["export", str(run), str(tmp_path / "out"), *CPU])
    first, model = opened_by_the_lines(capsys.readouterr().out)
    assert first.endswith("in Hugging Face PEFT, trained on a base in nf4 in blocks of 64, double")
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # or this machine would compute otherwise than another
    task = TextClassification.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert len(layers) == len(stored_as(task)) == 24
    torch.testing.assert_close(model(**encoded()).logits, task(encoded()), rtol=1e-4, atol=1e-5)


def quantised(model: torch.nn.Module) -> list[str]:
    """How each quantised layer is stored, in the order of the model; HF PEFT has other paths for them."""
    recognise(model)
    return [str(vars(found)) for layer in model.modules() if (found := quantizer_of(layer)) is not None]


class Classifier(pl.LightningModule):
    """A classifier that is read from a folder, which its lines name then."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net = PLAIN.from_pretrained(folder, num_labels=2)

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)


@pytest.mark.parametrize("kind", ["int8", "scales as they are", "blocks of 128", "compute_dtype: auto"])
def test_what_quantises_the_base_is_told_with_its_options_or_in_a_sentence(kind, tmp_path, capsys):
    options = {
        "int8": {"mode": "int8", "threshold": 5.0},
        "scales as they are": NF4 | {"double_quant": False},
        "blocks of 128": NF4 | {"block_size": 128},
        "compute_dtype: auto": NF4 | {"compute_dtype": "auto"},
    }[kind]
    module = Classifier(Path(ENCODER))
    heads = ["pre_classifier", "classifier"]
    method = LoRA(r=2, train_also=[f"net.{head}" for head in heads], quantize=options)
    method.attach(module)
    perturb(module)
    trainer(method).export(module, None, str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert f"trained on a base in {make_quantizer(options).stored_as}\n" in printed
    if kind == "blocks of 128":
        assert "Quantise the base in the same way, or the answers differ" in printed and "BitsAndBytes" not in printed
        return
    assert "Quantise the base" not in printed
    _, model = opened_by_the_lines(printed)
    assert len(stored_as(module)) == 24
    auto = kind == "compute_dtype: auto"
    assert ("# compute_dtype was auto: set bnb_4bit_compute_dtype" in printed) is auto
    assert auto or quantised(model) == quantised(module.net)  # transformers has no such word


def test_a_base_that_comes_in_4_bit_needs_no_more_words(tmp_path, capsys):
    config = make_quantizer(NF4).loading_config(["classifier", "pre_classifier"])
    PLAIN.from_pretrained(ENCODER, num_labels=2, quantization_config=config).save_pretrained(tmp_path / "base")
    module = Classifier(tmp_path / "base")
    method = LoRA(r=2)
    method.attach(module)
    trainer(method).export(module, None, str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "trained on a base in nf4" in printed and "Quantise" not in printed and "BitsAndBytes" not in printed
    _, model = opened_by_the_lines(printed)
    assert len(quantised(model)) == 24


def answers(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What `predict --text` prints."""
    capsys.readouterr()
    asked = [word for text in TEXTS for word in ("--text", text)]
    cli.main(["predict", *map(str, arguments), *asked, "--trainer.accelerator", "cpu"])
    return [line for line in capsys.readouterr().out.splitlines() if line.endswith(tuple(TEXTS))]


@torch.no_grad()
def expected(folder: Path, quantize: Any) -> list[str]:
    task = TextClassification(label_names=["negative", "positive"])
    lit_peft.load(task, folder, quantize=quantize)
    rows = task.eval()(encoded(TEXTS)).softmax(-1)
    return [
        f"{['negative', 'positive'][int(row.argmax())]}  {row.max():.4f}  {text}"
        for row, text in zip(rows, TEXTS, strict=True)
    ]


@pytest.mark.parametrize("of_run", [True, False])
def test_an_adapter_predicts_on_the_base_that_it_is_given(of_run, run, tmp_path, capsys):
    """As in training where nothing is said, else as it is said: in 4 bit, in 8, or in floats."""
    task = TextClassification(label_names=["negative", "positive"])
    task.configure_model()
    LoRA(r=4, dropout=0.0).attach(task)
    perturb(task)
    plain = lit_peft.save(task, tmp_path / "adapter")
    whole = ["--run", run] if of_run else []  # whose own method has a `quantize`, that is not the adapter's
    assert answers(capsys, *whole, "--adapter", plain) == expected(plain, None)
    nf4 = ["--config", "quantize/nf4", "--method.quantize.compute_dtype", "float32"]
    for given, quantize in ((nf4, NF4), (["--method.quantize", "int8"], "int8")):
        assert answers(capsys, *whole, "--adapter", plain, *given) == expected(plain, quantize)
    assert expected(plain, NF4) != expected(plain, None)
    quantised = run / "adapter"
    assert answers(capsys, *whole, "--adapter", quantised) == expected(quantised, NF4)
    assert answers(capsys, *whole, "--adapter", quantised, "--method.quantize", "null") == expected(quantised, None)


def test_a_test_of_a_run_on_other_storage_is_refused_and_names_the_way(run, capsys):
    words = ["test", "--run", str(run), "--method.quantize", "int8", *CPU]
    answer = told(capsys, *words)
    assert "made with LoRA(quantize='nf4'), not 'int8'" in answer
    assert f"give the run's adapter and no checkpoint: --adapter {run / 'adapter'}; in Python, lit_peft.load(" in answer
    capsys.readouterr()
    with pytest.warns(UserWarning, match="by what quantising rounds"):
        cli.main([*words, "--adapter", str(run / "adapter")])
    assert "test/nll" in capsys.readouterr().out
