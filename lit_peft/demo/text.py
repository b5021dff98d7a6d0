"""Film-review sentences from a small grammar: the offline data set of the demo.

The grammar is context free, and its symbols carry a polarity. In a production, ``{x+}`` stands for the symbol
``x`` with the polarity of the whole and ``{x-}`` for ``x`` with the opposite one, so negation ("not a {adj-}
minute") and contrast ("{clause-}, but {clause+}") are visible in the production itself, and the label of a
sentence follows from its words without noise. Both labels use the same productions, so no function word tells
the label.

What makes the data worth a pretrained encoder: counting words does not solve it, because a negated or
contrasted word has the opposite polarity of its sentence, and some sentiment words, `HELD_OUT`, occur in
validation and test but never in train.
"""

import difflib
import itertools
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_T = TypeVar("_T")

SIZES = {"train": 8000, "validation": 1000, "test": 1000}

# Words of every split, then words held out from train. Derivations of one stem ("disappoint",
# "disappointing") stay on one side, else a held-out word would be half known.
_WORDS = {
    "adj+": (
        "brilliant charming gripping touching clever delightful dazzling moving convincing witty elegant "
        "fresh inspired heartfelt memorable absorbing thrilling graceful sharp stylish splendid compelling "
        "masterful wonderful exciting rewarding engaging beautiful lively vivid assured original satisfying "
        "inventive impressive tender funny great excellent enjoyable",
        "superb captivating luminous refreshing poignant exquisite hilarious magnetic enchanting radiant "
        "astonishing sublime uplifting",
    ),
    "adj-": (
        "dull dreadful boring tedious clumsy lifeless predictable bland awful shallow messy tiresome stale "
        "wooden pointless muddled flat grating dreary contrived sloppy hollow irritating laughable lazy "
        "derivative pretentious incoherent stilted trite terrible plodding disappointing formulaic "
        "confusing mediocre painful ugly awkward bad",
        "insipid soulless banal abysmal horrible mawkish ponderous unwatchable inept lousy atrocious turgid dismal",
    ),
    "noun+": (
        "triumph delight gem treat masterpiece joy marvel pleasure success revelation winner treasure wonder",
        "knockout feast stunner blessing",
    ),
    "noun-": (
        "mess bore disaster chore failure letdown disappointment dud ordeal waste misfire flop slog",
        "travesty fiasco snooze calamity",
    ),
    # Verbs take -s in the third person, those of "feel" -d in the past: the productions spell the ending.
    "verb+": (
        "dazzle delight succeed shine soar charm work convince sparkle thrill amuse entertain",
        "enchant captivate mesmerise excel",
    ),
    "verb-": (
        "bore disappoint fail drag annoy flounder stumble irritate grate sink plod sag",
        "collapse meander exasperate fizzle",
    ),
    "feel+": ("love adore admire treasure praise embrace appreciate", "celebrate prize"),
    "feel-": ("hate loathe despise dislike deplore ridicule endure", "denounce lambaste"),
}
_ENDINGS = {"adj": ("",), "noun": ("",), "verb": ("", "s"), "feel": ("", "d")}

# Alternatives are equally likely, so a repeated one is more frequent.
_GRAMMAR = {
    "sentence": ("{plain+}",) * 9 + ("{turn+}",) + ("{contrast+}",) * 3,
    "plain": (
        "{clause+}",
        "{clause+} {tail}",
        "{opening}, {clause+}",
        "{clause+}, and {clause+}",
        "{neutral}, and {clause+}",
        "{clause+}, and {neutral}",
    ),
    # The clause after "but" or "yet" decides, and so does the one without "although" or "while".
    "contrast": (
        "{clause-}, but {clause+}",
        "{clause-}, but {clause+} {tail}",
        "{clause-}, yet {clause+}",
        "{clause-}; {clause+}, however",
        "although {clause-}, {clause+}",
        "{clause+}, although {clause-}",
        "{clause+}, even though {clause-}",
        "while {clause-}, {clause+}",
        "despite some {adj-} {part}s, {clause+}",
        "{clause+}, {adj-} {part}s notwithstanding",
        "{neutral}, but {clause+}",
        "although {neutral}, {clause+}",
    ),
    # Contrast inside one clause.
    "turn": (
        "{film} starts as a {noun-} but ends as a {noun+}",
        "{film} begins as a {adj-} {genre} but ends as a {noun+}",
        "{any} looks {adj-} at first and proves {adj+} {later}",
        "{any} could have been {adj-}, yet it is {very} {adj+}",
        "{any} is {adj+} rather than {adj-}",
        "{any} is more {adj+} than {adj-}",
        "{any} is not {adj-} but {adj+}",
        "{who} expected a {noun-} and got a {noun+}",
        "{who} came to {feel-} {any} and stayed to {feel+} it",
        "what sounds {adj-} on paper turns out {very} {adj+} {later}",
    ),
    # Only in unlabelled text: so many words of one polarity side by side teach an encoder which words are alike.
    "prose": ("{blurb+}", "{sentence+}"),
    "blurb": (
        "{adj+} and {adj+}",
        "{adj+}, {adj+} and {adj+}",
        "{any} is {adj+}, {adj+} and {adj+}",
        "a {adj+}, {adj+} {genre}",
        "a {adj+} {noun+}, {adj+} and {adj+}",
        "{adj+} {part}s, {adj+} {part}s and a {adj+} {genre}",
        "it {verb+}s, and it {verb+}s: a {adj+} {noun+}",
        "{who} {feel+}d its {adj+} {part}s and {feel+}d its {adj+} {part}s",
        "what a {noun+}, and what a {adj+} {genre}",
    ),
    "clause": ("{direct+}",) * 5 + ("{negated+}",),
    "direct": (
        "{any} {is} {very} {adj+}",
        "{any} {is} {very} {adj+}",
        "{any} {is} {adj+} and {adj+}",
        "{any} is a {noun+}",
        "{any} is a {adj+} {noun+}",
        "{film} is a {adj+} {genre}",
        "{any} {really} {verb+}s",
        "{any} {verb+}s and {verb+}s",
        "the {part}s are {very} {adj+}",
        "the {part}s {really} {verb+}",
        "{who} {really} {feel+}d {any}",
        "{who} found {any} {very} {adj+}",
        "there are {many} {adj+} {part}s in {film}",
        "{film} is full of {adj+} {part}s",
        "{film} offers one {adj+} {part} after another",
        "{director} has made a {very} {adj+} {genre}",
        "it is hard to imagine a more {adj+} {genre}",
    ),
    "negated": (
        "{any} {is} {not} {adj-}",
        "{any} {is} {not} {adj-}",
        "{any} is neither {adj-} nor {adj-}",
        "{any} is no {noun-}",
        "{any} is {not} a {noun-}",
        "{any} never {verb-}s",
        "{any} does not {verb-}",
        "the {part}s are {not} {adj-}",
        "the {part}s never {verb-}",
        "{who} did not {feel-} {any}",
        "nobody {feel-}d {any}",
        "nobody could call {any} {adj-}",
        "there is not a {adj-} {part} in {film}",
        "{film} passes without a {adj-} {part}",
        "{film} is free of {adj-} {part}s",
        "{who} could not find a single {adj-} {part} in {film}",
    ),
    # Some neutral clauses are negated too, so that a negation alone tells nothing.
    "neutral": (
        "it runs for {time}",
        "it does not run for {time}",
        "it was shot in {place}",
        "it never leaves {place}",
        "the story follows {topic}",
        "the story is not about {topic}",
        "{who} saw it {when}",
        "{who} had not read the book",
        "there is no narrator",
        "it opens with {topic} in {place}",
    ),
    "any": ("{film}", "the {element}"),
    "film": (*("{title}",) * 4, "{title} about {topic}", "{title} by {director}", "the {portion}"),
}
_PHRASES = {
    "title": "the film|the movie|this {genre}|the {genre}|this {kind} {genre}|the sequel|the remake|her debut|"
    "his latest feature|the adaptation",
    "genre": "film|movie|thriller|comedy|drama|western|romance|musical|mystery|documentary",
    "kind": "small|French|Danish|silent|independent|low-budget|three-hour|family",
    "portion": "story|plot|script|first act|second half|opening hour|finale",
    "element": "ending|dialogue|pacing|direction|camerawork|editing|music|heroine|villain|cast|lead actor|young star",
    "part": "scene|line|minute|moment|joke|song|character|twist|idea|performance",
    "who": "I|we|my sister|the audience|most critics|everyone around me|our film club",
    "director": "the director|a former editor|the Danish director|a first-time director|"
    "a team of students|the author of the novel|the makers of the series",
    "topic": "a lighthouse keeper|two sisters|a chess player|a retired detective|a family of bakers|"
    "a lost letter|the last train north|a village without electricity|three thieves|a night nurse|an old sailor|"
    "the summer of 1969|a boy who never speaks",
    "place": "Lisbon|the city|a harbour town|Iceland|the desert|one room|the mountains",
    "time": "two hours|ninety minutes|almost three hours|barely an hour",
    "when": "last night|on a plane|at a festival|twice|with friends|on a rainy Sunday",
    "later": "in the end|by the second act|an hour in|on a second viewing",
    "opening": "from start to finish|in the end|on a second viewing|for me|as a whole|once again",
    "tail": "from start to finish|in the end|this time|as a whole|until the credits roll|for once",
    "is": "is|is|was|feels|seems|remains",
    "not": "not|not|never|hardly|by no means|in no way|far from|anything but",
    "very": "|||very|truly|utterly|deeply|quite|rather|mostly|often|somewhat",
    "really": "||really|certainly|mostly|often|simply|rather",
    "many": "many|several|a few|plenty of|countless",
}


def _forms(sign: str, lines: slice = slice(None)) -> frozenset[str]:
    """Every form in which the words of one polarity (``"+"`` or ``"-"``) appear in a sentence."""
    return frozenset(
        word + ending
        for slot, endings in _ENDINGS.items()
        for line in _WORDS[slot + sign][lines]
        for word in line.split()
        for ending in endings
    )


LEXICON = (_forms("-"), _forms("+"))
"""The sentiment words, inflected, by label: ``LEXICON[0]`` negative, ``LEXICON[1]`` positive."""

HELD_OUT = _forms("-", slice(1, 2)) | _forms("+", slice(1, 2))
"""Those of them that never occur in the train split."""

_SLOT = re.compile(r"\{(\w+)([+-]?)\}")
# production -> [literal, symbol, sign, literal, symbol, sign, ..., literal]
_PRODUCTIONS = {
    symbol: [_SLOT.split(text) for text in texts]
    for symbol, texts in (_GRAMMAR | {symbol: text.split("|") for symbol, text in _PHRASES.items()}).items()
}


class _Writer:
    """Draws sentences from the grammar, the same on every platform and Python version.

    Only `random.Random.random` is used, the one method whose sequence for a seed Python promises to keep.
    """

    def __init__(self, seed: str, held_out: bool = True) -> None:
        self.random = random.Random(seed).random
        lines = slice(None) if held_out else slice(1)
        self.words = {slot: " ".join(parts[lines]).split() for slot, parts in _WORDS.items()}

    def choose(self, options: Sequence[_T]) -> _T:
        return options[int(self.random() * len(options))]

    def expand(self, symbol: str, label: int) -> str:
        if symbol in _ENDINGS:
            return self.choose(self.words[symbol + "-+"[label]])
        first, *rest = self.choose(_PRODUCTIONS[symbol])
        text = first
        for name, sign, literal in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            text += self.expand(name, 1 - label if sign == "-" else label) + literal
        return text

    def sentence(self, symbol: str, label: int) -> str:
        text = " ".join(self.expand(symbol, label).split())  # an absent adverb leaves two spaces
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        return text[0].upper() + text[1:] + "."


def _split_of(sentence: str) -> str:
    """The only split that may hold `sentence`: its checksum decides, so splits of any seeds are disjoint."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(sentence.encode()) % 8, "train")


def _sentences(writer: _Writer, symbol: str, split: str, label: int) -> Iterator[str]:
    while True:
        sentence = writer.sentence(symbol, label)
        if _split_of(sentence) == split and not re.search(r"\b(\w+),? (and |nor )?\1\b", sentence):
            yield sentence


def labelled_sentences(split: str, seed: int = 0) -> list[tuple[str, int]]:
    """One split of the demo data, without duplicates, half of it positive, in random order.

    Args:
        split: "train" (8,000 sentences), "validation" or "test" (1,000 each).
        seed: Another seed gives other sentences; those of different splits differ whatever their seeds.

    Returns:
        Pairs of a sentence and its label, 0 negative or 1 positive.

    Raises:
        ValueError: If `split` is none of the three.
    """
    if split not in SIZES:
        near = difflib.get_close_matches(str(split), SIZES, n=1)
        raise ValueError(
            f"split is one of {', '.join(SIZES)}, not {split!r}." + (f" Did you mean {near[0]!r}?" if near else "")
        )
    writer = _Writer(f"{split} {seed}", held_out=split != "train")
    pairs: dict[str, int] = {}
    for label in (0, 1):
        for sentence in _sentences(writer, "sentence", split, label):
            pairs[sentence] = label
            if len(pairs) == SIZES[split] * (label + 1) // 2:
                break
    return sorted(pairs.items(), key=lambda _: writer.random())


def unlabelled_text(n: int, seed: int = 0) -> list[str]:
    """Text for pretraining: reviews of one to three sentences that share one sentiment, which is not told.

    The words held out from train are among them; the sentences of validation and test, of any seed, are not.

    Args:
        n: Number of reviews.
        seed: Seed of the text.

    Returns:
        The reviews, their sentences joined by a space.
    """
    writer = _Writer(f"unlabelled {seed}")
    streams = [_sentences(writer, "prose", "train", label) for label in (0, 1)]
    return [" ".join(itertools.islice(writer.choose(streams), writer.choose((1, 2, 3, 3)))) for _ in range(n)]


def reviews(seed: int = 0) -> "DatasetDict":
    """The demo data as a `datasets.DatasetDict`: 8,000 train, 1,000 validation and 1,000 test sentences.

    Args:
        seed: Seed of `labelled_sentences`.

    Returns:
        Splits "train", "validation" and "test" with the columns "sentence" (str) and "label" (`ClassLabel`
        with the names "negative" and "positive").
    """
    from datasets import DatasetDict

    return DatasetDict({split: _table(split, seed) for split in SIZES})


@lru_cache(maxsize=len(SIZES))  # a notebook, or a test run, makes many data modules of it
def _table(split: str, seed: int) -> "Dataset":
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    sentences, labels = zip(*labelled_sentences(split, seed), strict=True)
    return Dataset.from_dict({"sentence": sentences, "label": labels}, features=features)


# Most words of a kind are interchangeable in the pretraining text, so their embeddings nearly coincide, and adapters
# that leave these alone hardly tell them apart in the softmax: "failure" and "triumph" came first in nearly all
# summaries, at a probability of .3, an ECE of .10. These two stand apart: one follows "an", one is a verb, too.
VERDICTS = (" As a whole, an ordeal.", " As a whole, a treasure.")
"""What `verdicts` answers, by label; of words that the demo decoder knows, and says of either kind of film."""


def verdicts(seed: int = 0) -> "DatasetDict":
    """The demo data for prompts and completions: a sentence, and the one of `VERDICTS` that sums it up.

    Args:
        seed: Seed of `labelled_sentences`.

    Returns:
        Splits as of `reviews`, with the columns "prompt" and "completion" (str).
    """
    from datasets import DatasetDict

    def answered(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        return {"prompt": batch["sentence"], "completion": [VERDICTS[label] for label in batch["label"]]}

    columns = ["sentence", "label"]
    return DatasetDict(
        {name: split.map(answered, batched=True, remove_columns=columns) for name, split in reviews(seed).items()}
    )
