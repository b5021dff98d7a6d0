"""From what the user writes, roles, names, globs, regular expressions, to the places in a model it means."""

import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lit_peft.core.layers import find_layer_ops, layer_ops

# Role -> path endings that play it, over the naming schemes of transformers; matched after a dot.
ROLES: dict[str, tuple[str, ...]] = {
    "query": ("q_lin", "q_proj", "query", "query_proj", "wq", "SelfAttention.q", "EncDecAttention.q"),
    "key": ("k_lin", "k_proj", "key", "key_proj", "wk", "SelfAttention.k", "EncDecAttention.k"),
    "value": ("v_lin", "v_proj", "value", "value_proj", "wv", "SelfAttention.v", "EncDecAttention.v"),
    "output": (
        *(
            "out_lin",
            "o_proj",
            "attention.output.dense",
            "self_attn.out_proj",
            "attn.c_proj",
            "attn.out_proj",
        ),
        *("SelfAttention.o", "EncDecAttention.o", "attention.dense", "self_attention.dense", "attn.Wo"),
    ),
    "ffn_up": (
        *(
            "lin1",
            "intermediate.dense",
            "mlp.c_fc",
            "up_proj",
            "mlp.fc1",
            "fc1",
            "linear1",
            "mlp.dense_h_to_4h",
        ),
        *("DenseReluDense.wi", "DenseReluDense.wi_1", "mlp.fc_in", "mlp.Wi"),
    ),
    "ffn_gate": ("gate_proj", "DenseReluDense.wi_0"),
    "ffn_down": (
        *(
            "lin2",
            "output.dense",
            "mlp.c_proj",
            "down_proj",
            "mlp.fc2",
            "fc2",
            "linear2",
            "mlp.dense_4h_to_h",
        ),
        *("DenseReluDense.wo", "mlp.fc_out", "mlp.Wo"),
    ),
}
# One weight that holds several roles side by side; it answers to each, and the table of sites says so.
FUSED: dict[str, tuple[str, ...]] = {
    "attn.c_attn": ("query", "key", "value"),
    "qkv_proj": ("query", "key", "value"),
    "query_key_value": ("query", "key", "value"),
    "attn.Wqkv": ("query", "key", "value"),
    "gate_up_proj": ("ffn_gate", "ffn_up"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "output"),
    "ffn": ("ffn_up", "ffn_gate", "ffn_down"),
}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Site:
    """One place in a model that an addition can be attached to.

    Attributes:
        path: Dotted path from the module that `attach` was called on; "" is that module itself.
        layer: The module that lives there.
        roles: Roles its name plays, several for a fused projection, none for an unknown name.
        block: Index of the transformer block (first number in the path), or None outside blocks.
    """

    path: str
    layer: nn.Module
    roles: tuple[str, ...] = ()
    block: int | None = None

    @cached_property
    def size(self) -> tuple[int, int]:
        """(out, in) of the layer's weight as a matrix."""
        return layer_ops(self.layer).size(self.layer)

    @property
    def out_features(self) -> int:
        """Rows of the weight matrix."""
        return self.size[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight matrix."""
        return self.size[1]

    @property
    def fan_in(self) -> int:
        """Inputs that one output sums over: `in_features`, and 1 for an embedding."""
        return layer_ops(self.layer).fan_in(self.layer)

    def answers_to(self, pattern: str) -> bool:
        """Whether a role, group, name, glob or `re:` expression means this site."""
        return _matches(pattern, self, set())

    def matrix(self) -> Tensor:
        """The dense weight, [out, in], detached."""
        with torch.no_grad():
            return layer_ops(self.layer).matrix(self.layer).detach()


def make_site(path: str, layer: nn.Module) -> Site:
    """The site of one module, its roles and block read off its path."""
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return Site(path, layer, roles_of(path), numbers[0] if numbers else None)


def roles_of(path: str) -> tuple[str, ...]:
    """Roles that the last parts of a path play: "…attn.c_attn" -> ("query", "key", "value")."""
    for ending, roles in FUSED.items():
        if _ends(path, ending):
            return roles
    # The longest ending wins: BERT's "attention.output.dense" is no "output.dense".
    matches = [(len(e), role) for role, endings in ROLES.items() for e in endings if _ends(path, e)]
    return (max(matches)[1],) if matches else ()


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith("." + ending)


def find_sites(
    module: nn.Module,
    targets: str | Sequence[str],
    *,
    exclude: str | Sequence[str] = (),
    blocks: str | Sequence[int] | None = None,
    avoid: Iterable[str] = (),
    layers_only: bool = True,
) -> list[Site]:
    """Resolves targets to sites, in the module's own order.

    Args:
        module: The module to search.
        targets: One or more of: a role (`query key value output ffn_up ffn_gate ffn_down`), a group
            (`attention`, `ffn`, `all-linear`: every linear layer but output layers), the last part or parts of
            a path (`q_lin`, `attention.q_lin`), a glob over whole paths (`*.layer.[01].*.lin?`), `re:` with a
            regular expression that must match a whole path. A word that is both a role and a name is the role.
        exclude: Sites to leave out, in the same language.
        blocks: Indices of transformer blocks to keep, negative ones from the end, or a range as text, "2-5".
        avoid: Paths whose subtrees are never targeted (a head that is trained itself).
        layers_only: Whether sites must have a weight matrix; False finds other modules too, by name or pattern.

    Raises:
        ValueError: When a target matches nothing, naming the nearest names and the role; when it matches what
            cannot be adapted; when a block does not exist.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("target_modules is empty: name at least one role, group, name or pattern.")
    avoided = tuple(avoid)
    all_sites = [make_site(p, layer) for p, layer in module.named_modules() if ".peft." not in f".{p}."]
    candidates = [s for s in all_sites if not any(s.path == a or s.path.startswith(a + ".") for a in avoided)]
    layers = [s for s in candidates if not layers_only or find_layer_ops(s.layer) is not None]
    outputs = _output_layers(module)
    bypassed = {s.path for s in layers if _is_bypassed(module, s.path)}
    experts = _expert_weights(candidates) if layers_only else []
    chosen: dict[str, Site] = {}
    for pattern in patterns:
        hits = [s for s in layers if _matches(pattern, s, outputs)]
        wide = pattern in (ALL_LINEAR, "ffn")
        stacked = [path for path in experts if wide or _matches(pattern, make_site(path, module), outputs)]
        if not hits:
            raise ValueError(_nothing_matches(module, pattern, all_sites, layers, avoided, stacked))
        wrong = [s.path for s in hits if s.path in bypassed]
        if (pattern == ALL_LINEAR or pattern in GROUPS) and len(wrong) < len(hits):
            hits = [s for s in hits if s.path not in bypassed]
            _report_left_out(pattern, wrong, _BYPASSED)
        elif wrong:
            raise ValueError(
                f"target_modules: {pattern!r} matches {wrong[0]}, but {_BYPASSED}. Name layers outside it "
                "(linear1, linear2)."
            )
        _report_left_out(pattern, stacked, _STACKED)
        chosen.update({s.path: s for s in hits})
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in excluded:
        dropped = [path for path, s in chosen.items() if _matches(pattern, s, outputs)]
        if not dropped and pattern not in GROUPS and pattern not in ROLES:
            names = sorted({path.rsplit(".", 1)[-1] for path in chosen})
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or names[:12]
            raise ValueError(
                f"exclude_modules: {pattern!r} leaves nothing out. Nearest of the chosen: {', '.join(close)}."
            )
        for path in dropped:
            del chosen[path]
    if blocks is not None:
        wanted = _blocks(blocks, {s.block for s in all_sites if s.block is not None})
        chosen = {path: s for path, s in chosen.items() if s.block in wanted}
    if not chosen:
        raise ValueError(f"No layer is left of target_modules={patterns} after exclude_modules and layers.")
    order = {s.path: i for i, s in enumerate(all_sites)}
    return sorted(chosen.values(), key=lambda s: order[s.path])


def sites_of_role(module: nn.Module, role: str) -> list[Site]:
    """All layers with a weight matrix that play a role; none where no name is known."""
    sites = (make_site(p, layer) for p, layer in module.named_modules() if ".peft." not in f".{p}.")
    return [s for s in sites if role in s.roles and find_layer_ops(s.layer) is not None]


def closest_site(site: Site, others: Iterable[Site]) -> Site | None:
    """The site of the same block with the longest path in common, or None where the block has none."""

    def common(other: Site) -> int:
        pairs = [a == b for a, b in zip(site.path.split("."), other.path.split("."), strict=False)]
        return [*pairs, False].index(False)

    near = [other for other in others if other.block == site.block]
    best = max(near, key=common, default=None)
    numbered = [i for i, part in enumerate(site.path.split("."), 1) if part.isdigit()]
    return best if best is not None and common(best) >= (numbered[0] if numbered else 0) else None


@dataclass(frozen=True)
class ParameterMatch:
    """Parameters that patterns named.

    Attributes:
        names: Canonical names of the parameters (tied ones once).
        roots: What must not be adapted besides: paths, of modules or parameters, that the patterns matched,
            and layers whose weight is among the parameters, under whatever name.
    """

    names: frozenset[str]
    roots: tuple[str, ...]


def find_parameters(module: nn.Module, patterns: Iterable[str]) -> ParameterMatch:
    """Resolves patterns of base parameters, each a parameter's or a module's name, path ending, glob or re:.

    Raises:
        ValueError: When a pattern names no parameter, with the nearest names.
    """
    canonical = {id(p): name for name, p in module.named_parameters()}
    named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if ".peft." not in f".{name}"]
    names, roots = set(), dict[str, None]()
    for pattern in patterns:
        found = False
        for name, parameter in named:
            parts = name.split(".")
            paths = (".".join(parts[: i + 1]) for i in range(len(parts)))
            root = next((path for path in paths if names_path(pattern, path)), None)
            if root is not None:
                found = True
                names.add(canonical[id(parameter)])
                roots[root] = None
        if not found:
            words = sorted({part for name, _ in named for part in name.split(".") if not part.isdigit()})
            close = difflib.get_close_matches(pattern, words, n=3, cutoff=0.5) or words[:12]
            raise ValueError(
                f"train_also: {pattern!r} names no parameter of {type(module).__name__}. Nearest: {', '.join(close)}."
            )
    for name, parameter in named:
        if parameter.ndim > 1 and canonical[id(parameter)] in names:
            roots[name.rpartition(".")[0]] = None
    return ParameterMatch(frozenset(names), tuple(roots))


def _is_bypassed(module: nn.Module, path: str) -> bool:
    """Whether the parent reads the layer's weight without calling the layer."""
    return isinstance(module.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


_BYPASSED = "nn.MultiheadAttention reads this weight itself, so that an adapter would have no effect"
_STACKED = "3-D expert weights, which are no layers"


def _expert_weights(candidates: list[Site]) -> list[str]:
    """Names of the parameters that hold one matrix per expert, which no layer type serves."""
    return [
        f"{s.path}.{name}".lstrip(".")
        for s in candidates
        if not isinstance(s.layer, nn.modules.conv._ConvNd)
        for name, p in s.layer.named_parameters(recurse=False)
        if p.ndim == 3 and min(p.shape) > 1  # not a class token, [1, 1, width]
    ]


def _report_left_out(pattern: str, names: list[str], why: str) -> None:
    """Names what a target would be expected to cover and does not: nothing is skipped in silence."""
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(f"target_modules={pattern!r} leaves out {shown}: {why}.", stacklevel=4)


def _matches(pattern: str, site: Site, outputs: set[int]) -> bool:
    if pattern == ALL_LINEAR:
        ops = find_layer_ops(site.layer)
        return ops is not None and ops.is_linear and id(site.layer) not in outputs
    if pattern in GROUPS:
        return any(role in GROUPS[pattern] for role in site.roles)
    if pattern in ROLES:
        return pattern in site.roles
    return names_path(pattern, site.path)


def names_path(pattern: str, path: str) -> bool:
    """Whether a name, a path ending, a glob or a regular expression (`re:`) means this path."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}.") from None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(path, pattern)
    return bool(pattern) and _ends(path, pattern)


def _output_layers(module: nn.Module) -> set[int]:
    """Identities of output embeddings (language-model heads), which "all-linear" leaves alone."""
    found = set()
    for child in module.modules():
        get = getattr(child, "get_output_embeddings", None)
        if callable(get) and (layer := get()) is not None:
            found.add(id(layer))
    return found


def _blocks(blocks: str | Sequence[int], present: set[int]) -> set[int]:
    count = max(present, default=-1) + 1
    if isinstance(blocks, str):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", blocks.strip())
        if match is None:
            raise ValueError(f"layers: {blocks!r} is neither a number nor a range such as '2-5'.")
        first, last = int(match[1]), int(match[2] or match[1])
        wanted = list(range(first, last + 1))
    else:
        wanted = list(blocks)
    for index in wanted:
        if not -count <= index < count:
            here = f"{count} (0 to {count - 1})" if count else "none"
            raise ValueError(f"layers: there is no block {index}; this model has {here}.")
    return {index % count for index in wanted}


def _nothing_matches(
    module: nn.Module,
    pattern: str,
    candidates: list[Site],
    layers: list[Site],
    avoided: tuple[str, ...],
    stacked: list[str],
) -> str:
    """Says why a target found nothing: what it hit instead, the nearest names, its role elsewhere."""
    name = type(module).__name__
    hit = next((s for s in candidates if _matches(pattern, s, _output_layers(module))), None)
    if hit is not None and any(hit.path == a or hit.path.startswith(a + ".") for a in avoided):
        return f"target_modules: {pattern!r} matches {hit.path}, which train_also trains as a whole."
    if hit is not None:
        kind = type(hit.layer)
        return (
            f"target_modules: {pattern!r} matches {hit.path} of {name}, a "
            f"{kind.__module__}.{kind.__qualname__}, which has no weight matrix that lit-peft "
            "knows; name the linear layers inside it."
        )
    if stacked:
        return f"target_modules: {pattern!r} matches only {stacked[0]} and its like in {name}: {_STACKED}."
    names = sorted({s.path.rsplit(".", 1)[-1] for s in layers if s.path})
    roles = {role: sorted({s.path.rsplit(".", 1)[-1] for s in layers if role in s.roles}) for role in ROLES}
    message = f"target_modules: {pattern!r} matches no layer of {name}."
    role = next(iter(roles_of(pattern)), None)
    if pattern in ROLES or pattern in GROUPS:
        present = [f"{role} ({', '.join(found)})" for role, found in roles.items() if found]
        paths = [site.path for site in layers if site.path]
        some = ", ".join(paths[:8]) + ", …" * (len(paths) > 8)
        return f"{message} Roles here: {', '.join(present) or f'none, name the layers: {some}'}."
    if role is not None and roles[role]:
        message += f" Elsewhere it is the {role!r} projection, here named {', '.join(roles[role])}: use {role!r}."
    close = difflib.get_close_matches(pattern, [*names, *ROLES, *GROUPS, ALL_LINEAR], n=3, cutoff=0.5)
    if close:
        message += f" Nearest: {', '.join(close)}."
    elif names:
        message += f" Layers here: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}."
    return message
