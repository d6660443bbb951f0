"""Attention layers of any network: found, their heads seen as particles, their calls recorded."""

from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.circuits import Circuits, circuit_products, head_circuits
from bayesattn.networks.head_slices import ROLES, HeadLayout, HeadSlice, ProjectionSlices
from bayesattn.networks.layer_inputs import InputMoments, input_moments
from bayesattn.networks.layers import AttentionLayer, attention_layers, head_partitions
from bayesattn.networks.observation import ObservedCalls, PlacedCall
from bayesattn.networks.partition import HeadPartition
from bayesattn.networks.projection_exchange import Exchange, HeadProjections
from bayesattn.networks.recognition import register_attention_layer
from bayesattn.networks.stacked_heads import HeadBatch, head_batches
from bayesattn.networks.taps import attention_calls, watch_attention

__all__ = [
    "ROLES",
    "AttentionCall",
    "AttentionLayer",
    "Circuits",
    "Exchange",
    "HeadBatch",
    "HeadLayout",
    "HeadPartition",
    "HeadProjections",
    "HeadSlice",
    "InputMoments",
    "ObservedCalls",
    "PlacedCall",
    "ProjectionSlices",
    "attention_calls",
    "attention_layers",
    "circuit_products",
    "head_batches",
    "head_circuits",
    "head_partitions",
    "input_moments",
    "register_attention_layer",
    "watch_attention",
]
