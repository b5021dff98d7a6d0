"""Causal language modelling in fits and evaluations: steps over tokens, perplexity, words."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from language_models import batch, save, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lit_peft import FullFineTuning, LoRA
from lit_peft.callbacks import ReliabilityDiagram
from lit_peft.core.quantize import stored_as
from lit_peft.demo import ENCODER
from lit_peft.tasks import CausalLanguageModeling

LENGTHS = [(9, 3), (5, 12), (2, 7)]  # texts of very different lengths, so that a mean of means is another number


class Texts(pl.LightningDataModule):
    """Batches as they are."""

    def __init__(self, *batches, words=None):
        super().__init__()
        self.batches, self.words = batches, words

    def loader(self):
        return DataLoader(self.batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = loader

    def tokens_per_word(self, role):
        return self.words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("gpt2"), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


class Gradients(pl.Callback):
    """Notes the gradients of each optimizer step, as a method sees them."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


class Penalised(LoRA):
    def penalty(self, module):
        return 0.3 * sum(p.square().sum() for p in module.parameters() if p.requires_grad)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def fitted(folder, batches, method=None, clip=None, **options):
    torch.manual_seed(0)
    plain = {"learning_rate": 0.1, "schedule": "constant", "warmup": 0.0, "weight_decay": 0}
    task = CausalLanguageModeling(folder, optimizer=sgd, **plain)
    seen = Gradients()
    method = method or LoRA(r=2, dropout=0.0, target_modules=["c_attn"])
    run = trainer(method, seen, gradient_clip_val=clip, **options)
    run.fit(task, train_dataloaders=DataLoader(batches, batch_size=None))
    return task, seen.steps


def as_one(lengths=LENGTHS) -> dict:
    """The texts of three batches in one."""
    width = max(max(pair) for pair in lengths)
    parts = [batch(*pair, seed=i) for i, pair in enumerate(lengths)]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.cat([F.pad(part[key], (0, width - part[key].shape[1]), value=value) for part in parts])
        for key, value in fill.items()
    }


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("penalised", [False, True])
def test_a_step_takes_the_mean_over_all_tokens_of_its_micro_batches(folder, clip, penalised):
    parts = [batch(*pair, seed=i) for i, pair in enumerate(LENGTHS)]

    def method():
        options = {"r": 2, "dropout": 0.0, "target_modules": ["c_attn"]}
        return (Penalised if penalised else LoRA)(**options)

    small, steps = fitted(folder, parts * 2, method(), clip, accumulate_grad_batches=3)
    large, expected = fitted(folder, [as_one()] * 2, method(), clip)
    assert len(steps) == len(expected) == 2
    for found, wanted in zip(steps, expected, strict=True):
        assert found.keys() == wanted.keys() and len(found) >= 4
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    for name, p in large.named_parameters():
        torch.testing.assert_close(small.get_parameter(name), p, rtol=1e-5, atol=1e-6)


def test_a_step_is_of_transformers_mean_loss_also_where_the_last_window_is_shorter(folder):
    parts = [batch(*pair, seed=i) for i, pair in enumerate(LENGTHS)]
    _, steps = fitted(folder, parts, FullFineTuning(), accumulate_grad_batches=2)
    assert len(steps) == 2  # two batches, then one
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    for window, found in zip((parts[:2], parts[2:]), steps, strict=True):
        model.zero_grad()
        sums = [
            F.cross_entropy(model(**p).logits[:, :-1].flatten(0, 1), p["labels"][:, 1:].flatten(), reduction="sum")
            for p in window
        ]
        (sum(sums) / sum(int((p["labels"][:, 1:] != -100).sum()) for p in window)).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[f"model.{name}"], p.grad, rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                p.sub_(0.1 * p.grad)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_takes_the_same_mean(folder, precision):
    parts = [batch(*pair, seed=i) for i, pair in enumerate(LENGTHS)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if precision == "16-mixed" else None
    plugin = MixedPrecision(precision, "cpu", scaler)
    _, steps = fitted(folder, parts, clip=0.01, plugins=[plugin], accumulate_grad_batches=3)
    _, expected = fitted(folder, [as_one()], clip=0.01)
    for name, gradient in expected[0].items():
        torch.testing.assert_close(steps[0][name], gradient, rtol=0.1, atol=0.03 * gradient.abs().max().item())
    assert scaler is None or scaler.get_scale() == 64.0  # no step was skipped


def test_a_quantised_base_trains_and_loads_again(folder, tmp_path):
    task, _ = fitted(folder, [batch(9, 4)], LoRA(r=2, quantize="nf4"))
    assert {kind.split()[0] for kind in stored_as(task.model).values()} == {"nf4"}
    assert len(stored_as(task.model)) == 8 and task._passes  # four layers a block; the head is tied and left alone
    task.trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = CausalLanguageModeling.load_from_checkpoint(tmp_path / "run.ckpt")
    given = batch(9, 4)
    task.eval()
    torch.testing.assert_close(again(given), task(given))
    assert stored_as(again.model).keys() == stored_as(task.model).keys()


def windows(ids, size: int, stride: int):
    """The usual procedure: windows of a fixed size, each of which scores what none before it has."""
    done, found = 0, []
    for start in range(0, len(ids), stride):
        end = min(start + size, len(ids))
        piece = ids[start:end][None]
        labels = piece.clone()
        labels[:, : len(piece[0]) - (end - done)] = -100
        found.append({"input_ids": piece, "attention_mask": torch.ones_like(piece), "labels": labels})
        done = end
        if end == len(ids):
            break
    return found


def test_perplexity_is_that_of_the_usual_procedure(folder):
    ids = batch(50, seed=9)["input_ids"][0]
    ids[1::2] = ids[::2]  # a pair of each, which a model with tied embeddings predicts at times
    rows = windows(ids, 16, 8)
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    total = count = right = 0
    with torch.no_grad():
        for row in rows:  # transformers' loss is a mean over the labels that it shifts itself
            n = int((row["labels"][:, 1:] != -100).sum())
            output = model(row["input_ids"], labels=row["labels"])
            total, count = total + n * output.loss.item(), count + n
            right += int((output.logits[:, :-1].argmax(-1) == row["labels"][:, 1:]).sum())
    expected = torch.tensor(total / count)
    batches = [{key: torch.cat([row[key] for row in rows[i : i + 2]]) for key in rows[0]} for i in (0, 2)] + rows[4:]
    (scores,) = trainer().test(CausalLanguageModeling(folder), Texts(*batches, words=1.25), verbose=False)
    assert set(scores) == {f"test/{name}" for name in ("nll", "perplexity", "word_perplexity", "acc", "ece")}
    assert scores["test/nll"] == pytest.approx(expected.item(), rel=1e-5)
    assert scores["test/perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)
    assert scores["test/word_perplexity"] == pytest.approx((1.25 * expected).exp().item(), rel=1e-4)
    assert scores["test/acc"] == pytest.approx(right / count) and 0 < scores["test/ece"] < 1


def test_words_are_left_out_where_they_are_not_known(folder, tmp_path):
    task, logger = CausalLanguageModeling(folder), TensorBoardLogger(tmp_path)
    run = trainer(LoRA(r=2), ReliabilityDiagram(), logger=logger)
    run.fit(task, Texts(batch(5, 9)))
    assert {"val/nll", "val/perplexity", "val/acc", "val/ece"} == {k for k in run.callback_metrics if k[:3] == "val"}
    (loss,) = [v for k, v in run.callback_metrics.items() if k == "train/loss"]
    assert loss > 0
    scores = trainer().validate(task, DataLoader([batch(5, 9)], batch_size=None), verbose=False)[0]
    assert "val/word_perplexity" not in scores
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["calibration/val"]


def test_words_are_not_those_of_the_data_before(folder):
    task, run = CausalLanguageModeling(folder), trainer()
    assert "test/word_perplexity" in run.test(task, Texts(batch(5, 9), words=1.5), verbose=False)[0]
    loader = DataLoader([batch(7, 3)], batch_size=None)
    assert "test/word_perplexity" not in run.test(task, loader, verbose=False)[0]
    (scores,) = run.validate(task, Texts(batch(5, 9), words=2.0), verbose=False)
    assert scores["val/word_perplexity"] == pytest.approx(scores["val/perplexity"] ** 2, rel=1e-4)


def test_encoders_are_sent_to_the_other_task(tmp_path):
    with pytest.raises(ValueError, match=r"distilbert, of which transformers has no causal .*: use MaskedL"):
        CausalLanguageModeling(str(ENCODER)).configure_model()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tf.BertModel(tf.BertConfig(vocab_size=50, **small)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a BertLMHeadModel, reads texts to both sides .* use MaskedLanguageModeling"):
        CausalLanguageModeling(str(tmp_path)).configure_model()
