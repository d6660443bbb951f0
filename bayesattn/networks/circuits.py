r"""What a head does to tokens: the products of its projections, which its weights stand for.

.. math:: C^{QK}_h = W_Q^\top W_K, \qquad C^{OV}_h = W_V^\top W_O^\top

An invertible R that takes :math:`W_Q` to :math:`R W_Q` and :math:`W_K` to :math:`R^{-\top} W_K`
changes weights and no circuit: it is a gauge. Inner products of circuits are sums over matrices as
small as a head is wide:

.. math:: \langle A_i^\top B_i,\, A_j^\top B_j \rangle
    = \sum_{ab} (A_i A_j^\top)_{ab} (B_i B_j^\top)_{ab}

Source:
    Elhage et al. (2021), A mathematical framework for transformer circuits.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.autocasting import full_precision
from bayesattn.networks.stacked_heads import HeadBatch

__all__ = ["Circuits", "circuit_products", "head_circuits"]


class Circuits(NamedTuple):
    r"""Circuits :math:`A^\top B` of heads; where some heads share a key and value, theirs together.

    Attributes:
        left: A.
        right: B; of A and B one may be shared by the group.
    """

    left: Float[Tensor, "*batch head #group width left"]
    right: Float[Tensor, "*batch head #group width right"]


def head_circuits(heads: HeadBatch, particles: Float[Tensor, "system head dim"]) -> Circuits:
    """Cut particles into the factors of their circuits; a bias is one more column of its weight.

    Args:
        heads: Joint partitions of two roles: queries and keys, or values and outputs.
        particles: Of these partitions.

    Raises:
        ValueError: If a particle is not made of two projections of one width.
    """
    factors: list[Tensor] = []
    for part in heads.parts(particles):
        if part.ndim == 3 and factors:
            factors[-1] = torch.cat([factors[-1], part[..., None]], -1)
        else:
            factors.append(part)
    if len(factors) != 2 or any(factor.ndim != 4 for factor in factors):
        raise ValueError(
            f"{heads.names[0]}: circuits need heads of two projections, such as "
            'head_partitions(model, ("query", "key"), joint=True)'
        )
    width = min(factor.shape[2] for factor in factors)
    return Circuits(*(factor.unflatten(2, (-1, width)) for factor in factors))


def circuit_products(one: Circuits, other: Circuits) -> Float[Tensor, "*batch head other_head"]:
    """Inner products of the circuits of heads with those of other heads."""
    with full_precision(one.left):
        left, right = (
            torch.einsum("...hgad,...tgbd->...htgab", factor, with_factor)
            for factor, with_factor in zip(one, other, strict=True)
        )
    return (left * right).sum((-3, -2, -1))
