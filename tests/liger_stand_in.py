"""A package in the place of Liger's: what it binds to a Llama, from code that a test gives."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from transformers.models.llama import modeling_llama

GPU = torch.device("cuda")
"""Where the models are said to run; nothing here does."""

MONKEY_PATCH = """
from types import MethodType

from liger_kernel.transformers.rms_norm import LigerSwiGLUMLP, LigerRMSNorm, lce_forward, rope

def bind(layer, name, function):
    layer.__dict__[name] = MethodType(function, layer)

def apply(rope_=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
    assert not cross_entropy
    from transformers.models.llama import modeling_llama
    modeling_llama.apply_rotary_pos_emb = rope
    modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP = LigerRMSNorm, LigerSwiGLUMLP
    if fused_linear_cross_entropy:
        model.forward = MethodType(lce_forward, model)
    for layer in model.model.layers:
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            kind = LigerSwiGLUMLP if name == "mlp" else LigerRMSNorm
            bind(getattr(layer, name), "forward", kind.forward)
            bind(getattr(layer, name), "_get_name", lambda self: "Liger")

MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply, "olmo2": apply}
"""


def install(monkeypatch, kernels: str) -> ModuleType:
    """Puts the package in the place of Liger; returns the module that the code of the kernels has become.

    It must define what `MONKEY_PATCH` imports, and `LigerSiLUMulFunction`.
    """
    for name, code in (("", ""), (".transformers", ""), (".transformers.rms_norm", kernels)):
        module = ModuleType(f"liger_kernel{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        exec(code, module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)
    last = ModuleType("liger_kernel.transformers.monkey_patch")
    exec(MONKEY_PATCH, last.__dict__)
    monkeypatch.setitem(sys.modules, last.__name__, last)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    return module
