"""`lit-peft plan`: a configuration without its weights and data, beside alternatives; modules of one's own."""

import json

import lightning.pytorch as pl
import pytest
from rich.console import Console

from lit_peft.callbacks import PeakPrediction
from lit_peft.callbacks.memory import predict
from lit_peft.callbacks.tables import _figures
from lit_peft.cli import main
from lit_peft.core.weightless import without_weights
from lit_peft.data import TextClassificationDataModule
from lit_peft.methods import LoRA
from lit_peft.planning import plan as plan_step
from lit_peft.planning.plan import Plan
from lit_peft.planning.text import fits, table
from lit_peft.tasks import TextClassification


@pytest.fixture
def plan(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        monkeypatch.setattr("sys.argv", ["lit-peft", "plan", *words])
        main(["plan", *words])
        return capsys.readouterr().out

    return run


def test_json_of_a_recipe_reads_no_weights(plan, monkeypatch, tmp_path):
    import transformers

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", None)
    found = json.loads(plan("--config", "quickstart", "--gpu", "24GiB", "--json", "--data.path", "nowhere.csv"))
    assert found["batch"] == [32, 64]
    first, *others = found["plans"]
    assert first["name"] == "LoRA r 4, float32"
    assert {p["name"] for p in others} == {"LoRA r 4, int8", "LoRA r 4, nf4", "FullFineTuning, float32"}
    assert first["fits"] is True
    assert first["adapters"] < 0.1 * others[-1]["adapters"]
    assert [*tmp_path.iterdir()] == []  # no run has begun


def test_the_table_says_what_fits(plan):
    said = plan("--config", "quickstart", "--gpu", "520MiB", "--alternatives", "false", "--method", "QLoRA")
    said = " ".join(said.split())
    assert "on one GPU: a batch of 32 x 64, the longest that data.max_length allows" in said
    assert "fits │ no peak is what torch.cuda.max_memory_allocated will say" in said
    assert "512.0 MiB more goes to CUDA itself, which `fits` counts: whether it fits 520MiB, 520.0 MiB." in said


@pytest.mark.parametrize(
    ("size", "limit", "notes"),
    [
        ("64", "data.block_size", []),
        ("null", "the model", []),
        (
            "100000",
            "the model",
            ["data.block_size is 100,000; texts have at most 128 tokens, which is what the model takes."],
        ),
    ],
)
def test_what_limits_a_block_is_told(plan, size, limit, notes):
    words = ["--config", "quickstart_lm", "--alternatives", "false", "--data.block_size", size]
    found = json.loads(plan(*words, "--json"))
    assert found["batch"] == [8, 64 if size == "64" else 128]
    assert (found["limit"], found["plans"][0]["notes"]) == (limit, notes)
    said = " ".join(plan(*words).split())
    assert f"the longest that {limit} allows" in said and all(note in said for note in notes)


def test_the_table_is_whole_where_a_terminal_has_80_columns(capsys):
    names = ["BottleneckAdapter, float32", "BottleneckAdapter, int8", "LoRA r 16, nf4", "FullFineTuning, float32"]
    sizes = [3 << 10, 5 << 20, 1023 << 20, 37 << 30, 0, 100 << 30]
    plans = [Plan(name, *sizes, 0, peak=103 << 30) for name in [*names, names[0]]]
    Console(width=80).print(table(plans, "Title", ("NVIDIA GeForce RTX 4090", 24 << 30)), highlight=False)
    said = capsys.readouterr().out
    assert "…" not in said
    rows = {line.partition("│")[0].strip(): line for line in said.splitlines() if "│" in line}
    assert (
        rows["base"].count("3.0 KiB") == rows["gradients"].count("37.00 GiB") == rows["peak"].count("103.00 GiB") == 5
    )
    assert rows["fits"].count("no") == 5
    headers = [line.split("┃")[1:] for line in said.splitlines() if "┃" in line]
    assert ["".join(part.strip() for part in column) for column in zip(*headers, strict=True)][:4] == [
        name.replace(", ", ",") for name in names
    ]


def test_a_run_is_planned_by_its_own_configuration(plan, monkeypatch, tmp_path):
    """A fit writes every option that it has into it."""
    words = ["fit", "--config", "quickstart", "--trainer.max_steps", "1", "--base_test", "false", "--method.r", "2"]
    words += [w for name in ("train", "val", "test") for w in (f"--data.limit_{name}", "8")]
    monkeypatch.setattr("sys.argv", ["lit-peft", *words])
    main(words)
    said = plan("--run", str(tmp_path / "runs/quickstart/version_0"), "--json", "--alternatives", "false")
    found = json.loads(said[said.rindex("\n{\n") :])  # behind what the fit has printed
    assert [p["name"] for p in found["plans"]] == ["LoRA r 2, float32"]


def test_a_task_is_planned_in_bfloat16_throughout(plan):
    """Its metrics, which keep float64 whatever the module is cast to, are copied without values."""
    words = ["--config", "quickstart", "--json", "--alternatives", "false", "--method", "FullFineTuning"]
    plain, half = (json.loads(plan(*words, *more))["plans"][0] for more in ([], ["--trainer.precision", "bf16-true"]))
    assert half["name"] == "FullFineTuning, bfloat16"
    assert half["gradients"] == pytest.approx(plain["gradients"] / 2, rel=0.01)
    assert half["activations"] < 0.6 * plain["activations"]


@pytest.mark.filterwarnings("error:.*fp16 is not supported on CPU")
def test_float16_is_planned_though_the_cpu_that_plans_has_it_not(plan):
    found = json.loads(plan("--config", "quickstart", "--json", "--trainer.precision", "16-mixed"))
    assert found["precision"] == "16-mixed"


def test_an_unknown_gpu_ends_with_the_nearest(plan, capsys):
    with pytest.raises(SystemExit) as end:
        plan("--config", "quickstart", "--gpu", "H10O")
    assert end.value.code == 2
    assert "'H10O' is not known. Did you mean 'H100'?" in capsys.readouterr().err


OWN = """
import lightning.pytorch as pl, torch
from torch import nn

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch, i):
        x, y = batch
        loss = nn.functional.cross_entropy(self.layers(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(pl.LightningDataModule):
    def __init__(self, broken: bool = False):
        super().__init__()
        self.broken = broken

    def train_dataloader(self):
        if self.broken:
            raise RuntimeError("no file here")
        rows = [(torch.zeros(32), 0)] * 8
        return torch.utils.data.DataLoader(rows, batch_size=4)
"""


def test_a_module_of_ones_own_is_planned_with_its_own_batch_and_optimizer(plan, monkeypatch, tmp_path):
    (tmp_path / "plan_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model", "plan_own.Net", "--data", "plan_own.Data", "--method", "LoRA", "--json"]
    words += ["--method.target_modules", "layers.0", "--method.r", "2"]
    found = json.loads(plan(*words))
    assert (found["batch"], found["longest"]) == ([4, 32], False)
    assert found["plans"][0]["optimizer"] == 0  # SGD keeps nothing


def test_data_that_cannot_be_had_are_told(plan, capsys, monkeypatch, tmp_path):
    (tmp_path / "plan_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        plan("--model", "plan_own.Net", "--data", "plan_own.Data", "--data.broken", "true", "--method", "LoRA")
    told = capsys.readouterr().err
    assert "Data.train_dataloader does not work without a trainer (RuntimeError: no file here)" in told


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("return None", "training_step of Net returns no loss"),
        ("self.optimizers().step()", "training_step of Net asks for its trainer, and there is none"),
        ("return batch[0].sum().item()", "a step of Net depends on the values of its batch"),
    ],
)
def test_steps_that_cannot_be_made_are_told(plan, capsys, monkeypatch, tmp_path, step, told):
    name = f"plan_step_{len(step)}"  # a module of its own: Python keeps those that it has imported
    (tmp_path / f"{name}.py").write_text(OWN.replace("x, y = batch", step))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model", f"{name}.Net", "--data", f"{name}.Data", "--method", "LoRA"]
    with pytest.raises(SystemExit):
        plan(*words, "--method.target_modules", "layers.0")
    assert told in capsys.readouterr().err


def test_cuda_itself_counts():
    plan = Plan("x", 0, 0, 0, 0, 0, 0, 0, peak=23 << 30)
    assert fits(plan, ("L4", 24 << 30)) and not fits(plan, ("L4", int(23.4 * 2**30))) and fits(plan, None) is None


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_fitted_module_is_planned_for_what_it_trained_on(tmp_path, quantize):
    """As a run on a GPU does when it ends; the plan of the same step before it is the same."""
    task = TextClassification(backbone="demo", label_names=["negative", "positive"], class_weights=[0.4, 0.6])
    data = TextClassificationDataModule(path="demo", limit_train=8, limit_val=8, max_length=32, batch_size=4)
    method = LoRA(r=4, quantize=quantize)
    trainer = pl.Trainer(
        callbacks=[method, PeakPrediction()], max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path
    )
    trainer.fit(task, data)
    assert trainer.callbacks[1].predicted_bytes is None  # on a CPU
    found = predict(trainer, task, task.sample(4, 32))

    again = TextClassification(backbone="demo", label_names=["negative", "positive"], class_weights=[0.4, 0.6])
    with without_weights():
        again.configure_model()
    assert all(p.is_meta for p in again.model.parameters())
    before = plan_step(again, LoRA(r=4, quantize=quantize), again.sample(4, 32))
    assert found == pytest.approx(before.peak, abs=8 * 512)  # class weights


def test_a_step_that_needs_its_trainer_leaves_no_figure(tmp_path):
    class Task(TextClassification):
        def training_step(self, batch, i):
            assert self.trainer is not None
            return super().training_step(batch, i)

    task = Task(backbone="demo", label_names=["negative", "positive"])
    data = TextClassificationDataModule(path="demo", limit_train=8, limit_val=8, max_length=32, batch_size=4)
    trainer = pl.Trainer(callbacks=[LoRA(r=4)], max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.fit(task, data)
    assert predict(trainer, task, task.sample(4, 32)) is None


def test_the_summary_shows_the_plan_beside_the_peak():
    figures = {"time/train_s": 1.0, "memory/peak_bytes": 2**30, "memory/predicted_bytes": 1.25 * 2**30}
    assert "peak memory 1.00 GiB (planned 1.25)" in dict(_figures(figures))["training"]


def test_of_a_perplexity_without_meaning_the_magnitude_is_shown():
    figures = {"test/perplexity": 41.987, "base/test/perplexity": 25234.5, "test/word_perplexity": 1.74e26}
    shown = dict(_figures(figures))
    assert shown == {"test perplexity": "41.99   (before training 25,234.50)", "by word": "1.7e+26"}
