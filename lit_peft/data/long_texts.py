"""What a model reads of a text that is longer than it takes: its head and its tail, or all of it in windows.

The tokenizer itself cuts off a head or a tail.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

Truncation = Literal["head", "tail", "head+tail"]
TRUNCATIONS: tuple[Truncation, ...] = ("head", "tail", "head+tail")
HEAD = 128 / 510
"""Share of what `head+tail` keeps that is of the head."""


def head_and_tail(length: int, room: int) -> list[range]:
    """The first h and the last `room` - h tokens of a text, h = round(128 / 510 * room); all of one that fits.

    Of the 510 tokens that BERT has room for these are the first 128 and the last 382, which did best on IMDB in Sun et
    al. 2019, "How to Fine-Tune BERT for Text Classification?", section 5.3.1; of any other number the same share.

    Args:
        length: Tokens of the text, its tokenizer's marks not counted.
        room: Tokens of it that a model takes, at least 1.

    Returns:
        Two stretches of the text's tokens, or one.
    """
    if length <= room:
        return [range(length)]
    head = round(HEAD * room)
    return [range(head), range(length - (room - head), length)]


def windows(length: int, room: int, overlap: int) -> list[range]:
    """Windows that cover a text: each begins `room` - `overlap` tokens behind the one before.

    The last one ends where the text ends, and is as long as the others: it may share more with the one before it, since
    a short one would weigh as much as a full one in the mean.

    Args:
        length: Tokens of the text, its tokenizer's marks not counted.
        room: Tokens of it that a model takes, at least 1.
        overlap: Tokens that two neighbours share, from 0 to `room` - 1.

    Returns:
        1 + ceil((length - room) / (room - overlap)) stretches; one, the text itself, where it fits.
    """
    if length <= room:
        return [range(length)]
    ends = [*range(room, length, room - overlap), length]
    return [range(end - room, end) for end in ends]


def marks_before(tokenizer: Any) -> int:
    """How many of a tokenizer's own marks stand before a text: 1 of BERT ([CLS]), 0 of T5, whose only one ends it."""
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((at for at, special in enumerate(mask) if not special), len(mask))


def encode_long(
    texts: Sequence[str], tokenizer: Any, inputs: Sequence[str], max_length: int, overlap: int | None
) -> dict[str, list[Any]]:
    """Tokenises texts and keeps of each what a model takes, the tokenizer's marks in their places.

    Args:
        texts: The texts.
        tokenizer: A tokenizer of transformers.
        inputs: What to keep of what it gives.
        max_length: Tokens that a model takes, the marks among them.
        overlap: None: head and tail; else all of a text, in windows that share so many tokens.

    Returns:
        `inputs`, of each text a list, in which its windows stand one behind the other; `length`, all tokens of that
        list; with an `overlap` also `windows`, of each text the lengths of its windows.
    """
    whole = tokenizer(list(texts), verbose=False)
    before, marks = marks_before(tokenizer), tokenizer.num_special_tokens_to_add()
    room = max_length - marks

    def pieces(tokens: int) -> list[list[range]]:
        """Of each window of a tokenised text, marks included, the stretches that it is made of."""
        length = tokens - marks
        cut = [head_and_tail(length, room)] if overlap is None else [[w] for w in windows(length, room, overlap)]
        first, last = range(before), range(before + length, tokens)
        return [[first, *(range(before + s.start, before + s.stop) for s in stretches), last] for stretches in cut]

    texts_pieces = [pieces(len(ids)) for ids in whole["input_ids"]]
    encoded: dict[str, list[Any]] = {
        name: [
            [token for s in chain.from_iterable(text) for token in row[s.start : s.stop]]
            for row, text in zip(whole[name], texts_pieces, strict=True)
        ]
        for name in inputs
    }
    lengths = [[sum(map(len, piece)) for piece in text] for text in texts_pieces]
    encoded["length"] = [sum(text) for text in lengths]
    return encoded if overlap is None else encoded | {"windows": lengths}
