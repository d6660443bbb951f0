r"""How far shared projections are from the products of heads, at their width and at any below.

.. math:: \lVert T - \hat T \rVert^2 = \sum_h
    \lVert C_h D_h^\top - R \operatorname{diag}(m_h) S^\top \rVert^2
    + \lVert C_h D_h'^\top \rVert^2 + \lVert C_h' D_h^\top \rVert^2
    + \lVert C_h' D_h'^\top \rVert^2

C and D are the heads' weights within the spans of the shared ones, whose triangular factors are R
and S; primed is what lies beside. No large numbers cancel, as they do in the difference of squared
norms: where little is lost, that little is told to its last digits.

Source:
    Eckart and Young (1936) for the bound, on the two unfoldings whose columns are features.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.alternating_least_squares import Factors, HeadProducts
from bayesattn.head_decomposition import squared_product_norms

__all__ = ["lower_bounds", "nested_errors", "over", "residual_errors", "unfolding_grams"]


def residual_errors(
    products: HeadProducts, factors: Factors
) -> tuple[Float[Tensor, " layer"], Float[Tensor, "layer head"]]:
    """Relative errors of layers and of heads, in float64; of zeros, what is there instead."""
    within, beside, triangles = zip(
        *(
            _split(products.by_head(side.double()), shared.double())
            for side, shared in ((products.query, factors.query), (products.key, factors.key))
        ),
        strict=True,
    )
    mixed = triangles[0][:, None] * factors.mixing.double()[:, :, None]
    lost = (within[0].mT @ within[1] - mixed @ triangles[1][:, None].mT).square().sum((-2, -1))
    for left, right in ((within[0], beside[1]), (beside[0], within[1]), beside):
        lost = lost + squared_product_norms(left, right)
    whole = products.squared_norms
    return over(lost.sum(-1), whole.sum(-1)).sqrt(), over(lost, whole).sqrt()


def nested_errors(products: HeadProducts, factors: Factors) -> Float[Tensor, "layer component"]:
    """Relative error by the first component, the first two, and so on, in float64.

    Differences of squared norms: below the root of rounding they tell nothing.
    """
    query, mixing, key = (part.double() for part in factors)
    gained = (mixing * products.inner_products(factors).double()).sum(1)
    gram = (query @ query.mT) * (key @ key.mT) * (mixing.mT @ mixing)
    counted = 2 * gram.tril(-1).sum(-1) + gram.diagonal(dim1=-2, dim2=-1)
    whole = products.squared_norms.sum(-1, keepdim=True)
    lost = whole + (counted - 2 * gained).cumsum(-1)
    return over(lost.clamp(min=0), whole).sqrt()


def lower_bounds(products: HeadProducts) -> Float[Tensor, "layer width"]:
    """Relative errors below which nothing of width one, two, and so on comes.

    From as many components as there are features on there is no bound but zero. Squared singular
    values are less what rounding may have added.
    """
    size = max(products.query.shape[-1], products.key.shape[-1])
    bounds = []
    for gram in unfolding_grams(products):
        spectrum = torch.linalg.eigvalsh(gram).flip(-1)
        noise = spectrum[:, :1] * gram.shape[-1] * torch.finfo(spectrum.dtype).eps
        spectrum = torch.nn.functional.pad(
            (spectrum - noise).clamp(min=0), (0, size - gram.shape[-1])
        )
        # From the smallest on, so that small tails are sums of small numbers.
        tails = spectrum.flip(-1).cumsum(-1).flip(-1) - spectrum
        whole = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        bounds.append(over(tails, whole).sqrt())
    return torch.maximum(*bounds)


def unfolding_grams(
    products: HeadProducts,
) -> tuple[
    Float[Tensor, "layer query_feature query_feature"],
    Float[Tensor, "layer key_feature key_feature"],
]:
    """Of the products side by side, and below each other, in float64; never the products."""
    query, key = products.by_head(products.query.double()), products.by_head(products.key.double())
    return (
        (query.mT @ ((key @ key.mT) @ query)).sum(1),
        (key.mT @ ((query @ query.mT) @ key)).sum(1),
    )


def over(part: Float[Tensor, "..."], whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Part of a whole; where that is nothing, the part."""
    return part / torch.where(whole > 0, whole, 1.0)


def _split(heads: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of heads in a basis of the shared rows, what is beside it, and the shared rows in it."""
    basis, triangle = torch.linalg.qr(shared.mT)
    within = heads @ basis[:, None]
    return within, heads - within @ basis[:, None].mT, triangle
