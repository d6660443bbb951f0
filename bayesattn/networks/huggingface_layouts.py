"""Where Hugging Face's attention layers keep their heads, by the names of their classes.

Two layers differ in the names of their parts, and in whether a projection is a ``Linear``, whose
rows belong to heads, or GPT-2's ``Conv1D``, whose columns do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from bayesattn.networks.head_slices import HeadLayout, HeadSlice, ProjectionSlices
from bayesattn.networks.shared_config import SHARED
from bayesattn.networks.torch_layouts import shared_layout

__all__ = ["HUGGING_FACE", "LINEAR_NAMES", "LayerNames", "present_names"]


class LayerNames(NamedTuple):
    """Names of a layer's linear maps, and of the module that has those of queries and keys."""

    query: str
    key: str
    value: str
    output: str | None = None
    inner: str = ""


def present_names(module: nn.Module, choices: tuple[LayerNames, ...]) -> LayerNames | None:
    """Return the first names that a layer has."""
    present = {name for name, _ in module.named_modules()}
    return next((names for names in choices if {names.query, names.key} <= present), None)


def _linear_layout(module: nn.Module, *, choices: tuple[LayerNames, ...]) -> HeadLayout | None:
    """Heads of a layer with a linear map for each role, under the first names that it has."""
    names = present_names(module, choices)
    if names is None:
        return None
    inner: Any = module.get_submodule(names.inner)
    width = getattr(inner, "head_dim", None) or inner.attention_head_size
    layout, roles = HeadLayout(), ("query", "key", "value")
    shared = getattr(inner, SHARED, None)
    if shared is not None:
        layout |= shared_layout(f"{names.inner}.{SHARED}".lstrip("."), shared)
        roles = ("value",)
    for role in roles:
        name = getattr(names, role)
        part: Any = module.get_submodule(name)
        weight = HeadSlice(f"{name}.weight", 0, 0, width, part.out_features // width)
        bias = None if part.bias is None else weight._replace(parameter=f"{name}.bias")
        layout[role] = ProjectionSlices(weight, bias)
    if names.output is not None:
        heads = layout["query"].weight.num_heads
        layout["output"] = ProjectionSlices(HeadSlice(f"{names.output}.weight", 1, 0, width, heads))
    return layout


def _gpt2_layout(module: Any) -> HeadLayout:
    """Heads of a layer that has query, key and value in one map; or only the last two."""
    places = {"query": ("c_attn", 0), "key": ("c_attn", 1), "value": ("c_attn", 2)}
    if module.is_cross_attention:
        places = {"query": ("q_attn", 0), "key": ("c_attn", 0), "value": ("c_attn", 1)}
    heads, width = module.num_heads, module.head_dim
    layout = HeadLayout()
    if getattr(module, SHARED, None) is not None:
        layout |= shared_layout(SHARED, getattr(module, SHARED))
        places = {"value": ("c_attn.value", 0)}
    for role, (name, place) in places.items():
        weight = HeadSlice(f"{name}.weight", 1, place * module.embed_dim, width, heads)
        layout[role] = ProjectionSlices(weight, weight._replace(parameter=f"{name}.bias", axis=0))
    layout["output"] = ProjectionSlices(HeadSlice("c_proj.weight", 0, 0, width, heads))
    return layout


# The block around BERT's attention has the output projection, so it is the layer.
_BERT_BLOCK = (LayerNames("self.query", "self.key", "self.value", "output.dense", "self"),)
_BERT = (LayerNames("query", "key", "value"),)
_ALBERT = (LayerNames("query", "key", "value", "dense"),)
_DISTILBERT = (LayerNames("q_lin", "k_lin", "v_lin", "out_lin"),)
_LLAMA = (LayerNames("q_proj", "k_proj", "v_proj", "o_proj"),)
_EARLY_VIT = LayerNames(
    "attention.query", "attention.key", "attention.value", "output.dense", "attention"
)

# Layers with a linear map for each role.
LINEAR_NAMES: dict[str, tuple[LayerNames, ...]] = {
    "transformers.models.albert.modeling_albert.AlbertAttention": _ALBERT,
    "transformers.models.bert.modeling_bert.BertAttention": _BERT_BLOCK,
    "transformers.models.bert.modeling_bert.BertSelfAttention": _BERT,
    "transformers.models.bert.modeling_bert.BertCrossAttention": _BERT,
    "transformers.models.roberta.modeling_roberta.RobertaAttention": _BERT_BLOCK,
    "transformers.models.roberta.modeling_roberta.RobertaSelfAttention": _BERT,
    "transformers.models.roberta.modeling_roberta.RobertaCrossAttention": _BERT,
    "transformers.models.vit.modeling_vit.ViTAttention": (*_LLAMA, _EARLY_VIT),
    "transformers.models.vit.modeling_vit.ViTSelfAttention": _BERT,
    "transformers.models.distilbert.modeling_distilbert.DistilBertSelfAttention": _DISTILBERT,
    "transformers.models.llama.modeling_llama.LlamaAttention": _LLAMA,
}

HUGGING_FACE: dict[str, Callable[[Any], HeadLayout | None]] = {
    **{name: partial(_linear_layout, choices=choices) for name, choices in LINEAR_NAMES.items()},
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": _gpt2_layout,
}
