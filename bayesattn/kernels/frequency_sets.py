r"""Sets of frequencies as the kernels that they make: features that know no order and no signs.

.. math:: f(W)_{hb} = \kappa_{W_h}(u_b) = \frac1M \sum_m \cos(2 \pi\, w_{hm} \cdot u_b)

The features of a set are its mean embedding at probes :math:`u_b`: the values, at these lags, of
the random-feature kernel that it makes.

Source:
    Muandet et al. (2017), Kernel mean embedding of distributions, arXiv:1605.09522, for embeddings
    of sets. As features of particles: ours.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_count
from bayesattn.kernels.bandwidths import Number

__all__ = ["FrequencySets", "FrequencyTerms", "normal_probes"]


def normal_probes(
    num_probes: int, dim: int, *, scale: Number | Tensor = 1.0, seed: int = 0
) -> Float[Tensor, "probe dim"]:
    """Lags drawn from a normal distribution, the same for equal arguments.

    Args:
        num_probes: How many.
        dim: Their width, that of one frequency.
        scale: Standard deviation, such as that of lags between the data; one for all coordinates,
            or one for each.
        seed: Of the draw.
    """
    for name, size in {"num_probes": num_probes, "dim": dim}.items():
        check_count(name, size)
    generator = torch.Generator().manual_seed(seed)
    # In double precision, so that a seed means the same lags in any type.
    normal = torch.randn(num_probes, dim, generator=generator, dtype=torch.float64, device="cpu")
    return normal * torch.as_tensor(scale, dtype=normal.dtype, device="cpu")


@dataclass(frozen=True)
class FrequencySets:
    r"""The map from particles "(set frequency dim)" to kernel values "(set probe)".

    Particles are alike to it that differ in the order of the frequencies within sets or in their
    signs: that make the same kernels at the probes. The sets themselves, up to order and signs,
    come with ever more probes; fewer than frequencies times dim never determine them. On a line
    the probes :math:`u, 2u, \ldots, Mu` do, for M frequencies below :math:`1 / (2u)`: cosines of
    multiples are polynomials, whose means are power sums.

    Probes far beyond what frequencies turn in see noise, and those far within see all alike: best
    are lags such as those between the data.

    Args:
        num_sets: Sets of a particle, such as heads, which are told apart.
        dim: Width of one frequency.
        probes: Lags :math:`u_b`, "probe dim"; 32 of :func:`normal_probes` by default, which suit
            data of unit scale.

    Raises:
        ValueError: If a size is not positive, or probes are not of this width.
    """

    num_sets: int
    dim: int
    probes: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("num_sets", "dim"):
            check_count(name, getattr(self, name))
        if self.probes is None:
            object.__setattr__(self, "probes", normal_probes(32, self.dim))
        assert self.probes is not None
        shape = tuple(self.probes.shape)
        if len(shape) != 2 or shape[0] == 0 or shape[1] != self.dim:
            raise ValueError(
                f"FrequencySets probes: expected at least one of width {self.dim}, got shape "
                f"{shape}"
            )

    def __call__(self, particles: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch feature"]:
        """Values of the kernel of each set at the probes, of each particle alone.

        Raises:
            ValueError: If particles are not made of such sets.
        """
        return self._angles(particles).cos().mean(-2).flatten(-2)

    def at(self, particles: Float[Tensor, "*batch particle dim"]) -> "FrequencyTerms":
        """The features and their derivatives at one cloud of particles.

        Raises:
            ValueError: If particles are not made of such sets.
        """
        angles = self._angles(particles)
        slopes = angles.sin() * (-2 * math.pi / angles.shape[-2])
        features = angles.cos().mean(-2).flatten(-2)
        return FrequencyTerms(features, slopes, self._probes_like(particles))

    def _angles(self, particles: Tensor) -> Float[Tensor, "*batch set frequency probe"]:
        width = self.num_sets * self.dim
        if particles.shape[-1] == 0 or particles.shape[-1] % width:
            raise ValueError(
                f"FrequencySets: expected particles of {self.num_sets} equal sets of frequencies "
                f"of width {self.dim}, so a multiple of {width}, got dimension "
                f"{particles.shape[-1]}"
            )
        frequencies = particles.unflatten(-1, (self.num_sets, -1, self.dim))
        return 2 * math.pi * (frequencies @ self._probes_like(particles).mT)

    def _probes_like(self, particles: Tensor) -> Float[Tensor, "probe dim"]:
        assert self.probes is not None
        return self.probes.detach().to(particles)


class FrequencyTerms(NamedTuple):
    """Sets of frequencies at one cloud of particles, their derivatives in closed form.

    Jacobians are products of slopes and probes; they are never held.

    Attributes:
        features: Kernel values, "(set probe)".
        slopes: Of each frequency's share in a feature, by its product with the probe.
        probes: Lags.
    """

    features: Float[Tensor, "*batch particle feature"]
    slopes: Float[Tensor, "*batch particle set frequency probe"]
    probes: Float[Tensor, "probe dim"]

    def laplacian(self) -> Float[Tensor, "*batch particle feature"]:
        """Second derivatives, which of a cosine are multiples of itself."""
        rates = (-4 * math.pi**2) * self.probes.square().sum(-1)
        return (self._by_set(self.features) * rates).flatten(-2)

    def push(
        self, vectors: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle feature"]:
        """How the features of each particle change along a vector of its own: J_i v_i."""
        moved = vectors.unflatten(-1, (*self.slopes.shape[-3:-1], -1)) @ self.probes.mT
        return (moved * self.slopes).sum(-2).flatten(-2)

    def pull(
        self, covectors: Float[Tensor, "*batch particle feature"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """The gradient by each particle of its features' product with covectors: J_iᵀ c_i."""
        weighted = self._by_set(covectors)[..., None, :] * self.slopes
        return (weighted @ self.probes).flatten(-3)

    def gather(
        self, covectors: Float[Tensor, "*batch row particle feature"]
    ) -> Float[Tensor, "*batch row dim"]:
        """Sum over j of J_jᵀ c_ij."""
        pairs = self._by_set(covectors)
        weighted = torch.einsum("...ijhb,...jhmb->...ihmb", pairs, self.slopes)
        return (weighted @ self.probes).flatten(-3)

    def gather_pushed(
        self, covectors: Float[Tensor, "*batch row particle feature"]
    ) -> Float[Tensor, "*batch row feature"]:
        """Sum over j of J_j J_jᵀ c_ij."""
        metric = (self.slopes.mT @ self.slopes) * (self.probes @ self.probes.mT)
        pairs = self._by_set(covectors)
        return torch.einsum("...ijhb,...jhbc->...ihc", pairs, metric).flatten(-2)

    def _by_set(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.slopes.shape[-3], -1))
