"""Texts that are longer than a model takes: what is kept of them, and documents that are scored in windows."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers as tf
from data_helpers import save_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from lit_peft import LoRA
from lit_peft.data import TextClassificationDataModule
from lit_peft.data.long_texts import head_and_tail, windows
from lit_peft.metrics import classification_metrics
from lit_peft.tasks import TextClassification
from lit_peft.tasks.documents import document_logits
from lit_peft.tasks.loading import max_positions

CLS, SEP, FIRST = 2, 3, 5  # of the tokenizer: word n has the id n + 5
POSITIONS = 16
LENGTHS = (3, 60, 14, 1, 15, 16, 2, 33, 9, 25, 100, 7, 0)  # words of each document


def words(length: int, start: int = 0) -> str:
    """A text of so many words that counts from `start`."""
    return " ".join(f"w{(start + n) % 200}" for n in range(length)) or "\u200d"  # which is no token


class Data(TextClassificationDataModule):
    """Documents of many lengths."""

    def load(self) -> dict[str, Dataset]:
        texts = [words(length, 11 * n) for n, length in enumerate(LENGTHS)]
        rows = Dataset.from_dict({"text": texts, "label": [n % 3 for n in range(len(texts))]})
        return {"train": rows, "validation": rows, "test": rows}


def save_backbone(path: Path) -> str:
    """A tiny encoder of 16 positions, and a tokenizer that knows no limit."""
    folder = save_tokenizer(path, model_input_names=["input_ids", "attention_mask"])
    torch.manual_seed(0)
    config = tf.DistilBertConfig(
        vocab_size=205, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=POSITIONS
    )
    tf.DistilBertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def task(backbone: str) -> TextClassification:
    """A model of three classes that is sure of what it says."""
    torch.manual_seed(1)
    task = TextClassification(backbone=backbone, label_names=["0", "1", "2"])
    task.configure_model()
    with torch.no_grad():
        for parameter in (*task.model.classifier.parameters(), *task.model.pre_classifier.parameters()):
            parameter.normal_()
    return task.eval()


def by_hand(task: TextClassification, text: str, overlap: int) -> torch.Tensor:
    """Mean probabilities of a document's windows, each read alone and without padding."""
    ids = [int(word[1:]) + FIRST for word in text.split() if word.startswith("w")]
    room = POSITIONS - 2
    parts, start = [], 0
    while start + room < len(ids):
        parts.append(ids[start : start + room])
        start += room - overlap
    parts.append(ids[max(0, len(ids) - room) :])
    found = [task.model(input_ids=torch.tensor([[CLS, *part, SEP]])).logits.double().softmax(-1)[0] for part in parts]
    return torch.stack(found).mean(0)


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, callbacks=[*callbacks], max_epochs=1, **quiet)


# Truncation


def saved(folder: Path, template: str | None) -> str:
    """A fast tokenizer of w0, w1, ... with id n + 1, without marks of its own, or with the mark 0 in a template."""
    tokenizer = Tokenizer(WordLevel({"[X]": 0} | {f"w{n}": n + 1 for n in range(200)}, unk_token="[X]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if template:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("[X]", 0)])
    wrapped = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[X]")
    wrapped.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "template, before, after, kept",
    [
        (None, 0, 0, {"head": [*range(10)], "tail": [*range(20, 30)], "head+tail": [0, 1, 2, *range(23, 30)]}),
        ("$A [X]", 0, 1, {"head": [*range(9)], "tail": [*range(21, 30)], "head+tail": [0, 1, *range(23, 30)]}),
        ("[X] $A", 1, 0, {"head": [*range(9)], "tail": [*range(21, 30)], "head+tail": [0, 1, *range(23, 30)]}),
        ("[X] $A [X]", 1, 1, {"head": [*range(8)], "tail": [*range(22, 30)], "head+tail": [0, 1, *range(24, 30)]}),
    ],
)
def test_what_is_kept_of_a_text_and_where_the_marks_stand(
    tmp_path: Path, template: str | None, before: int, after: int, kept: dict[Any, list[int]]
) -> None:
    name = saved(tmp_path / "tokenizer", template)
    for truncation, numbers in kept.items():
        data = TextClassificationDataModule(tokenizer=name, max_length=10, truncation=truncation)
        data.use_texts([words(30), words(10 - before - after), words(2)])
        rows = data._encoded("predict")
        whole = [[*range(10 - before - after)], [0, 1]]
        assert rows["input_ids"][:] == [
            [0] * before + [n + 1 for n in part] + [0] * after for part in (numbers, *whole)
        ]
        assert rows["attention_mask"][:] == [[1] * 10, [1] * 10, [1] * (2 + before + after)]
        assert rows["length"][:] == [10, 10, 2 + before + after]


def test_a_tokenizer_that_would_cut_the_head_off_cuts_where_it_is_told(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "left", truncation_side="left")
    data = TextClassificationDataModule(tokenizer=name, max_length=5)
    data.use_texts([words(9)])
    assert data._encoded("predict")["input_ids"][:] == [[CLS, 5, 6, 7, SEP]]


@pytest.mark.parametrize("room, head", [(510, 128), (126, 32), (255, 64), (4, 1), (2, 1), (1, 0)])
def test_the_head_has_the_same_share_of_any_length(room: int, head: int) -> None:
    tokens = [at for stretch in head_and_tail(1000, room) for at in stretch]
    assert tokens == [*range(head), *range(1000 - room + head, 1000)] and len(tokens) == room
    assert head_and_tail(room, room) == [range(room)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"truncation": "middle"}, r"data\.truncation must be head, tail or head\+tail, not 'middle'"),
        (
            {"text_pair_column": "b", "truncation": "tail"},
            "data.truncation is 'tail', but data.text_pair_column is 'b'",
        ),
        ({"text_pair_column": "b", "windows": True}, "data.windows is true, but .*; expected truncation: head and"),
        ({"window_overlap": -1}, "data.window_overlap is -1, expected at least 0"),
    ],
)
def test_arguments_that_have_no_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextClassificationDataModule("here", **options)


def test_windows_that_share_everything(tokenizer: str) -> None:
    data = Data(tokenizer=tokenizer, max_length=10, windows=True, window_overlap=8)
    with pytest.raises(ValueError, match="window_overlap is 8, expected less than 8, the tokens of a text"):
        data.setup("test")


# Windows


def test_windows_cover_a_text_evenly() -> None:
    assert windows(10, 4, 1) == [range(0, 4), range(3, 7), range(6, 10)]
    assert windows(11, 4, 1) == [range(0, 4), range(3, 7), range(6, 10), range(7, 11)]
    for length in range(40):
        for room in range(1, 9):
            for overlap in range(room):
                found = windows(length, room, overlap)
                assert {at for window in found for at in window} == {*range(length)}
                assert {len(window) for window in found} == {min(room, length)}
                steps = [b.start - a.start for a, b in itertools.pairwise(found)]
                assert {*steps[:-1]} <= {room - overlap}
                assert not steps or 0 < steps[-1] <= room - overlap


@pytest.mark.parametrize("overlap", [0, 5, 13])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_documents_have_the_mean_of_their_windows_in_the_order_of_the_file(
    backbone: str, task: TextClassification, batch_size: int, overlap: int
) -> None:
    data = Data(tokenizer=backbone, windows=True, window_overlap=overlap, max_length=512, eval_batch_size=batch_size)
    found = [row for batch in trainer().predict(task, data) for row in batch]
    expected = [by_hand(task, words(length, 11 * n), overlap) for n, length in enumerate(LENGTHS)]
    assert len(found) == len(LENGTHS)
    for row, probabilities in zip(found, expected, strict=True):
        assert [*row["probabilities"].values()] == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert row["label"] == str(int(probabilities.argmax()))


def test_metrics_count_each_document_once_in_any_batch_and_on_any_rank(
    backbone: str, task: TextClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = torch.stack([by_hand(task, words(length, 11 * n), 3) for n, length in enumerate(LENGTHS)])
    target = torch.arange(len(LENGTHS)) % 3
    options = {"tokenizer": backbone, "max_length": POSITIONS, "windows": True, "window_overlap": 3}
    whole = classification_metrics(3)
    whole.update(expected.log().float(), target)
    scores = {name: pytest.approx(value.item(), abs=1e-5) for name, value in whole.compute().items()}
    (tested,) = trainer().test(task, Data(**options, eval_batch_size=4), verbose=False)
    assert tested == {f"test/{name}": value for name, value in scores.items()}
    for ranks, size in ((1, 1), (1, 5), (2, 2), (2, 3), (2, 50), (3, 2)):
        metrics = classification_metrics(3)
        for rank in range(ranks):
            data = Data(**options, eval_batch_size=size)
            monkeypatch.setattr(data, "_replicas", lambda: {"num_replicas": ranks, "rank": rank})  # noqa: B023
            for batch in data.test_dataloader():
                assert batch["document"].unique().tolist() == list(range(len(batch["labels"])))
                with torch.no_grad():
                    metrics.update(task(batch), batch["labels"])
        assert {name: value.item() for name, value in metrics.compute().items()} == scores


def test_a_quarter_of_a_window_is_shared_unless_told(tokenizer: str) -> None:
    data = Data(tokenizer=tokenizer, max_length=14, windows=True)
    (batch,) = Data(tokenizer=tokenizer, max_length=14, windows=True).predict_dataloader()
    of_33 = batch["input_ids"][batch["document"] == LENGTHS.index(33)]
    assert data._overlap == 3  # of 12
    assert (of_33[:, 1] - of_33[0, 1]).tolist() == [0, 9, 18, 21]


def test_training_reads_the_same_rows_with_windows_as_without(tokenizer: str) -> None:
    for overfit in (False, True):
        with_windows, without = (
            Data(tokenizer=tokenizer, max_length=14, truncation="head+tail", windows=on, batch_size=4, limit_train=9)
            for on in (True, False)
        )
        for data in (with_windows, without):
            data.trainer = (
                SimpleNamespace(overfit_batches=2, distributed_sampler_kwargs=None, lightning_module=None)
                if overfit
                else None
            )
        batches = zip(with_windows.train_dataloader(), without.train_dataloader(), strict=True)
        for one, other in batches:
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
            assert "document" not in one and len(one["labels"]) == len(one["input_ids"])


def test_a_batch_of_long_documents_goes_through_in_parts() -> None:
    """And ranks that have fewer parts than another run as often."""
    sizes: list[int] = []

    def classify(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        return inputs["input_ids"].float()

    ids = torch.tensor([[1, 2], [3, 1], [0, 9], [2, 2], [5, 4]])
    batch = {"input_ids": ids, "labels": torch.tensor([1, 0]), "document": torch.tensor([0, 0, 0, 0, 1])}
    expected = torch.stack([ids[:4].double().softmax(-1).mean(0), ids[4].double().softmax(-1)])
    others = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce=lambda passes, reduce_op: passes + 2))
    for group, parts in ((None, [2, 2, 1]), (others, [2, 2, 1, 1, 1])):
        sizes.clear()
        torch.testing.assert_close(document_logits(classify, batch, group).double().exp(), expected)
        assert sizes == parts
    del batch["document"]
    assert torch.equal(document_logits(classify, batch, others), ids.float())


def test_a_class_that_every_window_rules_out_stays_ruled_out() -> None:
    inputs = {"input_ids": torch.tensor([[0.0, -torch.inf], [3.0, -torch.inf], [-200.0, 200.0]])}
    batch = inputs | {"document": torch.tensor([0, 0, 1])}
    logits = document_logits(lambda rows: rows["input_ids"], batch)
    assert logits[0].tolist() == [0.0, -torch.inf] and logits[1].tolist() == [-400.0, 0.0]


# Positions


@pytest.mark.parametrize("options", [{}, {"truncation": "tail"}, {"truncation": "head+tail"}, {"windows": True}])
def test_no_text_is_too_long_for_the_model(backbone: str, options: dict[str, Any]) -> None:
    """Its tokenizer knows no limit, and data.max_length is above that of the model."""
    data = Data(**options, max_length=512, batch_size=4)
    task = TextClassification(backbone=backbone)
    run = trainer(LoRA(r=2))
    run.fit(task, data)
    (scores,) = run.test(task, data, verbose=False)
    assert np.isfinite([scores["test/nll"], scores["test/acc"]]).all()
    assert max(batch["input_ids"].shape[1] for batch in data.test_dataloader()) == POSITIONS
    assert len(run.predict(task, data)[0]) == 8


def test_models_say_how_many_positions_they_have(tmp_path: Path) -> None:
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    configs = {
        "roberta": (tf.RobertaConfig(**small, intermediate_size=16, max_position_embeddings=34, pad_token_id=1), 32),
        "opt": (tf.OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=40), 40),
        "gpt2": (tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=24), 24),
        "llama": (tf.LlamaConfig(**small, intermediate_size=16, max_position_embeddings=44), 44),
        "t5": (tf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), None),
        "mpt": (tf.MptConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, max_seq_len=28), 28),
    }
    for name, (config, positions) in configs.items():
        config.save_pretrained(tmp_path / name)
        assert max_positions(str(tmp_path / name)) == positions
