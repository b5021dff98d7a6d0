"""The classification task and the callbacks around it, without the command line."""

import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_peft.callbacks import ReproducibleSteps, SpeedMonitor
from lit_peft.callbacks.speed import batch_size
from lit_peft.data import TextClassificationDataModule
from lit_peft.demo import ENCODER
from lit_peft.methods import BitFit, FullFineTuning, LoRA
from lit_peft.tasks import TextClassification
from lit_peft.tasks.loading import load_classifier
from lit_peft.tasks.optim import warmup_schedule


def data(**options) -> TextClassificationDataModule:
    small = {"limit_train": 48, "limit_val": 16, "limit_test": 16, "batch_size": 16}
    return TextClassificationDataModule(path="demo", **{**small, **options})


def trainer(*callbacks, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_model_summary=False,
        **{**quiet, "max_epochs": 1, **options},
    )


def test_the_model_trains_in_training_mode_and_names_what_is_new():
    model, fresh = load_classifier("demo", ["bad", "good"], torch.float32)
    assert all(child.training for child in model.modules())  # from_pretrained returns evaluation mode
    assert fresh == ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"]
    assert model.config.id2label == {0: "bad", 1: "good"} and model.config.label2id == {"bad": 0, "good": 1}


def test_a_random_pooler_trains_too(tmp_path):
    import transformers as tf

    config = tf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    tf.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    _, fresh = load_classifier(str(tmp_path), ["a", "b", "c"], torch.float32)
    assert fresh == ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]


@pytest.mark.parametrize(("method", "rate"), [(LoRA(r=2), 1e-3), (BitFit(), 1e-3), (FullFineTuning(), 5e-5)])
def test_groups_hold_trainables_once_with_their_decay_and_the_methods_rate(method, rate):
    model = TextClassification(weight_decay=0.1)
    fitted = trainer(method, max_steps=1)
    fitted.fit(model, data())
    (optimizer,) = fitted.optimizers
    names = {id(p): name for name, p in model.named_parameters()}
    seen = [(names[id(p)], p, g) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(name for name, _, _ in seen) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for name, parameter, group in seen:
        assert group["initial_lr"] == rate
        decays = parameter.ndim > 1 and ".peft." not in name
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
    assert any(g["weight_decay"] for g in optimizer.param_groups)


def test_adapters_decay_when_asked():
    model = TextClassification(adapter_weight_decay=0.3)
    fitted = trainer(LoRA(r=2), max_steps=1)
    fitted.fit(model, data())
    decays = {g["weight_decay"] for g in fitted.optimizers[0].param_groups}
    assert decays == {0.3, 0.01, 0.0}


def test_schedules():
    def rates(kind: str, steps: float) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = warmup_schedule(optimizer, kind, steps, 0.2)
        values = []
        for _ in range(10):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return values

    assert rates("linear", 10) == pytest.approx([0.5, 1, 1, *[1 - i / 8 for i in range(1, 8)]])
    assert rates("cosine", 10) == pytest.approx([0.5, 1, *[0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]])
    assert rates("constant", math.inf) == [1.0] * 10
    with pytest.raises(ValueError, match="needs an end"):
        rates("linear", math.inf)


def test_class_weights():
    module = data(tokenizer=str(ENCODER))
    model = TextClassification(class_weights="balanced", label_names=["negative", "positive"])
    assert model._class_weights([30, 10]).tolist() == pytest.approx([2 / 3, 2.0])
    with pytest.raises(ValueError, match="has 3 numbers; there are 2 classes"):
        TextClassification(class_weights=[1, 2, 3], label_names=["a", "b"])._class_weights(None)
    heavy = TextClassification(class_weights=[1.0, 0.0])
    fitted = trainer(LoRA(r=2, dropout=0.0), max_steps=3, precision="bf16-true")
    fitted.fit(heavy, data())
    batch = next(iter(module.train_dataloader()))
    with torch.no_grad():
        assert heavy(batch).softmax(-1)[:, 0].mean() > 0.5  # only the first class counted


def test_data_of_other_classes_is_refused():
    model = TextClassification(label_names=["good", "bad"])
    with pytest.raises(ValueError, match="data's classes are negative, positive; this model's are good, bad"):
        trainer(LoRA(r=2)).fit(model, data())


def test_evaluation_logs_calibration_beside_accuracy():
    model, module = TextClassification(), data()
    fitted = trainer(LoRA(r=2), max_steps=1)
    fitted.fit(model, module)
    (scores,) = fitted.test(model, module, verbose=False)
    assert set(scores) == {f"test/{name}" for name in ("acc", "f1", "mcc", "nll", "brier", "ece")}
    rows = [row for batch in fitted.predict(model, module) for row in batch]
    assert len(rows) == 16 and set(rows[0]["probabilities"]) == {"negative", "positive"}
    assert all(row["probability"] == max(row["probabilities"].values()) for row in rows)


def test_speed_counts_examples_and_survives_a_resume():
    speed = SpeedMonitor()
    trainer(LoRA(r=2), speed, max_epochs=2).fit(TextClassification(), data())
    assert speed.examples == 96
    assert 0 < speed.batches_s <= speed.train_s
    assert speed.examples_per_s == pytest.approx(96 / speed.batches_s)
    assert speed.peak_bytes > 1e8  # torch alone is larger
    again = SpeedMonitor()
    again.load_state_dict(speed.state_dict())
    assert (again.examples, again.batches_s) == (96, speed.batches_s)
    assert again.train_s == pytest.approx(speed.train_s)
    assert batch_size({"name": "x", "ids": torch.zeros(7, 2)}) == 7
    assert batch_size([torch.zeros(3), torch.zeros(5)]) == 3


def test_steps_draw_the_same_numbers_whatever_was_drawn_before():
    class Draws(pl.Callback):
        def __init__(self, noise: int):
            self.noise, self.drawn = noise, []

        def on_train_batch_start(self, *args):
            self.drawn.append(torch.rand(1).item())
            torch.rand(self.noise)

    drawn = []
    for noise in (1, 100):
        draws = Draws(noise)
        trainer(LoRA(r=2), ReproducibleSteps(seed=3), draws).fit(TextClassification(), data())
        drawn.append(draws.drawn)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_steps_of_other_seeds_ranks_and_batches_draw_other_numbers():
    """Also on a CPU, whose generator reads the low 32 bits of a seed alone."""

    def drawn(seed, rank, batches):
        run = SimpleNamespace(global_rank=rank, fit_loop=SimpleNamespace(total_batch_idx=batches))
        ReproducibleSteps(seed).on_train_batch_start(run, None)
        return tuple(torch.rand(4).tolist())

    found = {(s, r, b): drawn(s, r, b) for s in (0, 1, 7) for r in (0, 1, 2) for b in (0, 1, 5000)}
    assert len(set(found.values())) == len(found)
    assert drawn(7, 2, 5000) == found[7, 2, 5000]
