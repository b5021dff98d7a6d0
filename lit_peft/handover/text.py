"""What `merge` and `export` print: figures, and the lines of Python that open what was written."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lit_peft.callbacks.tables import summary_panel
from lit_peft.core.merge import MEANINGS
from lit_peft.core.quantize import quantizer_of, stored_as
from lit_peft.handover.report import REPORT
from lit_peft.saving.left_alone import left_alone


def print_merged(
    out: Path, report: Mapping[str, Any], model: nn.Module, tokenizer: Any, max_length: int | None
) -> None:
    """Prints the figures of a report, and the line of Python that opens what was written.

    Args:
        out: The folder.
        report: What its merge_report.json says.
        model: What was written.
        tokenizer: What was written beside it; None: none.
        max_length: Tokens after which the run cut texts off.
    """
    names = " + ".join(spec["class_path"].rpartition(".")[2] for spec in report["methods"].values())
    count = report["folded"]["count"]
    notes = {
        "model": f"{out} ({size_of(out)}), {report['architecture']} in {report['dtype']}",
        "folded": f"{names} at {count} layers" if count else f"nothing: {names} trains the base itself",
    }
    if report["base_quantization"] is not None and report["into"] is not None:
        stored = ", ".join(f"{kind} at {n} layers" for kind, n in report["base_quantization"].items())
        notes["trained on"] = stored
        notes["into"] = f"{report['into']}: {MEANINGS[report['into']]}"
    if report["left_out"]:
        notes["left out"] = f"{', '.join(report['left_out'])}: outside of the {report['architecture']}"
    notes |= _compared(report)
    metrics = report["metrics"] or {"before": {}, "after": {}}
    for key, before in metrics["before"].items():
        if key in metrics["after"]:
            notes[key] = f"{before:.4f}, merged {metrics['after'][key]:.4f}"
    if report["reloaded_max_logit_difference"] is not None:
        notes["read again"] = (
            f"by transformers: {_kind(report)} differ by at most {report['reloaded_max_logit_difference']:.2g}"
        )
    if tokenizer is None:
        notes["tokenizer"] = "none was found: put that of the base beside it"
    notes["report"] = str(out / REPORT)
    Console(soft_wrap=False).print(summary_panel("merged", {}, notes))
    if tokenizer is not None and report["architecture"].endswith("ForSequenceClassification"):
        cut = f", truncation=True, max_length={max_length}" if max_length else ""
        call = f'pipeline("text-classification", model={_literal(out)}{cut})'
        code = f'from transformers import pipeline; print({call}("a great movie"))'
    else:
        code = f"{_import(model)}; Net.from_pretrained({_literal(out)})"
    _print(f"  python -c {shlex.quote(code)}")


def print_exported(out: Path, names: Iterable[str], model: nn.Module) -> None:
    """Prints, for each adapter in a folder that was exported, the lines of Python that open it on its base.

    A base that was quantised as it was loaded is quantised so again, or one sentence says what must be done.

    Args:
        out: The folder.
        names: Of the adapters.
        model: The transformers model that they are of.
    """
    of_classes = "Classification" in type(model).__name__ and hasattr(model.config, "num_labels")
    head = f", num_labels={model.config.num_labels}" if of_classes else ""  # type: ignore[union-attr]
    kinds = stored_as(model)
    stored = f", trained on a base in {' and '.join(sorted(set(kinds.values())))}" if kinds else ""
    comes_so = getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)
    options = None if comes_so else _bitsandbytes_config(model, kinds)
    for folder in (out if name == "default" else out / name for name in names):
        config = json.loads((folder / "adapter_config.json").read_text())
        base, net, quantized = config["base_model_name_or_path"], "net", None
        if base is not None:
            quantized = options
            given = ", quantization_config=quantized" if quantized else ""
            net = f"Net.from_pretrained({_literal(base)}{head}{given})"
        _print(f"Adapter: {folder} ({size_of(folder)}), {config['peft_type']} in Hugging Face PEFT{stored}")
        if kinds and not quantized and not (comes_so and base is not None):
            _print("  Quantise the base in the same way, or the answers differ; these lines do not.")
        _print("  from peft import PeftModel" + (f"; {_import(model)}" if base is not None else ""))
        if quantized:
            _print("  from transformers import BitsAndBytesConfig")
            _print(f"  quantized = {quantized}")
        _print(f"  model = PeftModel.from_pretrained({net}, {_literal(folder)})")


def size_of(folder: Path) -> str:
    """Size of the files in a folder, as it is printed."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def _bitsandbytes_config(model: nn.Module, kinds: Mapping[str, str]) -> str | None:
    """The BitsAndBytesConfig with which transformers quantises a base to the layers that a model has.

    Args:
        model: The model, with its adapters.
        kinds: Path -> what it is stored as, for each quantised layer.

    Returns:
        It as Python; None where nothing is quantised, or transformers has no words for it.
    """
    found = [quantizer_of(model.get_submodule(path)) for path in kinds]
    first = found[0] if found else None
    if first is None or any(type(other) is not type(first) or vars(other) != vars(first) for other in found):
        return None
    own = [path for path in left_alone(model, kinds) if ".peft." not in f".{path}."]  # not what adapters are made of
    config: Any = first.loading_config(own)
    if type(config).__name__ != "BitsAndBytesConfig":
        return None
    told = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
    was_auto = getattr(first, "compute_dtype", torch.float32) is None
    note = "  # compute_dtype was auto: set bnb_4bit_compute_dtype to the dtype of training" if was_auto else ""
    return f"BitsAndBytesConfig({', '.join(f'{key}={value!r}' for key, value in told.items())}){note}"


def _compared(report: Mapping[str, Any]) -> dict[str, str]:
    if report["max_logit_difference"] is None:
        return {"logits": f"not compared: {report['not_compared']}"}
    notes = {
        _kind(report): f"differ by at most {report['max_logit_difference']:.2g} of {report['largest_logit']:.3g}, over "
        f"{report['rows']:,} rows"
        + (" of the test set" if report["metrics"] is not None else ", fixed inputs: no test set was scored")
    }
    if report["label_flips"] is not None:
        notes["predictions"] = f"{report['label_flips']:,} of {report['rows']:,} changed"
    return notes


def _kind(report: Mapping[str, Any]) -> str:
    return "logits" if report["compared"] in ("logits", None) else "hidden states"


def _literal(path: object) -> str:
    """A path as Python reads it, whatever characters it has."""
    return json.dumps(str(path), ensure_ascii=False)


def _import(model: nn.Module) -> str:
    """How a model's class is imported, as Net."""
    import transformers

    name = type(model).__name__
    home = "transformers" if hasattr(transformers, name) else type(model).__module__
    return f"from {home} import {name} as Net"


def _print(line: str) -> None:
    Console(soft_wrap=False).print(line, soft_wrap=True, highlight=False, markup=False)
