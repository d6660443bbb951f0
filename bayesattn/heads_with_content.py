r"""Heads of a width whose logits are nearest to given ones, content vectors and biases included.

.. math:: \begin{pmatrix} T & u \\ v^\top & \cdot \end{pmatrix} \approx
    \begin{pmatrix} W_Q^\top \\ b_Q^\top \end{pmatrix} \begin{pmatrix} W_K & b_K \end{pmatrix}

A head of width d has a matrix of rank d for tokens with a feature of one appended; its corner moves
all logits alike, and is free. Two ways are tried, and each head takes the nearer: the best T of
rank d, with biases fitted to it, which is exact where T has that rank and v lies in the span of its
keys; and the best T and v together, which is exact where T has a smaller rank.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from bayesattn.head_decomposition import head_factors, squared_product_norms, truncated_heads

__all__ = ["HeadsApart", "heads_apart"]


class HeadsApart(NamedTuple):
    """Heads with projections of their own.

    Attributes:
        query_weight: Of queries.
        key_weight: Of keys.
        query_bias: Of queries; None where keys had no content.
        key_bias: Of keys; None where queries had no content.
        relative_error: Of all heads' products and contents together.
        head_errors: Of each head.
    """

    query_weight: Float[Tensor, "head dim query_feature"]
    key_weight: Float[Tensor, "head dim key_feature"]
    query_bias: Float[Tensor, "head dim"] | None
    key_bias: Float[Tensor, "head dim"] | None
    relative_error: Float[Tensor, ""]
    head_errors: Float[Tensor, " head"]


def heads_apart(
    query_weight: Float[Tensor, "head component query_feature"],
    key_weight: Float[Tensor, "head component key_feature"],
    dim: int,
    key_content: Float[Tensor, "head key_feature"] | None = None,
    query_content: Float[Tensor, "head query_feature"] | None = None,
) -> HeadsApart:
    """Find heads of a width.

    Args:
        query_weight: Of heads of any width, in float64.
        key_weight: Likewise.
        dim: Width of a head.
        key_content: What adds to the logits as a function of keys.
        query_content: Likewise of queries.
    """
    query, key = truncated_heads(head_factors(query_weight, key_weight), dim)[:2]
    query_bias = None if key_content is None else _fitted_bias(key, key_content)
    given = (query_weight, key_weight, key_content, query_content)
    ways = [_with_errors(given, query, key, query_bias)]
    if key_content is not None:
        ways.append(_with_errors(given, *_joined(query_weight, key_weight, key_content, dim)))
    lost = torch.stack([squares for *_, squares in ways])
    best = lost.argmin(0)
    heads = torch.arange(len(best), device=best.device)
    query, key, query_bias, key_bias = (
        None if values[0] is None else torch.stack(values)[best, heads]
        for values in zip(*(way[:4] for way in ways), strict=True)
    )
    assert query is not None
    assert key is not None
    whole = squared_product_norms(query_weight, key_weight)
    for content in (key_content, query_content):
        whole = whole if content is None else whole + content.square().sum(-1)
    left, tiny = lost[best, heads], torch.finfo(whole.dtype).tiny
    return HeadsApart(
        query,
        key,
        query_bias,
        key_bias,
        (left.sum() / whole.sum().clamp(min=tiny)).sqrt(),
        (left / whole.clamp(min=tiny)).sqrt(),
    )


def _joined(
    query: Tensor, key: Tensor, key_content: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best weights and bias of queries together."""
    one = torch.zeros_like(query[:, :1, :])
    asks = torch.cat([pad(query, (0, 1)), pad(one, (0, 1), value=1.0)], 1)
    asked = torch.cat([key, key_content[:, None]], 1)
    weights, key = truncated_heads(head_factors(asks, asked), dim)[:2]
    return weights[..., :-1], key, weights[..., -1]


def _with_errors(
    given: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    query: Tensor,
    key: Tensor,
    query_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Weights and biases, and the squared norm of what each head lost."""
    query_weight, key_weight, key_content, query_content = given
    key_bias = None if query_content is None else _fitted_bias(query, query_content)
    lost = squared_product_norms(
        torch.cat([query_weight, -query], 1), torch.cat([key_weight, key], 1)
    )
    for content, weight, bias in (
        (key_content, key, query_bias),
        (query_content, query, key_bias),
    ):
        if content is not None and bias is not None:
            lost = lost + (content - torch.einsum("hd,hdf->hf", bias, weight)).square().sum(-1)
    return query, key, query_bias, key_bias, lost


def _fitted_bias(
    weight: Float[Tensor, "head dim feature"], content: Float[Tensor, "head feature"]
) -> Float[Tensor, "head dim"]:
    """The bias of the other side that gives content vectors, as nearly as there is one."""
    # On the CPU, whose least squares take weights of any rank.
    found = torch.linalg.lstsq(weight.mT.cpu(), content[..., None].cpu(), driver="gelsd")
    return found.solution[..., 0].to(weight.device)
