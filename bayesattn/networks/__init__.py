"""Attention layers of any network: found, and their heads seen as particles."""

from bayesattn.networks.head_slices import ROLES, HeadLayout, HeadSlice, ProjectionSlices
from bayesattn.networks.layers import AttentionLayer, attention_layers, head_partitions
from bayesattn.networks.partition import HeadPartition
from bayesattn.networks.recognition import register_attention_layer

__all__ = [
    "ROLES",
    "AttentionLayer",
    "HeadLayout",
    "HeadPartition",
    "HeadSlice",
    "ProjectionSlices",
    "attention_layers",
    "head_partitions",
    "register_attention_layer",
]
