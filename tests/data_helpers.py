"""A tokenizer of a few words and texts whose tokens tell which example they are."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tokenizer(folder: Path, words: int = 200, **options: Any) -> str:
    """A WordPiece tokenizer of the words w0, w1, ...: word n has the id n + 5."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *(f"w{n}" for n in range(words))]))
    BertTokenizer(str(vocabulary), **options).save_pretrained(folder)
    return str(folder)


def text(number: int) -> str:
    """1 to 12 words, the first of which tells the number."""
    return " ".join([f"w{number}"] * (1 + number * 7 % 12))


def rows(*numbers: int) -> dict[str, list[Any]]:
    """Columns of a data set; the label is `good` every third time."""
    return {"text": [text(n) for n in numbers], "label": ["good" if n % 3 == 0 else "bad" for n in numbers]}


def numbers_of(*batches: dict[str, torch.Tensor]) -> list[int]:
    """Which examples some batches hold."""
    return [number for batch in batches for number in (batch["input_ids"][:, 1] - len(SPECIAL)).tolist()]


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A jsonl or csv file of these columns."""
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".csv":
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, line.values())) for line in lines)]) + "\n")
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_decoder_tokenizer(folder: Path, words: int = 200, begins: bool = False, **options: Any) -> str:
    """A tokenizer as decoders have it, of the words w0, w1, ... and line breaks: word n has the id n + 4.

    </s> (0) is its eos token and <s> (1) its bos token, which stands before each text where it `begins` with one.
    """
    vocabulary = {
        token: at for at, token in enumerate(["</s>", "<s>", "<unk>", "\n", *(f"w{n}" for n in range(words))])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    inner.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if begins:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    marks = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **marks, **options).save_pretrained(folder)
    return str(folder)
