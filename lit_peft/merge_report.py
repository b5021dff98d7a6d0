"""What is said of a merge: the report beside the model, and the summary that is printed."""

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lit_peft import __version__, hub
from lit_peft.callbacks.logits import LogitsComparison, logits_of
from lit_peft.callbacks.tables import summary_panel
from lit_peft.core.attach import registry
from lit_peft.core.hf_peft import Root
from lit_peft.saving.merged import left_out, read_again

REPORT = "merge_report.json"
TEXTS = ["a great movie", "a dull and empty film", "The table has four legs.", "Nobody knows what comes next, or when."]
"""What a model is asked where no test set is scored."""
EPSILONS = 64
"""Differences of the written model's logits from those in memory that are rounding, in units of the dtype's."""


def describe(module: nn.Module, root: Root) -> dict[str, Any]:
    """What a report says of a module that is about to be merged."""
    state = registry(module)
    assert state is not None
    folded = sorted(path for path in {p for a in state.adapters.values() for p in a.sites})
    chains: list[Any] = [module.get_submodule(path) for path in folded]
    layers = [path for path, layer in zip(folded, chains, strict=True) if layer.peft.chain()]
    bases = (getattr(module, "backbone", None), getattr(root.model.config, "_name_or_path", None))
    digest = hashlib.sha256(json.dumps(sorted(state.fingerprint.items())).encode()).hexdigest()[:32]
    return {
        "lit_peft": __version__,
        "base": next((base for base in bases if isinstance(base, str) and base), None),
        "base_fingerprint": digest,
        "architecture": type(root.model).__name__,
        "methods": {name: adapter.spec for name, adapter in state.adapters.items()},
        "folded": {"count": len(layers), "layers": layers},
        "trained_as_they_are": sorted({name for adapter in state.adapters.values() for name in adapter.base}),
        "left_out": left_out(module, root),
    }


def find_tokenizer(module: nn.Module, data: Any, model: nn.Module) -> Any:
    """The tokenizer of the data, of the module, or of the base; None where there is none."""
    from transformers import AutoTokenizer

    for owner in (data, module):
        with suppress(ValueError, AttributeError):
            if hasattr(owner.tokenizer, "save_pretrained"):
                return owner.tokenizer
    names = (getattr(data, "tokenizer_name", None), getattr(module, "backbone", None), model.config._name_or_path)  # type: ignore[union-attr]
    for name in names:
        if isinstance(name, str) and name:
            with suppress(OSError, ValueError, KeyError):
                tokenizer = AutoTokenizer.from_pretrained(hub.locate(name))
                if tokenizer.pad_token_id is None:  # decoders have none; the model's is their last, too
                    tokenizer.pad_token = tokenizer.eos_token
                return tokenizer
    return None


def fixed_inputs(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Inputs that are always the same: some texts, or without a tokenizer some tokens; empty for a model of no text."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return {}
    if tokenizer is None:
        return dict(model.dummy_inputs)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}


def verify(model: nn.Module, folder: Path, logits: LogitsComparison, out: str) -> float | None:
    """Largest difference of the logits of the model that transformers reads from a folder to those of the merged one.

    Raises:
        ValueError: When it is another model.
    """
    try:
        again = read_again(model, folder)
        if logits.inputs is None:
            return None
        args, kwargs = logits.inputs
        model.eval()
        with torch.no_grad():
            ours, theirs = (logits_of(m(*args, **kwargs))[1] for m in (model, again))
        difference = (ours.float() - theirs.float()).abs().max().item()
        allowed = EPSILONS * torch.finfo(ours.dtype).eps * max(1.0, ours.float().abs().max().item())
        if not difference <= allowed:
            raise ValueError(f"its logits differ by {difference:.3g} from those in memory.")
    except ValueError as error:
        raise ValueError(
            f"{out} was not written, since what transformers reads from it is another model: {error}"
        ) from error
    return difference


def finite(value: Any) -> Any:
    """For JSON, which has no nan: null in its place."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_merged(out: Path, report: Mapping[str, Any], tokenizer: Any, max_length: int | None) -> None:
    """Prints the figures of a report, and the line of Python that opens what was written.

    Args:
        out: The folder.
        report: What its merge_report.json says.
        tokenizer: What was written beside the model; None: none.
        max_length: Tokens after which the run cut texts off.
    """
    names = " + ".join(spec["class_path"].rpartition(".")[2] for spec in report["methods"].values())
    count = report["folded"]["count"]
    notes = {
        "model": f"{out} ({size_of(out)}), {report['architecture']} in {report['dtype']}",
        "folded": f"{names} at {count} layers" if count else f"nothing: {names} trains the base itself",
    }
    if report["left_out"]:
        notes["left out"] = f"{', '.join(report['left_out'])}: outside of the {report['architecture']}"
    compared = "logits" if report["compared"] in ("logits", None) else "hidden states"
    if report["max_logit_difference"] is not None:
        notes[compared] = (
            f"differ by at most {report['max_logit_difference']:.2g} of {report['largest_logit']:.3g}, over "
            f"{report['rows']:,} rows"
            + (" of the test set" if report["metrics"] else ", fixed inputs: no test set was scored")
        )
    else:
        notes["logits"] = "not compared: no inputs are known"
    if report["label_flips"] is not None:
        notes["predictions"] = f"{report['label_flips']:,} of {report['rows']:,} changed"
    for key, before in (report["metrics"] or {"before": {}})["before"].items():
        notes[key] = f"{before:.4f}, merged {report['metrics']['after'][key]:.4f}"
    if report["reloaded_max_logit_difference"] is not None:
        notes["read again"] = (
            f"by transformers: {compared} differ by at most {report['reloaded_max_logit_difference']:.2g}"
        )
    if tokenizer is None:
        notes["tokenizer"] = "none was found: put that of the base beside it"
    notes["report"] = str(out / REPORT)
    console = Console(soft_wrap=False)
    console.print(summary_panel("merged", {}, notes))
    if report["architecture"].endswith("ForSequenceClassification"):
        cut = f", truncation=True, max_length={max_length}" if max_length else ""
        call = f'pipeline("text-classification", model="{out}"{cut})'
        code = f'from transformers import pipeline; print({call}("a great movie"))'
    else:
        code = f'from transformers import {report["architecture"]} as Net; Net.from_pretrained("{out}")'
    console.print(f"  python -c {shlex.quote(code)}", soft_wrap=True, highlight=False, markup=False)


def size_of(folder: Path) -> str:
    """Size of the files in a folder, as it is printed."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"
