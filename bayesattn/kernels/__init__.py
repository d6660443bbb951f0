"""Positive-definite kernels between particles in Gram form, with repulsion and noise."""

from bayesattn.kernels.blocks import Blocks, PerSite
from bayesattn.kernels.distances import median_squared_distance, squared_distances
from bayesattn.kernels.feature_maps import FeatureMap, FeatureTerms
from bayesattn.kernels.frequency_sets import FrequencySets, normal_probes
from bayesattn.kernels.linear import Linear
from bayesattn.kernels.preconditioned import Preconditioned
from bayesattn.kernels.protocol import Kernel, KernelTerms, ScalarKernel, SiteKernel, Terms
from bayesattn.kernels.pullback import Equivariant, Pullback, reads_coordinates
from bayesattn.kernels.radial import IMQ, RBF, pairwise_repulsion
from bayesattn.kernels.separate import Separate
from bayesattn.kernels.sums import Sum

__all__ = [
    "IMQ",
    "RBF",
    "Blocks",
    "Equivariant",
    "FeatureMap",
    "FeatureTerms",
    "FrequencySets",
    "Kernel",
    "KernelTerms",
    "Linear",
    "PerSite",
    "Preconditioned",
    "Pullback",
    "ScalarKernel",
    "Separate",
    "SiteKernel",
    "Sum",
    "Terms",
    "median_squared_distance",
    "normal_probes",
    "pairwise_repulsion",
    "reads_coordinates",
    "squared_distances",
]
