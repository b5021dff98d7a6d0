"""What users write under target_modules, exclude_modules, layers and train_also, and what it means."""

import functools
import warnings

import pytest
import torch
import transformers as tf
from models import TINY, tiny
from torch import nn

from lit_peft.core.targets import GROUPS, ROLES, find_parameters, find_sites, roles_of
from lit_peft.methods import LoRA

model = functools.cache(tiny)  # nothing here changes a model

Q, K, V, OUT, UP, GATE, DOWN = "query", "key", "value", "output", "ffn_up", "ffn_gate", "ffn_down"


def stack(prefix: str, layers: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Prefix of a block, and the linear layers inside, in the module's order, with the roles of each."""
    pairs = (entry.split(":") for entry in layers.split())
    return prefix, {name: tuple(roles.split(",")) for name, roles in pairs}


BERT = (
    "attention.self.query:query attention.self.key:key attention.self.value:value "
    "attention.output.dense:output intermediate.dense:ffn_up output.dense:ffn_down"
)
T5_SELF = "0.SelfAttention.q:query 0.SelfAttention.k:key 0.SelfAttention.v:value 0.SelfAttention.o:output "
T5_FFN = " {0}.DenseReluDense.wi_0:ffn_gate {0}.DenseReluDense.wi_1:ffn_up {0}.DenseReluDense.wo:ffn_down"
STACKS = {
    "distilbert": [
        stack(
            "distilbert.transformer.layer.{}.",
            "attention.q_lin:query attention.k_lin:key attention.v_lin:value attention.out_lin:output "
            "ffn.lin1:ffn_up ffn.lin2:ffn_down",
        )
    ],
    "bert": [stack("bert.encoder.layer.{}.", BERT)],
    "roberta": [stack("roberta.encoder.layer.{}.", BERT)],
    "gpt2": [
        stack(
            "transformer.h.{}.",
            "attn.c_attn:query,key,value attn.c_proj:output mlp.c_fc:ffn_up mlp.c_proj:ffn_down",
        )
    ],
    "llama": [
        stack(
            "model.layers.{}.",
            "self_attn.q_proj:query self_attn.k_proj:key self_attn.v_proj:value self_attn.o_proj:output "
            "mlp.gate_proj:ffn_gate mlp.up_proj:ffn_up mlp.down_proj:ffn_down",
        )
    ],
    "t5": [
        stack("encoder.block.{}.layer.", T5_SELF + T5_FFN.format(1)),
        stack(
            "decoder.block.{}.layer.",
            T5_SELF + T5_SELF.replace("0.SelfAttention", "1.EncDecAttention") + T5_FFN.format(2),
        ),
    ],
}
# Linear layers outside the blocks; language-model heads are missing from "all-linear" on purpose.
BESIDE = {
    "distilbert": ["pre_classifier", "classifier"],
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
}


def in_blocks(name: str, *roles: str) -> list[str]:
    """Paths of the layers that play one of these roles, all of them when none is named."""
    return [
        prefix.format(block) + layer
        for prefix, layers in STACKS[name]
        for block in range(2)
        for layer, played in layers.items()
        if not roles or set(roles) & set(played)
    ]


def paths(module: nn.Module, targets, **options) -> list[str]:
    return [site.path for site in find_sites(module, targets, **options)]


def blocks_of_distilbert(targets, **options) -> str:
    found = paths(model("distilbert"), targets, **options)
    return " ".join(path.removeprefix("distilbert.transformer.layer.") for path in found)


# ------------------------------------------------------------------------------------- roles and groups


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", TINY)
def test_roles(name, role):
    expected = in_blocks(name, role)
    if expected:
        assert paths(model(name), role) == expected
    else:  # BERT has no gate
        with pytest.raises(ValueError, match=rf"{role!r} matches no layer .* Roles here: query \(\w+\), key"):
            find_sites(model(name), role)


@pytest.mark.parametrize("name", TINY)
def test_groups(name):
    assert paths(model(name), "attention") == in_blocks(name, Q, K, V, OUT)
    assert paths(model(name), "ffn") == in_blocks(name, UP, GATE, DOWN)
    assert paths(model(name), "all-linear") == in_blocks(name) + BESIDE.get(name, [])


@pytest.mark.parametrize("name", TINY)
def test_sites_know_their_roles_block_and_size(name):
    roles = {
        prefix.format(block) + layer: (played, block)
        for prefix, layers in STACKS[name]
        for block in range(2)
        for layer, played in layers.items()
    }
    for site in find_sites(model(name), "all-linear"):
        assert (site.roles, site.block) == roles.get(site.path, ((), None)), site.path
        y = site.layer(torch.zeros(1, site.in_features))
        assert y.shape[-1] == site.out_features == site.matrix().shape[0]


def test_a_fused_projection_answers_to_each_of_its_roles_once():
    assert roles_of("transformer.h.0.attn.c_attn") == (Q, K, V)
    assert roles_of("model.layers.0.self_attn.qkv_proj") == (Q, K, V)
    assert roles_of("model.layers.0.mlp.gate_up_proj") == (GATE, UP)
    for targets in ("query", "value", ["query", "key", "value"]):
        assert paths(model("gpt2"), targets) == in_blocks("gpt2", Q)


def test_the_longest_ending_decides_and_only_at_a_dot():
    assert roles_of("bert.encoder.layer.0.attention.output.dense") == (OUT,)
    assert roles_of("bert.encoder.layer.0.output.dense") == (DOWN,)
    assert roles_of("h.0.attn.c_proj") == (OUT,)
    assert roles_of("h.0.mlp.c_proj") == (DOWN,)
    assert roles_of("my_q_lin") == roles_of("layer.q_linear") == ()


def test_t5_stacks_can_be_told_apart():
    t5 = model("t5")
    cross = [path for path in in_blocks("t5", Q, K, V, OUT) if "EncDec" in path]
    assert len(cross) == 8
    assert paths(t5, "re:.*EncDecAttention.[qkvo]") == cross
    assert paths(t5, "query", exclude="encoder.*") == [p for p in in_blocks("t5", Q) if p.startswith("decoder")]
    assert paths(t5, "encoder.*.o") == [f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(2)]


# ------------------------------------------------------------- names, patterns, exclusions, block ranges


@pytest.mark.parametrize(
    ("targets", "options", "expected"),
    [
        ("q_lin", {}, "0.attention.q_lin 1.attention.q_lin"),
        ("attention.q_lin", {}, "0.attention.q_lin 1.attention.q_lin"),
        ("1.attention.q_lin", {}, "1.attention.q_lin"),
        ("distilbert.transformer.layer.0.ffn.lin1", {}, "0.ffn.lin1"),
        ("*.layer.[01].ffn.lin?", {}, "0.ffn.lin1 0.ffn.lin2 1.ffn.lin1 1.ffn.lin2"),
        ("*.0.*.[kv]_lin", {}, "0.attention.k_lin 0.attention.v_lin"),
        (r"re:.*\.1\.(ffn\.lin1|attention\.v_lin)", {}, "1.attention.v_lin 1.ffn.lin1"),
        (["v_lin", "query", "q_lin"], {"blocks": "0"}, "0.attention.q_lin 0.attention.v_lin"),
        ("q_lin", {"blocks": "0-1"}, "0.attention.q_lin 1.attention.q_lin"),
        ("q_lin", {"blocks": [-1]}, "1.attention.q_lin"),
        ("all-linear", {"blocks": [0], "exclude": "attention"}, "0.ffn.lin1 0.ffn.lin2"),
        ("attention", {"exclude": ["key", "*1.*", "out_lin"]}, "0.attention.q_lin 0.attention.v_lin"),
        ("query", {"exclude": "ffn"}, "0.attention.q_lin 1.attention.q_lin"),
        ("lin2", {"exclude": r"re:.*0\..*"}, "1.ffn.lin2"),
        (["lin1", "*word_embeddings"], {"blocks": "1"}, "1.ffn.lin1"),
    ],
)
def test_the_language(targets, options, expected):
    assert blocks_of_distilbert(targets, **options) == expected


def test_a_regular_expression_must_match_the_whole_path():
    with pytest.raises(ValueError, match="matches no layer"):
        find_sites(model("distilbert"), "re:q_lin")


def test_modules_without_a_weight_are_found_only_when_asked():
    expected = "0.ffn 1.ffn"
    assert blocks_of_distilbert("*.ffn", layers_only=False) == expected
    with pytest.raises(ValueError, match=r"layer\.0\.ffn of .*FFN, which has no weight matrix.*name the linear"):
        find_sites(model("distilbert"), "*.ffn")


def test_a_bare_layer_is_its_own_site():
    assert paths(nn.Linear(2, 3), "all-linear") == [""]
    assert paths(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "0") == ["0"]


def test_a_second_adapter_sees_the_layers_and_not_the_first():
    module = nn.ModuleDict({"peft_model": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    LoRA(r=2, target_modules=["peft_model"]).attach(module)
    assert paths(module, "re:.*", layers_only=False) == ["", "peft_model", "b"]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (
            "q_proj",
            {},
            r"'q_proj' matches no layer of DistilBertFor.*'query' projection, here named q_lin: use 'query'",
        ),
        ("qlin", {}, r"Nearest: q_lin, "),
        ("all_linear", {}, r"Nearest: all-linear"),
        ("Query", {}, r"Nearest: query"),
        ("re:.*xyz", {}, r"Layers here: classifier, k_lin, .*word_embeddings"),
        ("re:(", {}, r"'re:\(' is no regular expression: missing \)"),
        ("layer", {}, r"matches distilbert\.transformer\.layer of .*ModuleList, which has no weight matrix"),
        ("LayerNorm", {}, r"LayerNorm, which has no weight matrix"),
        ([], {}, "target_modules is empty"),
        ("", {}, "'' matches no layer"),
        (["q_lin", "vlin"], {}, r"'vlin' matches no layer.*Nearest: v_lin"),
        ("attention", {"exclude": "vlin"}, r"'vlin' leaves nothing out\. Nearest of the chosen: v_lin"),
        ("attention", {"exclude": "attention"}, r"No layer is left of target_modules=\['attention'\]"),
        ("query", {"blocks": []}, "No layer is left"),
        ("query", {"blocks": "1-2"}, r"there is no block 2; this model has 2 \(0 to 1\)"),
        ("query", {"blocks": [-3]}, r"there is no block -3"),
        ("query", {"blocks": "first"}, r"'first' is neither a number nor a range such as '2-5'"),
        (
            "classifier",
            {"avoid": ["classifier"]},
            r"'classifier' matches classifier, which train_also trains",
        ),
    ],
)
def test_errors_name_the_value_and_the_nearest(targets, options, message):
    with pytest.raises(ValueError, match=message):
        find_sites(model("distilbert"), targets, **options)


def test_blocks_of_a_model_without_any():
    with pytest.raises(ValueError, match="there is no block 0; this model has none"):
        find_sites(nn.Linear(2, 2), "all-linear", blocks=[0])


# ------------------------------------------------------------- what cannot be adapted is refused or reported


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


@pytest.mark.parametrize("targets", ["out_proj", "output", "attention", "*", ["linear1", "out_proj"]])
def test_an_attention_that_reads_weights_itself_is_refused(targets):
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.out_proj, but nn\.MultiheadAttention reads"):
        find_sites(encoder(), targets)


def test_all_linear_reports_the_attention_that_it_leaves_out():
    with pytest.warns(UserWarning, match=r"leaves out layers\.0\.self_attn\.out_proj, layers\.1\.self_attn"):
        found = paths(encoder(), "all-linear")
    assert found == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]


@functools.cache
def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )


def test_all_linear_reports_expert_weights():
    with pytest.warns(UserWarning, match=r"leaves out model\.layers\.0\.mlp\.experts\.gate_up_proj, .*3-D expert"):
        found = paths(mixtral(), "all-linear")
    assert found == [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of an attention is left out
        assert paths(mixtral(), "attention") == found


@pytest.mark.parametrize("targets", ["down_proj", "ffn_up", "ffn", "*.experts.gate_up_proj"])
def test_expert_weights_cannot_be_named(targets):
    with pytest.raises(ValueError, match=r"matches only model\.layers\.0\.mlp\.experts\.\w+ .*3-D expert weights"):
        find_sites(mixtral(), targets)


def test_a_shared_expert_does_not_hide_the_others():
    module = nn.ModuleDict({"shared": nn.ModuleDict({"down_proj": nn.Linear(4, 4)}), "experts": nn.Module()})
    module["experts"].down_proj = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.warns(UserWarning, match=r"leaves out experts\.down_proj: 3-D expert weights"):
        assert paths(module, "down_proj") == ["shared.down_proj"]


def test_class_tokens_and_kernels_are_no_experts():
    module = nn.ModuleDict({"kernel": nn.Conv1d(4, 4, 3), "head": nn.Linear(4, 4)})
    module.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    module.position_embeddings = nn.Parameter(torch.zeros(1, 9, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths(module, "all-linear") == ["head"]


@pytest.mark.parametrize("name", ["layer", "distilbert.transformer.layer"])
def test_containers_cannot_carry_an_addition(name):
    class Wraps(LoRA):
        layers_only = False

        def build(self, site):
            return nn.Identity()

    with pytest.raises(ValueError, match=r"distilbert\.transformer\.layer: a ModuleList iterates over its children"):
        Wraps(target_modules=name).attach(tiny("distilbert"))


def test_an_embedding_that_rewrites_itself_cannot_be_adapted():
    module = nn.ModuleDict({"embedding": nn.Embedding(9, 4, max_norm=1.0)})
    with pytest.raises(TypeError, match="max_norm rewrites its own weight as it runs and cannot be adapted"):
        LoRA(r=2, target_modules="embedding").attach(module)


# -------------------------------------------------------------------------------------------- train_also


NORM = "distilbert.embeddings.LayerNorm"


@pytest.mark.parametrize(
    ("patterns", "names", "roots"),
    [
        (["classifier"], "classifier.bias classifier.weight", "classifier"),
        (["classifier.bias"], "classifier.bias", "classifier.bias"),
        (["*classifier.bias"], "classifier.bias pre_classifier.bias", "pre_classifier.bias classifier.bias"),
        (
            [r"re:classifier\..*"],
            "classifier.bias classifier.weight",
            "classifier.weight classifier.bias classifier",
        ),
        (["*.embeddings.Layer*"], f"{NORM}.bias {NORM}.weight", NORM),
        ([], "", ""),
    ],
)
def test_parameters(patterns, names, roots):
    match = find_parameters(model("distilbert"), patterns)
    assert sorted(match.names) == names.split()
    assert match.roots == tuple(roots.split())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "clasifier",
            r"'clasifier' names no parameter of DistilBertFor.*Nearest: classifier, pre_classifier",
        ),
        ("LayerNrm", "Nearest: LayerNorm"),
        ("dropout", "names no parameter"),
        ("", "'' names no parameter"),
        ("re:[", "is no regular expression"),
    ],
)
def test_parameter_errors(pattern, message):
    with pytest.raises(ValueError, match=message):
        find_parameters(model("distilbert"), ["classifier", pattern])


def test_a_tied_parameter_has_one_name_and_two_places():
    gpt2 = model("gpt2")
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    for pattern, roots in (
        ("lm_head", {"lm_head", "transformer.wte"}),
        ("wte", {"transformer.wte", "lm_head"}),
    ):
        match = find_parameters(gpt2, [pattern])
        assert match.names == {"transformer.wte.weight"}
        assert set(match.roots) == roots


@pytest.mark.parametrize("head", ["classifier", "classifier.weight", r"re:classifier\..*"])
def test_a_head_that_trains_is_never_adapted(head):
    module = tiny("distilbert")
    adapter = LoRA(r=2, target_modules="all-linear", train_also=[head]).attach(module)
    assert list(adapter.sites) == [*in_blocks("distilbert"), "pre_classifier"]
    assert "classifier.weight" in adapter.base


def test_biases_that_train_leave_their_layers_adaptable():
    module = tiny("distilbert")
    adapter = LoRA(r=2, train_also=["q_lin.bias"]).attach(module)
    assert list(adapter.sites) == in_blocks("distilbert", Q, K, V, OUT)
    assert adapter.base == [f"{path}.bias" for path in in_blocks("distilbert", Q)]


def test_a_lightning_modules_own_train_also_is_added():
    module = tiny("distilbert")
    module.train_also = ["classifier"]
    adapter = LoRA(r=2, target_modules=["all-linear"], train_also=["pre_classifier"]).attach(module)
    assert list(adapter.sites) == in_blocks("distilbert")
    assert {name.partition(".")[0] for name in adapter.base} == {"classifier", "pre_classifier"}


def test_groups_cover_the_roles():
    assert {role for roles in GROUPS.values() for role in roles} == set(ROLES)
