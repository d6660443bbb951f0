r"""Components that heads share, mixing integrated out: few dimensions, fit for a Markov chain.

.. math:: T_h \sim N\Bigl(0,\; \sigma^2 I
    + \sum_r s_r^2\, (a_r \otimes b_r)(a_r \otimes b_r)^\top\Bigr), \qquad
    a_r = s_r u_r, \quad b_r = s_r w_r

The model is that of :mod:`bayesattn.models.shared_components`, whose mixing is normal given all
else. Directions u and w are standard normal, so that they and the scales stay apart where nothing
is needed; or they are given, and only the scales are left.
"""

from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayesattn.argument_checks import check_type
from bayesattn.models.checks import check_settings
from bayesattn.models.component_scales import AutomaticRelevance, ComponentScales, Horseshoe
from bayesattn.models.component_summaries import COMPONENT_DIMS, note_components, note_logits
from bayesattn.models.head_products import ScaledProducts, scaled_products

__all__ = ["ComponentScalesAlone", "MarginalComponents"]

Number = float | int


@dataclass(frozen=True)
class MarginalComponents:
    """A Pyro program: components that heads share, with mixing integrated out.

    Sites: in plate ``component`` those of the scales, ``query_direction`` and ``key_direction``;
    the factor ``products``. Deterministic: those of
    :class:`~bayesattn.models.SharedComponents`, here expected given all sites: ``energy`` and
    ``relative_error`` by their mean squares, ``logits`` by their mean.

    Attributes:
        num_components: Most components.
        scales: Prior of the scales.
        tolerance: As for :class:`~bayesattn.models.SharedComponents`.
        share: Likewise.
    """

    num_components: int
    scales: ComponentScales = field(default_factory=AutomaticRelevance)
    tolerance: int | float = 0.1
    share: int | float = 0.01

    def __post_init__(self) -> None:
        check_type("scales", self.scales, ComponentScales)
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the last axes of each site and argument, for ArviZ."""
        return {
            **COMPONENT_DIMS,
            "query_direction": ["component", "query_feature"],
            "key_direction": ["component", "key_feature"],
        }

    def __call__(
        self,
        query_weight: Float[Tensor, "head dim query_feature"],
        key_weight: Float[Tensor, "head dim key_feature"],
        query_tokens: Float[Tensor, "query query_feature"] | None = None,
        key_tokens: Float[Tensor, "key key_feature"] | None = None,
    ) -> None:
        """Run the program; arguments: :class:`~bayesattn.models.SharedComponents`."""
        products = scaled_products(query_weight, key_weight)
        plate = pyro.plate("component", self.num_components)
        scale = self.scales.sample(plate)
        with plate:
            query, key = (
                pyro.sample(name, _unit_rows(scale, size))
                for name, size in (
                    ("query_direction", query_weight.shape[-1]),
                    ("key_direction", key_weight.shape[-1]),
                )
            )
        sides = scale[:, None] * query, scale[:, None] * key
        mixing = _observe(products, sides, scale, self.tolerance, self.share)
        note_logits(products, (*sides, mixing), query_tokens, key_tokens)

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values of this program's sites from those of ``SharedComponents``, for ``init``.

        Args:
            values: Of all its sites, such as one draw or the mean of a posterior, under
                ``AutomaticRelevance``.
        """
        root = values["precision"].sqrt()[..., None]
        return {
            "precision": values["precision"],
            "query_direction": root * values["query_component"],
            "key_direction": root * values["key_component"],
        }


@dataclass(frozen=True)
class ComponentScalesAlone:
    """A Pyro program for the scales of given components, mixing integrated out.

    Of the directions given only that counts: rows are as long as is expected of standard normal
    ones. Few dimensions are left, and no gauge, so a Markov chain gives a posterior over the width
    given these directions. Sites are those of the scales; deterministic: as in
    :class:`MarginalComponents`.

    Attributes:
        scales: Prior of the scales.
        tolerance: As for :class:`~bayesattn.models.SharedComponents`.
        share: Likewise.
    """

    scales: ComponentScales = field(default_factory=Horseshoe)
    tolerance: int | float = 0.1
    share: int | float = 0.01

    def __post_init__(self) -> None:
        check_type("scales", self.scales, ComponentScales)
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the last axes of each site and argument, for ArviZ."""
        return {
            **COMPONENT_DIMS,
            "query_component": ["component", "query_feature"],
            "key_component": ["component", "key_feature"],
        }

    def __call__(
        self,
        query_weight: Float[Tensor, "head dim query_feature"],
        key_weight: Float[Tensor, "head dim key_feature"],
        query_component: Float[Tensor, "component query_feature"],
        key_component: Float[Tensor, "component key_feature"],
        query_tokens: Float[Tensor, "query query_feature"] | None = None,
        key_tokens: Float[Tensor, "key key_feature"] | None = None,
    ) -> None:
        """Run the program.

        Args:
            query_weight: Of a layer's queries.
            key_weight: Of its keys, as wide.
            query_component: Directions of the components, such as those of
                :func:`bayesattn.factorize`. One with a row of zeros takes no part.
            key_component: Likewise.
            query_tokens: What asks, for ``logits``; with ``key_tokens`` or not at all.
            key_tokens: What is asked.

        Raises:
            ValueError: If the weights are not of the same heads and widths, or the components not
                of the same number and of the weights' features.
        """
        products = scaled_products(query_weight, key_weight)
        _check_rows(query_component, key_component, products)
        scale = self.scales.sample(pyro.plate("component", query_component.shape[0]))
        sides = _usual_rows(query_component, scale), _usual_rows(key_component, scale)
        mixing = _observe(products, sides, scale, self.tolerance, self.share)
        note_logits(products, (*sides, mixing), query_tokens, key_tokens)


def _observe(
    products: ScaledProducts,
    sides: tuple[Float[Tensor, "component query_feature"], Float[Tensor, "component key_feature"]],
    scale: Float[Tensor, " component"],
    tolerance: Number,
    share: Number,
) -> Float[Tensor, "component head"]:
    """Add the density of the products, note what does not hang on order and signs.

    Returns:
        Mean of the mixing given all else.
    """
    query, key = sides
    gram = (query @ query.mT) * (key @ key.mT)
    inner = products.inner_products(query, key)
    # In units of its prior the mixing has a precision of at least one, however small a scale is.
    inverse = scale[:, None] * gram * scale / tolerance**2 + torch.eye(len(gram)).to(gram)
    factor = torch.linalg.cholesky(inverse)
    half = torch.linalg.solve_triangular(factor, scale[:, None] * inner, upper=False)
    half = half / tolerance**2
    log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    num_heads = inner.shape[-1]
    gained = half.square().sum() - num_heads * log_determinant
    pyro.factor("products", products.log_likelihood(tolerance**2 * gained, tolerance))
    mixing = scale[:, None] * torch.linalg.solve_triangular(factor.mT, half, upper=True)
    covariance = scale[:, None] * torch.cholesky_inverse(factor) * scale
    second = mixing @ mixing.mT + num_heads * covariance
    energy = query.norm(dim=-1) * key.norm(dim=-1) * second.diagonal(dim1=-2, dim2=-1).sqrt()
    explained = 2 * (mixing * inner).sum() - (second * gram).sum()
    note_components(products, energy, explained, share)
    return mixing


def _unit_rows(scale: Float[Tensor, " component"], size: int) -> TorchDistributionMixin:
    zeros = torch.zeros_like(scale)[..., None].expand(*scale.shape, size)
    return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)


def _usual_rows(
    rows: Float[Tensor, "component size"], scale: Float[Tensor, " component"]
) -> Float[Tensor, "component size"]:
    length = scale * rows.shape[-1] ** 0.5
    norms = rows.norm(dim=-1)
    return rows * (length / torch.where(norms > 0, norms, 1.0))[:, None]


def _check_rows(query: Tensor, key: Tensor, products: ScaledProducts) -> None:
    sizes = products.query.shape[-1], products.key.shape[-1]
    if (
        query.ndim != 2
        or key.ndim != 2
        or len(query) != len(key)
        or (query.shape[-1], key.shape[-1]) != sizes
    ):
        raise ValueError(
            f"query_component, key_component: expected as many rows of {sizes[0]} and of "
            f"{sizes[1]} features, got shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
