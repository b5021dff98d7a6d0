"""What a run says of a quantised base: the table before training, counts, metrics.json, inspect, and memory."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny
from rich.console import Console
from test_cli import SMALL, fit
from torch import nn
from toys import Module, loader, trainer

from lit_peft import LoRA, cli
from lit_peft.callbacks.tables import count_parameters, sites_table
from lit_peft.core import memory
from lit_peft.core.quantize import make_quantizer

NF4 = "nf4 in blocks of 64, double"
GROWTH = 64 << 20


class Plain(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2))


def table(module: nn.Module) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sites_table(module))
    return console.export_text()


@pytest.mark.parametrize(
    "quantize", [None, "nf4", "int8", {"mode": "fp4", "storage_dtype": "float32"}, {"mode": "nf4", "block_size": 128}]
)
def test_packed_weights_count_by_their_logical_shape(quantize):
    model = tiny("distilbert")
    total = sum(p.numel() for p in model.parameters())
    method = LoRA(r=2, target_modules="attention", train_also="classifier", quantize=quantize)
    method.attach(model)
    counts = count_parameters(model)
    adapter = sum(p.numel() for a in method.additions(model).values() for p in a.parameters())
    assert (counts.total, counts.adapter) == (total + adapter, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_says_what_the_base_takes_and_what_was_left_alone(dtype):
    module = Plain().to(dtype)
    trainer(
        LoRA(r=2, target_modules=["net.0", "net.2"], quantize={"mode": "nf4", "skip_modules": "net.0"}),
        max_steps=1,
        precision="bf16-mixed",
    ).fit(module, loader())
    text = table(module)
    size = make_quantizer("nf4").size(128, 128)
    now, dense = (codes / 2**20 for codes in (sum(size), 128 * 128 * dtype.itemsize))
    assert f"Base: 1 layer in {NF4}, {now:.1f} MiB instead of {dense:.1f} MiB in {str(dtype)[6:]}." in text
    assert "Left alone: net.0 (skip_modules names it); net.4 (it is the last layer)." in text


def test_of_a_base_as_it_came_the_table_says_nothing():
    module = Plain()
    LoRA(r=2, target_modules="net.2").attach(module)
    assert "Base:" not in table(module) and "Left alone" not in table(module)


def test_two_kinds_have_a_line_each():
    module = Plain()
    for path, mode in (("net.0", "nf4"), ("net.2", "int8")):
        make_quantizer(mode).quantize(module.get_submodule(path), torch.device("cpu"))
    LoRA(r=2, target_modules="net.2").attach(module)
    lines = [line for line in table(module).splitlines() if line.startswith("Base:")]
    assert [line.partition(",")[0] for line in lines] == [
        "Base: 1 layer in nf4 in blocks of 64",
        "Base: 1 layer in int8 by rows",
    ]


def test_growth_is_told_where_a_block_has_raised_the_largest_size_ever(monkeypatch):
    for sizes, expected in (([(100, 150), (120, 300)], 200), ([(100, 150), (120, 150)], None), ([(0, 0)] * 2, None)):
        found = iter(sizes)
        monkeypatch.setattr(memory, "_resident", lambda found=found: next(found))
        with memory.measured(torch.device("cpu")) as growth:
            pass
        assert (growth.host, growth.device) == (expected, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_growth_is_that_of_a_tensor():
    """In a process of its own: one that has run tests has room for a tensor that it need not ask the system for."""
    script = f"""
import torch
from lit_peft.core import memory
now, most = memory._resident()
with memory.measured(torch.device("cpu")) as growth:
    torch.ones(most - now + {GROWTH}, dtype=torch.uint8)
print(growth.host - (most - now))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(GROWTH, abs=8 << 20)


def test_a_run_tells_its_quantisation(tmp_path, capsys):
    short = ["--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_steps", "1"]
    folder = fit(tmp_path, *short, "--config", "quantize/nf4")
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"Base: 24 layers in {NF4}" in printed
    assert "Left alone: model.pre_classifier, model.classifier (it trains)." in printed
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["quantize"] == NF4
    assert {"memory/load_host_bytes", "memory/load_device_bytes"} <= metrics.keys()
    assert metrics["memory/load_device_bytes"] is None
    for path in (folder, folder / "adapter"):
        cli.main(["inspect", str(path)])
        printed = " ".join(capsys.readouterr().out.split())
        assert f"quantised 24 of these tensors: {NF4}" in printed
    cli.main(["inspect", str(folder / "adapter"), "--json"])
    assert json.loads(capsys.readouterr().out)["base"]["quantized"] == {NF4: 24}


def test_the_method_is_described_without_values(capsys):
    cli.main(["methods", "qlora"])
    printed = capsys.readouterr().out
    assert "quantize (default 'nf4')" in printed and "Learning rate: 0.0002" in printed
    assert "Optimizer: bitsandbytes.optim.PagedAdamW\n" in printed
    assert "of 72,263,426 parameters train" in printed and "Merges into the weights: yes" in printed
