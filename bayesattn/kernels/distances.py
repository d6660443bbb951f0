r"""Squared distances between particles, in full precision and about their mean, and their median.

.. math:: r_{ij}^2 = \lVert x_i \rVert^2 + \lVert x_j \rVert^2 - 2 \, x_i \cdot x_j

Nothing larger than "particle particle" or "particle dim" is held: sums over pairs are products.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.order_statistics import smallest_but

__all__ = [
    "about_mean",
    "floored_median",
    "geometry",
    "local_distances",
    "median_squared_distance",
    "squared_distances",
    "widened",
]


def squared_distances(
    x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"] | None = None
) -> Float[Tensor, "*#batch row column"]:
    """Squared Euclidean distances between the rows of two clouds, or of one cloud and itself.

    Norms less twice the inner products, about the mean of ``x``, so that a cloud far from the
    origin loses no digits; never negative.

    Args:
        x: First cloud, at least one row.
        y: Second cloud; ``x`` itself if None, and then the diagonal is exactly zero.

    Returns:
        Squared distances, in float32 or the wider type of ``x``.

    Raises:
        ValueError: If ``x`` has no row.
    """
    if y is None:
        return geometry(x)[1]
    rows, shift = about_mean(x)
    columns = widened(y) - shift[0] - shift[1]
    with full_precision(x):
        products = rows @ columns.mT
    return _from_products(rows.square().sum(-1), columns.square().sum(-1), products)


def local_distances(
    x: Float[Tensor, "*#batch row dim"], y: Float[Tensor, "*#batch column dim"]
) -> Float[Tensor, "*#batch row column"]:
    """Squared distances, each of them of the two places alone, whatever stands at others.

    So they are about the origin, and lose the digits that :func:`squared_distances` keeps where
    clouds are far from it.
    """
    return _from_products(x.square().sum(-1), y.square().sum(-1), x @ y.mT)


def median_squared_distance(
    particles: Float[Tensor, "*batch particle dim"],
) -> Float[Tensor, "*batch"]:
    """Median squared distance over pairs of distinct particles (the lower of two middle ones).

    Floored at what the distances of such a cloud can resolve, so that a bandwidth made of it is
    positive also when particles coincide. A single particle has no pair and gets one.

    Returns:
        Positive, detached, in float32 or the wider type of ``particles``.

    Raises:
        ValueError: Without particles.
    """
    return floored_median(geometry(particles.detach())[1])


def widened(tensor: Tensor) -> Tensor:
    """The same values in float32 or the wider type that they have."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def about_mean(
    x: Float[Tensor, "*batch row dim"],
) -> tuple[Float[Tensor, "*batch row dim"], tuple[Tensor, Tensor]]:
    """A cloud less its mean, and that mean as a sum of two: the first row and what is left.

    The mean is a constant to differentiation.

    Raises:
        ValueError: Without rows.
    """
    if x.shape[-2] == 0:
        raise ValueError(f"a kernel needs at least one particle, got none: shape {tuple(x.shape)}")
    x = widened(x)
    # About the first row before the mean: rows that coincide then become zero exactly.
    first = x.detach()[..., :1, :]
    shifted = x - first
    mean = shifted.detach().mean(-2, keepdim=True)
    return shifted - mean, (first, mean)


def geometry(
    particles: Float[Tensor, "*batch particle dim"],
) -> tuple[Float[Tensor, "*batch particle dim"], Float[Tensor, "*batch particle particle"]]:
    """Particles about their mean, and the squared distances between every two of them."""
    centered, _ = about_mean(particles)
    with full_precision(particles):
        products = centered @ centered.mT
    # Norms read off the diagonal of the product itself cancel exactly there.
    norms = products.flatten(-2)[..., :: products.shape[-1] + 1]
    return centered, _from_products(norms, norms, products)


def floored_median(
    distances: Float[Tensor, "*batch particle particle"],
    mean_square: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """:func:`median_squared_distance` from squared distances.

    Args:
        distances: Zero on the diagonal.
        mean_square: Of the norms that the distances were rounded at; those about the particles'
            mean by default.
    """
    distances = distances.detach()
    count, info = distances.shape[-1], torch.finfo(distances.dtype)
    if count == 1:
        return torch.ones_like(distances[..., 0, 0])
    # In order come the zeros of the diagonal, then each pair twice.
    middle = (count * (count - 1) // 2 - 1) // 2
    median = smallest_but(distances.flatten(-2), count + 2 * middle)
    if mean_square is None:
        mean_square = distances.mean((-2, -1)) / 2
    resolution = 64 * info.eps * mean_square.detach()
    return torch.maximum(median, resolution + info.tiny / info.eps)


def _from_products(row_norms: Tensor, column_norms: Tensor, products: Tensor) -> Tensor:
    return (row_norms[..., :, None] + column_norms[..., None, :] - 2 * products).clamp_min(0.0)
