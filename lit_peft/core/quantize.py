"""Frozen bases in 4 and 8 bit: what a quantiser is, and quantising the layers of any module in place."""

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from lit_peft.core.layers import find_layer_ops
from lit_peft.core.quantized import adopt
from lit_peft.core.registry import registry
from lit_peft.core.swap import leave_fast_path
from lit_peft.core.targets import names_path

GROUP = "lit_peft.quantizers"
"""Entry-point group through which a package brings a quantiser: `my4 = "my_package.module:MyQuantizer"`."""

Quantize = str | Mapping[str, Any] | None
"""What a method's `quantize` takes: a mode, or {"mode": a mode, option: value, ...}."""


class StoredSize(NamedTuple):
    """Bytes that a quantised weight takes."""

    codes: int
    constants: int
    """Scales and what else is needed to read the codes."""


class Quantizer:
    """A way of storing the frozen weights of linear layers in fewer bits. Subclass it to bring another one.

    Its layers need a `LayerOps`, which tells their matrix and, by `quantization`, that they are quantised; it is
    registered where the class of the layer, or of its weight, is new.

    Args:
        skip_modules: Modules that are left alone, beside what is always: names, path endings, globs, `re:` expressions.
    """

    kinds: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")
    """Qualified names of the classes of layer that it takes; exactly these, since a subclass may read its weight."""

    def __init__(self, skip_modules: str | Sequence[str] = ()) -> None:
        names = [skip_modules] if isinstance(skip_modules, str) else skip_modules
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"skip_modules is {skip_modules!r}, expected names, [a, b].")
        for name in names:
            try:
                names_path(name, "")
            except ValueError as error:  # of a regular expression
                raise ValueError(f"skip_modules: {error}") from None
        self.skip_modules = list(names)

    @property
    def stored_as(self) -> str:
        """What `LayerOps.quantization` tells of its layers."""
        raise NotImplementedError(f"{type(self).__name__} must say what it stores weights as.")

    def quantize(self, layer: nn.Module, device: torch.device) -> None:
        """Quantises one layer, in place: the module stays the same object, its class and its weight change.

        Args:
            layer: A layer of one of `kinds`; its bias stays as it is.
            device: Where to do it, and where the quantised weight is afterwards; meta for the shapes alone, of a layer
                that is there itself.
        """
        raise NotImplementedError(f"{type(self).__name__} must define quantize(layer, device).")

    def check_device(self, device: torch.device) -> None:
        """Warns of what a device does badly, before anything is quantised for it."""

    def size(self, out_features: int, in_features: int) -> StoredSize:
        """Bytes of a weight [out, in] once it is quantised."""
        raise NotImplementedError(f"{type(self).__name__} must define size(out_features, in_features).")

    def loading_config(self, left_alone: list[str]) -> Any | None:
        """A transformers quantisation config with which `from_pretrained` gives the same layers; None: there is none.

        Args:
            left_alone: What transformers must not quantise, as its configs take that: see `lit_peft.saving.left_alone`.
        """
        return None

    @classmethod
    def of(cls, layer: nn.Module) -> "Quantizer | None":
        """The quantiser of this class that makes such a layer; None where that is another one."""
        return None

    def reading_config(self, left_alone: list[str]) -> Any | None:
        """A transformers quantisation config with which `from_pretrained` reads a model with its layers from a folder.

        There the codes are written already, so that less needs to be said than where they are made.
        """
        return self.loading_config(left_alone)


# ------------------------------------------------------------------------------------------- by the user's name


def modes() -> list[str]:
    """Names of all modes, of the installed packages."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def parse(quantize: Quantize) -> dict[str, Any] | None:
    """What `quantize` means, with every option by name; None for None.

    Raises:
        ValueError: For a mode or an option that is not known, with the nearest ones, a value that cannot be, or a
            package that is missing.
    """
    if quantize is None:
        return None
    given = dict(quantize) if isinstance(quantize, Mapping) else {"mode": quantize}
    if not isinstance(mode := given.pop("mode", None), str):
        raise ValueError(f"quantize: {quantize!r} names no mode; modes: {', '.join(modes())}.")
    known = _options(mode)
    for option in given:
        if option not in known:
            raise ValueError(f"quantize: {mode} has no option {option!r}.{_near(option, known, 'Options')}")
    options = {**known, **given}
    if missing := [option for option, value in options.items() if value is inspect.Parameter.empty]:
        raise ValueError(f"quantize: {mode} needs {missing[0]}: give {{mode: {mode}, {missing[0]}: …}}.")
    options["skip_modules"] = _made(mode, options).skip_modules  # a wrong value is told before anything is loaded
    return {"mode": mode, **options}


def make_quantizer(quantize: Quantize) -> Quantizer:
    """The quantiser that a `quantize` which is not None means.

    Raises:
        ValueError: As `parse`.
    """
    options = parse(quantize)
    assert options is not None
    return _made(options.pop("mode"), options)


def _made(mode: str, options: Mapping[str, Any]) -> Quantizer:
    cls = _quantizer_class(mode)
    try:
        return cls(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"quantize: {error}") from error


def quantizer_of(layer: nn.Module) -> Quantizer | None:
    """The quantiser that makes such a layer, of any installed package; None where there is none."""
    for mode in modes():
        try:
            found = _quantizer_class(mode).of(layer)
        except ValueError:  # its package is missing, so that the layer is not of it
            continue
        if found is not None:
            return found
    return None


def _quantizer_class(mode: str) -> type[Quantizer]:
    found = [point for point in entry_points(group=GROUP) if point.name == mode]
    if not found:
        known, bits = modes(), re.findall("[48]", mode)  # "4bit", "int4", "8-bit", as others call them
        alike = [name for name in reversed(known) if bits and re.findall("[48]", name) == bits]
        raise ValueError(f"quantize: there is no mode {mode!r}.{_near(mode, known, 'Modes', sorted(alike, key=len))}")
    try:
        return found[0].load()
    except ImportError as error:
        raise ValueError(f"quantize: {mode} needs a package that is not installed: {error}.") from error


def _options(mode: str) -> dict[str, Any]:
    """Options of a mode, those that a constructor hands on as `**common` too, with their defaults.

    `Parameter.empty` is that of one that must be given.
    """
    found: dict[str, Any] = {}
    for base in _quantizer_class(mode).__mro__:
        if issubclass(base, Quantizer):
            for p in list(inspect.signature(base.__init__).parameters.values())[1:]:
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                    found.setdefault(p.name, list(p.default) if isinstance(p.default, tuple) else p.default)
    return found


def _near(word: str, known: Iterable[str], what: str, alike: Sequence[str] = ()) -> str:
    close = alike or difflib.get_close_matches(word.lower(), list(known), n=2, cutoff=0.5)
    close = [word.lower()] if word.lower() in close else close
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{hint} {what}: {', '.join(known)}."


# --------------------------------------------------------------------------------------------------- in place


def stored_as(module: nn.Module) -> dict[str, str]:
    """Path -> what its weight is stored as, for every quantised layer of a module."""
    found = {}
    for path, layer in module.named_modules():
        ops = find_layer_ops(layer) if "weight" in layer._parameters else None
        if ops is not None and (kind := ops.quantization(layer)) is not None:
            found[path] = kind
    return found


def recognise(module: nn.Module) -> dict[str, str]:
    """Makes the layers that came quantised, as transformers loads them, fit to stand in a frozen base; see `adopt`.

    Returns:
        `stored_as` of the module.
    """
    for layer in module.modules():
        adopt(layer)
    found = stored_as(module)
    for path in found:
        leave_fast_path(module, path)  # nn.TransformerEncoderLayer would read the codes as a weight
    return found


def quantize_base(
    module: nn.Module, quantizer: Quantizer, avoid: Iterable[str] = (), device: torch.device | None = None
) -> list[str]:
    """Quantises the linear layers of a module in place, one by one, so that at most one is there twice.

    Where the module holds transformers models, the layers of their bodies: heads, whatever is inside a module outside
    of these bodies, output embeddings and what transformers keeps in float32 are left alone. Else all but the last one,
    which makes the outputs. Layers whose weight is used in another place too are left alone in any case, and so is what
    `avoid` and the quantiser name.

    Args:
        module: The module, before anything is attached to it.
        quantizer: How.
        avoid: Paths of modules or parameters that train, or will be replaced.
        device: Where to quantise, and where the quantised weights are then; by default where each layer is. meta, named
            here, quantises the shapes of layers without values, to see what memory they take.

    Returns:
        Paths of the layers that were quantised, none where they were already, in the same way.

    Raises:
        ValueError: When layers are quantised in another way already, none is left, or a pattern matches nothing.
    """
    found = recognise(module)
    if other := [path for path, kind in found.items() if kind != quantizer.stored_as]:
        raise ValueError(
            f"quantize: {other[0]} is quantised already, {found[other[0]]}, not {quantizer.stored_as}. Take it as "
            "it is, quantize=None, or load the base unquantised."
        )
    if found:
        return []
    if registry(module) is not None:
        raise ValueError(
            "quantize: the base has adapters already, which stand on it as it is. Quantise with the first."
        )
    chosen = choose_layers(module, quantizer, avoid)
    paths = [path for path, why in chosen.items() if why is None]
    if not paths:
        raise ValueError(_none_is_left(module, {path: why for path, why in chosen.items() if why}))
    for path in paths:
        layer: Any = module.get_submodule(path)
        if layer.weight.is_meta and (device is None or device.type != "meta"):
            raise ValueError(f"quantize: {path} has no values yet; load the base first.")
        quantizer.quantize(layer, device or layer.weight.device)
        leave_fast_path(module, path)
    return paths


def choose_layers(module: nn.Module, quantizer: Quantizer, avoid: Iterable[str] = ()) -> dict[str, str | None]:
    """Path -> None for each layer that is to be quantised, or why it is left alone; also on the meta device.

    Raises:
        ValueError: When a pattern of `skip_modules` matches nothing.
    """
    avoided, reasons = tuple(avoid), list[tuple[Callable[[str, nn.Module], bool], str]]()
    layers = {p: layer for p, layer in module.named_modules() if ".peft." not in f".{p}." and _kind(layer, quantizer)}
    unused = [s for s in quantizer.skip_modules if not any(_named(s, path) for path, _ in module.named_modules())]
    if unused:
        names = sorted({path.rpartition(".")[2] for path in layers})
        raise ValueError(f"quantize: skip_modules {unused[0]!r} matches nothing.{_near(unused[0], names, 'Layers')}")
    models = {path: m for path, m in module.named_modules() if hasattr(m, "base_model_prefix")}
    models = {p: m for p, m in models.items() if not any(p != q and _inside(p, (q,)) for q in models)}
    bodies = tuple(_body(path, model) for path, model in models.items())
    kept = {name for model in models.values() for name in getattr(model, "_keep_in_fp32_modules", None) or ()}
    kept |= {name for m in models.values() for name in getattr(m, "_keep_in_fp32_modules_strict", None) or ()}
    outputs = {id(get()) for m in module.modules() if callable(get := getattr(m, "get_output_embeddings", None))}
    shared = _shared_weights(module)
    last = list(layers)[1:][-1:] if not bodies else []  # where it is the only one, it is what the user is after
    reasons += [
        (lambda path, layer: _inside(path, avoided), "it trains"),
        (lambda path, layer: any(_named(s, path) for s in quantizer.skip_modules), "skip_modules names it"),
        (lambda path, layer: bool(bodies) and not _inside(path, bodies), "it is a head"),
        (lambda path, layer: path in last, "it is the last layer"),
        (lambda path, layer: id(layer) in outputs, "it is an output embedding"),
        (lambda path, layer: id(layer.weight) in shared, "its weight is used elsewhere too"),
        (lambda path, layer: any(f".{k}." in f".{path}.weight." for k in kept), "transformers keeps it in float32"),
    ]
    return {path: next((why for holds, why in reasons if holds(path, layer)), None) for path, layer in layers.items()}


def _none_is_left(module: nn.Module, why: Mapping[str, str]) -> str:
    """Tells why most linear layers are left alone: by `why`, what `choose_layers` says, or by their class."""
    reasons = dict(why)
    for path, layer in module.named_modules():
        ops = find_layer_ops(layer) if path not in why else None
        if ops is not None and ops.is_linear:
            reasons[path] = f"of class {type(layer).__name__}, which this mode does not take"
    if not reasons:
        return f"quantize: {type(module).__name__} has no linear layer."
    reason, count = Counter(reasons.values()).most_common(1)[0]
    example = next(path for path in reasons if reasons[path] == reason)
    return (
        f"quantize: {type(module).__name__} has no linear layer that could be quantised. Left alone: {count:,} of "
        f"{len(reasons):,}, such as {example} ({reason})."
    )


def _kind(layer: nn.Module, quantizer: Quantizer) -> bool:
    cls = type(layer)
    is_own = (
        "forward" not in layer.__dict__ and "weight" in layer._parameters
    )  # not computed by a hook, as weight norm's
    return f"{cls.__module__}.{cls.__qualname__}" in quantizer.kinds and is_own


def _inside(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a path is one of these, or below it; "" is the root of all."""
    return any(not root or path == root or path.startswith(root + ".") for root in roots)


def _named(pattern: str, path: str) -> bool:
    """Whether a pattern means this path or one above it."""
    parts = path.split(".")
    return any(names_path(pattern, ".".join(parts[: i + 1])) for i in range(len(parts)))


def _body(path: str, model: Any) -> str:
    """Path of a transformers model without its heads."""
    body = model.base_model
    inner = next(name for name, child in model.named_modules() if child is body)
    return ".".join(part for part in (path, inner) if part)


def _shared_weights(module: nn.Module) -> set[int]:
    """Identities of weights that several modules hold."""
    seen, shared = set[int](), set[int]()
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
