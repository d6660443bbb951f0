r"""The square of a kernel of random Fourier features, as logits see it.

.. math:: \log(\hat k_{ij}^2 + \epsilon), \qquad \hat k_{ij} = \phi(q_i) \cdot \phi(k_j)

and, anchored at the softmax,

.. math:: \log g_{ij}^2 + \log \frac{\hat c_{ij}^2 + \epsilon}{g_{ij}^2 + \epsilon}, \qquad
    \hat c = g + \hat k - \hat k_0, \qquad g_{ij} = e^{-\lVert q_i - k_j \rVert^2 / 4 \sqrt d}

where :math:`\hat k_0` are the features of frequencies from the density whose kernel is g. They are
a control variate of stationary kernels: where frequencies are still these, the kernel is the
softmax's without any error of features, and near there the errors of the two all but cancel. Of
pairs of frequencies they are an anchor alone, for the mean of :math:`\hat k_0` is another. After
training an anchored square need not be positive definite.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147, for the squared features, with
    :math:`\epsilon = 10^{-5}`. The control variate and the unbiased square are ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.contraction import inner_products
from bayesattn.edge_contractions import edge_products
from bayesattn.kernels.distances import local_distances
from bayesattn.logits.kernel_logits import ends_of_edges, start_rate
from bayesattn.logits.spectral_features import (
    fourier_features,
    log_of_square,
    square_features,
    unbiased_square,
)

__all__ = ["SQUARES", "Frequencies", "SpectralKernel", "softmax_frequency_scale"]

SQUARES = ("anchored", "plain", "unbiased")


def softmax_frequency_scale(dim: int) -> float:
    r"""Standard deviation of frequencies whose squared kernel is the softmax's.

    .. math:: s^2 = \frac{1}{8 \pi^2 \sqrt d}
    """
    return start_rate(dim) ** 0.5 / (8**0.5 * math.pi)


class Frequencies(NamedTuple):
    """Of random Fourier features, in cycles for a unit of queries and keys.

    Attributes:
        first: Of all features, if the kernel is stationary.
        second: As many others, if it is not.
    """

    first: Float[Tensor, "*_batch head frequency dim"]
    second: Float[Tensor, "*_batch head frequency dim"] | None = None

    def detached(self) -> "Frequencies":
        """A copy that stands apart from any graph of gradients."""
        second = None if self.second is None else self.second.detach().clone()
        return Frequencies(self.first.detach().clone(), second)

    def of_sequences(self, rows: slice) -> "Frequencies":
        """Those of some sequences; of all, where they share theirs."""
        if self.first.ndim < 4:
            return self
        second = None if self.second is None else self.second[rows]
        return Frequencies(self.first[rows], second)

    def features(
        self, part: Float[Tensor, "*_batch position dim"]
    ) -> Float[Tensor, "*_batch position feature"]:
        """Features of queries or keys, in their type."""
        second = None if self.second is None else self.second.to(part.dtype)
        return fourier_features(part, self.first.to(part.dtype), second)


@dataclass(frozen=True, eq=False)
class SpectralKernel:
    """The squared kernel of given frequencies.

    Attributes:
        frequencies: In force; one sequence may have others than another.
        anchor: As many that the softmax's density gave, of which those in force were made; None
            where the square is not anchored.
        square: "anchored", "plain" or "unbiased".
        floor: Epsilon.
    """

    frequencies: Frequencies
    anchor: Frequencies | None
    square: str
    floor: float

    def detached(self) -> "SpectralKernel":
        """A copy that stands apart from any graph of gradients."""
        anchor = None if self.anchor is None else self.anchor.detached()
        return replace(self, frequencies=self.frequencies.detached(), anchor=anchor)

    def of_sequences(self, rows: slice) -> "SpectralKernel":
        """The kernel of some sequences."""
        anchor = None if self.anchor is None else self.anchor.of_sequences(rows)
        return replace(self, frequencies=self.frequencies.of_sequences(rows), anchor=anchor)

    def similarity(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """The kernel of all pairs before it is squared, with its sign."""
        similarity = inner_products(self._asking(query), self._asked(key))
        if self.anchor is None:
            return similarity
        return similarity + _half_log_softmax(local_distances(query, key), query).exp()

    def log_kernel(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """Logarithm of the square of all pairs."""
        return self._log_square(query, key, inner_products, local_distances)

    def log_kernel_of_edges(
        self,
        query: Float[Tensor, "head query dim"],
        key: Float[Tensor, "head key dim"],
        edges: Int[Tensor, "2 edge"],
    ) -> Float[Tensor, "head edge"]:
        """Logarithm of the square of the pairs that edges join.

        Nodes have features, not edges, of which there are more.
        """

        def products(asking: Tensor, asked: Tensor) -> Tensor:
            return edge_products(asking, asked, edges)

        def distances(asking: Tensor, asked: Tensor) -> Tensor:
            at_target, at_source = ends_of_edges(asking, asked, edges)
            return (at_target - at_source).square().sum(-1)

        return self._log_square(query, key, products, distances)

    def _log_square(
        self,
        query: Tensor,
        key: Tensor,
        products: Callable[[Tensor, Tensor], Tensor],
        distances: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Of all pairs, or of those that edges join, as products and distances are."""
        asking, asked = self._asking(query), self._asked(key)
        similarity = products(asking, asked)
        if self.square == "anchored":
            half = _half_log_softmax(distances(query, key), query)
            start = half.exp()
            changed = log_of_square((start + similarity).square(), self.floor)
            return 2 * half + changed - log_of_square(start.square(), self.floor)
        if self.square == "plain":
            return log_of_square(similarity.square(), self.floor)
        squares = products(square_features(asking), square_features(asked))
        num_frequencies = self.frequencies.first.shape[-2]
        return log_of_square(unbiased_square(similarity, squares, num_frequencies), self.floor)

    def _asking(self, query: Tensor) -> Tensor:
        features = self.frequencies.features(query)
        if self.anchor is None:
            return features
        return torch.cat([features, -self.anchor.features(query)], -1)

    def _asked(self, key: Tensor) -> Tensor:
        features = self.frequencies.features(key)
        if self.anchor is None:
            return features
        return torch.cat([features, self.anchor.features(key)], -1)


def _half_log_softmax(distances: Tensor, like: Tensor) -> Tensor:
    """Half the logarithm of the softmax's kernel."""
    return -start_rate(like.shape[-1]) * distances / 4
