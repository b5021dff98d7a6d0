"""WikiText2DataModule: lines, words and blocks, of files laid out as the published ones and of these."""

import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import save_decoder_tokenizer
from datasets import Dataset
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lit_peft.data import LanguageModelingDataModule, WikiText2DataModule
from lit_peft.tasks import CausalLanguageModeling

SHARED = Path(os.environ.get("LIT_PEFT_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "wikitext2"
published = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the published WikiText-2 is not in $LIT_PEFT_SHARED or ../shared"
)
ROWS = ["", " = w1 w2 = \n", "", " w3 w4 w5 . \n", " w6 <unk> \n", "", " = = w7 = = \n", "", " w8 w9 \n"]


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for at, split in enumerate(("train", "validation", "test")):
        Dataset.from_dict({"text": ROWS[: 9 - 2 * at]}).to_parquet(path / f"{split}.parquet")
    return path


def save_bytes(path: Path) -> str:
    """A tokenizer whose tokens are the bytes of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: at for at, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="!").save_pretrained(path)
    return str(path)


def text_of(data: WikiText2DataModule, role: str) -> str:
    """The text that the blocks of a role hold, one behind the other."""
    return data.tokenizer.decode([token for row in data._encoded(role)["input_ids"] for token in row])


def test_a_split_is_its_published_text(tmp_path: Path) -> None:
    """Blank lines are " " there; each line, headings too, is as it was, and nothing stands between articles."""
    data = WikiText2DataModule(str(folder(tmp_path)), tokenizer=save_bytes(tmp_path / "bytes"), block_size=10)
    assert text_of(data, "train") == (" \n = w1 w2 = \n \n w3 w4 w5 . \n w6 <unk> \n \n = = w7 = = \n \n w8 w9 \n")
    for role, rows in (("train", ROWS), ("val", ROWS[:7]), ("test", ROWS[:5])):
        text = "".join(row or " \n" for row in rows)
        assert text_of(data, role) == text
        assert data.tokens_per_word(role) == len(text) / (len(text.split()) + len(rows))


@pytest.mark.parametrize("suffix", ["raw", "tokens"])
def test_the_published_files_are_read_under_their_own_names(tmp_path: Path, suffix: str) -> None:
    for at, split in enumerate(("train", "valid", "test")):
        text = "".join(row or " \n" for row in ROWS[: 9 - 2 * at])
        (tmp_path / f"wiki.{split}.{suffix}").write_text(text, newline="")
    tokenizer = save_bytes(tmp_path / "bytes")
    data = WikiText2DataModule(str(tmp_path), tokenizer=tokenizer, block_size=10)
    hub = WikiText2DataModule(str(folder(tmp_path / "hub")), tokenizer=tokenizer, block_size=10)
    for role in ("train", "val", "test"):
        assert text_of(data, role) == text_of(hub, role)


def test_files_of_several_types_are_no_one_split(tmp_path: Path) -> None:
    """A copy under another name would be read twice."""
    for suffix in ("raw", "txt"):
        (tmp_path / f"wiki.train.{suffix}").write_text("w1 w2\n")
    with pytest.raises(ValueError, match="as one split: expected files of one type"):
        WikiText2DataModule(str(tmp_path), tokenizer=save_bytes(tmp_path / "bytes"), block_size=10).setup("fit")


def test_validation_and_test_have_splits_of_their_own(tmp_path: Path) -> None:
    tokenizer = save_decoder_tokenizer(tmp_path / "tokenizer")
    lines = WikiText2DataModule(str(folder(tmp_path)), tokenizer=tokenizer).describe()
    assert lines[0] == ("Data: 9 lines, 26 words, 26 tokens, 1 block of at most 1,024 tokens to train")
    assert [line.rpartition(" to ")[2] for line in lines[1:]] == [
        "validate (split validation)",
        "test (split test)",
    ]


def test_files_of_other_columns(tmp_path: Path) -> None:
    Dataset.from_dict({"txet": ROWS}).to_parquet(tmp_path / "train.parquet")
    data = WikiText2DataModule(str(tmp_path), tokenizer=save_decoder_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=r"No column 'text' in split 'train' .* did you mean 'txet'"):
        data.setup("fit")


def test_headings_that_articles_share_are_no_copies(tmp_path: Path) -> None:
    """A text is known again by its longer lines."""
    tokenizer = save_decoder_tokenizer(tmp_path / "tokenizer")
    long = " ".join(f"w{n}" for n in range(9)) + " \n"
    for split, end in (("train", []), ("validation", []), ("test", [long])):
        other = [long.replace("w8", f"w{len(split)}0")]
        Dataset.from_dict({"text": ["", " = = w7 = = \n", *other, *end] + [long] * (split == "train")}).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    data = WikiText2DataModule(str(tmp_path), tokenizer=tokenizer)
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), distributed_sampler_kwargs={}, lightning_module=None
    )
    data.trainer = trainer
    data.setup("fit")
    state = data.state_dict()
    told = []
    for verb in ("validate", "test"):
        trainer.state.fn = verb
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data.load_state_dict(state)
            data.val_dataloader() if verb == "validate" else data.test_dataloader()
        told += [str(warning.message) for warning in caught]
    assert len(state["trained"]) == 2
    assert told == ["1 of 2 rows to test have a text that was trained on."]


def test_the_command_line_knows_every_argument() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LanguageModelingDataModule, "data")
    options = ["--data=WikiText2DataModule", "--data.name=wikitext-2-v1", "--data.stride=7", "--data.tokenizer=null"]
    data = parser.instantiate(parser.parse_args(options)).data
    assert isinstance(data, WikiText2DataModule)
    changed = {"path": "Salesforce/wikitext", "name": "wikitext-2-v1", "document": "split"}
    assert dict(data.hparams) == dict(LanguageModelingDataModule(stride=7).hparams) | changed


@published
def test_the_published_counts(tmp_path: Path) -> None:
    """Merity et al. 2016, table 1, which counts an <eos> for each line."""
    tokenizer = save_decoder_tokenizer(tmp_path / "tokenizer")
    data = WikiText2DataModule(str(SHARED), tokenizer=tokenizer, block_size=1000)
    counts = {"train": (36_718, 2_088_628), "val": (3_760, 217_646), "test": (4_358, 245_569)}
    for role, (lines, words) in counts.items():
        assert (len(data._rows(role)[1]), sum(data._tokens(role)["words"][:])) == (lines, words)
        assert sum(data._tokens(role)["length"][:]) == words  # of a word-level tokenizer
        assert len(data._encoded(role)) == -(-words // 1000)


@published
@pytest.mark.parametrize(
    ("stride", "count"),
    [(512, 120), (256, 120), pytest.param(512, None, marks=pytest.mark.slow)],  # None: all lines, minutes
)
def test_perplexity_of_the_published_text_is_that_of_a_plain_loop(
    tmp_path: Path, stride: int, count: int | None
) -> None:
    """By the data module, the task and the trainer; and by transformers' loss over the same windows."""
    name = str(SHARED.parents[1] / "models" / "gpt2-mini")
    lines = WikiText2DataModule(str(SHARED))._split("test")["text"][:count]
    for split in ("train", "validation", "test"):
        Dataset.from_dict({"text": lines}).to_parquet(tmp_path / f"{split}.parquet")
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    data = WikiText2DataModule(str(tmp_path), block_size=512, stride=stride, eval_batch_size=3)
    (scores,) = trainer.test(CausalLanguageModeling(name), data, verbose=False)

    ids = AutoTokenizer.from_pretrained(name)("".join(lines), return_tensors="pt", verbose=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    total, n, end = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        window = ids[:, start : start + 512]
        labels = window.clone()
        labels[:, : end - start] = -100  # scored in the window before, as context here
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(window, labels=labels).loss.item() * scored
        n, end = n + scored, start + window.shape[1]
        if end == ids.shape[1]:
            break
    assert scores["test/perplexity"] == pytest.approx(math.exp(total / n), rel=1e-5)
