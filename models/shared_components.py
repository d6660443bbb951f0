r"""How many components do heads share? A canonical polyadic decomposition with an inferred width.

.. math:: a_r \sim N(0, s_r^2 I), \quad b_r \sim N(0, s_r^2 I), \quad m_r \sim N(0, s_r^2 I), \qquad
    W_{Q,h}^\top W_{K,h} \sim N\Bigl(\sum_r m_{rh}\, a_r b_r^\top,\; \sigma^2\Bigr)

The products of a trained layer's heads are known without noise, so :math:`\sigma` is no noise but a
tolerance, and fixed: were it learned, it would fall to zero, and all components would be needed.
Products are taken in units of their root mean square, so that a tolerance of .1 is a tenth of it.

Source:
    The decomposition: Cordonnier, Loukas and Jaggi (2020), arXiv:2006.16362; the model is ours.
"""

from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.models.checks import check_settings
from bayesattn.models.component_scales import AutomaticRelevance, ComponentScales, Horseshoe
from bayesattn.models.head_products import scaled_products

__all__ = ["ComponentScalesAlone", "SharedComponents"]

Number = float | int


@dataclass(frozen=True)
class SharedComponents:
    """A Pyro program: heads' products from components that they share, each with a scale.

    Sites: in plate ``component`` those of the scales, ``query_component``, ``key_component`` and
    ``mixing``, one row a component; the factor ``products``. Deterministic: ``energy`` of each
    component, and ``width``, how many have more than ``share`` of the largest energy. Components
    come in no order and no signs, so look at these two, or at products, and not at single draws.

    Attributes:
        num_components: Most components; some more than are thought to be needed.
        scales: Prior of the scales.
        tolerance: Standard deviation of each entry, in units of the products' root mean square.
        share: Of the largest energy, above which a component counts.
    """

    num_components: int
    scales: ComponentScales = field(default_factory=AutomaticRelevance)
    tolerance: int | float = 0.1
    share: int | float = 0.01

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(
        self,
        query_weight: Float[Tensor, "head dim query_feature"],
        key_weight: Float[Tensor, "head dim key_feature"],
    ) -> None:
        """Run the program.

        Args:
            query_weight: Of a layer's queries.
            key_weight: Of its keys, as wide.

        Raises:
            ValueError: If the weights are not of the same heads and widths.
        """
        products = scaled_products(query_weight, key_weight)
        plate = pyro.plate("component", self.num_components)
        scale = self.scales.sample(plate)
        sizes = {
            "query_component": query_weight.shape[-1],
            "key_component": key_weight.shape[-1],
            "mixing": query_weight.shape[0],
        }
        with plate:
            query, key, mixing = (
                pyro.sample(name, _rows(scale, size)) for name, size in sizes.items()
            )
        gram = (query @ query.mT) * (key @ key.mT) * (mixing @ mixing.mT)
        explained = 2 * (mixing * products.inner_products(query, key)).sum() - gram.sum()
        pyro.factor("products", products.log_likelihood(explained, self.tolerance))
        energy = query.norm(dim=-1) * key.norm(dim=-1) * mixing.norm(dim=-1)
        _note_width(energy, self.share)


@dataclass(frozen=True)
class ComponentScalesAlone:
    r"""A Pyro program for the scales of given components, mixing integrated out.

    .. math:: T_h \sim N\Bigl(0,\; \sigma^2 I
        + \sum_r s_r^2\, (a_r \otimes b_r)(a_r \otimes b_r)^\top\Bigr)

    With unit :math:`a_r` and :math:`b_r` of a factorization held fixed few dimensions are left, and
    no gauge: a Markov chain then gives a posterior over the width. Sites are those of the scales;
    deterministic: ``energy``, here the expected norm of each component's mixing given the scales,
    and ``width``.

    Attributes:
        scales: Prior of the scales.
        tolerance: As for :class:`SharedComponents`.
        share: Likewise.
    """

    scales: ComponentScales = field(default_factory=Horseshoe)
    tolerance: int | float = 0.1
    share: int | float = 0.01

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(
        self,
        query_weight: Float[Tensor, "head dim query_feature"],
        key_weight: Float[Tensor, "head dim key_feature"],
        query_component: Float[Tensor, "component query_feature"],
        key_component: Float[Tensor, "component key_feature"],
    ) -> None:
        """Run the program.

        Args:
            query_weight: Of a layer's queries.
            key_weight: Of its keys, as wide.
            query_component: Directions of the components, whose lengths do not matter.
            key_component: Likewise.

        Raises:
            ValueError: If the weights are not of the same heads and widths.
        """
        products = scaled_products(query_weight, key_weight)
        query = query_component / query_component.norm(dim=-1, keepdim=True)
        key = key_component / key_component.norm(dim=-1, keepdim=True)
        scale = self.scales.sample(pyro.plate("component", query.shape[0]))
        inner = products.inner_products(query, key) / self.tolerance**2
        gram = (query @ query.mT) * (key @ key.mT)
        # In this form scales may be as small as they like.
        shape = scale[:, None] * gram * scale / self.tolerance**2
        factor = torch.linalg.cholesky(shape + torch.eye(len(gram)).to(gram))
        half = torch.linalg.solve_triangular(factor, scale[:, None] * inner, upper=False)
        log_determinant = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        gained = half.square().sum() - 2 * query_weight.shape[0] * log_determinant
        value = products.log_likelihood(self.tolerance**2 * gained, self.tolerance)
        pyro.factor("products", value)
        mixing = scale[:, None] * torch.linalg.solve_triangular(factor.mT, half, upper=True)
        variance = scale.square() * torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
        second = mixing.square().sum(-1) + query_weight.shape[0] * variance
        _note_width(second.sqrt(), self.share)


def _rows(scale: Float[Tensor, " component"], size: int) -> dist.TorchDistribution:
    scales = scale[..., None].expand(*scale.shape, size)
    return dist.Normal(torch.zeros_like(scales), scales).to_event(1)


def _note_width(energy: Float[Tensor, " component"], share: Number) -> None:
    pyro.deterministic("energy", energy, event_dim=1)
    counts = energy > share * energy.amax(-1, keepdim=True)
    pyro.deterministic("width", counts.sum(-1).to(energy), event_dim=0)
