"""`lit-peft inspect`: what a checkpoint, an adapter folder or a run is, without its base.

A folder is read without torch, in no time; a checkpoint needs torch to be unpickled. Both are held to what
`lit_peft.load` holds them to.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_peft.arguments import nearest
from lit_peft.core.folder_files import open_files
from lit_peft.core.records import CONFIG, RECORD, TENSORS, CheckpointMismatch, check_checkpoint
from lit_peft.methods.registry import available

# How HF PEFT names the tensors of an addition: the path of its layer, and the tensor.
_THEIRS = re.compile(
    r"(?P<path>.*?)\.?\b(?P<tensor>((lora|hira|ia3|vera)_\w+(\.weight)?|prompt_encoder\..*|prompt_embeddings))"
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


class Part(NamedTuple):
    """A tensor of a file, without its values."""

    shape: tuple[int, ...]
    dtype: str
    size: int
    """Bytes."""
    zeros: int | None = None
    """Entries that are exactly 0, or False, where they were counted."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What there is at a path, as plain values.

    Args:
        path: A checkpoint, the folder of an adapter, ours or HF PEFT's, or the folder of a run.

    Returns:
        `kind` ("checkpoint", "adapter folder", "run"), `path`, `bytes`; of a run its `metrics`, `checkpoint` and
        `adapters`; of the others `written_by`, `adapters` (name -> method, arguments, sites, sizes), `base`, `trained`,
        `buffers`, `labels`, `metrics`, `epoch`, `step`: what the file tells of them.

    Raises:
        FileNotFoundError: When there is nothing of the kind.
        CheckpointMismatch: When a file is damaged, as `lit_peft.load` would say.
    """
    path = Path(path)
    if path.is_file():
        if path.name in (CONFIG, TENSORS):
            return _folder(path.parent)
        return _checkpoint(path)
    if not path.is_dir():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.{nearest(path.name, there)}")
    names = {p.name for p in path.iterdir()}
    if names & {CONFIG, TENSORS, "adapter_model.bin"}:
        return _folder(path)
    if names & {"checkpoints", "adapter", "metrics.json"}:
        return _run(path)
    raise FileNotFoundError(f"{path} {_what_else(path, names)}")


def _what_else(path: Path, names: set[str]) -> str:
    """What a folder is that is none of the three, and what to do with it."""
    if "config.json" in names:
        try:
            kind = ", ".join(json.loads((path / "config.json").read_text())["architectures"])
        except (OSError, ValueError, LookupError, TypeError):
            kind = "a model"
        merged = (
            " An adapter was merged into it, as its merge_report.json says." if "merge_report.json" in names else ""
        )
        opens = "from_pretrained, or --model.backbone, opens it."
        return f"holds a whole model of transformers ({kind}) and no adapter: {opens}{merged}"
    inside = {p.parent.parent if p.parent.name in ("checkpoints", "adapter") else p.parent for p in _found_in(path)}
    if inside:
        newest = max(inside, key=lambda p: p.stat().st_mtime)
        return f"is no run and no adapter. The newest in it: lit-peft inspect {newest}"
    return f"is no run and no adapter: it has no {CONFIG}, no checkpoints and no metrics.json."


def _found_in(path: Path) -> list[Path]:
    patterns = ("checkpoints/*.ckpt", f"adapter/{CONFIG}", CONFIG, "metrics.json")
    return [found for depth in ("*/", "*/*/", "*/*/*/") for pattern in patterns for found in path.glob(depth + pattern)]


# ------------------------------------------------------------------------------------------------- a run


def _run(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "run", "path": str(path)}
    if (path / "metrics.json").is_file():
        try:
            found["metrics"] = json.loads((path / "metrics.json").read_text())
        except ValueError as error:
            raise CheckpointMismatch(f"{path}/metrics.json is damaged: {error}") from error
    checkpoints = [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    checkpoints += sorted((path / "checkpoints").glob("*.ckpt"), key=lambda p: -p.stat().st_mtime)
    if (best := next((p for p in checkpoints if p.is_file()), None)) is not None:
        found["checkpoint"] = _checkpoint(best)
    folders = [path / "adapter", *sorted(p.parent for p in (path / "adapter").glob(f"*/{CONFIG}"))]
    found["adapters"] = [_folder(folder) for folder in folders if (folder / CONFIG).is_file()]
    return found


# ---------------------------------------------------------------------------------------------- a folder


def _folder(path: Path) -> dict[str, Any]:
    config, stored, mine = open_files(path)
    counted = {name: _zeros(tensor) if mine else None for name, tensor in stored.items()}
    wrapped = {name: re.sub(r"^base_model\.(model\.)?", "", name).replace(".base_layer.", ".") for name in stored}
    parts = {
        wrapped[name]: Part(tuple(t.shape), _DTYPES.get(t.dtype, t.dtype.lower()), len(t.data), counted[name])
        for name, t in stored.items()
    }
    known = {*mine["base"], *mine["head"], *mine["fingerprint"], *mine["moved"]} if mine else set()
    additions: dict[tuple[str, str], Part] = {}
    base: dict[str, Part] = {}
    for name, part in parts.items():
        head, own, rest = name.partition(".peft.")
        match = _THEIRS.fullmatch(name)
        if own or match:
            additions[(head, rest) if own else (match["path"], match["tensor"])] = part  # type: ignore[index]
        elif mine is None or name in known or name.rpartition(".")[2] in _STATISTICS:
            base[name] = part
        else:
            path_of, _, tensor = name.removesuffix(".weight").rpartition(".")
            additions[path_of, tensor] = part
    buffers = _buffers(base, mine or {})
    _check_finite(path, stored, {w: n for n, w in wrapped.items()}, parts.keys() - buffers.keys())
    told = (mine or {}).get("model") or {}
    ((name, spec),) = mine["methods"].items() if mine else (("default", _theirs(config)),)
    trains = set(mine["base"]) if mine else base.keys()
    return {
        "kind": "adapter folder",
        "path": str(path),
        "bytes": sum((path / file).stat().st_size for file in (CONFIG, TENSORS)),
        "written_by": _writer(mine) if mine else f"HF PEFT {config.get('peft_version') or ''}".strip(),
        "adapters": {name: _adapter(spec, additions)},
        "base": {
            "backbone": told.get("backbone"),
            "base_model_name_or_path": config.get("base_model_name_or_path"),
            **_fingerprint((mine or {}).get("fingerprint")),
        },
        "trained": _grouped({n: p for n, p in base.items() if n in trains and n not in buffers}),
        "kept": _grouped({n: p for n, p in base.items() if n not in trains and n not in buffers}),
        "buffers": _grouped(buffers),
        "labels": told.get("label_names"),
        "metrics": (mine or {}).get("metrics") or None,
    }


def _theirs(config: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the place of a spec for a folder of HF PEFT's."""
    if "peft_type" not in config:
        raise CheckpointMismatch(f"{CONFIG} names no peft_type: neither HF PEFT nor lit-peft wrote it.")
    fitting: dict[str, int] = {}
    for entry in available().values():
        form = entry.class_attribute("hf_peft") or {}
        if form and form.items() <= dict(config).items():
            fitting[entry.class_path] = len(form)
    skipped = ("peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision")
    return {
        "class_path": max(fitting, key=lambda path: fitting[path]) if fitting else None,
        "peft_type": config["peft_type"],
        "init_args": {key: value for key, value in config.items() if value and key not in skipped},
    }


def _check_finite(path: Path, stored: Mapping[str, Any], names: Mapping[str, str], looked_at: Iterable[str]) -> None:
    """Raises CheckpointMismatch for nan and inf in anything but buffers."""
    import numpy as np

    exponents = {"F64": (np.uint64, 0x7FF << 52), "F32": (np.uint32, 0xFF << 23), "F16": (np.uint16, 0x1F << 10)}
    exponents["BF16"] = (np.uint16, 0xFF << 7)
    for name in sorted(looked_at):
        tensor = stored[names[name]]
        if tensor.dtype in exponents:
            kind, mask = exponents[tensor.dtype]
            if (np.frombuffer(tensor.data, kind) & kind(mask) == kind(mask)).any():
                raise CheckpointMismatch(
                    f"{path}: {name} holds nan or inf: its training diverged, or the folder is damaged."
                )


def _zeros(tensor: Any) -> int | None:
    import numpy as np

    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}.get(tensor.dtype)
    if kind is None:
        return None
    values = np.frombuffer(tensor.data, kind)
    return int(((values << 1) == 0).sum() if tensor.dtype == "BF16" else (values == 0).sum())


# ------------------------------------------------------------------------------------------ a checkpoint


def _checkpoint(path: Path) -> dict[str, Any]:
    from lit_peft.core.checkpoint import adapter_of
    from lit_peft.core.files import read_archive

    content = read_archive(path)
    if RECORD not in content:
        tensors = content.get("state_dict")
        count = f" ({len(tensors):,} tensors)" if isinstance(tensors, dict) else ""
        by = f" of Lightning {version}" if (version := content.get("pytorch-lightning_version")) else ""
        raise CheckpointMismatch(
            f"{path} is a checkpoint{by} that no lit-peft method wrote: it has no 'lit_peft' entry. To start from its "
            f"weights{count}, load them into the module before attaching."
        )
    saved = content[RECORD]
    check_checkpoint(saved, str(path))
    additions: dict[str, dict[tuple[str, str], Part]] = {name: {} for name in saved["methods"]}
    base: dict[str, Part] = {}
    for key, tensor in content.get("state_dict", {}).items():
        if not hasattr(tensor, "shape"):  # the extra state of a module
            continue
        dtype, dense = str(tensor.dtype).removeprefix("torch."), str(tensor.layout) == "torch.strided"
        zeros = int((tensor == 0).sum()) if dense and not tensor.is_quantized else None
        part = Part(tuple(tensor.shape), dtype, tensor.numel() * tensor.element_size(), zeros)
        if (name := adapter_of(key)) in additions:
            head, _, rest = f".{key}".partition(f".peft.{name}.")
            additions[name][head.removeprefix("."), rest] = part
        else:
            base[key] = part
        weighs = dense and tensor.is_floating_point() and not _is_buffer(key, saved)
        if weighs and not tensor.float().isfinite().all():
            raise CheckpointMismatch(
                f"{path}: {key} holds nan or inf: its training diverged, or the file is damaged. Use another "
                "checkpoint of the run."
            )
    hyper = content.get("hyper_parameters")
    hyper = hyper if isinstance(hyper, dict) else {}
    labels, backbone = hyper.get("label_names"), hyper.get("backbone")
    buffers = _buffers(base, saved)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "bytes": path.stat().st_size,
        "written_by": _writer(saved),
        "adapters": {name: _adapter(spec, additions[name]) for name, spec in saved["methods"].items()},
        "weights": saved.get("weights") or None,
        "base": {"backbone": backbone if isinstance(backbone, str) else None, **_fingerprint(saved["fingerprint"])},
        "trained": _grouped({n: p for n, p in base.items() if n not in buffers}),
        "buffers": _grouped(buffers),
        "labels": labels if isinstance(labels, list) else None,
        "metrics": saved.get("metrics") or None,
        "epoch": content.get("epoch") if isinstance(content.get("epoch"), int) else None,
        "step": content.get("global_step") if isinstance(content.get("global_step"), int) else None,
        "resumes": bool(content.get("optimizer_states")),
    }


# -------------------------------------------------------------------------------------- what both have


def _writer(record: Mapping[str, Any]) -> str:
    version = record.get("version")
    return f"lit-peft{f' {version}' if isinstance(version, str) else ''}, format {record['format_version']}"


def _buffers(base: Mapping[str, Part], record: Mapping[str, Any]) -> dict[str, Part]:
    return {name: part for name, part in base.items() if _is_buffer(name, record)}


def _is_buffer(name: str, record: Mapping[str, Any]) -> bool:
    return name in record.get("moved", ()) or name.rpartition(".")[2] in _STATISTICS


def _fingerprint(digests: Mapping[str, str] | None) -> dict[str, Any]:
    """One short digest of the base's, the same of a checkpoint and of a folder, and how many tensors it covers."""
    if digests is None:
        return {}
    together = hashlib.sha256("\n".join(sorted(digests.values())).encode()).hexdigest()[:12]
    storages = Counter(digest.partition(":")[2].rpartition(":")[0] for digest in digests.values())
    quantised = {storage: count for storage, count in storages.items() if storage}
    return {"fingerprint": together, "tensors": len(digests)} | ({"quantized": quantised} if quantised else {})


def _adapter(spec: Mapping[str, Any], additions: Mapping[tuple[str, str], Part]) -> dict[str, Any]:
    entry = next((e for e in available().values() if e.class_path == spec["class_path"]), None)
    defaults = {} if entry is None or "peft_type" in spec else entry.defaults()
    arguments = {key: value for key, value in spec["init_args"].items() if key != "name"}
    usual = {key for key, value in arguments.items() if key in defaults and _same(value, defaults[key])}
    parameters = {place: part for place, part in additions.items() if part.dtype != "bool"}
    found = {
        "method": (spec["class_path"] or spec["peft_type"]).rpartition(".")[2],
        "class_path": spec["class_path"],
        "peft_type": spec.get("peft_type"),
        "arguments": {key: value for key, value in arguments.items() if key not in usual},
        "defaults": {key: value for key, value in arguments.items() if key in usual},
        "sites": _sites(additions),
        "parameters": sum(part.numel for part in parameters.values()),
        "bytes": sum(part.size for part in additions.values()),
        "dtypes": sorted({part.dtype for part in parameters.values()}),
    }
    name = found["method"]
    if name in ("SparseLoRA", "AdaLoRA"):
        found |= _left(name, spec["init_args"], additions)
    return {key: value for key, value in found.items() if value is not None}


def _left(name: str, arguments: Mapping[str, Any], additions: Mapping[tuple[str, str], Part]) -> dict[str, Any]:
    """Of a method that prunes: the share of exact zeros, or the ranks that are left."""
    if name == "AdaLoRA":
        kept = [p.numel - p.zeros for (_, tensor), p in additions.items() if tensor == "kept" and p.zeros is not None]
        ranks = [p.shape[0] for (_, tensor), p in additions.items() if tensor == "lora_E" and p.shape]
        init, sites = arguments.get("init_r"), len(arguments.get("rank_pattern") or ranks)
        return {"ranks_left": sum(kept or ranks), "ranks": init * sites if isinstance(init, int) else None}
    factors = [p for (_, tensor), p in additions.items() if tensor.startswith("lora_") and p.zeros is not None]
    total = sum(p.numel for p in factors)
    return {"zeros": sum(p.zeros or 0 for p in factors) / total if total else None}


def _same(value: Any, default: Any) -> bool:
    empty: tuple[Any, ...] = (None, [], {}, ())
    return bool(value == (list(default) if isinstance(default, tuple) else default)) or (
        value in empty and default in empty
    )


def _sites(additions: Mapping[tuple[str, str], Part]) -> list[dict[str, Any]]:
    """The places that have additions, those of one shape together."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for (path, tensor), part in additions.items():
        shapes.setdefault(path, {})[tensor.removesuffix(".weight")] = part.shape
    groups: dict[tuple[str, str], list[str]] = {}
    for path, tensors in shapes.items():
        groups.setdefault((re.sub(r"\b\d+\b", "#", path), json.dumps(tensors, sort_keys=True)), []).append(path)
    return [
        {"paths": _joined(paths), "count": len(paths), "tensors": json.loads(tensors)}
        for (_, tensors), paths in groups.items()
    ]


def _grouped(tensors: Mapping[str, Part]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name, part in tensors.items():
        groups.setdefault((re.sub(r"\b\d+\b", "#", name), part.shape, part.dtype), []).append(name)
    return [
        {"names": _joined(names), "count": len(names), "shape": list(shape), "dtype": dtype}
        for (_, shape, dtype), names in groups.items()
    ]


def _joined(names: list[str]) -> str:
    """Names that differ in numbers as one: encoder.layer.{0-5}.query."""
    columns = zip(*(re.split(r"\b(\d+)\b", name) for name in names), strict=True)
    return "".join(_numbers(column) if index % 2 else column[0] for index, column in enumerate(columns))


def _numbers(column: Iterable[str]) -> str:
    numbers = sorted(set(map(int, column)))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
