"""What `datasets` calls to tokenise texts, samples and prompts, and to lay out rows of them; kept in its cache."""

import itertools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_peft.data.blocks import Marks, check_tokens, evaluation_windows, packed, training_blocks
from lit_peft.data.held_out import VERBS
from lit_peft.labels import IGNORED

PER_PROCESS = 25_000  # texts; with fewer, starting a process costs more than it saves
PIECE = 10_000
"""Characters of a text of lines after which it is tokenised anew, from the next line on: few enough to share the work
among processes, and so many that what a tokenizer would have joined across two pieces does not count."""


def pieces(batch: Mapping[str, list[str]], column: str) -> dict[str, list[str]]:
    """Joins lines to pieces of whole lines; a piece ends with the line that reaches a multiple of `PIECE`."""
    lines = [line if line.endswith("\n") else line + "\n" for line in batch[column]]
    begins = itertools.accumulate(map(len, lines), initial=0)
    pieces = itertools.groupby(zip(begins, lines, strict=False), key=lambda line: line[0] // PIECE)
    return {column: ["".join(line for _, line in piece) for _, piece in pieces]}


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens without marks, however many; `verbose` would warn of texts that are cut into blocks later."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def texts(batch: Mapping[str, list[str]], tokenizer: Any, column: str, line_breaks: bool) -> dict[str, list[Any]]:
    """Tokens of texts, without marks; and how many words each has, with or without its line breaks."""
    texts = batch[column]
    ids = _ids(tokenizer, texts)
    words = [len(text.split()) + line_breaks * text.count("\n") for text in texts]
    return {"input_ids": ids, "length": [*map(len, ids)], "words": words}


def samples(
    batch: Mapping[str, list[str]], tokenizer: Any, columns: list[str], size: int, marks: Marks
) -> dict[str, list[Any]]:
    """Prompt, completion and eos token in at most `size` tokens; `cut` where they are more."""
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": [], "cut": []}
    room = size - len(marks.before)
    for prompt, completion in zip(*(_ids(tokenizer, batch[column]) for column in columns), strict=True):
        end = [*completion, marks.eos][: room - 1]
        begin = [*marks.before, *prompt[len(end) - room :]]
        rows["input_ids"].append(begin + end)
        rows["labels"].append([IGNORED] * len(begin) + end)
        rows["length"].append(len(begin) + len(end))
        rows["cut"].append(len(prompt) + len(completion) + 1 > room)
    return rows


def prompts(
    batch: Mapping[str, list[str]], tokenizer: Any, column: str, size: int, marks: Marks, lines: bool
) -> dict[str, list[Any]]:
    """The last tokens of prompts, at most `size` with the marks; `cut` where they are more.

    Of `lines` blank ones are left out, and the others come without what ends them.
    """
    texts = [text.rstrip() for text in batch[column] if text.strip()] if lines else batch[column]
    after = marks.after if marks.masked else ()
    room = max(1, size - len(marks.before) - len(after))
    whole = _ids(tokenizer, texts) if texts else []
    ids = [[*marks.before, *tokens[-room:], *after] for tokens in whole]
    return {"input_ids": ids, "length": [*map(len, ids)], "cut": [len(tokens) > room for tokens in whole]}


def _flat(tokens: pa.Table, column: str) -> np.ndarray:
    check_tokens(pc.sum(tokens["length"]).as_py() or 0)
    return tokens[column].combine_chunks().flatten().to_numpy()


def _documents(tokens: pa.Table, one_text: bool) -> tuple[np.ndarray, np.ndarray]:
    """All tokens, and how many each document has."""
    lengths = tokens["length"].to_numpy()
    return _flat(tokens, "input_ids"), np.array([lengths.sum()]) if one_text else lengths


def blocks(tokens: pa.Table, size: int, marks: Marks, one_text: bool) -> pa.Table:
    """`training_blocks` of what `texts` gives."""
    return training_blocks(*_documents(tokens, one_text), size, marks)


def windows(tokens: pa.Table, size: int, marks: Marks, one_text: bool, stride: int | None) -> pa.Table:
    """`evaluation_windows` of what `texts` gives."""
    return evaluation_windows(*_documents(tokens, one_text), size, stride, marks)


def packed_samples(tokens: pa.Table, size: int) -> pa.Table:
    """`packed` rows of what `samples` gives."""
    return packed(_flat(tokens, "input_ids"), _flat(tokens, "labels"), tokens["length"].to_numpy(), size)


_INTS = ListOf(Value("int32"))
FEATURES = {
    texts: Features(input_ids=_INTS, length=Value("int64"), words=Value("int64")),
    samples: Features(input_ids=_INTS, labels=_INTS, length=Value("int64"), cut=Value("bool")),
    prompts: Features(input_ids=_INTS, length=Value("int64"), cut=Value("bool")),
}


def without_blank(split: Dataset, column: str) -> Dataset:
    """Documents that are not blank."""
    return split.filter(_has_text, input_columns=column)


def joined(split: Dataset, column: str) -> Dataset:
    """The lines of a text in `pieces`. Blank ones, too: they are a part of the text."""
    return split.map(pieces, batched=True, batch_size=None, fn_kwargs={"column": column})


def tokens_of_texts(
    split: Dataset, tokenizer: Any, processes: int | None, role: str, where: str, one_text: bool, **arguments: Any
) -> Dataset:
    """What `texts` gives of documents, or of the pieces of one text.

    Raises:
        ValueError: They hold no tokens.
    """
    split = (joined if one_text else without_blank)(split, arguments["column"])
    tokens = encode(split, texts, tokenizer, processes, role, **arguments)
    if not sum(tokens["length"][:]):
        raise ValueError(f"What there is in {where} to {VERBS[role]} holds no tokens, blank texts alone.")
    return tokens


def tokens_of_samples(
    split: Dataset, tokenizer: Any, processes: int | None, role: str, where: str, **arguments: Any
) -> Dataset:
    """What `samples` gives of prompts and completions, with a warning if some are cut.

    Raises:
        ValueError: There is no eos token.
    """
    if arguments["marks"].eos is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path} has no eos token, with which a completion is closed: take "
            "another, or set data.prompt_column and data.completion_column to null, for texts."
        )
    tokens = encode(split, samples, tokenizer, processes, role, **arguments)
    if cut := sum(tokens["cut"][:]):
        rank_zero_warn(
            f"{cut:,} of {len(tokens):,} samples of {where} are longer than {arguments['size']:,} tokens: their "
            "prompts lose the beginning, and completions for which that is not enough their end."
        )
    return tokens


def tokens_of_prompts(split: Dataset, tokenizer: Any, processes: int | None, **arguments: Any) -> Dataset:
    """What `prompts` gives, with a warning if some are cut."""
    rows = encode(split, prompts, tokenizer, processes, "predict", **arguments)
    if cut := sum(rows["cut"][:]):
        rank_zero_warn(
            f"{cut:,} of {len(rows):,} prompts are longer than {arguments['size']:,} tokens, what data.block_size and "
            "the model's positions before model.max_new_tokens have room for, and lose the beginning."
        )
    return rows.select_columns(["input_ids", "length"])


def encode(
    split: Dataset, function: Any, tokenizer: Any, processes: int | None, role: str, **arguments: Any
) -> Dataset:
    """What `texts`, `samples` or `prompts` gives of a split, a row each; without a number, in as many as pay off."""
    processes = processes or min(os.cpu_count() or 1, len(split) // PER_PROCESS)
    return split.map(
        function,
        batched=True,
        remove_columns=split.column_names,
        features=FEATURES[function],
        fn_kwargs={"tokenizer": tokenizer, **arguments},
        num_proc=processes if processes > 1 else None,
        desc=f"Tokenising {role}",
    )


def lay_out(tokens: Dataset, function: Any, **arguments: Any) -> Dataset:
    """What `blocks`, `windows` or `packed_samples` gives of all tokens: rows that depend on all of them."""
    rows = tokens.with_format("arrow").map(
        function, batched=True, batch_size=None, remove_columns=tokens.column_names, fn_kwargs=arguments
    )
    return rows.with_format(None)


def _has_text(text: str) -> bool:
    return bool(text.strip())
