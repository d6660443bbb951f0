"""Divergences between two point clouds, such as the queries and the keys of an attention layer."""

from bayesattn.divergences.energy import Energy, energy_distance
from bayesattn.divergences.kernel_discrepancy import MMD, squared_mmd
from bayesattn.divergences.point_clouds import Divergence, PointClouds, Weights, weighted_clouds
from bayesattn.divergences.sliced import SlicedWasserstein, sliced_wasserstein

__all__ = [
    "MMD",
    "Divergence",
    "Energy",
    "PointClouds",
    "SlicedWasserstein",
    "Weights",
    "energy_distance",
    "sliced_wasserstein",
    "squared_mmd",
    "weighted_clouds",
]
