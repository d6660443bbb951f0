"""Where PyTorch's multi-head attention, and ours, keep their heads."""

from torch import nn

from bayesattn.networks.head_slices import HeadLayout, HeadSlice, ProjectionSlices
from bayesattn.structured_pooling import StructuredSelfAttention

__all__ = ["multihead_layout", "pooling_layout"]


def multihead_layout(module: nn.MultiheadAttention) -> HeadLayout:
    """Heads of a layer with its projections in one parameter or in three."""
    heads, width = module.num_heads, module.head_dim
    separate = module.in_proj_weight is None
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    layout = HeadLayout()
    for place, role in enumerate(("query", "key", "value")):
        start = place * module.embed_dim
        name, weight_start = (names[place], 0) if separate else ("in_proj_weight", start)
        bias = None
        if module.in_proj_bias is not None:
            bias = HeadSlice("in_proj_bias", 0, start, width, heads)
        layout[role] = ProjectionSlices(HeadSlice(name, 0, weight_start, width, heads), bias)
    layout["output"] = ProjectionSlices(HeadSlice("out_proj.weight", 1, 0, width, heads))
    return layout


def pooling_layout(module: StructuredSelfAttention) -> HeadLayout:
    """Heads of structured pooling, which are its queries themselves."""
    return HeadLayout(query=ProjectionSlices(HeadSlice("query_weight", 0, 0, 1, module.num_heads)))
