"""LanguageModelingDataModule: texts, prompts and completions; what is scored; files, cuts, prompts and errors."""

import itertools
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import save_decoder_tokenizer, write
from datasets import Dataset
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_peft.data import LanguageModelingDataModule
from lit_peft.demo import DECODER, ENCODER
from lit_peft.tasks import CausalLanguageModeling

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ckpt_path"),
    pytest.mark.filterwarnings("ignore:.*no `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
Batch = dict[str, torch.Tensor]
FIRST = 4
"""Id of w0."""
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder_tokenizer(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def beginner(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that puts <s> before each text."""
    return save_decoder_tokenizer(tmp_path_factory.mktemp("beginner"), begins=True)


def text(number: int) -> str:
    """1 to 12 words; one of a kind."""
    return " ".join(f"w{(number + n) % 200}" for n in range(1 + number * 7 % 12))


def documents(*numbers: int) -> dict[str, list[Any]]:
    return {"text": [text(n) for n in numbers]}


def samples(*numbers: int) -> dict[str, list[Any]]:
    return {"prompt": [text(n) for n in numbers], "completion": [text(n * 5 + 3) for n in numbers]}


def ids_of(words: str) -> list[int]:
    """Their tokens, by the helper's own rule."""
    return [3 if word == "\n" else int(word[1:]) + FIRST for word in words.replace("\n", " \n ").split(" ") if word]


def module(path: Path | str, tokenizer: str, **options: Any) -> LanguageModelingDataModule:
    return LanguageModelingDataModule(str(path), tokenizer=tokenizer, **options)


def pairs(path: Path | str, tokenizer: str, **options: Any) -> LanguageModelingDataModule:
    return module(path, tokenizer, prompt_column="prompt", completion_column="completion", **options)


def scored(*batches: Batch) -> list[int]:
    return [int(n) for batch in batches for n in batch["labels"][batch["labels"] != -100]]


def rows_of(*batches: Batch) -> list[list[int]]:
    """Rows without padding."""
    return [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


# Texts


@pytest.mark.parametrize("block_size", [5, 16, 64])
def test_every_token_trains_once(tmp_path: Path, decoder: str, block_size: int) -> None:
    path = write(tmp_path / "mine.jsonl", documents(*range(40)))
    data = module(path, decoder, block_size=block_size, batch_size=3)
    kept = data._rows("train")[1]
    batches = list(data.train_dataloader())
    assert set(batches[0]) == {"input_ids", "labels", "attention_mask"} and len(kept) == 32
    assert max(batch["input_ids"].shape[1] for batch in batches) <= max(block_size, 8)
    assert sorted(scored(*batches)) == sorted(itertools.chain(*(ids_of(text(n)) for n in kept)))
    joined = list(itertools.chain(*([*ids_of(text(n)), 0] for n in kept)))[:-1]
    blocks = [joined[at : at + block_size] for at in range(0, len(joined), block_size)]
    assert sorted(rows_of(*batches)) == sorted(blocks)


def test_documents_are_evaluated_one_by_one(tmp_path: Path, decoder: str) -> None:
    path = write(tmp_path / "mine.jsonl", documents(*range(40)))
    data = module(path, decoder, block_size=8, stride=3)
    for role, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        held = data._rows(role)[1]
        assert len(held) == 4
        expected = []
        for words in map(ids_of, documents(*held)["text"]):
            last = max(0, -(-(len(words) - 8) // 3))
            expected += [words[3 * at : 3 * at + 8] for at in range(last + 1)]
        assert sorted(rows_of(*loader)) == sorted(expected)
        assert sorted(scored(*loader)) == sorted(itertools.chain(*(ids_of(text(n)) for n in held)))


def test_blocks_of_masked_models(tmp_path: Path, tokenizer: str) -> None:
    """Between [CLS] and [SEP], which with the [SEP] between documents are not scored."""
    path = write(tmp_path / "train.jsonl", {"text": ["w1 w2 w3", "w4 w5"]})
    write(tmp_path / "test.jsonl", {"text": ["w1 w2 w3", "w4 w5"]})
    data = module(path.parent, tokenizer, block_size=7, val_split="test", test_split="test")
    (batch,) = data.train_dataloader()
    order = batch["input_ids"][:, 1].argsort()  # w1 first
    assert batch["input_ids"][order].tolist() == [[2, 6, 7, 8, 3, 9, 3], [2, 10, 3, 0, 0, 0, 0]]
    assert batch["labels"][order].tolist() == [[-100, 6, 7, 8, -100, 9, -100], [-100, 10] + [-100] * 5]
    assert sorted(rows_of(*data.test_dataloader())) == [[2, 6, 7, 8, 3], [2, 9, 10, 3]]


def test_a_text_shorter_than_a_block(tmp_path: Path, decoder: str) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", {"text": ["w1 w2"]})
    data = module(tmp_path, decoder)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        (batch,) = loader
        assert rows_of(batch) == [[5, 6]] and scored(batch) == [5, 6]


def test_blank_documents_hold_nothing(tmp_path: Path, decoder: str) -> None:
    write(tmp_path / "train.jsonl", {"text": ["", "w1 w2", " \n", "w3", ""]})
    write(tmp_path / "test.jsonl", {"text": ["w1", ""]})
    data = module(tmp_path, decoder, val_split="test", test_split="test")
    assert rows_of(*data.train_dataloader()) == [[5, 6, 0, 7]]
    assert rows_of(*data.test_dataloader()) == [[5]]


# Text files


@pytest.mark.parametrize("column", ["text", "anything"])
def test_a_text_file_is_one_text(tmp_path: Path, decoder: str, column: str) -> None:
    """Whose last lines validate, and those before them test; lines are joined as they are."""
    lines = [f"w{n} w{n + 50}\n" if n % 5 else "\n" for n in range(40)]
    lines[-1] = lines[-1].rstrip()
    (tmp_path / "mine.txt").write_bytes("".join(lines).replace("\n", "\r\n").encode("utf-8-sig"))
    data = module(tmp_path / "mine.txt", decoder, text_column=column, block_size=10, stride=4)
    lines[-1] += "\n"
    for role, part in (("train", lines[:32]), ("test", lines[32:36]), ("val", lines[36:])):
        loader = data.train_dataloader() if role == "train" else getattr(data, f"{role}_dataloader")()
        assert sorted(scored(*loader)) == sorted(ids_of("".join(part)))
    blocks = ids_of("".join(lines[:32]))
    assert sorted(rows_of(*data.train_dataloader())) == sorted(blocks[n : n + 10] for n in range(0, len(blocks), 10))
    assert data.tokens_per_word("test") == len(ids_of("".join(lines[32:36]))) / len("".join(lines[32:36]).split())


def test_long_texts_are_tokenised_in_pieces_of_whole_lines(tmp_path: Path, decoder: str) -> None:
    """So that processes can share the work, which changes nothing."""
    text = "".join(f"w{n % 200} w{n * 7 % 200} w3\n" for n in range(2500))
    (tmp_path / "mine.txt").write_text(text)
    one, two = (module(tmp_path / "mine.txt", decoder, val_fraction=0.001, num_proc=n) for n in (1, 2))
    assert len(one._tokens("train")) == -(-len(text) // 10_000)
    kept = len(one._rows("train")[1])
    blocks = list(itertools.chain(*one._encoded("train")["input_ids"][:]))
    assert kept == 2496 and blocks == ids_of(text)[: kept * 4]
    assert list(itertools.chain(*two._encoded("train")["input_ids"][:])) == blocks


def test_a_folder_of_text_files(tmp_path: Path, decoder: str) -> None:
    (tmp_path / "train.txt").write_text("w1 w2\nw3\n")
    (tmp_path / "valid.txt").write_text("w4\n\nw5")
    (tmp_path / "test.txt").write_text("w6\n")
    data = module(tmp_path, decoder)
    found = [rows_of(*loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert found == [[[5, 6, 3, 7, 3]], [[8, 3, 3, 9, 3]], [[10, 3]]]
    by_lines = module(tmp_path, decoder, document="row")
    assert sorted(rows_of(*by_lines.val_dataloader())) == [[8, 3], [9]]
    write(tmp_path / "train.jsonl", documents(1))  # beside data, a text file is one about them
    assert set(module(tmp_path, decoder)._splits) == {"train"}


def test_a_split_can_be_one_text(tmp_path: Path, decoder: str) -> None:
    for split in ("train", "validation", "test"):
        Dataset.from_dict({"text": ["", "w1 w2\n", "", "w3"]}).to_parquet(tmp_path / f"{split}.parquet")
    data = module(tmp_path, decoder, document="split")
    assert rows_of(*data.train_dataloader()) == [[3, 5, 6, 3, 3, 7, 3]]


# Prompts and completions


def test_the_completion_alone_is_scored(tmp_path: Path, decoder: str, beginner: str) -> None:
    path = write(tmp_path / "mine.jsonl", samples(*range(20)))
    for tokenizer, before in ((decoder, []), (beginner, [1])):
        data = pairs(path, tokenizer, eval_batch_size=1)
        kept = data._rows("val")[1]
        expected = {}
        for n in kept:
            prompt, completion = ids_of(text(n)), [*ids_of(text(n * 5 + 3)), 0]
            ids = before + prompt + completion
            expected[tuple(ids)] = [-100] * len(before + prompt) + completion
        found = {}
        for batch in data.val_dataloader():
            (ids,) = rows_of(batch)
            found[tuple(ids)] = batch["labels"][0, : len(ids)].tolist()
            assert (batch["labels"][0, len(ids) :] == -100).all()
        assert found == expected and len(found) == 2


@pytest.mark.parametrize(
    "block_size, row, labels",
    [
        (8, [1, 5, 6, 7, 11, 12, 13, 0], 4),
        (7, [1, 6, 7, 11, 12, 13, 0], 4),
        (6, [1, 7, 11, 12, 13, 0], 4),
        (5, [1, 7, 11, 12, 13], 3),
        (4, [1, 7, 11, 12], 2),
        (3, [1, 7, 11], 1),
    ],
)
def test_samples_longer_than_a_block(
    tmp_path: Path, beginner: str, block_size: int, row: list[int], labels: int
) -> None:
    """The prompt loses its beginning; then the completion, of which a causal model can score all, its end."""
    path = write(tmp_path / "mine.jsonl", {"prompt": ["w1 w2 w3"], "completion": ["w7 w8 w9"]})
    data = pairs(path, beginner, block_size=block_size, val_split="train", test_split="train")
    told = pytest.warns(UserWarning, match=f"1 of 1 samples of .* are longer than {block_size} tokens")
    with nullcontext() if block_size == 8 else told:
        (batch,) = data.train_dataloader()
    assert rows_of(batch) == [row]
    assert scored(batch) == row[-labels:]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_and_unpacked_losses_agree(
    tmp_path: Path, beginner: str, kind: str, attention: str, training: bool
) -> None:
    """In every mode of a real model, in float32; a packed row that leaked would not agree."""
    size: dict[str, Any] = {"vocab_size": 204, "attn_implementation": attention}
    if kind == "gpt2":
        dropouts = {f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")}
        config: Any = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **dropouts, **size)
        model: Any = GPT2LMHeadModel(config)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = LlamaConfig(hidden_size=32, intermediate_size=48, max_position_embeddings=64, **heads, **size)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 4  # a random model of the usual scale hardly looks at its context
    path = write(tmp_path / "mine.jsonl", samples(*range(30)))
    model.train(training)

    def loss(pack: bool, **leak: Any) -> tuple[float, int, int]:
        data = pairs(path, beginner, pack=pack, block_size=48, batch_size=4, val_split="train", test_split="train")
        total, count, rows = 0.0, 0, 0
        for batch in data.train_dataloader():
            assert ("attention_mask" in batch) != pack and ("position_ids" in batch) == pack
            labels = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                logits = model(**(batch | leak), use_cache=False).logits[:, :-1]
            total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
            count, rows = count + int((labels != -100).sum()), rows + len(labels)
        return total / count, count, rows

    apart, count, rows = loss(pack=False)
    together, same, fewer = loss(pack=True)
    assert count == same and fewer < rows / 2
    assert together == pytest.approx(apart, abs=1e-5)
    ones = {"attention_mask": None, "position_ids": None}  # samples that see each other
    assert abs(loss(pack=True, **ones)[0] - apart) > 1e-3


# Roles, cuts, subsets


def test_validation_and_test_are_whole_documents_cut_by_seed(tmp_path: Path, decoder: str) -> None:
    path = write(tmp_path / "mine.jsonl", documents(*range(50)))
    cuts = {
        seed: {r: tuple(module(path, decoder, seed=seed)._rows(r)[1]) for r in ("train", "val", "test")}
        for seed in (0, 1)
    }
    assert [len(rows) for rows in cuts[0].values()] == [40, 5, 5]
    assert sorted(itertools.chain(*cuts[0].values())) == list(range(50))
    assert cuts[0] != cuts[1]
    assert cuts[0] == {role: tuple(module(path, decoder)._rows(role)[1]) for role in ("train", "val", "test")}


def test_an_empty_split_is_none(tmp_path: Path, decoder: str) -> None:
    write(tmp_path / "train.jsonl", documents(*range(20)))
    data = module(tmp_path, decoder)
    splits = {"train": Dataset.from_dict(documents(*range(20))), "validation": Dataset.from_dict({"text": []})}
    data.load = lambda: splits  # type: ignore[method-assign]
    assert data._sources == {"train": "train", "val": None, "test": None}
    named = module(tmp_path, decoder, val_split="validation")
    named.load = data.load  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="nothing in split 'validation'"):
        named.setup("validate")


def test_a_wrong_split_is_told_before_train_is_tokenised(tmp_path: Path, decoder: str) -> None:
    data = module(write(tmp_path / "mine.jsonl", documents(*range(50))), decoder, val_split="valid")
    with pytest.raises(ValueError, match=r"No split 'valid' in .*--data\.val_split"):
        data.setup("fit")
    assert not data._parts


@pytest.mark.parametrize("role", ["train", "predict"])
def test_special_tokens_that_a_text_spells_out_are_those(tmp_path: Path, decoder: str, role: str) -> None:
    data = module(write(tmp_path / "mine.jsonl", {"text": ["w0 </s> w1"] * 3}), decoder)
    marks = data._marks
    (row, *_) = data._encoded(role)
    assert row["input_ids"][:3] == [FIRST, marks.eos, FIRST + 1]
    if role == "train":
        assert row["labels"][:3] == [FIRST, -100, FIRST + 1]


def test_limits_count_rows_of_tokens(tmp_path: Path, decoder: str) -> None:
    path = write(tmp_path / "mine.jsonl", documents(*range(50)))
    limits = {"limit_train": 7, "limit_val": 2, "limit_test": 1000}
    data, whole = module(path, decoder, block_size=8, **limits), module(path, decoder, block_size=8)
    chosen, of = (sorted(rows_of(*d.train_dataloader())) for d in (data, whole))
    assert len(chosen) == 7 < len(of) and all(row in of for row in chosen)
    assert len(rows_of(*data.val_dataloader())) == 2
    assert sorted(rows_of(*data.test_dataloader())) == sorted(rows_of(*whole.test_dataloader()))
    assert data.tokens_per_word("val") == whole.tokens_per_word("val") == 1.0
    other = module(path, decoder, block_size=8, limit_train=7, seed=1)
    assert sorted(rows_of(*other.train_dataloader())) != chosen


def test_tokens_per_word(tmp_path: Path, beginner: str) -> None:
    """Neither <s> nor the separator is a token of the text; words are those between white space."""
    write(tmp_path / "train.jsonl", documents(1))
    write(tmp_path / "test.jsonl", {"text": ["w1 w2\nw3", "", "w4"]})
    data = module(tmp_path, beginner, val_split="test", test_split="test")
    assert data.tokens_per_word("test") == data.tokens_per_word("val") == 5 / 4
    with pytest.raises(ValueError, match="No role 'tset'; there are: train, val, test; did you mean 'test'"):
        data.tokens_per_word("tset")
    path = write(tmp_path / "pairs.jsonl", samples(*range(10)))
    assert pairs(path, beginner).tokens_per_word("test") is None


def test_describe(tmp_path: Path, decoder: str) -> None:
    path = write(tmp_path / "mine.jsonl", {"text": ["w1 w2\nw3", "w4"] * 20})
    assert module(path, decoder, block_size=10, limit_train=5, val_split="train").describe(
        ("train", "val", "test")
    ) == [
        f"Data: 36 documents, {36 * 2} words, {36 * 2.5:.0f} tokens, 5 of 13 blocks of at most 10 tokens to train",
        "Data: 40 documents, 80 words, 100 tokens, 40 windows of at most 10 tokens to validate",
        "Data: 4 documents, 8 words, 10 tokens, 4 windows of at most 10 tokens to test (cut from train)",
    ]
    write(tmp_path / "own.jsonl", {"prompt": ["w1"] * 20, "completion": ["w2"] * 20})
    packed = pairs(tmp_path / "own.jsonl", decoder, pack=True, block_size=6, test_split="tset")
    assert packed.describe() == [
        "Data: 18 samples, 54 tokens, 9 rows of at most 6 tokens to train",
        "Data: 2 samples, 6 tokens, 1 row of at most 6 tokens to validate (cut from train)",
        "Data: none to test",
    ]


def test_text_that_a_subclass_reads_has_what_columns_that_gives_it(tmp_path: Path, decoder: str) -> None:
    class Dialogues(LanguageModelingDataModule):
        def load(self) -> dict[str, Dataset]:
            return {"train": Dataset.from_dict(samples(*range(20)))}

    (tmp_path / "dialogues.txt").write_text("Q: w1\nA: w2\n")
    options = {"prompt_column": "prompt", "completion_column": "completion", "tokenizer": decoder, "block_size": 24}
    data = Dialogues(str(tmp_path / "dialogues.txt"), **options)
    data.check("train")
    assert data.describe(("train",))[0].startswith("Data: 16 samples")


# Prompts


def test_prompts_are_in_the_order_of_the_file(tmp_path: Path, decoder: str, beginner: str, tokenizer: str) -> None:
    path = write(tmp_path / "mine.jsonl", documents(*range(20, 0, -1)))
    (batch,) = module(path, decoder, eval_batch_size=20).predict_dataloader()
    assert set(batch) == {"input_ids", "attention_mask"} and batch["attention_mask"][:, -1].all()
    assert rows_of(batch) == [ids_of(text(n)) for n in range(20, 0, -1)]
    (batch,) = module(path, beginner, eval_batch_size=20, block_size=4).predict_dataloader()
    assert rows_of(batch) == [[1, *ids_of(text(n))[-3:]] for n in range(20, 0, -1)]
    (batch,) = module(path, tokenizer, eval_batch_size=20, block_size=4).predict_dataloader()  # of a masked model
    assert rows_of(batch) == [[2, *(n + 1 for n in ids_of(text(n))[-2:]), 3] for n in range(20, 0, -1)]


def test_prompts_of_other_kinds(tmp_path: Path, decoder: str) -> None:
    (tmp_path / "new.txt").write_text("w5\n\nw6 w7 \nw8")
    for make in (module, pairs):
        assert rows_of(*make(tmp_path / "new.txt", decoder).predict_dataloader()) == [[9], [10, 11], [12]]
    path = write(tmp_path / "new.jsonl", {"prompt": ["w3 w4", "w1"]})  # no completions
    data = pairs(path, decoder)
    assert rows_of(*data.predict_dataloader()) == [[7, 8], [5]]
    data.use_texts(["w2", "w3 w4"])
    assert rows_of(*data.predict_dataloader()) == [[6], [7, 8]]
    with pytest.raises(ValueError, match=r"^A prompt is one text: leave out .*--text_pair"):
        data.use_texts(["w2"], ["w3"])
    with pytest.raises(ValueError, match="1 empty text"):
        data.use_texts(["w2", " "])
    given = module(tmp_path / "nowhere.txt", decoder)
    given.use_texts(["w2"])
    assert rows_of(*given.predict_dataloader()) == [[6]]


# Sizes


def test_the_default_block_is_what_tokenizer_and_model_take(tmp_path: Path) -> None:
    class Model(pl.LightningModule):
        max_positions = 30

    path = write(tmp_path / "mine.jsonl", {"text": [" ".join(["w1"] * 1200)] * 20})
    endless = save_decoder_tokenizer(tmp_path / "endless")
    short = save_decoder_tokenizer(tmp_path / "short", model_max_length=20)
    for tokenizer, trained, longest in (
        (endless, False, 1024),
        (short, False, 20),
        (endless, True, 30),
        (short, True, 20),
    ):
        data = module(path, tokenizer)
        wide = module(path, tokenizer, block_size=2000)
        if trained:
            trainer = pl.Trainer(**QUIET, enable_checkpointing=False)
            trainer.strategy._lightning_module = Model()
            data.trainer = wide.trainer = trainer
        data_rows = rows_of(*data.train_dataloader())
        assert max(map(len, data_rows)) == longest
        if longest < 1024:
            with pytest.warns(UserWarning, match=f"data.block_size is 2,000; rows have at most {longest} tokens"):
                wide.setup("fit")
            assert max(map(len, rows_of(*wide.train_dataloader()))) == longest
        else:
            assert wide._longest == 2000


def test_a_model_with_less_room_gets_shorter_rows_and_prompts(tmp_path: Path) -> None:
    """Also where a module has made rows for another one before."""
    path = write(tmp_path / "mine.jsonl", {"text": [" ".join(["w1"] * 300)] * 20})
    data = module(path, save_decoder_tokenizer(tmp_path / "tokenizer"), block_size=64)
    assert max(map(len, rows_of(*data.train_dataloader()))) == 64
    model = pl.LightningModule()
    model.max_positions, model.decoding = 32, SimpleNamespace(max_new_tokens=10)
    data.trainer = pl.Trainer(**QUIET, enable_checkpointing=False)
    data.trainer.strategy._lightning_module = model
    assert max(map(len, rows_of(*data.train_dataloader()))) == 32
    with pytest.warns(UserWarning, match="20 of 20 prompts are longer than 22 tokens, .* lose the beginning"):
        assert next(iter(data.predict_dataloader()))["input_ids"].shape[1] == 22
    data.use_texts([" ".join(["w1"] * 22)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lose the beginning")
        data.predict_dataloader()


# Order, cache


class Recorder(pl.LightningModule):
    def __init__(self, backbone: str, stop: int = 0) -> None:
        super().__init__()
        self.backbone, self.stop = backbone, stop
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, index, batch["input_ids"].tolist(), batch["labels"].tolist()))
        if len(self.seen) == self.stop:
            raise InterruptedError
        return self.weight * batch["input_ids"].float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


@pytest.mark.parametrize("pack", [False, True])
def test_a_resumed_run_sees_what_was_left(tmp_path: Path, decoder: str, pack: bool) -> None:
    columns = samples(*range(60)) if pack else documents(*range(60))
    path = write(tmp_path / "mine.jsonl", columns)

    def fit(*callbacks: Any, stop: int = 0, **options: Any) -> tuple[list[Any], float]:
        make = pairs if pack else module
        data = make(path, decoder, pack=pack, block_size=24, batch_size=3, seed=3)
        model = Recorder(decoder, stop)
        trainer = pl.Trainer(
            **QUIET, max_epochs=3, callbacks=[*callbacks], limit_val_batches=0, enable_checkpointing=bool(callbacks)
        )
        with suppress(InterruptedError):
            trainer.fit(model, data, **options)
        return model.seen, model.weight.item()

    whole, weight = fit()
    assert whole == fit()[0]
    per_epoch = len(whole) // 3
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=per_epoch + 2, save_top_k=-1, filename="{step}")
    before, _ = fit(keep, stop=per_epoch + 4)
    resumed, resumed_weight = fit(ckpt_path=tmp_path / f"step={per_epoch + 2}.ckpt")
    assert before[: per_epoch + 2] + resumed == whole and resumed_weight == weight
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch]


def test_a_fit_resumes_with_the_data_that_it_began_with(tmp_path: Path, decoder: str) -> None:
    path = write(tmp_path / "mine.jsonl", documents(*range(60)))
    data = module(path, decoder, block_size=24)
    trainer = pl.Trainer(**QUIET, max_steps=2, limit_val_batches=0, default_root_dir=tmp_path)
    trainer.fit(Recorder(decoder), data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    for change, told in (
        ({"block_size": 12}, "block_size is 12, and was 24"),
        ({"limit_train": 3}, "limit_train is 3"),
    ):
        again = pl.Trainer(**QUIET, max_steps=4, limit_val_batches=0, enable_checkpointing=False)
        with pytest.raises(ValueError, match=f"data.{told}"):
            again.fit(
                Recorder(decoder),
                module(path, decoder, **({"block_size": 24} | change)),
                ckpt_path=tmp_path / "two.ckpt",
            )


@pytest.mark.filterwarnings("ignore:.*samples of split")
@pytest.mark.parametrize("kind", ["rows", "lines", "packed"])
def test_what_is_prepared_is_cached_by_tokenizer_and_length(
    tmp_path: Path, decoder: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "lines":
        (tmp_path / "mine.txt").write_text("\n".join(map(text, range(60))))
    path = (
        tmp_path / "mine.txt"
        if kind == "lines"
        else write(tmp_path / "mine.jsonl", documents(*range(60)) | samples(*range(60)))
    )

    def files(tokenizer: str = decoder, block_size: int = 24) -> set[str]:
        make = pairs if kind == "packed" else module
        data = make(path, tokenizer, block_size=block_size, pack=kind == "packed")
        data.setup("fit")
        return {file["filename"] for role in ("train", "val") for file in data._encoded(role).cache_files}

    first = files()
    before = {file: Path(file).stat().st_mtime_ns for file in first}
    written = {*Path(next(iter(first))).parent.iterdir()}
    assert len(first) == 2 and files() == first
    assert {file: Path(file).stat().st_mtime_ns for file in first} == before
    assert {*Path(next(iter(first))).parent.iterdir()} == written  # no step before these was done anew
    assert not files(block_size=20) & first
    assert not files(save_decoder_tokenizer(tmp_path / "other", words=150)) & first


# Errors

TRAIN = documents(*range(6)) | samples(*range(6)) | {"score": [0, 1, 2, 3, 4, 5]}
COMPLETIONS = {"prompt_column": "prompt", "completion_column": "completion"}


@pytest.mark.parametrize(
    "options, stage, message",
    [
        ({"text_column": "txt"}, "fit", r"No column 'txt' in split .* \(--data.text_column\); .* mean 'text'"),
        ({"text_column": "score"}, "fit", "'score' of split 'train' of here holds int64, expected text"),
        (COMPLETIONS | {"completion_column": "answer"}, "fit", r"No column 'answer' in .*--data.completion_column"),
        (
            COMPLETIONS | {"val_split": "gap"},
            "validate",
            "'completion' of split 'gap' .* has 1 empty text, the first in row 2",
        ),
        ({"val_split": "gap"}, "validate", "'text' of split 'gap' of here has 1 text of null, the first in row 2 of 2"),
        ({"val_split": "blank"}, "validate", "only blank texts in column 'text' of split 'blank'"),
        ({"val_split": "valid"}, "fit", r"No split 'valid' in here \(--data.val_split"),
        (
            {"block_size": 1, "tokenizer": "encoder"},
            "fit",
            "block_size is 1, expected at least 3: 2 marks of the tokenizer and 1 token",
        ),
        (COMPLETIONS | {"block_size": 1}, "fit", "block_size is 1, expected at least 2: 0 marks"),
        (
            COMPLETIONS | {"tokenizer": "encoder"},
            "fit",
            "tokenizer .* has no eos token, with which a completion is closed: .* data.completion_column to null",
        ),
    ],
)
def test_errors_name_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, decoder: str, tokenizer: str, options: dict[str, Any], stage: str, message: str
) -> None:
    gap = {"text": ["w1", None], "prompt": ["w1", "w2"], "completion": ["w1", " "]}
    splits = {"train": TRAIN, "validation": TRAIN, "gap": gap, "blank": {"text": ["", " \n"]}}
    chosen = tokenizer if options.get("tokenizer") == "encoder" else decoder
    data = LanguageModelingDataModule("here", **(options | {"tokenizer": chosen}))
    monkeypatch.setattr(data, "load", lambda: {name: Dataset.from_dict(split) for name, split in splits.items()})
    with pytest.raises(ValueError, match=message):
        data.setup(stage)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 0}, "data.block_size is 0, expected at least 1"),
        ({"stride": 0}, "data.stride is 0, expected at least 1"),
        ({"limit_val": 0}, "data.limit_val is 0"),
        ({"seed": -1}, "data.seed is -1"),
        ({"val_fraction": 0.5}, "data.val_fraction is 0.5"),
        ({"block_size": 8, "stride": 9}, "data.stride is 9, expected at most data.block_size, 8"),
        ({"document": "line"}, "data.document is 'line', expected row, split or null"),
        ({"prompt_column": "a"}, "data.completion_column is null"),
        ({"completion_column": "a"}, "data.prompt_column is null"),
        ({"prompt_column": "a", "completion_column": "a"}, "are both 'a'"),
        ({"pack": True}, "data.pack is true: .* Set it to false, or data.prompt_column .* to columns"),
        (COMPLETIONS | {"stride": 4}, "data.stride is 4: it is for windows over texts.* Set it to null, or .* to null"),
        (COMPLETIONS | {"document": "split"}, "data.document is split: a sample is a row"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelingDataModule(**options)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"mine\.txt is empty: it has 0 bytes"),
        (b"w1\n\xff\n", r"mine\.txt is not UTF-8: byte 0xff at offset 3, in line 2"),
        (b"\n\n\n", "only blank texts in column 'text'"),
        (
            b"w1 w2 w3",
            r"1 examples in split 'train' of .*mine\.txt are too few to cut some off: .* a file for each split",
        ),
    ],
)
def test_text_files_that_cannot_be_read(tmp_path: Path, decoder: str, content: bytes, message: str) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        module(tmp_path / "mine.txt", decoder).setup("fit")


def test_the_demo_needs_no_file(decoder: str) -> None:
    data = module("demo", decoder, text_column="anything", limit_val=20)
    assert len(data._splits["train"]) == 8000 and data._splits["train"].column_names == ["anything"]
    assert sum(len(batch["input_ids"]) for batch in data.val_dataloader()) == 20


def test_the_command_line_knows_every_argument() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    options = ["--data=lit_peft.data.LanguageModelingDataModule", "--data.path=here", "--data.document=split"]
    data = parser.instantiate(parser.parse_args([*options, "--data.block_size=null"])).data
    assert isinstance(data, LanguageModelingDataModule) and data.document == "split"


def texts_for(task: CausalLanguageModeling, tokenizer: str | None) -> LanguageModelingDataModule:
    """The demo's texts beside a task, as a trainer has them."""
    data = LanguageModelingDataModule(path="demo", tokenizer=tokenizer)
    data.trainer = SimpleNamespace(lightning_module=task)  # type: ignore[assignment]
    return data


def read_by(task: CausalLanguageModeling, tokenizer: str | None) -> str:
    """Where the tokenizer is from that texts for this task are read with."""
    return texts_for(task, tokenizer).tokenizer.name_or_path


def test_a_models_own_tokenizer_is_compared_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lit_peft.hub.locate", asked.append)  # seconds, where a hub does not answer
    CausalLanguageModeling("owner/decoder").check_tokenizer("owner/decoder", None)
    assert asked == []


def test_the_bundled_decoder_is_read_to_by_its_own_tokenizer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (None, "demo", str(DECODER)):
            assert read_by(CausalLanguageModeling("demo"), name) == str(DECODER)


def test_a_tokenizer_that_a_model_cannot_take_is_told(tmp_path: Path) -> None:
    task = CausalLanguageModeling("demo")
    with pytest.warns(UserWarning, match=f"602 of 602 tokens of {ENCODER} are other tokens to demo-decoder"):
        read_by(task, str(ENCODER))
    more = AutoTokenizer.from_pretrained(DECODER)
    more.add_tokens(["one more"])
    more.save_pretrained(tmp_path)
    data = texts_for(task, str(tmp_path))
    for _ in range(2):  # whoever tries again is told again
        with pytest.raises(ValueError, match=r"has ids up to 1,011, demo-decoder embeds 1,011 tokens\. Leave"):
            _ = data.tokenizer
    task.configure_model()
    task.model.resize_token_embeddings(1012)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.tokenizer.name_or_path == str(tmp_path)


def test_a_tokenizer_beside_weights_alone_is_compared_with_nothing(tmp_path: Path, decoder: str) -> None:
    """transformers makes a tokenizer of special tokens there, and an error where a package is missing."""
    GPT2Config(vocab_size=1000, n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_by(CausalLanguageModeling(str(tmp_path)), decoder) == decoder
