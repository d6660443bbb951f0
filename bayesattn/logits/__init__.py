"""Logits of attention: the scaled dot product and what may stand in its place."""

from bayesattn.logits.additive import AdditiveLogits
from bayesattn.logits.dot_product import DotProduct
from bayesattn.logits.gaussian import GaussianLogits
from bayesattn.logits.implicit import ImplicitSpectralLogits
from bayesattn.logits.kernel_logits import KernelLogits
from bayesattn.logits.magnitudes import Magnitude
from bayesattn.logits.positive_features import PositiveFeatures
from bayesattn.logits.protocol import (
    ConditionalLogits,
    EdgeLogits,
    FactoredLogits,
    Logits,
    ReducedLogits,
)
from bayesattn.logits.radial_kernels import Matern, RationalQuadratic
from bayesattn.logits.rbf_magnitude import RBFMagnitude
from bayesattn.logits.schoenberg import SchoenbergMixture
from bayesattn.logits.spectral import SpectralLogits
from bayesattn.logits.spectral_mixture import SpectralMixture

__all__ = [
    "AdditiveLogits",
    "ConditionalLogits",
    "DotProduct",
    "EdgeLogits",
    "FactoredLogits",
    "GaussianLogits",
    "ImplicitSpectralLogits",
    "KernelLogits",
    "Logits",
    "Magnitude",
    "Matern",
    "PositiveFeatures",
    "RBFMagnitude",
    "RationalQuadratic",
    "ReducedLogits",
    "SchoenbergMixture",
    "SpectralLogits",
    "SpectralMixture",
]
