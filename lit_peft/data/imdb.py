"""The Large Movie Review Dataset, with two classes."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Value

from lit_peft.data.held_out import digests
from lit_peft.data.splits import stratified_subset
from lit_peft.data.text_classification import TextClassificationDataModule

LINE_BREAK = re.compile(r"(<|&lt;)\s*/?\s*br\b[^<>&]*(>|&gt;)", re.IGNORECASE)


class IMDBDataModule(TextClassificationDataModule):
    """IMDB (Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis", section 4.1): is a film review positive?

    25,000 reviews to train on and 25,000 to test on, half of each positive; the test set is the published one. There
    is no validation split: it is cut from train, where the files hold all negative reviews before all positive ones,
    by labels. The split `unsupervised` has no labels; it can be predicted, and is refused elsewhere.

    HTML's line breaks, of which a review has four in the mean, become newlines, however they are written; the few
    other tags stay.

    192 of the 25,000 reviews of train have the text of another: none of these is held out, so that no text validates
    that trained. Two more things no cut mends. 123 texts are in train and in test, which is told when the test set is
    scored. And reviews of one film, at most 30, lie on both sides of the cut, while no film of train is in test:
    validation may be easier than the test.

    A review has 174 words in the median, and one in ten more than 450: see `truncation` and `windows`.

    Args:
        path: `stanfordnlp/imdb`; a folder with train and test files of the columns text and label (parquet, csv, tsv,
            jsonl); or `demo`.
        max_length: Tokens that are kept of a review.
        kwargs: Arguments of `TextClassificationDataModule`.
    """

    numbered: ClassVar[Sequence[str]] = ("neg", "pos")

    def __init__(self, path: str = "stanfordnlp/imdb", max_length: int = 512, **kwargs: Any) -> None:
        super().__init__(path=path, max_length=max_length, **kwargs)

    def load(self) -> dict[str, Dataset]:
        """The splits, without line breaks of HTML."""
        return {name: self._clean(split) for name, split in super().load().items()}

    def use_texts(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> None:
        super().use_texts(texts, pairs)
        assert self._given is not None
        self._given = self._clean(self._given)

    def hold_out(self, split: Dataset, labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Rows drawn by label from those whose text is there once.

        Raises:
            ValueError: Too few are.
        """
        _, index, counts = np.unique(digests(split, self._text_columns), return_inverse=True, return_counts=True)
        single = np.flatnonzero(counts[index] == 1)
        if len(single) < size:
            raise ValueError(
                f"Only {len(single):,} of {len(split):,} texts of {self.path} are there once, too few to cut {size:,} "
                f"off: set data.val_split (there are: {', '.join(self._splits)}) or a smaller data.val_fraction."
            )
        return single[stratified_subset(labels[single], size, rng)]

    def _clean(self, split: Dataset) -> Dataset:
        columns = [name for name in self._text_columns if split.features.get(name) == Value("string")]
        # The pattern is an argument, so that what was cached under another one is not found.
        arguments = {"columns": columns, "pattern": LINE_BREAK}
        return split.map(replace_breaks, batched=True, fn_kwargs=arguments, desc="Cleaning") if columns else split


def replace_breaks(batch: dict[str, list[Any]], columns: Sequence[str], pattern: re.Pattern[str]) -> dict[str, Any]:
    """Columns of texts with a newline for each match of a pattern; null stays null."""
    return {name: [text if text is None else pattern.sub("\n", text) for text in batch[name]] for name in columns}
