"""`lit-peft inspect`: what a file is, without its base, and told as `load` tells it where it is damaged."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from models import tiny
from mutations import OURS, Files, mutated
from test_cli import SMALL, fit
from test_damaged_folders import FAMILIES, THEIRS, outcome, whole
from toys import Module, net_lora, saved

import lit_peft
from lit_peft.cli import main
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.registry import registry
from lit_peft.inspecting import inspect
from lit_peft.inspecting_text import as_text
from lit_peft.methods.registry import available


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {family: lit_peft.save(make(), tmp_path_factory.mktemp(family)) for family, (_, make) in FAMILIES.items()}


def said(capsys, *words: str) -> str:
    """What a mistake prints."""
    with pytest.raises(SystemExit) as end:
        main(["inspect", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) <= 3 and error.startswith("lit-peft: ")
    return error


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_each_method(family, folders):
    found = inspect(folders[family])
    (adapter,) = found["adapters"].values()
    module = FAMILIES[family][1]()
    record = registry(module).adapters["default"]
    own = {name: p for name, p in module.named_parameters() if ".peft." in name}
    assert adapter["method"] == family and adapter["class_path"] == f"lit_peft.methods.{family}"
    assert adapter["arguments"].keys() | adapter["defaults"].keys() == record.spec["init_args"].keys() - {"name"}
    if family not in ("SparseLoRA", "AdaLoRA", "VeRA", "BitFit", "LinearProbe", "PTuning"):
        assert adapter["parameters"] == sum(p.numel() for p in own.values())
        assert sum(site["count"] for site in adapter["sites"]) == max(1, len(record.sites)) or "Prefix" in family
    if family not in ("BitFit", "LinearProbe"):
        assert adapter["dtypes"] == ["float32"] and adapter["bytes"] == 4 * adapter["parameters"]
    assert sum(group["count"] for group in found["trained"]) == len(record.base)
    assert found["base"]["tensors"] > 10 and len(found["base"]["fingerprint"]) == 12
    assert json.loads(json.dumps(found)) == found
    assert family in as_text(found)


def test_what_differs_from_the_defaults_stands_first(folders):
    (adapter,) = inspect(folders["LoRA"])["adapters"].values()
    assert adapter["arguments"] == {
        "r": 4,
        "alpha": 6,
        "rank_pattern": {"*.0.*q_lin": 2},
        "alpha_pattern": {"*.1.*v_lin": 5},
        "target_modules": ["q_lin", "v_lin"],
        "train_also": ["pre_classifier", "classifier"],
    }
    assert adapter["sites"][0] == {
        "paths": "distilbert.transformer.layer.0.attention.q_lin",
        "count": 1,
        "tensors": {"lora_A": [2, 16], "lora_B": [16, 2]},
    }
    assert {site["paths"]: site["count"] for site in adapter["sites"][1:]} == {
        "distilbert.transformer.layer.{0-1}.attention.v_lin": 2,
        "distilbert.transformer.layer.1.attention.q_lin": 1,
    }


@pytest.mark.parametrize("name", available())
def test_defaults_read_from_the_source_are_those_of_the_class(name):
    entry = available()[name]
    plain = {k: p.default for k, p in entry.load().parameters().items() if p.default is not p.empty}
    assert entry.defaults().items() >= plain.items()
    assert entry.class_attribute("hf_peft") == getattr(entry.load(), "hf_peft", None)


def test_what_is_pruned(folders, tmp_path):
    (sparse,) = inspect(folders["SparseLoRA"])["adapters"].values()
    assert 0.1 < sparse["zeros"] < 0.6
    (ranked,) = inspect(folders["AdaLoRA"])["adapters"].values()
    assert (ranked["ranks_left"], ranked["ranks"]) == (3 + 2 + 1 + 1, 16)  # a layer has one, if only of zeros
    assert "7 of 16 ranks are left" in as_text(inspect(folders["AdaLoRA"]))
    method = lit_peft.AdaLoRA(init_r=4, target_r=2, target_modules=["net.first", "net.second"])
    (ranked,) = inspect(saved(tmp_path, Module(), method))["adapters"].values()
    assert (ranked["ranks_left"], ranked["ranks"]) == (4, 8)


def test_a_checkpoint_of_several_adapters(tmp_path):
    method = net_lora(train_also=["head"])
    path = saved(tmp_path, Module(), method, net_lora(r=3, name="other"))
    found = inspect(path)
    assert (found["kind"], found["epoch"], found["step"], found["resumes"]) == ("checkpoint", 1, 4, True)
    assert {name: adapter["parameters"] for name, adapter in found["adapters"].items()} == {
        "default": 2 * (4 + 8 + 8 + 8),
        "other": 3 * (4 + 8 + 8 + 8),
    }
    assert [group["names"] for group in found["trained"]] == ["net.head.weight", "net.head.bias"]
    lines = as_text(found).splitlines()
    assert lines[0] == f"{path}: checkpoint, lit-peft {lit_peft.__version__}, format 1, {path.stat().st_size:,} bytes"
    assert "  method      LoRA (lit_peft.methods.LoRA), adapter 'other'" in lines
    assert "  trained     epoch 1, 4 steps; a fit can go on from it" in lines


@pytest.mark.parametrize("family", THEIRS)
def test_a_folder_of_hf_peft(family, tmp_path):
    name, config = THEIRS[family]
    peft.get_peft_model(tiny(name), config, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    (adapter,) = found["adapters"].values()
    assert found["written_by"] == f"HF PEFT {peft.__version__}" and "fingerprint" not in found["base"]
    assert adapter["peft_type"] == config.peft_type.value and adapter["method"] == family
    assert adapter["parameters"] > 0 and f"opens as lit_peft.methods.{family}" in as_text(found)


# ----------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return fit(root, "--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_epochs", "1")


def test_a_run_its_checkpoint_and_its_adapter(run, capsys):
    main(["inspect", str(run), "--json"])
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((run / "metrics.json").read_text())
    (adapter,) = found["adapters"]
    assert found["kind"] == "run" and found["metrics"] == metrics
    assert found["checkpoint"]["path"] == str(run / "checkpoints" / "best.ckpt")
    # The same base, labels and scores, whichever file is asked.
    assert adapter["base"]["fingerprint"] == found["checkpoint"]["base"]["fingerprint"]
    assert adapter["labels"] == found["checkpoint"]["labels"] == ["negative", "positive"]
    assert adapter["metrics"] == {key: value for key, value in metrics.items() if key.startswith(("val/", "test/"))}
    assert found["checkpoint"]["metrics"]["val/nll"] == pytest.approx(metrics["val/nll"], rel=1e-4)
    main(["inspect", str(run)])
    text = capsys.readouterr().out
    assert f"{run}: run\n" in text and f"adapter     {run}/adapter: LoRA, " in text
    assert re.search(r"sites +model\.distilbert\.transformer\.layer\.\{0-3\}\.attention\.q_lin x4: lora_A", text)


def test_a_folder_needs_neither_torch_nor_lightning(run):
    code = (
        "import sys, time; from lit_peft.cli import main; main(['inspect', sys.argv[1]]); "
        "print([m for m in ('torch', 'lightning', 'transformers', 'peft') if m in sys.modules])"
    )
    for path, needs in ((run / "adapter", "[]"), (run / "checkpoints" / "best.ckpt", "['torch']")):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == needs


# ---------------------------------------------------------------------------------------- what is something else


def test_what_is_something_else_is_told(run, folders, tmp_path, capsys):
    assert "Did you mean 'adapter'?" in said(capsys, str(run / "adaptr"))
    assert f"The newest in it: lit-peft inspect {run}" in said(capsys, str(run.parent))
    (tmp_path / "empty").mkdir()
    assert "is no run and no adapter: it has no adapter_config.json" in said(capsys, str(tmp_path / "empty"))
    tiny("distilbert").save_pretrained(tmp_path / "merged")
    assert "a whole model of transformers (DistilBertForSequenceClassification) and no adapter" in said(
        capsys, str(tmp_path / "merged")
    )
    torch.save({"state_dict": {"a": torch.ones(1)}, "pytorch-lightning_version": "2.6"}, tmp_path / "plain.ckpt")
    assert "is a checkpoint of Lightning 2.6 that no lit-peft method wrote" in said(
        capsys, str(tmp_path / "plain.ckpt")
    )
    (tmp_path / "notes.txt").write_text("none")
    assert "is no checkpoint, or is cut off" in said(capsys, str(tmp_path / "notes.txt"))
    shutil.copytree(folders["LoRA"], tmp_path / "bin")
    (tmp_path / "bin" / "adapter_model.safetensors").rename(tmp_path / "bin" / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in said(capsys, str(tmp_path / "bin"))
    assert "inspect has no option '--jsn'" in said(capsys, str(run), "--jsn")
    assert "inspect takes one path" in said(capsys)
    assert inspect(folders["LoRA"] / "adapter_model.safetensors") == inspect(folders["LoRA"])


@pytest.mark.parametrize("family", ["LoRA", "PTuning", "BottleneckAdapter"])
def test_damage_is_told_as_load_tells_it(family, folders, tmp_path):
    subject, told = whole(FAMILIES[family][0], folders[family]), 0
    for number in range(60):
        done, files = mutated(Files.read(folders[family]), random.Random(f"inspect {number}"), OURS)
        result = outcome(subject, files, folder := tmp_path / "folder")
        try:
            as_text(inspect(folder))
        except (CheckpointMismatch, FileNotFoundError) as error:
            assert str(folder) in str(error)
            told += 1
            assert result == "refused", done
        else:
            assert result == "same", done
    assert 30 < told < 60


def test_an_edited_checkpoint_never_ends_in_a_traceback(tmp_path):
    from test_edited_checkpoints import method
    from test_edited_checkpoints import mutated as edit

    content, told = torch.load(saved(tmp_path, Module(), method())), 0
    for number in range(120):
        torch.save(edit(content, random.Random(number)), tmp_path / "edited.ckpt")
        try:
            as_text(inspect(tmp_path / "edited.ckpt"))
        except CheckpointMismatch as error:
            assert "edited.ckpt" in str(error)
            told += 1
    assert 20 < told < 100


def test_who_has_read_enough_sees_no_traceback(folders):
    command = [sys.executable, "-m", "lit_peft.cli", "inspect", "--json", str(folders["LoRA"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == ""
    assert process.returncode == 0
