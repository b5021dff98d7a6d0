"""The round-trip matrix with HF PEFT, methods by directions, as docs/interop.md shows it."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from interop_rows import ARCHS, ROWS, TEXT, Arch, Row
from torch import Tensor, nn

import lit_peft

DOCS = Path(__file__).parents[1] / "docs" / "interop.md"
WRITES = os.environ.get("LIT_PEFT_WRITE_DOCS") == "1"
TOLERANCE = 1e-5
"""Largest difference of two logits."""
HEARD = 1000 * TOLERANCE
"""Least change of a logit by what is compared."""

DIRECTIONS = {
    "ours, ours": "saved by `lit_peft.save`, loaded by `lit_peft.load` on a fresh base; against the model saved",
    "ours, HF PEFT": "saved by `lit_peft.save`, opened by `PeftModel.from_pretrained`; against our model",
    "ours, HF PEFT, ours": "that, written again by HF PEFT's `save_pretrained`, loaded by `lit_peft.load`; against our "
    "model",
    "HF PEFT, ours": "made by `get_peft_model` and changed in HF PEFT, written by `save_pretrained`, loaded by "
    "`lit_peft.load`; against HF PEFT's model, which has seen nothing of ours",
    "HF PEFT, ours, HF PEFT": "that, saved again by `lit_peft.save`, opened by `PeftModel.from_pretrained`; against HF "
    "PEFT's model",
}
STAGES = {
    "save": ("ours, ours", "ours, HF PEFT", "ours, HF PEFT, ours"),
    "open": ("ours, HF PEFT", "ours, HF PEFT, ours"),
    "again": ("ours, HF PEFT, ours",),
    "make": ("HF PEFT, ours", "HF PEFT, ours, HF PEFT"),
    "load": ("HF PEFT, ours", "HF PEFT, ours, HF PEFT"),
}
"""What can fail -> the directions that are then missing."""


@dataclass(frozen=True)
class Hole:
    """What does not go.

    Attributes:
        rows: Methods.
        archs: Architectures.
        stage: What fails: our `save`; HF PEFT's opening of our folder, or its writing it again; its making or running
            of its own; our `load` of that.
        error: Part of the error that occurs.
        why: The reason.
    """

    rows: tuple[str, ...]
    archs: tuple[str, ...]
    stage: str
    error: str
    why: str


_ENCODERS = ("DistilBERT", "BERT", "RoBERTa", "BERT (questions)", "BERT (tokens)")
_KEPT = (
    "an encoder's text keeps its positions and its head reads the text, where HF PEFT moves both on by the virtual "
    "tokens; the folder's peft_type says so, and HF PEFT does not open it. With as_hf_peft it does."
)
_PREFIXES = ("PrefixTuning", "PrefixTuning (reparametrised)")
_AS_HF_PEFT = tuple(f"{name} as_hf_peft" for name in _PREFIXES)
_SHARED = (
    "of an encoder-decoder HF PEFT gives several layers of the decoder the same keys and values, leaves others unread, "
    "and gives the encoder none; ours go into every attention."
)
_TIED = (
    "with ensure_weight_tying HF PEFT puts a Linear in the place of the tied embeddings, and fails; without it, it "
    "trains them apart. It opens our folder, but what it writes of that lacks all but one of them, which is refused."
)
_LENGTHS = "HF PEFT's DoRA of an embedding keeps a length for each token, ours for each feature: two equations."
_CONV = "at the input of a convolution HF PEFT scales channels, ours each place in the kernel: two equations."
_LINEAR = "HF PEFT has it for linear layers alone; `lit_peft.load` reads the folder."
_NONE = "HF PEFT has no such method; `lit_peft.load` reads the folder."

HOLES = (
    Hole(_PREFIXES, _ENCODERS, "open", "KeyError: 'LIT_PEFT_PREFIX_TUNING'", _KEPT),
    Hole(("PromptTuning",), _ENCODERS, "open", "KeyError: 'LIT_PEFT_PROMPT_TUNING'", _KEPT),
    Hole(("PTuning",), _ENCODERS, "open", "KeyError: 'LIT_PEFT_P_TUNING'", _KEPT),
    *(
        Hole(
            _AS_HF_PEFT,
            ("DistilBERT",),
            stage,
            "ValueError: Model does not support past key values which are required for prefix tuning.",
            "HF PEFT's prefix needs a cache, which DistilBERT has not.",
        )
        for stage in ("open", "make")
    ),
    Hole(
        (*_PREFIXES, *_AS_HF_PEFT),
        ("T5",),
        "save",
        "ValueError: HF PEFT's prefix goes into every layer of one",
        _SHARED,
    ),
    Hole(_AS_HF_PEFT, ("T5",), "load", "HF PEFT's prefix of an encoder-decoder gives several layers", _SHARED),
    Hole(("LoRA (tied head)",), ("T5",), "make", "RuntimeError: mat1 and mat2 shapes cannot be multiplied", _TIED),
    Hole(("LoRA (tied head)",), ("T5",), "again", "shared.weight was trained apart from encoder.embed_tokens", _TIED),
    *(
        Hole(("DoRA (embedding)",), TEXT, stage, "HF PEFT's DoRA of an embedding has another equation.", _LENGTHS)
        for stage in ("save", "load")
    ),
    Hole(("VeRA (convolutions)",), ("ConvNet",), "open", "KeyError: 'LIT_PEFT'", _LINEAR),
    Hole(("VeRA (convolutions)",), ("ConvNet",), "make", "No layers types compatible with VeRA were found.", _LINEAR),
    Hole(("IA3 (inputs of convolutions)",), ("ConvNet",), "open", "KeyError: 'LIT_PEFT'", _CONV),
    Hole(("IA3 (inputs of convolutions)",), ("ConvNet",), "load", "in the folder and", _CONV),
    Hole(("BottleneckAdapter",), TEXT, "open", "KeyError: 'LIT_PEFT'", _NONE),
    Hole(
        ("FullFineTuning",),
        TEXT,
        "save",
        "ValueError: FullFineTuning trains every parameter",
        "there is no adapter; the trainer's checkpoint holds the model.",
    ),
)

PAIRS = [(row, arch) for row, entry in ROWS.items() for arch in entry.archs]
FAST = [pair for pair in PAIRS if pair[1] in ("BERT", "GPT-2", "ConvNet") or pair[0] == "LoRA"]


def holes(row: str, arch: str) -> dict[str, Hole]:
    """Stage -> why it fails for this pair."""
    return {hole.stage: hole for hole in HOLES if row in hole.rows and arch in hole.archs}


def missing(row: str, arch: str) -> set[str]:
    """The directions that a pair does not go."""
    found = {direction for stage in holes(row, arch) for direction in STAGES[stage]}
    found |= set(STAGES["save"]) if ROWS[row].ours is None else set()
    return found | (set(STAGES["make"]) if ROWS[row].theirs is None else set())


# ------------------------------------------------------------------------------------------------ measuring


ADDED = (".peft.", "lora_", "hira_", "vera_", "ia3_", "prompt_encoder")
"""What names of additions hold, ours and HF PEFT's."""


def change(model: nn.Module, base: bool, step: float) -> bool:
    """Moves what trains, of the additions or of the base, by noise of this size; whether there was anything."""
    generator, found = torch.Generator().manual_seed(1 + base), False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in ADDED) != base:
            parameter.data.add_(step * torch.randn(parameter.shape, generator=generator))
            found = True
    return found


class Subject:
    """A row of the matrix on an architecture."""

    def __init__(self, row: str, arch: str) -> None:
        self.row: Row = ROWS[row]
        self.arch: Arch = ARCHS[arch]
        # Behind a prompt HF PEFT reads the last position of a text that is padded, ours its last token.
        self.padded = not (self.row.skip and arch.endswith("(classes)"))
        self.before = self.row.skip if self.arch.task in ("CAUSAL_LM", "QUESTION_ANS", "TOKEN_CLS") else 0

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        output: Any = model(**self.arch.inputs(self.padded))
        if hasattr(output, "start_logits"):
            output = torch.stack([output.start_logits, output.end_logits], -1)
        output = getattr(output, "logits", output)
        return output[:, self.before :] if isinstance(model, peft.PeftModel) else output

    def ours(self) -> nn.Module:
        assert self.row.ours is not None
        model = self.arch.build()
        self.row.ours(self.arch).attach(model)
        return model

    def theirs(self) -> nn.Module:
        assert self.row.theirs is not None
        return peft.get_peft_model(self.arch.build(), self.row.theirs(self.arch), autocast_adapter_dtype=False).eval()

    def opened(self, folder: Path) -> nn.Module:
        return peft.PeftModel.from_pretrained(self.arch.build(), str(folder)).eval()

    def loaded(self, folder: Path) -> nn.Module:
        model = self.arch.build()
        lit_peft.load(model, folder)
        return model

    def changed(self, model: nn.Module) -> tuple[Tensor, float]:
        """The logits once everything has moved, and the smaller of what additions and base have changed."""
        heard, last = [], self.logits(self.arch.build())
        for base in (False, True):
            if change(model, base, 0.3 if base else self.row.step):
                if not base:
                    self.row.prepare(model)
                now = self.logits(model)
                heard.append(largest(now, last))
                last = now
        return last, min(heard)


def largest(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@dataclass
class Outcome:
    """What a pair came to: direction -> difference, the effect of what was compared, stage -> error."""

    differences: dict[str, float]
    heard: float
    errors: dict[str, Exception]


def measure(row: str, arch: str, folder: Path) -> Outcome:
    """Runs the directions of a pair, as far as they go."""
    subject, found, heard, errors = Subject(row, arch), {}, [], {}
    stage = "save"
    try:
        if subject.row.ours is not None:
            model = subject.ours()
            expected, effect = subject.changed(model)
            heard.append(effect)
            lit_peft.save(model, folder / "ours")
            found["ours, ours"] = largest(subject.logits(subject.loaded(folder / "ours")), expected)
            stage = "open"
            opened = subject.opened(folder / "ours")
            found["ours, HF PEFT"] = largest(subject.logits(opened), expected)
            stage = "again"
            opened.save_pretrained(folder / "ours_again")
            again = subject.loaded(folder / "ours_again")
            found["ours, HF PEFT, ours"] = largest(subject.logits(again), expected)
    except Exception as error:
        errors[stage] = error
    stage = "make"
    try:
        if subject.row.theirs is not None:
            theirs = subject.theirs()
            expected, effect = subject.changed(theirs)
            heard.append(effect)
            theirs.save_pretrained(folder / "theirs")
            stage = "load"
            model = subject.loaded(folder / "theirs")
            found["HF PEFT, ours"] = largest(subject.logits(model), expected)
            lit_peft.save(model, folder / "theirs_again")
            opened = subject.opened(folder / "theirs_again")
            found["HF PEFT, ours, HF PEFT"] = largest(subject.logits(opened), expected)
    except Exception as error:
        errors[stage] = error
    return Outcome(found, min(heard, default=0.0), errors)


def check(row: str, arch: str, outcome: Outcome) -> None:
    """Holds an outcome against what is promised: the tolerance, an effect, and the holes with their errors."""
    expected = holes(row, arch)
    for stage, error in outcome.errors.items():
        if stage not in expected:
            raise error
        assert expected[stage].error in f"{type(error).__name__}: {error}", f"{stage}: {error!r}"
    assert not (more := expected.keys() - outcome.errors.keys()), f"{more} of {row} on {arch} works now"
    assert set(outcome.differences) == set(DIRECTIONS) - missing(row, arch)
    if outcome.differences:
        assert outcome.heard >= HEARD, f"what is compared changes the logits by {outcome.heard:g} alone"
    for direction, difference in outcome.differences.items():
        assert difference <= TOLERANCE, f"{direction}: {difference:g}"


# ------------------------------------------------------------------------------------------------ rendering

HEAD = f"""# Folders of ours and of Hugging Face PEFT's

Which adapters go from one to the other, and by how much their logits differ afterwards. `make interop` measures all of
it, prints this page and writes it; the tests fail where a difference exceeds the tolerance or the page is old.

- Tolerance: {TOLERANCE:g}, the largest difference of two logits in float32, on a CPU. What is compared changes the
  logits by {HEARD:g} at least, additions and trained base parameters each by themselves: *heard* has the least change.
- A figure is the largest over the architectures, tiny random models of transformers:
  {", ".join(ARCHS)}.
  DistilBERT, BERT, RoBERTa and "classes" are sequence classifiers, "questions" answers by spans, "tokens" classifies
  each token, T5 generates, GPT-2 and Llama alone are causal language models.
- Heads train and are saved: ours in `train_also`, HF PEFT's in `modules_to_save`.
- One of the two texts is padded; not behind a prompt on a decoder with classes, where HF PEFT reads the last position
  even if it is padded, and ours the last token of the text.
- Behind a prompt HF PEFT also returns outputs for the virtual tokens, which are left out where each token has one.
- A dash: not in this direction, or on no architecture; why stands below.
"""
VERSIONS = (
    f"Measured with torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}.\n"
)


class Matrix:
    """The outcomes of all pairs."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], Outcome] = {}

    def page(self) -> str:
        """docs/interop.md; figures that were not measured are #."""
        lines = [f"- **{name}**: {meaning}." for name, meaning in DIRECTIONS.items()]
        table = [["method", *DIRECTIONS, "heard"], ["---"] * (len(DIRECTIONS) + 2)]
        table += [[row, *self.cells(row)] for row in ROWS]
        rows = [f"| {' | '.join(row)} |" for row in table]
        parts = [HEAD, VERSIONS, "## Directions\n", "\n".join(lines) + "\n", "\n".join(rows) + "\n"]
        return "\n".join([*parts, "## What does not go, and why\n", "\n".join(self.reasons()) + "\n"])

    def cells(self, row: str) -> list[str]:
        found: dict[str, list[float]] = defaultdict(list)
        for arch in ROWS[row].archs:
            outcome = self.outcomes.get((row, arch))
            for direction in DIRECTIONS.keys() - missing(row, arch):
                found[direction].append(outcome.differences[direction] if outcome else float("nan"))
                found["heard"].append(outcome.heard if outcome else float("nan"))
        cells = [_figure(max(found[direction])) if direction in found else "-" for direction in DIRECTIONS]
        return [*cells, _figure(min(found["heard"])) if "heard" in found else "-"]

    def reasons(self) -> list[str]:
        own = [row for row, entry in ROWS.items() if entry.theirs is None and not any(row in h.rows for h in HOLES)]
        lines = [f"- {', '.join(own)}: HF PEFT has no such method, and opens it as a LORA: for the way back see LoRA."]
        for hole in dict.fromkeys(hole.why for hole in HOLES):
            same = [h for h in HOLES if h.why == hole]
            rows = list(dict.fromkeys(row for h in same for row in h.rows))
            archs = list(
                dict.fromkeys(arch for h in same for arch in h.archs if any(arch in ROWS[r].archs for r in rows))
            )
            errors = "; ".join(f"`{h.error}`" for h in {h.error: h for h in same}.values())
            where = "all text models" if set(archs) == set(TEXT) else ", ".join(archs)
            lines.append(f"- {', '.join(rows)} on {where}: {hole} {errors}")
        return lines

    def check_docs(self) -> None:
        """Holds the page against what was measured; writes it if asked for."""
        if WRITES:
            assert len(self.outcomes) == len(PAIRS), "the page is written from a run of all pairs that passes"
            DOCS.write_text(self.page())
        page = DOCS.read_text() if DOCS.is_file() else ""
        assert masked(page) == masked(self.page()), f"docs/{DOCS.name} is old: make interop"


def _figure(value: float) -> str:
    return "0" if value == 0 else "#" if value != value else f"{value:.1e}"


def masked(page: str) -> str:
    """A page without what one machine measures otherwise than another."""
    page = re.sub(r"^Measured with .*$", "", page, flags=re.MULTILINE)
    return re.sub(r"\| (?:0|#|\d\.\de[+-]\d\d)(?= \|)", "| #", page)
