"""A quantiser of another package: the example, by entry point, under methods, in checkpoints and folders; the docs."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import logits, tiny
from test_cli import SMALL
from test_cli import fit as cli_fit
from toys import Module, adapters, fit

import lit_peft
from lit_peft import DoRA, HiRA, LoRA, cli
from lit_peft.core import quantize as core
from lit_peft.core.layers import layer_ops

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the example's package were installed."""
    declared = re.search(r'^    rows8 = "(.+)"$', PAGE, re.MULTILINE)
    points = [*core.entry_points(group=core.GROUP), EntryPoint("rows8", declared[1], core.GROUP)]
    monkeypatch.setattr(core, "entry_points", lambda group: points)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_it_rounds_to_its_grid_and_says_its_size():
    model = tiny("distilbert")
    weight = model.distilbert.transformer.layer[0].ffn.lin1.weight.detach().clone()
    LoRA(r=2, quantize={"mode": "rows8", "bits": 5}).attach(model)
    layer = model.distilbert.transformer.layer[0].ffn.lin1
    step = weight.abs().amax(1, keepdim=True) / 15
    assert ((layer_ops(layer).matrix(layer) - weight).abs() <= step * 0.501).all()
    size = core.make_quantizer("rows8").size(*weight.shape)
    assert sum(size) == sum(t.numel() * t.element_size() for t in layer_ops(layer).stored(layer))


@pytest.mark.parametrize("method", [LoRA, DoRA, HiRA])
def test_methods_train_resume_and_load_on_it(method, tmp_path):
    def make(**options):
        quantize = {"mode": "rows8", **options}
        return method(r=2, dropout=0.0, target_modules=["net.first", "net.second"], quantize=quantize)

    whole, half, resumed = Module(), Module(), Module()
    fit(whole, make(), max_epochs=3)
    fit(half, make(), ModelCheckpoint(tmp_path, "{epoch}"), max_epochs=2)
    fit(resumed, make(), max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    ours, theirs = adapters(resumed), adapters(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert set(core.stored_as(whole).values()) == {"8 bits by rows"}
    with pytest.raises(ValueError, match="quantize"):  # other codes are another base
        fit(Module(), make(bits=5), max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")


def test_a_folder_brings_it_along(tmp_path):
    model = tiny("distilbert")
    base = tiny("distilbert")
    base.load_state_dict(model.state_dict())
    LoRA(r=2, quantize="rows8").attach(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    lit_peft.save(model, tmp_path)
    lit_peft.load(base, tmp_path)
    assert torch.equal(logits(base.eval(), "distilbert"), logits(model.eval(), "distilbert"))


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_it_merges_as_it_is_told(into):
    torch.manual_seed(0)
    model = tiny("distilbert").eval()
    LoRA(r=2, target_modules="ffn", quantize="rows8").attach(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model.eval()
    before = logits(model, "distilbert")
    lit_peft.merge(model, into=into)
    after = logits(model, "distilbert")
    assert torch.allclose(after, before, atol=1e-5 if into == "dequantized" else 1e-2)
    lit_peft.unmerge(model)
    assert torch.equal(logits(model, "distilbert"), before)


def test_the_command_line_knows_it(tmp_path, capsys):
    short = ["--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_steps", "1"]
    cli_fit(tmp_path, *short, "--method.quantize", "rows8", "--method.quantize.bits", "4")
    assert "Base: 24 layers in 4 bits by rows," in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit):
        cli.main(["fit", *short, "--method.quantize.mode", "rows8", "--method.quantize.bits", "9"])
    assert "quantize: bits is 9, expected 2 to 8." in capsys.readouterr().err


@pytest.mark.parametrize("source", re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S))
def test_python_of_the_page_runs(source):
    found: dict = {}
    exec(compile(source, "quantization.md", "exec"), found)
    assert core.stored_as(found["net"]) == dict.fromkeys(("0", "2"), "nf4 in blocks of 64, double")


@pytest.mark.parametrize("command", re.findall(r"^    lit-peft (fit .*)$", PAGE, re.MULTILINE))
def test_commands_of_the_page_run(command, tmp_path):
    words = command.split()
    folder = cli_fit(tmp_path, *words[1:], "--config", "offline", *SMALL, "--trainer.max_steps", "1")
    assert (folder / "metrics.json").exists()
