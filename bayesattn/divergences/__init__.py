"""Divergences between two point clouds, such as the queries and the keys of an attention layer."""

from bayesattn.divergences.adversary import Adversarial
from bayesattn.divergences.bidirectional_transport import (
    ConditionalTransport,
    conditional_transport,
)
from bayesattn.divergences.energy import Energy, energy_distance
from bayesattn.divergences.entropic import (
    EntropicDuals,
    EntropicTransport,
    SinkhornDivergence,
    entropic_duals,
    entropic_transport,
    sinkhorn_divergence,
)
from bayesattn.divergences.gaussian_moments import (
    BuresWasserstein,
    MomentDistance,
    bures_wasserstein,
    moment_distance,
)
from bayesattn.divergences.kernel_discrepancy import MMD, squared_mmd
from bayesattn.divergences.permutation import PermutationTest, permutation_test
from bayesattn.divergences.point_clouds import Divergence, PointClouds, Weights, weighted_clouds
from bayesattn.divergences.sliced import SlicedWasserstein, sliced_wasserstein
from bayesattn.divergences.standardization import Balanced, ScaleFree, Whitened

__all__ = [
    "MMD",
    "Adversarial",
    "Balanced",
    "BuresWasserstein",
    "ConditionalTransport",
    "Divergence",
    "Energy",
    "EntropicDuals",
    "EntropicTransport",
    "MomentDistance",
    "PermutationTest",
    "PointClouds",
    "ScaleFree",
    "SinkhornDivergence",
    "SlicedWasserstein",
    "Weights",
    "Whitened",
    "bures_wasserstein",
    "conditional_transport",
    "energy_distance",
    "entropic_duals",
    "entropic_transport",
    "moment_distance",
    "permutation_test",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "squared_mmd",
    "weighted_clouds",
]
