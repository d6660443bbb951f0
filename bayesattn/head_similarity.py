r"""How alike the heads of a layer are, by their weights, their outputs or their attention.

.. math::
    \cos_{ij} = \frac{x_i \cdot x_j}{\lVert x_i \rVert \lVert x_j \rVert}, \qquad
    \mathrm{CKA}_{ij} = \frac{\lVert Y_i^\top Y_j \rVert_F^2}
        {\lVert Y_i^\top Y_i \rVert_F \lVert Y_j^\top Y_j \rVert_F}, \qquad
    \mathrm{JS}_{ij} = H\!\left(\tfrac{a_i + a_j}2\right) - \tfrac{H(a_i) + H(a_j)}2

How many heads there are in effect is the exponential of the entropy of the eigenvalues of a
similarity over M: one where all are alike, M where none is like another.

Source:
    Kornblith et al. (2019), Similarity of neural network representations revisited,
    arXiv:1905.00414, for linear CKA. Friedman and Dieng (2023), The Vendi score, arXiv:2210.02410,
    for the effective number.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.kernels.distances import widened

__all__ = [
    "centered_kernel_alignment",
    "cosine_similarity",
    "effective_heads",
    "jensen_shannon",
    "mean_over_pairs",
    "over_norms",
]


def cosine_similarity(
    rows: Float[Tensor, "*batch head dim"],
) -> Float[Tensor, "*batch head head"]:
    """Cosines of the angles between heads; a head of zeros is like no other, and itself.

    Returns:
        In [-1, 1], in float32 or the wider type of the rows; ones on the diagonal.
    """
    rows = widened(rows)
    norms = rows.norm(dim=-1, keepdim=True)
    unit = rows / torch.where(norms > 0, norms, 1.0)
    with full_precision(rows):
        return _with_ones(unit @ unit.mT)


def centered_kernel_alignment(
    features: Float[Tensor, "*batch head sample dim"],
) -> Float[Tensor, "*batch head head"]:
    """Linear CKA: whether heads see the same differences between samples, up to rotation.

    Args:
        features: Such as a head's outputs at tokens; centred here. Few samples in many dimensions
            bias it towards one.

    Returns:
        In [0, 1]; ones on the diagonal. A head whose samples are all equal is like no other.
    """
    features = widened(features)
    # In units of their own size, so that no square is too large or small.
    size = features.abs().amax((-2, -1), keepdim=True)
    features = features / torch.where(size > 0, size, 1.0)
    centered = features - features.mean(-2, keepdim=True)
    # What rounding leaves of samples that are all equal is no difference between them.
    is_flat = centered.abs().amax((-2, -1), keepdim=True) <= 8 * torch.finfo(features.dtype).eps
    centered = torch.where(is_flat, 0.0, centered)
    with full_precision(features):
        if features.shape[-2] <= features.shape[-1]:
            rows = (centered @ centered.mT).flatten(-2)
            products = rows @ rows.mT
        else:
            crossed = torch.einsum("...hsa,...tsb->...htab", centered, centered)
            products = crossed.square().sum((-2, -1))
    return _with_ones(over_norms(products))


def jensen_shannon(
    weights: Float[Tensor, "*batch head query key"],
    query_mask: Bool[Tensor, "*batch query"] | None = None,
) -> Float[Tensor, "*batch head head"]:
    """Jensen-Shannon divergences between the attention of heads, the mean over queries.

    Args:
        weights: Of attention; rows of zeros count as alike.
        query_mask: Which queries count.

    Returns:
        In [0, log 2] nats; zeros on the diagonal. NaN where no query counts.

    Raises:
        ValueError: If there is no query.
    """
    num_queries = weights.shape[-2]
    if num_queries == 0:
        raise ValueError(f"weights: expected a query at least, got shape {tuple(weights.shape)}")
    weights = widened(weights)
    entropy = torch.special.entr(weights).sum(-1)
    # One head against all at a time, so that nothing is larger than the weights.
    columns = []
    for head in range(weights.shape[-3]):
        middle = (weights + weights[..., head : head + 1, :, :]) / 2
        own = (entropy + entropy[..., head : head + 1, :]) / 2
        columns.append(torch.special.entr(middle).sum(-1) - own)
    divergence = torch.stack(columns, -2).clamp_min(0.0)
    if query_mask is None:
        return divergence.mean(-1)
    counted = query_mask[..., None, None, :].to(divergence.dtype)
    return (divergence * counted).sum(-1) / counted.sum(-1)


def effective_heads(similarity: Float[Tensor, "*batch head head"]) -> Float[Tensor, "*batch"]:
    """How many heads there are in effect, from one to their number.

    Args:
        similarity: Symmetric and positive semidefinite, with ones on the diagonal, such as cosines
            or CKA. A head that is like no other, such as one that does nothing, counts as one.

    Returns:
        The numbers, NaN where a similarity is not finite.
    """
    similarity = widened(similarity)
    is_known = similarity.isfinite().all(-1).all(-1)
    eye = torch.eye(similarity.shape[-1], dtype=similarity.dtype, device=similarity.device)
    known = torch.where(is_known[..., None, None], similarity, eye)
    eigenvalues = torch.linalg.eigvalsh(known / similarity.shape[-1])
    count = torch.special.entr(eigenvalues.clamp_min(0.0)).sum(-1).exp()
    return torch.where(is_known, count, torch.nan)


def over_norms(products: Float[Tensor, "*batch head head"]) -> Float[Tensor, "*batch head head"]:
    """Inner products over the norms of both, of which those that are zero count as one."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    return products / (norms[..., :, None] * norms[..., None, :])


def mean_over_pairs(values: Float[Tensor, "*batch head head"]) -> Float[Tensor, "*batch"]:
    """Mean over pairs of different heads; NaN where there is one head alone."""
    count = values.shape[-1]
    own = values.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (values.sum((-2, -1)) - own) / (count * (count - 1))


def _with_ones(similarity: Tensor) -> Tensor:
    similarity = similarity.clamp(-1.0, 1.0)
    is_own = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    return torch.where(is_own, 1.0, similarity)
