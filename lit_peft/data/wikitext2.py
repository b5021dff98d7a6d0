"""WikiText-2: language modelling on Wikipedia's good and featured articles."""

from typing import Any

from datasets import Dataset

from lit_peft.data.language_modeling import LanguageModelingDataModule


class WikiText2DataModule(LanguageModelingDataModule):
    r"""WikiText-2 (Merity et al. 2016, "Pointer sentinel mixture models", section 4.3 and table 1).

    600, 60 and 60 articles, one split each of train, validation and test. A split is one text, as it is in the
    published files: articles follow each other without a mark, headings are lines of it (" = Robert Boulter = ", and
    " = = Career = = " for a section), and a blank line, which the hub's rows give as "", is the line " " again. So
    36,718, 3,760 and 4,358 lines have 2,051,910, 213,886 and 241,211 words; the paper counts an <eos> for each line and
    reports 2,088,628, 217,646 and 245,569 tokens. These are the words of `tokens_per_word`, as the line breaks
    are tokens that a causal model predicts, so that word perplexities compare with those of word-level models.

    - wikitext-2-raw-v1 is the text for models with a vocabulary of their own, and what is usual for them.
    - wikitext-2-v1 has <unk> in the place of every word seen less than three times in train (2.6 % of it): the text of
      word-level models. Other tokenizers read <unk> as any characters, or as their own mark of unknown words (Llama,
      RoBERTa, T5), and what is easier to predict in it is not theirs to claim.

    Both keep the original's tokens ("@-@", spaces before commas). Perplexities "of WikiText-2" in work on quantised
    models are of another text, the raw rows with two line breaks between each, and by their own tokens: neither is
    comparable with a perplexity here.

    Args:
        path: `Salesforce/wikitext`; or a folder with train, validation and test files: parquet of the column text, as
            on the hub, or the published wiki.train.raw or wiki.train.tokens and so on, also named train.txt.
        name: wikitext-2-raw-v1 or wikitext-2-v1, on the hub; a folder is what it is.
        kwargs: Arguments of `LanguageModelingDataModule`; `document` is split.
    """

    counts_line_breaks = True

    def __init__(
        self, path: str = "Salesforce/wikitext", name: str | None = "wikitext-2-raw-v1", **kwargs: Any
    ) -> None:
        super().__init__(path=path, name=name, document="split", **kwargs)

    def load(self) -> dict[str, Dataset]:
        """The splits, blank lines as they are in the published files."""
        splits = super().load()
        column = self.text_column
        return {
            name: split.map(_lines, batched=True, fn_kwargs={"column": column}) if column in split.features else split
            for name, split in splits.items()
        }


def _lines(batch: dict[str, list[Any]], column: str) -> dict[str, list[Any]]:
    return {column: [" \n" if row == "" else row for row in batch[column]]}
