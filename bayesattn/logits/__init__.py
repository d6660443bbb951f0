"""Logits of attention: the scaled dot product and what may stand in its place."""

from bayesattn.logits.additive import AdditiveLogits
from bayesattn.logits.dot_product import DotProduct
from bayesattn.logits.gaussian import GaussianLogits
from bayesattn.logits.magnitudes import Magnitude
from bayesattn.logits.protocol import EdgeLogits, Logits, ReducedLogits
from bayesattn.logits.rbf_magnitude import RBFMagnitude

__all__ = [
    "AdditiveLogits",
    "DotProduct",
    "EdgeLogits",
    "GaussianLogits",
    "Logits",
    "Magnitude",
    "RBFMagnitude",
    "ReducedLogits",
]
