"""How logits become weights: over keys, over queries and keys, or by sweeps over both."""

from bayesattn.normalizations.columns import (
    DoublyNormalized,
    HybridNormalized,
    InterpolatedNormalized,
    Sinkhorn,
    Softmax,
    doubly_normalized,
)
from bayesattn.normalizations.prefix import CausalDoublyNormalized
from bayesattn.normalizations.protocol import Component, LogSums, Normalization

__all__ = [
    "CausalDoublyNormalized",
    "Component",
    "DoublyNormalized",
    "HybridNormalized",
    "InterpolatedNormalized",
    "LogSums",
    "Normalization",
    "Sinkhorn",
    "Softmax",
    "doubly_normalized",
]
