"""Damage to adapter folders: files as bytes, and seeded mutations of them, from a flipped bit to a rewritten record."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_peft.core.records import CONFIG, RECORD, TENSORS, sealed, tensor_digest

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NAMES = (
    "../../x",
    "/etc/passwd",
    "a\0b",
    "x" * 5_000,
    "größe.重み",
    "",
    "a\nb\nc\nd",
    ".",
    "..",
    "base_model.model.",
    "weight",
    "__m__",
)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 800, 10**9, 10**12, 10**400, -(10**9), 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "four", "(", "../../x", "none", "LORA", "IA3", "PREFIX_TUNING", [], ["x"], [[]], [None], {}, {"x": 1}),
    *({"(": 2}, {".*": 1}, [1, 2], {"": {}}),
)

DAMAGED = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, struct.error)
"""What a mutation meets where another one has been before it."""


@dataclass(frozen=True)
class Files:
    """The files of a folder; `special` stands in the place of one of them: "config: empty"."""

    config: bytes
    tensors: bytes
    special: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Files":
        return cls((folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes())

    def write(self, folder: Path) -> None:
        (folder / CONFIG).write_bytes(self.config)
        (folder / TENSORS).write_bytes(self.tensors)
        which, _, what = self.special.partition(": ")
        if not which:
            return
        path = folder / (CONFIG if which == "config" else TENSORS)
        content = path.read_bytes()
        path.unlink()
        if what == "loop":
            path.symlink_to(path)
        elif what == "dangling":
            path.symlink_to(folder / "nowhere")
        elif what == "directory":
            path.mkdir()
        elif what == "empty":
            path.touch()
        elif what == "pickle":
            path.write_bytes(
                b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
            )
        elif what == "bin":
            (folder / "adapter_model.bin").write_bytes(content)
        elif what == "the other":
            path.write_bytes(self.config if which == "tensors" else self.tensors)


Mutation = Callable[[random.Random, Files], Files]


# ------------------------------------------------------------------------------------------------ bytes


def _bytes(change: Callable[[random.Random, bytearray], Any]) -> Mutation:
    """A change of the bytes of either file, the tensors more often."""

    def mutate(rng: random.Random, files: Files) -> Files:
        which = rng.choice(("config", "tensors", "tensors", "tensors"))
        content = bytearray(getattr(files, which))
        changed = change(rng, content) if content else content
        return replace(files, **{which: bytes(content if changed is None else changed)})

    return mutate


def _place(rng: random.Random, content: bytes) -> int:
    """An offset, every second time in the first 2 kB: headers and JSON are small beside tensors."""
    return rng.randrange(min(len(content), 2_000) if rng.random() < 0.5 else len(content))


def flip(rng: random.Random, content: bytearray) -> None:
    content[_place(rng, content)] ^= 1 << rng.randrange(8)


def other_byte(rng: random.Random, content: bytearray) -> None:
    content[_place(rng, content)] = rng.choice(b'\0\xff"{}[]:,0123456789eE+-.\\')


def truncate(rng: random.Random, content: bytearray) -> None:
    del content[_place(rng, content) :]


def append(rng: random.Random, content: bytearray) -> None:
    content += rng.choice((b"\0", b" ", b"\n", b"}", rng.randbytes(64)))


def insert(rng: random.Random, content: bytearray) -> None:
    at = _place(rng, content)
    content[at:at] = rng.randbytes(rng.randint(1, 9))


def delete(rng: random.Random, content: bytearray) -> None:
    at = _place(rng, content)
    del content[at : at + rng.randint(1, 9)]


def _range(rng: random.Random, content: bytearray) -> slice:
    at = _place(rng, content)
    return slice(at, at + rng.choice((1, 4, 16, 64, 512)))


def zero(rng: random.Random, content: bytearray) -> None:
    where = _range(rng, content)
    content[where] = bytes(len(content[where]))


def duplicate(rng: random.Random, content: bytearray) -> None:
    part = content[_range(rng, content)]
    at = _place(rng, content)
    content[at : at + len(part)] = part[: len(content) - at]


def swap(rng: random.Random, content: bytearray) -> None:
    size = rng.choice((1, 4, 16, 64))
    a, b = sorted((_place(rng, content), _place(rng, content)))
    if a + size <= b and b + size <= len(content):
        content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


# ------------------------------------------------------------------------------------------------- JSON


def edited(value: Any, rng: random.Random) -> Any:
    """A JSON value in which one part, at any depth, is replaced, taken out, renamed or joined by another."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(JUNK)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed = value.copy()
    how = rng.choice(("into", "into", "into", "out", "more", "order"))
    if how == "into":
        changed[key] = edited(value[key], rng)
    elif how == "out":
        del changed[key]
    elif how == "order":
        items = list(value.items()) if isinstance(value, dict) else value.copy()
        rng.shuffle(items)
        changed = dict(items) if isinstance(value, dict) else items
    elif isinstance(value, dict):
        changed[rng.choice((*NAMES, f"{key}x"))] = rng.choice((*JUNK, value[key]))
    else:
        changed.append(rng.choice((*JUNK, value[key])))
    return changed


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def edit_config(rng: random.Random, files: Files) -> Files:
    try:
        return replace(files, config=_dumped(edited(json.loads(files.config), rng)))
    except DAMAGED:
        return files


# ----------------------------------------------------------------------------------------------- tensors


def split(tensors: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (size,) = struct.unpack("<Q", tensors[:8])
    return json.loads(tensors[8 : 8 + size]), tensors[8 + size :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else _dumped(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _parsed(change: Callable[[random.Random, dict[str, Any], dict[str, list[Any]]], None]) -> Mutation:
    """A change of the tensors of a file, name -> [dtype, shape, bytes], and of its metadata, that leaves it whole."""

    def mutate(rng: random.Random, files: Files) -> Files:
        try:
            header, data = split(files.tensors)
            metadata = header.pop("__metadata__", {})
            tensors = {k: [v["dtype"], v["shape"], data[slice(*v["data_offsets"])]] for k, v in header.items()}
            change(rng, metadata, tensors)
        except DAMAGED:
            return files
        header, parts = {"__metadata__": metadata} if metadata else {}, []
        for name, (dtype, shape, part) in tensors.items():
            start = sum(map(len, parts))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(part)]}
            parts.append(part)
        return replace(files, tensors=join(header, b"".join(parts)))

    return mutate


def _renamed(tensors: dict[str, list[Any]], names: dict[str, str]) -> None:
    items = [(names.get(name, name), tensor) for name, tensor in tensors.items()]
    tensors.clear()
    tensors.update(items)


def rename(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    name = rng.choice(list(tensors))
    parts = name.split(".")
    rng.shuffle(parts)
    other = rng.choice((*NAMES, name.upper(), name + "x", name[:-1], f"base_model.model.{name}", ".".join(parts)))
    _renamed(tensors, {name: other})


def drop(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    del tensors[rng.choice(list(tensors))]


def add(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    name = rng.choice(list(tensors))
    other = rng.choice((*NAMES, f"{name}x", name.replace("layer.0", "layer.1") + "_", f"base_model.model.x.{name}"))
    tensors[other] = list(tensors[name])


def exchange(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    """Two tensors of one shape in each other's place, as of two layers."""
    name = rng.choice(list(tensors))
    other = rng.choice([n for n in tensors if tensors[n][:2] == tensors[name][:2]])
    _renamed(tensors, {name: other, other: name})


def reshape(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    tensor = tensors[rng.choice(list(tensors))]
    total = 1
    for size in tensor[1]:
        total *= size
    forms = [tensor[1][::-1], [total], [1, *tensor[1]], [*tensor[1], 1]]
    tensor[1] = rng.choice([*forms, [total // 2, 2]] if total % 2 == 0 else forms)


def shrink(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    tensor = tensors[rng.choice(list(tensors))]
    rest = tensor[1][1:]
    width = len(tensor[2]) // tensor[1][0]
    rows = rng.choice((0, tensor[1][0] - 1, tensor[1][0] + 1))
    tensor[1], tensor[2] = [rows, *rest], (tensor[2] + tensor[2])[: rows * width]


def recast(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    """The same bytes under another dtype of the same size, or twice as many values of half of it."""
    tensor = tensors[rng.choice(list(tensors))]
    size = SIZES[tensor[0]]
    tensor[0] = rng.choice([d for d, s in SIZES.items() if s in (size, size // 2) and d != tensor[0]])
    if SIZES[tensor[0]] != size:
        tensor[1] = [*tensor[1][:-1], tensor[1][-1] * 2]


def odd_dtype(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    tensors[rng.choice(list(tensors))][0] = rng.choice(("F8_E4M3", "F8_E8M0", "F4", "F7", "U64", "C64", "", "f32"))


def _floats(change: Callable[[random.Random, list[float]], None]) -> Mutation:
    def mutate(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
        tensor = tensors[rng.choice([name for name, tensor in tensors.items() if tensor[0] == "F32" and tensor[2]])]
        values = list(struct.unpack(f"<{len(tensor[2]) // 4}f", tensor[2]))
        change(rng, values)
        tensor[2] = struct.pack(f"<{len(values)}f", *values)

    return _parsed(mutate)


def not_finite(rng: random.Random, values: list[float]) -> None:
    values[rng.randrange(len(values))] = rng.choice((float("nan"), float("inf"), -float("inf")))


def one_value(rng: random.Random, values: list[float]) -> None:
    values[rng.randrange(len(values))] += rng.choice((1e-6, 1.0, -100.0)) + 1.0


def permute(rng: random.Random, values: list[float]) -> None:
    rng.shuffle(values)


def zeros(rng: random.Random, values: list[float]) -> None:
    values[:] = [0.0] * len(values)


def scale(rng: random.Random, values: list[float]) -> None:
    values[:] = [2 * value for value in values]


# ------------------------------------------------------------------------------------------- header, metadata


def lie(rng: random.Random, files: Files) -> Files:
    """A header that says something else of sizes and offsets than is so."""
    try:
        header, data = split(files.tensors)
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        a, b = entry["data_offsets"]
        other = rng.choice([value for key, value in header.items() if key != "__metadata__"])["data_offsets"]
        key, value = rng.choice(
            [
                ("data_offsets", [b, a]),
                ("data_offsets", [-1, b]),
                ("data_offsets", [a, b + 4]),
                ("data_offsets", [a + 4, b + 4]),
                ("data_offsets", [0, len(data)]),
                ("data_offsets", [a, 1 << 62]),
                ("data_offsets", [1 << 63, 1 << 64]),
                ("data_offsets", other if other != [a, b] else [a, a]),
                ("shape", [1 << 40, 1 << 40]),
                ("shape", [-1, *entry["shape"][1:]]),
                ("shape", [0]),
                ("shape", [float(size) for size in entry["shape"]]),
                ("dtype", 4),
                ("extra", {"x": 1}),
            ]
        )
        header[name] = entry | {key: value}
        return replace(files, tensors=join(header, data))
    except DAMAGED:
        return files


def lie_about_length(rng: random.Random, files: Files) -> Files:
    length = rng.choice((0, 1, 7, len(files.tensors), 1 << 20, 99_999_999, 1 << 31, 1 << 40, (1 << 64) - 1))
    return replace(files, tensors=struct.pack("<Q", length) + files.tensors[8:])


def odd_header(rng: random.Random, files: Files) -> Files:
    header = rng.choice(
        (b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b'{"__metadata__": []}', b"\xff\xfe")
    )
    return replace(files, tensors=join(header, files.tensors[-64:]))


def edit_record(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    metadata[RECORD] = json.dumps(edited(json.loads(metadata[RECORD]), rng))


def odd_record(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    text = metadata[RECORD]
    at = rng.randrange(len(text))
    metadata[RECORD] = rng.choice(
        [
            *("", "{", "[]", "null", "4", '"x"', "{}", "[" * 50_000, '{"a":' * 50_000, '{"format_version": 1}'),
            *(text[:at], text[:at] + text[at + 1 :], text + text),
            text[:at] + chr(rng.randrange(32, 127)) + text[at + 1 :],
        ]
    )


def odd_metadata(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    key = rng.choice(("format", "more", "lit_peft.", "Lit_peft"))
    metadata[key] = rng.choice(("pt", "tf", "", "np", "x", "\0", "größe"))


def place_special(rng: random.Random, files: Files) -> Files:
    what = rng.choice(("loop", "dangling", "directory", "empty", "pickle", "bin", "the other"))
    return replace(files, special=f"{rng.choice(('config', 'tensors'))}: {what}")


def _seal(rng: random.Random, metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    digests = {name: tensor_digest(*tensor) for name, tensor in tensors.items()}
    metadata[RECORD] = sealed(json.loads(metadata[RECORD]) | {"digests": digests})


def seal(files: Files) -> Files:
    """The files with digests that match them, as one would leave them who writes such folders."""
    return _parsed(_seal)(random.Random(0), files)


BYTES = (flip, flip, flip, other_byte, truncate, append, insert, delete, zero, duplicate, swap)
WHOLE = (rename, drop, add, exchange, reshape, shrink, recast, odd_dtype)
VALUES = (not_finite, one_value, permute, zeros, scale)
RECORDS = (edit_record, edit_record, edit_record, odd_record, odd_metadata)
ANY: dict[str, Mutation] = {
    **{f"bytes: {change.__name__}": _bytes(change) for change in BYTES},
    **{f"tensors: {change.__name__}": _parsed(change) for change in WHOLE},
    **{f"values: {change.__name__}": _floats(change) for change in VALUES},
    "config": edit_config,
    "header: lie": lie,
    "header: length": lie_about_length,
    "header: odd": odd_header,
    "special": place_special,
}
"""What may be done to any folder."""
OURS: dict[str, Mutation] = {**ANY, **{f"record: {change.__name__}": _parsed(change) for change in RECORDS}}
"""And to one of ours."""
SEALABLE = {name: change for name, change in OURS.items() if name.startswith(("record", "tensors", "values", "config"))}
"""What leaves a record that can be sealed."""
WEIGHTS = {"bytes: flip": 6, "config": 8, "record: edit_record": 8, "tensors: rename": 2}


def mutated(files: Files, rng: random.Random, kinds: dict[str, Mutation]) -> tuple[str, Files]:
    """What was done, and the files after it: one mutation as a rule, two or three now and then."""
    while True:
        names = rng.choices(list(kinds), [WEIGHTS.get(name, 1) for name in kinds], k=rng.choice((1, 1, 1, 1, 2, 3)))
        changed = files
        for name in names:
            changed = kinds[name](rng, changed)
        if changed != files:
            return " + ".join(names), changed
