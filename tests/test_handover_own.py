"""`merge` and `export` of somebody's own modules, data and callbacks, which do what ours do not."""

import itertools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from filelock import FileLock
from models import tiny
from torch.utils.data import DataLoader

from lit_peft import LoRA
from lit_peft.callbacks.logits import LogitsComparison
from lit_peft.handover.trainer import Trainer
from lit_peft.handover.verifying import find_tokenizer, fixed_inputs
from lit_peft.testing.conformance import perturb

ROWS = torch.arange(48).reshape(8, 6)


class Net(pl.LightningModule):
    """A model of transformers, and what a test asks it."""

    def __init__(self, name: str = "bert") -> None:
        super().__init__()
        self.net: Any = tiny(name)

    def test_step(self, batch, _):
        self.log("test/mean", self.net(input_ids=batch).logits.mean())


class Untested(pl.LightningModule):
    """One without a test."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs):
        return self.net(**inputs)


class Numbers(pl.LightningDataModule):
    def test_dataloader(self):
        return DataLoader(ROWS, batch_size=3)


def adapted(module: pl.LightningModule, *targets: str) -> tuple[pl.LightningModule, LoRA]:
    method = LoRA(r=2, target_modules=list(targets) or ["query"])
    method.attach(module)
    perturb(module)
    return module.eval(), method


def trainer(*callbacks: pl.Callback) -> Trainer:
    return Trainer(callbacks=[*callbacks], logger=False, accelerator="cpu", enable_progress_bar=False)


def merged(module: pl.LightningModule, data: Any, out: Path, *targets: str, callbacks: Any = ()) -> dict[str, Any]:
    """What the report says of a module that is given a LoRA and merged."""
    module, method = adapted(module, *targets)
    trainer(method, *callbacks).merge(module, data, str(out))
    return json.loads((out / "merge_report.json").read_text())


# ------------------------------------------------------------------------------------------------- random tests


def mask(rows: list[torch.Tensor]) -> torch.Tensor:
    batch = torch.stack(rows)
    return torch.where(torch.rand(batch.shape) < 0.3, torch.tensor(3), batch)


class Shuffled(Numbers):
    def test_dataloader(self):
        return DataLoader(ROWS, batch_size=3, shuffle=True, collate_fn=mask)


def test_random_data_are_the_same_before_and_after(tmp_path):
    found = merged(Net(), Shuffled(), tmp_path / "out")
    assert (found["rows"], found["not_compared"]) == (8, None)
    assert found["max_logit_difference"] < 1e-4
    assert found["metrics"]["difference"]["test/mean"] == pytest.approx(0, abs=1e-5)


class Drifting(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.passes = itertools.count()

    def test_dataloader(self):
        return DataLoader(ROWS + next(self.passes), batch_size=3)


class Dropped(Net):
    def test_step(self, batch, _):
        self.net.train()
        super().test_step(batch, _)


class Longer(Net):
    """Asks more in the first pass."""

    asked = 0

    def test_step(self, batch, _):
        self.asked += 1
        for _ in range(2 if self.asked < 4 else 1):
            super().test_step(batch, _)


@pytest.mark.parametrize(
    ("module", "data", "why"),
    [
        (Net, Drifting, "its inputs differ between the two passes"),
        (Dropped, Numbers, "the test runs it in training mode"),
        (Longer, Numbers, "its inputs differ between the two passes"),
    ],
)
def test_what_is_asked_otherwise_is_not_compared(module, data, why, tmp_path, capsys):
    found = merged(module(), data(), tmp_path / "out")
    assert found["max_logit_difference"] is found["label_flips"] is found["measured_on"] is None
    assert why in found["not_compared"] and f"not compared: {why}" in " ".join(capsys.readouterr().out.split())


class Twice(Net):
    def test_step(self, batch, _):
        self.log("test/mean", self.net(batch).logits.mean() + self.net(batch[:2]).logits.mean())


def test_rows_are_counted_and_not_calls(tmp_path):
    found = merged(Twice(), Numbers(), tmp_path / "out")
    assert (found["rows"], found["label_flips"]) == (8, None)


def test_answers_of_another_shape_are_not_compared():
    model, comparison = tiny("bert"), LogitsComparison()
    comparison.ask(model, {"input_ids": ROWS})
    model.classifier = torch.nn.Linear(16, 5)
    comparison.compare().ask(model, {"input_ids": ROWS})
    assert "differ in shape" in comparison.figures()["not_compared"]


# -------------------------------------------------------------------------------------------- callbacks and calls


class Metric(pl.Callback):
    """Logs a metric of its own."""

    def on_test_epoch_end(self, trainer, pl_module):
        pl_module.log("test/extra", 1.0)


class Scaled(Net):
    """Looks for its callback."""

    def test_step(self, batch, _):
        next(c for c in self.trainer.callbacks if isinstance(c, Metric))  # type: ignore[attr-defined]
        super().test_step(batch, _)


def test_callbacks_of_the_users_take_part_in_both_passes(tmp_path, capsys):
    module, method = adapted(Scaled())
    own = Metric()
    runs = trainer(method, own)
    before = list(runs.callbacks)  # type: ignore[attr-defined]
    runs.merge(module, Numbers(), str(tmp_path / "out"))
    assert runs.callbacks == before  # type: ignore[attr-defined]
    assert "test/extra 1.0000, merged 1.0000" in " ".join(capsys.readouterr().out.split())


class Once(Net):
    """Logs a metric in the first pass only."""

    steps = 0

    def test_step(self, batch, _):
        super().test_step(batch, _)
        self.steps += 1
        if self.steps < 4:
            self.log("test/early", 1.0)


def test_a_metric_of_one_pass_alone_is_not_printed(tmp_path, capsys):
    found = merged(Once(), Numbers(), tmp_path / "out")
    assert "test/early" in found["metrics"]["before"] and "test/early" not in capsys.readouterr().out


class Generates(Net):
    loss = True

    def test_step(self, batch, _):
        if self.loss:
            more = {"decoder_input_ids": batch[:, :2]} if self.net.config.is_encoder_decoder else {}
            self.net(input_ids=batch, **more)
        self.log("test/length", float(self.net.generate(batch, max_new_tokens=3, pad_token_id=0).shape[1]))


@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize(("name", "target"), [("gpt2", "attention"), ("t5", "q")])
def test_calls_with_a_cache_are_passed_over(name, target, loss, tmp_path):
    module = Generates(name)
    module.loss = loss
    found = merged(module, Numbers(), tmp_path / "out", target)
    if loss:
        assert (found["rows"], found["reloaded_max_logit_difference"]) == (8, 0.0)
    else:
        assert found["not_compared"] == "all calls have a cache, as those of generate"


class Paired(tf.BertForSequenceClassification):
    """Answers a loss alone, as CLIP's first output is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (super().forward(*args, **kwargs).logits.mean(),)


class Loss(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.__class__ = Paired

    def test_step(self, batch, _):
        self.log("test/mean", self.net(input_ids=batch)[0])


def test_an_answer_without_rows_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(tf, "Paired", Paired, raising=False)
    assert merged(Loss(), Numbers(), tmp_path / "out")["not_compared"] == "its tuple has no logits by rows"


# ------------------------------------------------------------------------------------------------- fixed inputs


def words(folder: str, pad: str | None = None) -> Any:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad
    return tokenizer


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_without_padding_texts_are_asked_one_by_one(name, tokenizer):
    model = tiny(name)
    model.resize_token_embeddings(256)
    batches = fixed_inputs(model, words(tokenizer))
    assert [len(batch["input_ids"]) for batch in batches] == [1] * 4
    assert len(fixed_inputs(model, words(tokenizer, "[PAD]"))) == 1
    comparison = LogitsComparison()
    for _ in range(2):
        for batch in batches:
            batch.pop("token_type_ids", None)
            comparison.ask(model, batch)
        comparison.compare()
    assert comparison.figures()["rows"] == 4


def test_the_tokenizer_is_written_as_that_of_the_base(tokenizer, tmp_path):
    model = tiny("gpt2")
    model.save_pretrained(tmp_path / "base")
    words(tokenizer).save_pretrained(tmp_path / "base")
    found = find_tokenizer(pl.LightningModule(), None, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    fixed_inputs(model, found)
    assert found.pad_token is None


class Refuses:
    pad_token_id = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("no words")

    def save_pretrained(self, folder: Path) -> None:
        pass


@pytest.mark.parametrize("broken", ["tokenizer", "model"])
def test_whatever_cannot_be_asked_is_not_compared(broken, tmp_path, monkeypatch):
    module = Untested(tiny("bert"))
    if broken == "tokenizer":
        module.tokenizer = Refuses()  # type: ignore[assignment]
    else:
        monkeypatch.setattr(type(module.net), "dummy_inputs", {"input_ids": torch.tensor([[10**6]])})
    found = merged(module, None, tmp_path / "out")
    assert found["max_logit_difference"] is None
    assert found["not_compared"] in ("no inputs are known", "asked fixed inputs, it raises IndexError")


# ----------------------------------------------------------------------------------------------- several models


class Distilled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny("roberta")


def test_of_a_student_and_a_teacher_the_adapted_one_is_handed_over(tmp_path):
    module, method = adapted(Distilled(), "net.bert.encoder.layer.0.attention.self.query")
    trainer(method).merge(module, Numbers(), str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert (found["architecture"], found["rows"]) == ("BertForSequenceClassification", 8)
    module, method = adapted(Distilled(), "net.bert.encoder.layer.0.attention.self.query")
    trainer(method).export(module, None, str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_two_adapted_models_are_refused_by_name(tmp_path):
    module, method = adapted(Distilled())
    with pytest.raises(ValueError, match="several models that were trained, net and teacher"):
        trainer(method).merge(module, Numbers(), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="lies outside"):
        trainer(method).export(module, None, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- data, places, lines


class Late(Net):
    """Builds its model in every run anew."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def setup(self, stage):
        self.net = tiny(self.trainer.datamodule.model)  # type: ignore[attr-defined]


class Named(Numbers):
    model = "bert"


def test_a_model_that_is_built_for_every_run_is_handed_over_without_scores(tmp_path):
    runs = trainer(LoRA(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"Late builds its model anew each time .*--score false"):
        runs.merge(Late(), Named(), str(tmp_path / "out"))
    trainer(LoRA(r=2, target_modules=["query"])).merge(Late(), Named(), str(tmp_path / "out"), score=False)


class Gone(Numbers):
    def setup(self, stage):
        raise FileNotFoundError("rows.csv")


def test_no_data_are_read_without_scores(tmp_path):
    module, method = adapted(Net())
    trainer(method).merge(module, Gone(), str(tmp_path / "merged"), score=False)
    module, method = adapted(Net())
    trainer(method).export(module, Gone(), str(tmp_path / "exported"))


def test_the_place_is_taken_before_anything_is_scored(tmp_path, monkeypatch):
    module, method = adapted(Net())
    monkeypatch.setattr(pl.Trainer, "test", None)
    with FileLock(tmp_path / ".out.lock"), pytest.raises(FileExistsError, match="another process is writing"):
        trainer(method).merge(module, Numbers(), str(tmp_path / "out"))


def test_names_are_printed_as_python_reads_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    module, method = adapted(Untested(tiny("bert")))
    trainer(method).merge(module, None, '~/a "model"')
    assert (tmp_path / 'a "model"' / "config.json").is_file()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "pipeline" not in line and "import BertForSequenceClassification as Net" in line  # there is no tokenizer
    assert f'Net.from_pretrained("{tmp_path}/a \\"model\\"")' in line


VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}


@pytest.mark.parametrize("kind", ["vit", "mlm", "t5"])
def test_the_lines_that_export_prints_open_the_base_with_its_head(kind, tmp_path, capsys):
    if kind == "vit":
        model: Any = tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **VIT))
        inputs = {"pixel_values": torch.randn(1, 3, 8, 8)}
    elif kind == "mlm":
        config = tf.BertConfig(vocab_size=50, max_position_embeddings=16, **{**VIT, "num_labels": 2})
        model, inputs = tf.BertForMaskedLM(config), {"input_ids": ROWS[:1]}
    else:
        model, inputs = tiny("t5"), {"input_ids": ROWS[:1], "decoder_input_ids": ROWS[:1]}
    model.save_pretrained(tmp_path / "base")
    module, method = adapted(Untested(type(model).from_pretrained(tmp_path / "base")), {"t5": "q"}.get(kind, "query"))
    trainer(method).export(module, None, str(tmp_path / "out"))
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in capsys.readouterr().out.strip().splitlines()[-2:]), names)
    opened, net = names["model"].eval(), module.net
    torch.testing.assert_close(opened(**inputs).logits, net(**inputs).logits, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
