"""Where PyTorch's multi-head attention, and ours, keep their heads."""

from torch import nn

from bayesattn.networks.head_slices import HeadLayout, HeadSlice, ProjectionSlices
from bayesattn.shared_projections import SharedProjections
from bayesattn.structured_pooling import StructuredSelfAttention

__all__ = ["multihead_layout", "pooling_layout", "shared_layout"]


def multihead_layout(module: nn.MultiheadAttention) -> HeadLayout:
    """Heads of a layer with its projections in one parameter or in three, or with shared ones."""
    heads, width = module.num_heads, module.head_dim
    shared = getattr(module, "projections", None)
    if shared is not None:
        layout = shared_layout("projections", shared)
        bias = None
        if module.v_proj_bias is not None:
            bias = HeadSlice("v_proj_bias", 0, 0, width, heads)
        layout["value"] = ProjectionSlices(HeadSlice("v_proj_weight", 0, 0, width, heads), bias)
        layout["output"] = ProjectionSlices(HeadSlice("out_proj.weight", 1, 0, width, heads))
        return layout
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


def shared_layout(name: str, shared: SharedProjections) -> HeadLayout:
    """What heads that share their projections have of their own: mixing, and a content vector."""
    mixing = HeadSlice(f"{name}.mixing", 0, 0, 1, shared.num_heads)
    content = (
        None if shared.key_content is None else mixing._replace(parameter=f"{name}.key_content")
    )
    return HeadLayout(query=ProjectionSlices(mixing, content))


def pooling_layout(module: StructuredSelfAttention) -> HeadLayout:
    """Heads of structured pooling, which are its queries themselves."""
    return HeadLayout(query=ProjectionSlices(HeadSlice("query_weight", 0, 0, 1, module.num_heads)))
