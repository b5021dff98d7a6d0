"""Rules of Hugging Face PEFT that its adapter folders follow: which modules a config means, tasks, options."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.layers import find_layer_ops, layer_ops
from lit_peft.core.registry import Adapter
from lit_peft.core.targets import Site, make_site

PREFIX = "base_model.model."
"""What HF PEFT puts before the names of the model."""
PROMPT = "prompt_embeddings"
"""The one tensor of HF PEFT's prompt methods, without a prefix; they wrap the model once, not twice."""
SHARED = ("vera_A", "vera_B")
"""Tensors that all layers share, which HF PEFT keeps beside the model."""

OWN = ".peft."
"""What stands between the path of a layer and the name of a tensor where HF PEFT has no form for the method."""

# Ending of a transformers class name -> (HF PEFT's task type, heads that it then trains and saves unasked).
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
}
HEADS: dict[str | None, tuple[str, ...]] = dict(TASKS.values())

# Entries of an adapter_config.json that do not change the equation, or that the keys of the tensors tell as well.
_DESCRIPTIVE = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "ensure_weight_tying"),
    }
)


class Root(NamedTuple):
    """The transformers model inside a module, to which the names in a folder are relative."""

    path: str
    model: nn.Module

    def inside(self, name: str) -> str:
        """A name in the module as one in the model."""
        if self.path and not is_inside(name, [self.path]):
            raise ValueError(
                f"{name} is adapted or trained, but lies outside the {type(self.model).__name__} at {self.path!r}, "
                "the only part that HF PEFT would know. The trainer's checkpoint keeps both."
            )
        return name[len(self.path) + 1 :] if self.path else name

    def outside(self, name: str) -> str:
        """A name in the model as one in the module."""
        return f"{self.path}.{name}" if self.path else name

    def pairs(self, adapter: Adapter) -> list[tuple[Site, Addition]]:
        """The additions of an adapter, each with its place in the model."""
        paths = [self.inside(path) for path in adapter.sites]
        layers: list[Any] = [self.model.get_submodule(path) for path in paths]
        return [(make_site(path, layer), layer.peft[adapter.name]) for path, layer in zip(paths, layers, strict=True)]


def find_root(module: nn.Module, holding: Collection[str] = (), fits: Callable[[Root], bool] | None = None) -> Root:
    """The outermost submodule that has `config` and `save_pretrained`, or the module itself where none has.

    Args:
        module: The module.
        holding: Names that choose between several.
        fits: Whether one of several may be meant; that is taken which alone does.

    Raises:
        ValueError: When several remain.
    """
    found = find_models(module)
    if holding:
        found = [path for path in found if all(is_inside(name, [path]) for name in holding)] or found
    if len(found) > 1 and fits is not None:
        fitting = [path for path in found if fits(Root(path, module.get_submodule(path)))]
        found = fitting if len(fitting) == 1 else found
    if holding or len(found) < 2:
        return Root(found[0], module.get_submodule(found[0])) if found else Root("", module)
    raise ValueError(
        f"{type(module).__name__} holds several models ({', '.join(found)}) and an adapter folder is for one; pass "
        f"that one, {type(module).__name__}.{found[0]} for instance."
    )


def find_models(module: nn.Module) -> list[str]:
    """Paths of the outermost submodules that have `config` and `save_pretrained`; [""] for a module that has itself."""
    found: list[str] = []
    for path, child in module.named_modules():
        if hasattr(child, "config") and hasattr(child, "save_pretrained") and not is_inside(path, found):
            if not path:
                return [""]
            found.append(path)
    return found


def task_type(model: nn.Module, sites: Iterable[str]) -> str | None:
    """The task of a transformers model by its class name, None where HF PEFT has none.

    Also None where an adapted layer lies in the head: HF PEFT would train the whole head instead.
    """
    name = type(model).__name__
    task, heads = next((entry for ending, entry in TASKS.items() if name.endswith(ending)), (None, ()))
    if task == "SEQ_2_SEQ_LM" and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    head = modules_to_save(model, heads)
    return None if any(is_inside(path, head) for path in sites) else task


def modules_to_save(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Paths of the modules that HF PEFT trains and saves whole: those whose path *ends* with one of the names.

    Not at a dot: by `classifier` DistilBERT's `pre_classifier` is meant too.
    """
    paths = (path for path, _ in model.named_modules(remove_duplicate=False))
    return [path for path in paths if path.endswith(tuple(names))]


def is_inside(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is one of these modules or lies in one."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def target_modules(model: nn.Module, sites: Collection[str], saved: Iterable[str]) -> list[str]:
    """Names that make HF PEFT adapt exactly these layers: the last parts of their paths, or else whole paths."""
    leaves = sorted({path.rpartition(".")[2] for path in sites})
    endings = tuple(f".{leaf}" for leaf in leaves)
    chosen = {p for p, _ in model.named_modules() if f".{p}".endswith(endings) and not is_inside(p, saved)}
    return leaves if chosen == set(sites) else sorted(sites)


def named_to_save(model: nn.Module, paths: list[str]) -> list[str]:
    """Of modules that are saved whole, those that `modules_to_save` names.

    Of tied ones HF PEFT puts a Linear in the place of all but the first, which T5's embeddings do not survive. Left
    out here, they are in the folder all the same, and HF PEFT loads them into its base.
    """
    tied, seen = [], set[int]()
    for path in paths:
        own = {id(parameter) for parameter in model.get_submodule(path).parameters()}
        if own and own <= seen:
            tied.append(path)
        seen |= own
    embeds = any(layer_ops(layer).looks_up for path in tied if find_layer_ops(layer := model.get_submodule(path)))
    return [path for path in paths if path not in tied] if embeds else paths


def trained_whole(model: nn.Module, trained: set[int]) -> list[str]:
    """Paths of the outermost modules all of whose parameters train, [""] where that is the model itself.

    Args:
        model: The model.
        trained: Identities of the parameters that train; names of tied ones would not do.
    """
    found: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        own = [id(p) for name, p in module.named_parameters() if ".peft." not in f".{name}"]
        runs = type(module).forward is not nn.Module.forward  # HF PEFT cannot wrap a ModuleList
        if own and runs and trained.issuperset(own) and not is_inside(path, found):
            found.append(path)
            if not path:
                break
    return found


def first_linear(model: nn.Module, saved: Iterable[str]) -> str:
    """Path of the first linear layer outside the modules that are saved whole.

    Raises:
        ValueError: When there is none.
    """
    for path, module in model.named_modules():
        ops = find_layer_ops(module)
        if path and ops is not None and ops.is_linear and not is_inside(path, saved):
            return path
    raise ValueError(f"{type(model).__name__} has no linear layer outside its head, and HF PEFT must adapt one.")


def match_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of a `rank_pattern` or `alpha_pattern` for a path: of the first expression that its end matches."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


class OwnForm:
    """How a method is written that HF PEFT does not have: each tensor of an addition by its site and its name."""

    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "LIT_PEFT"}

    @staticmethod
    def to_hf_peft(sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """No entries; the tensors, whether they train or not."""
        tensors = {}
        for site, addition in sites:
            for key, tensor in addition.state_dict(keep_vars=True).items():
                tensors[f"{site.path}{OWN}{key}"] = tensor
        return {}, tensors


def has_form(method: type) -> bool:
    """Whether a class says how its own additions map: a subclass that builds others does not inherit the map."""
    mapped = next((cls for cls in method.__mro__ if {"to_hf_peft", "exported"} & vars(cls).keys()), None)
    built = next(cls for cls in method.__mro__ if {"build", "delta"} & vars(cls).keys())
    return mapped is not None and issubclass(mapped, built)


def form_of(method: Any, sites: Iterable[tuple[Site, Any]]) -> Any:
    """What maps these additions: the method, or `OwnForm` where HF PEFT lacks it, or lacks it at one of the layers."""
    return method if has_form(type(method)) and first_lacking(method, sites) is None else OwnForm


def first_lacking(method: Any, sites: Iterable[tuple[Site, Any]]) -> Site | None:
    """The first of these places at which HF PEFT does not have the method, which may be its class; None: it has all."""
    has = getattr(method, "hf_has", lambda *_: True)
    return next((site for site, addition in sites if not has(site, addition)), None)


def stores_transposed(sites: Iterable[tuple[Site, Any]]) -> bool:
    """Whether a layer stores its weight as [in, out], as GPT-2's do: HF PEFT's `fan_in_fan_out`."""
    return any(layer_ops(site.layer).fan_in_fan_out for site, _ in sites)


def read_options(config: Mapping[str, Any], known: Mapping[str, Any], reader: str) -> dict[str, Any]:
    """The entries of a config that a method reads, with HF PEFT's defaults where they are missing.

    Args:
        config: adapter_config.json.
        known: Entry -> default.
        reader: Name of the method.

    Raises:
        CheckpointMismatch: For an entry that the method does not know and that asks for something.
    """
    for key, value in config.items():
        if value and key not in known and key not in _DESCRIPTIVE:
            raise CheckpointMismatch(f"adapter_config.json asks for {key}={value!r}, which {reader} does not have.")
    return {key: default if config.get(key) is None else config[key] for key, default in known.items()}


def prefix(key: str, keys: Collection[str]) -> str:
    """What HF PEFT puts before the name of this tensor in a folder that holds these."""
    if key == PROMPT:
        return ""
    wrapper = PREFIX.removesuffix("model.")
    return wrapper if PROMPT in keys or key.removeprefix(wrapper) in SHARED else PREFIX


def split(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits the tensors of a folder, by names in the model: those of the base, and those of the additions."""
    patterns = (config.get("rank_pattern") or {}).items()
    empty = tuple(key.removesuffix("lora_E") for key, kept in patterns if isinstance(kept, list) and not any(kept))
    known = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    if asked := config.get("layer_replication"):
        raise CheckpointMismatch(
            f"adapter_config.json asks for layer_replication={asked!r}, which changes the base too."
        )
    base, changes = {}, {}
    for key, tensor in tensors.items():
        if ".modules_to_save." in key or ".original_module." in key:
            continue  # with bias="all", HF PEFT writes the biases of modules_to_save three times
        name = key.removeprefix(prefix(key, tensors))
        plain = name.replace(".base_layer.", ".")
        if name.startswith(empty):
            continue  # a layer that HF PEFT's AdaLoRA has left no rank
        if key == PROMPT and config.get("num_transformer_submodules") == 2:
            tensor = tensor[: config.get("num_virtual_tokens")]  # as many for the decoder, which HF PEFT never reads
        if plain in known:
            base[plain] = tensor
        else:
            changes[name] = tensor
    return base, changes


def check_sizes(config: Mapping[str, Any], changes: Mapping[str, Tensor]) -> None:
    """Raises CheckpointMismatch for a size that no tensor has and that would be allocated before that is seen."""
    for entry, ending in (("num_virtual_tokens", PROMPT), ("r", "vera_lambda_d")):
        for key, tensor in changes.items():
            size = config.get(entry)
            if key.endswith(ending) and tensor.ndim and isinstance(size, int) and size > len(tensor):
                raise CheckpointMismatch(
                    f"{key} has shape {list(tensor.shape)} in the folder, and {entry} is {size} in adapter_config.json."
                )


def site_paths(model: nn.Module, keys: Collection[str]) -> list[str]:
    """Paths of the layers that tensors of additions belong to, in the model's order.

    None in a folder of a prompt method: such a method finds its place in the model itself.
    """
    if PROMPT in keys:
        return []
    modules = dict(model.named_modules())
    paths = set()
    for key in sorted(set(keys).difference(SHARED)):
        path, own, _ = key.partition(OWN)
        while path not in modules:
            path = path.rpartition(".")[0]
        if not own and find_layer_ops(modules[path]) is None:
            raise CheckpointMismatch(f"The folder holds {key}, for which {type(model).__name__} has no layer.")
        paths.add(path)
    return [path for path in modules if path in paths]


def trained_names(
    model: nn.Module, config: Mapping[str, Any], base: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Of a folder of HF PEFT's, the base parameters that train, and those among them in `modules_to_save`.

    Raises:
        CheckpointMismatch: When HF PEFT has trained parameters apart that are tied in the model.
    """
    names = [*(config.get("modules_to_save") or ()), *HEADS.get(config.get("task_type"), ())]
    saved = modules_to_save(model, names)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head = [name for name in base if name in parameters and is_inside(name, saved)]
    for name, twin in ((a, b) for a in head for b in parameters if a != b and parameters[a] is parameters[b]):
        if twin not in base or not torch.equal(base[twin], base[name]):
            raise CheckpointMismatch(
                f"{name} was trained apart from {twin}, and the two are one parameter here: train it in HF PEFT with "
                "ensure_weight_tying, or untie them in both (tie_word_embeddings=False)."
            )
    biases = [] if config.get("bias", "none") == "none" else [name for name in base if name.endswith(".bias")]
    return list(dict.fromkeys([*head, *biases])), head
