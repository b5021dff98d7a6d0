"""Language modelling on texts, or on prompts and completions, from a hub data set, local files, or the demo."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from lit_peft import hub
from lit_peft.data import token_rows
from lit_peft.data.blocks import counted, pad_rows
from lit_peft.data.columns import check_documents, check_text, given_texts, nearest
from lit_peft.data.held_out import VERBS, check_least
from lit_peft.data.positions import WithinPositions
from lit_peft.data.splits import LINE, is_text, load_splits, stratified_subset

LONGEST_BLOCK = 1024
"""Tokens of a block where `block_size` is null and the tokenizer and the model take more."""
TOLD_APART = 8
"""Words of the shortest line by which a text is known again: texts share headings and blank lines."""


class LanguageModelingDataModule(WithinPositions):
    """Texts, or prompts with completions, for causal and masked language models.

    Batches are dicts of int64 tensors, (batch, width): `input_ids`; `labels`, aligned with them, -100 where nothing is
    to be scored; and `attention_mask`. Padding is on the right, to the longest row, rounded up to a multiple of 8.

    **Texts** (`text_column`). To train, documents are joined, with the tokenizer's eos token (or its sep token) between
    two of them, and cut into disjoint blocks of `block_size` tokens; each token is in one block, and the last block is
    shorter where the tokens do not divide. In evaluation each document is read by itself, in windows of `block_size`
    tokens, `stride` tokens apart, each of which scores what the one before it had not reached: every token has one
    label, and less context than a window holds only where a window begins. A causal model can score all tokens but a
    row's first: with disjoint windows (`stride: null`) one of each window goes unscored, with overlapping ones only the
    first of a document. The tokenizer's marks ([CLS] and [SEP], or a <s>), which count as tokens of a block, stand
    around each row; neither they nor separators are scored. Blank texts hold nothing and are passed over. A special
    token that a text spells out ("[MASK]", "<|endoftext|>") is read as that token, as transformers does by default
    (`split_special_tokens`), and is not scored in a text either.

    **Prompts and completions** (`prompt_column`, `completion_column`). A sample is the prompt and the completion as
    they stand, each tokenised by itself, and an eos token; the completion and that token are scored. Of a sample longer
    than a block the prompt loses its beginning, but for its last token; then the completion loses its end. With
    `pack: true` a row holds several samples, by `best_fit`, as many as `block_size` tokens allow. Such batches have no
    attention mask but `position_ids`, which begin with 0 in each sample: by them transformers keeps attention within
    samples, if the model is called with `use_cache=False`. The loss is that of samples one by one.

    Validation and test read splits of their own, or are cut from train: whole documents or samples, drawn by `seed`;
    of one text of lines the last ones, for validation, and those before them, for the test. To predict, each row is
    a prompt (of a text of lines each line, but for blank ones), in the order of the file, padded on the left; of one
    longer than a block, or than leaves room for what is to follow, the end is kept, with a warning. Training rows come
    in an order that follows from `seed` and the epoch alone; a resumed run, also in mid-epoch, sees exactly the batches
    that were left.

    Args:
        path: `demo` for the bundled reviews, one sentence a document, or with columns for prompts and completions
            sentences and what sums them up, under these names; a text file (txt), or one of rows (csv, tsv,
            json, jsonl, parquet), which is the split `train`; a folder with one file a split; or a data set of the
            Hugging Face hub.
        name: Configuration of a hub data set that has several.
        text_column: Column of the text. That of the demo and of text files goes by any name.
        prompt_column: Column of the prompt, with `completion_column`.
        completion_column: Column of the completion, in the place of `text_column`.
        document: What one document is. row: each row; split: all rows of a split, which are the lines of one text; a
            line break is added to those that do not end with one. null: split for text files, else row.
        tokenizer: Hub id or folder of the tokenizer; null: the model's `backbone`.
        block_size: Most tokens of a row; null: 1024, and no more than virtual tokens (`PromptTuning`, `PrefixTuning`,
            `PTuning`) leave of a model's positions; one that is set and more than that is refused. Where the tokenizer
            or the model take less, so many, with a warning if it was set.
        stride: Tokens from one evaluation window to the next; null: `block_size`, so that none overlap.
        pack: Put several samples, of a prompt and a completion each, into one row.
        batch_size: Training rows a step on each device.
        eval_batch_size: Rows a step on each device in evaluation; null: twice `batch_size`.
        val_split: Split to validate on; null: `validation` where there is such a split, not empty, that is not
            `test_split`, else cut from train; cut: cut from train in any case.
        test_split: Split to test on; null: `test`, or cut from train, likewise; cut: as above.
        predict_split: Split of the prompts; null: the split to test on, else `test`, else the only one there is.
        val_fraction: Share of train's documents, samples or lines that is cut off for validation, and again for the
            test.
        limit_train: Train on this many rows of tokens (blocks or samples), a random choice; null: all.
        limit_val: Validate on this many, chosen likewise.
        limit_test: Test on this many, chosen likewise.
        num_workers: Processes that load batches; 0: the main process.
        num_proc: Processes that tokenise; null: one for every 25,000 texts, up to the number of cores.
        seed: Seed of the order, the cut and the subsets, not negative.

    Raises:
        ValueError: An argument out of range; while loading: a file that is broken or empty, a missing split or column,
            a text that is null, an empty prompt or completion, a split of blank texts alone, a `block_size` that has
            no room for a text, or to which virtual tokens do not leave enough positions, no eos token to close
            completions, a tokenizer whose special tokens do not stand around a text, 2^31 tokens or more in the rows
            of a split.
        FileNotFoundError: A local path that does not exist.
        ConnectionError: A hub data set or tokenizer that is neither in reach nor in the cache.
    """

    counts_line_breaks = False
    """Whether a line break is one of a text's words, in `tokens_per_word`."""

    def __init__(
        self,
        path: str = hub.DEMO,
        name: str | None = None,
        text_column: str = "text",
        prompt_column: str | None = None,
        completion_column: str | None = None,
        document: Literal["row", "split"] | None = None,
        tokenizer: str | None = None,
        block_size: int | None = None,
        stride: int | None = None,
        pack: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        predict_split: str | None = None,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            {"train": "train", "val": val_split, "test": test_split, "predict": predict_split},
            {"train": limit_train, "val": limit_val, "test": limit_test, "predict": None},
            val_fraction,
            tokenizer=tokenizer,
            max_length=block_size or LONGEST_BLOCK,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_least(1, block_size=block_size, stride=stride, num_proc=num_proc)
        if document not in ("row", "split", None):
            raise ValueError(f"data.document is {document!r}, expected row, split or null.")
        for argument, given, other in (
            ("completion_column", prompt_column, completion_column),
            ("prompt_column", completion_column, prompt_column),
        ):
            if given is not None and other is None:
                raise ValueError(f"data.{argument} is null: prompts and completions need a column each.")
        if prompt_column is not None and prompt_column == completion_column:
            raise ValueError(f"data.prompt_column and data.completion_column are both {prompt_column!r}.")
        for argument, set_, why in (
            ("pack", pack and prompt_column is None, "true: blocks of texts are full as it is. Set it to false"),
            ("stride", stride and prompt_column, f"{stride}: it is for windows over texts. Set it to null"),
            ("document", document == "split" and prompt_column, "split: a sample is a row. Set it to null"),
        ):
            if set_:
                columns = "data.prompt_column and data.completion_column"
                raise ValueError(f"data.{argument} is {why}, or {columns} to {'null' if prompt_column else 'columns'}.")
        if stride and block_size and stride > block_size:
            raise ValueError(
                f"data.stride is {stride}, expected at most data.block_size, {block_size}: "
                "what lies between two windows would not be scored."
            )
        self.save_hyperparameters()
        self.name = name
        self.text_column = text_column
        self.prompt_column = prompt_column
        self.completion_column = completion_column
        self.document = document
        self.block_size = block_size
        self.stride = stride
        self.pack = pack
        self.num_proc = num_proc
        self._given: Dataset | None = None
        self._parts: dict[tuple[str, str, str, int], Dataset] = {}

    def load(self) -> dict[str, Dataset]:
        """The splits as they come. For subclasses to override; called once."""
        if self.path == hub.DEMO:
            from lit_peft.demo import reviews, verdicts

            columns = {"sentence": self.text_column}
            if self.prompt_column and self.completion_column:
                columns = {"prompt": self.prompt_column, "completion": self.completion_column}
            return {
                str(name): split.select_columns([*columns]).rename_columns(columns)
                for name, split in (verdicts() if self.prompt_column else reviews()).items()
            }
        splits = load_splits(self.path, self.name, lines=True)
        if is_text(self.path) and self._prompt != LINE:  # lines may be prompts, to predict
            splits = {name: split.rename_column(LINE, self._prompt) for name, split in splits.items()}
        return splits

    def check(self, role: str) -> None:
        """Raises ValueError for what would make the rows of a role unusable: a missing split, column, or text."""
        self._check_texts(self._rows(role)[0])

    def tokens_per_word(self, role: str) -> float | None:
        """Tokens of what a role reads by its words, which white space parts; marks and separators are no tokens.

        A mean negative log-likelihood of a token times this is one of a word: the word perplexity is
        exp(nll * tokens_per_word). A limit of rows does not change it.

        Args:
            role: "train", "val" or "test".

        Returns:
            The ratio; None for completions, whose eos token is no part of a word.

        Raises:
            ValueError: Another role.
        """
        if role not in VERBS:
            raise ValueError(f"No role {role!r}; {nearest(role, VERBS)}")
        if self.prompt_column:
            return None
        tokens = self._tokens(role)
        return sum(tokens["length"][:]) / sum(tokens["words"][:])

    def describe(self, roles: Sequence[str] = ("train", "val", "test")) -> list[str]:
        """What a person should know before training: how much text each role reads, and where it is from.

        Args:
            roles: Out of "train", "val" and "test".

        Returns:
            Lines to print.
        """
        size, lines = self._longest, []
        for role in roles:
            try:
                name, rows = self._rows(role)
                tokens, count = self._tokens(role), len(self._all_rows(role))
            except ValueError:  # an error of the stage that needs it
                lines.append(f"Data: none to {VERBS[role]}")
                continue
            kind = "sample" if self.prompt_column else "line" if self._is_one_text else "document"
            parts = [counted(len(rows), kind)]
            if not self.prompt_column:
                parts.append(counted(sum(tokens["words"][:]), "word"))
            parts.append(counted(sum(tokens["length"][:]), "token"))
            limit = self.limits[role] or count
            chosen = f"{limit:,} of " if limit < count else ""
            kind = "row" if self.prompt_column else "block" if role == "train" else "window"
            what = f"{chosen}{counted(count, kind)} of at most {size:,} tokens"
            lines.append(f"Data: {', '.join(parts)}, {what} to {VERBS[role]}{self._origin(role, name)}")
        return lines

    def use_texts(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> None:
        """Predict from these prompts, in this order, instead of a data set; `path` is then not read for prediction.

        Args:
            texts: The prompts. Special tokens that they spell out are read as such, or no mask token could be given:
                take them out of what strangers have typed.
            pairs: Not for language models: None.

        Raises:
            ValueError: There are no texts, or one is blank or too long; `pairs` are given.
        """
        if pairs is not None:
            raise ValueError("A prompt is one text: leave out the second ones, pairs or --text_pair.")
        self._given = given_texts(texts, None, self._prompt, None)
        self._tokenised = {key: value for key, value in self._tokenised.items() if key[0] != "predict"}

    def hold_out(self, split: Dataset, labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Documents or samples drawn by chance; the last lines of one text."""
        if self._is_one_text:
            return np.arange(max(0, len(split) - size), len(split))
        return super().hold_out(split, labels, size, rng)

    # ------------------------------------------------------------------------------- the rows of the files

    @cached_property
    def _is_one_text(self) -> bool:
        """Whether the rows of a split are the lines of one text."""
        if self.document is not None:
            return self.document == "split"
        return self.path != hub.DEMO and is_text(self.path)

    @property
    def _prompt(self) -> str:
        return self.prompt_column or self.text_column

    @property
    def _text_columns(self) -> list[str]:
        return [self.prompt_column, self.completion_column] if self.completion_column else [self.text_column]  # type: ignore[list-item]

    def _scorable(self, split: str) -> bool:
        data = self._splits[split]
        return len(data) > 0 and {*self._text_columns} <= {*data.column_names}

    def _codes(self, split: str) -> np.ndarray:
        return np.zeros(len(self._split(split)), dtype=np.int64)

    def _train_codes(self) -> np.ndarray:
        self._check_texts("train")
        return self._codes("train")

    def _check_texts(self, split: str) -> None:
        data, where = self._split(split), self._where(split)
        if self.completion_column:
            if self.completion_column not in data.column_names and self.path != hub.DEMO and is_text(self.path):
                pack = " and data.pack to false" if self.pack else ""
                raise ValueError(
                    f"{self.path} is text without columns: set data.prompt_column and data.completion_column to null"
                    f"{pack}, which scores all of it, or give rows of prompts and completions (jsonl, csv, tsv or "
                    "parquet)."
                )
            for column, option in zip(self._text_columns, ("prompt_column", "completion_column"), strict=True):
                check_text(data, column, where, option=option)
            return
        check_documents(data, self.text_column, where, option="text_column")

    def _rows(self, role: str, limited: bool = True) -> tuple[str, np.ndarray]:
        return super()._rows(role, limited=False)  # limits count rows of tokens

    def _digests(self, split: str, rows: np.ndarray) -> np.ndarray:
        if self._is_one_text:
            texts = self._split(split).select(rows)[self.text_column][:]
            rows = rows[[len(text.split()) >= TOLD_APART for text in texts]]
        return super()._digests(split, rows)

    @property
    def _identity(self) -> dict[str, Any]:
        known = super()._identity | {"limit_train": self.limits["train"], "block_size": self._longest}
        del known["max_length"]
        return known | {name: getattr(self, name) for name in ("document", "pack", "completion_column")}

    # --------------------------------------------------------------------------------- the rows of tokens

    def _loader_options(self) -> dict[str, Any]:
        collate = partial(pad_rows, pad=self.tokenizer.pad_token_id or 0, longest=self._longest)
        return super()._loader_options() | {"collate_fn": collate}

    def _forget(self) -> None:
        super()._forget()
        self._parts.clear()

    def _tokenise(self, role: str) -> Dataset:
        if role == "predict":
            return self._prompts()
        rows = self._all_rows(role)
        if limit := self.limits[role]:
            rng = np.random.default_rng((self.seed, 2 + list(self.limits).index(role)))
            rows = rows.select(stratified_subset(np.zeros(len(rows), dtype=np.int64), limit, rng))
        return rows

    def _all_rows(self, role: str) -> Dataset:
        """Blocks, windows or samples of a role, whatever its limit."""
        key = role, self.tokenizer.name_or_path, "rows", self._longest
        if key not in self._parts:
            tokens = self._tokens(role)
            arguments = {"size": self._longest, "marks": self._marks}
            if not self.completion_column:
                stride = {} if role == "train" else {"stride": self.stride}
                function = token_rows.blocks if role == "train" else token_rows.windows
                rows = token_rows.lay_out(tokens, function, **arguments, **stride, one_text=self._is_one_text)
            elif self.pack:
                rows = token_rows.lay_out(tokens, token_rows.packed_samples, size=self._longest)
            else:
                rows = tokens.select_columns(["input_ids", "labels", "length"])
            self._parts[key] = rows
        return self._parts[key]

    def _tokens(self, role: str) -> Dataset:
        """Tokens of each text, or of each piece of one; or of each sample, with labels; and how many there are."""
        key = role, self.tokenizer.name_or_path, "tokens", self._longest
        if key in self._parts:
            return self._parts[key]
        name, rows = self._rows(role)
        self._check_texts(name)
        split, where = self._split(name).select_columns(self._text_columns), self._where(name)
        split = split.select(rows) if len(rows) < len(split) else split
        self._marks.check_room(self._longest, bool(self.completion_column))
        common = (split, self.tokenizer, self.num_proc, role, where)
        if self.completion_column:
            tokens = token_rows.tokens_of_samples(
                *common, columns=self._text_columns, size=self._longest, marks=self._marks
            )
        else:
            tokens = token_rows.tokens_of_texts(
                *common, self._is_one_text, column=self.text_column, line_breaks=self.counts_line_breaks
            )
        self._parts[key] = tokens
        return tokens

    def _prompts(self) -> Dataset:
        split = self._given
        if split is None:
            name, rows = self._rows("predict")
            split = self._split(name).select(rows)
            if self._is_one_text:
                check_documents(self._split(name), self._prompt, self._where(name), option="text_column")
            else:
                option = "prompt_column" if self.prompt_column else "text_column"
                check_text(self._split(name), self._prompt, self._where(name), option=option)
        return token_rows.tokens_of_prompts(
            split.select_columns([self._prompt]),
            self.tokenizer,
            self.num_proc,
            column=self._prompt,
            size=self._prompt_room,
            marks=self._marks,
            lines=self._is_one_text and self._given is None,
        )
