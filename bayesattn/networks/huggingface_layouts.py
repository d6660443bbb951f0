"""Where Hugging Face's attention layers keep their heads, by the names of their classes.

Two layers differ in the names of their parts, and in whether a projection is a ``Linear``, whose
rows belong to heads, or GPT-2's ``Conv1D``, whose columns do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from bayesattn.networks.head_slices import HeadLayout, HeadSlice, ProjectionSlices

__all__ = ["HUGGING_FACE"]


class _Names(NamedTuple):
    """Names of a layer's linear maps, and of the module that knows the heads' width."""

    query: str
    key: str
    value: str
    output: str | None = None
    inner: str = ""


def _linear_layout(module: nn.Module, *, choices: tuple[_Names, ...]) -> HeadLayout | None:
    """Heads of a layer with a linear map for each role, under the first names that it has."""
    present = {name for name, _ in module.named_modules()}
    names = next((names for names in choices if {names.query, names.key} <= present), None)
    if names is None:
        return None
    inner: Any = module.get_submodule(names.inner)
    width = getattr(inner, "head_dim", None) or inner.attention_head_size
    layout = HeadLayout()
    for role in ("query", "key", "value"):
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
    for role, (name, place) in places.items():
        weight = HeadSlice(f"{name}.weight", 1, place * module.embed_dim, width, heads)
        layout[role] = ProjectionSlices(weight, weight._replace(parameter=f"{name}.bias", axis=0))
    layout["output"] = ProjectionSlices(HeadSlice("c_proj.weight", 0, 0, width, heads))
    return layout


def _linear(*choices: _Names) -> Callable[[nn.Module], HeadLayout | None]:
    return partial(_linear_layout, choices=choices)


# The block around BERT's attention has the output projection, so it is the layer.
_BERT_BLOCK = _linear(_Names("self.query", "self.key", "self.value", "output.dense", "self"))
_BERT = _linear(_Names("query", "key", "value"))
_LLAMA = _Names("q_proj", "k_proj", "v_proj", "o_proj")
_EARLY_VIT = _Names(
    "attention.query", "attention.key", "attention.value", "output.dense", "attention"
)

HUGGING_FACE: dict[str, Callable[[Any], HeadLayout | None]] = {
    f"transformers.models.{name}": describe
    for name, describe in {
        "albert.modeling_albert.AlbertAttention": _linear(_Names("query", "key", "value", "dense")),
        "bert.modeling_bert.BertAttention": _BERT_BLOCK,
        "bert.modeling_bert.BertSelfAttention": _BERT,
        "bert.modeling_bert.BertCrossAttention": _BERT,
        "roberta.modeling_roberta.RobertaAttention": _BERT_BLOCK,
        "roberta.modeling_roberta.RobertaSelfAttention": _BERT,
        "roberta.modeling_roberta.RobertaCrossAttention": _BERT,
        "vit.modeling_vit.ViTAttention": _linear(_LLAMA, _EARLY_VIT),
        "vit.modeling_vit.ViTSelfAttention": _BERT,
        "distilbert.modeling_distilbert.DistilBertSelfAttention": _linear(
            _Names("q_lin", "k_lin", "v_lin", "out_lin")
        ),
        "gpt2.modeling_gpt2.GPT2Attention": _gpt2_layout,
        "llama.modeling_llama.LlamaAttention": _linear(_LLAMA),
    }.items()
}
