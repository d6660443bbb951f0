r"""Normalizations over queries first and over keys last, so that no key is explained away.

.. math:: A_{ij} = \frac{\xi_{ij}}{\sum_l \xi_{il}}, \qquad
    \xi_{ij} = \frac{\pi_i e^{s_{ij}}}{\sum_l \pi_l e^{s_{lj}}}

Columns come first and rows last: it is one sweep of Sinkhorn's algorithm in that order, and one
step of EM for a mixture in which queries generate keys. Each key's total attention is at least one
over the number of keys, under any logits.

Source:
    Ding et al. (2020), Attention that does not explain away, arXiv:2009.14308. Derived afresh, as
    only its abstract was at hand.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.normalizations.protocol import Component, FusedSums, LogSums, Normalization

__all__ = [
    "DoublyNormalized",
    "HybridNormalized",
    "InterpolatedNormalized",
    "Sinkhorn",
    "Softmax",
    "doubly_normalized",
]


def doubly_normalized(
    logits: Float[Tensor, "*_batch query key"],
    mask: Bool[Tensor, "*_batch _query _key"] | None = None,
) -> Float[Tensor, "*_batch query key"]:
    r"""Normalize over queries, then over keys, so that no key is explained away.

    .. math:: A_{ij} = \xi_{ij} / \sum_l \xi_{il}, \quad \xi_{ij} = e^{s_{ij}} / \sum_l e^{s_{lj}}

    Args:
        logits: :math:`s_{ij}`, in nats.
        mask: Which pairs take part; all if None.

    Returns:
        Weights; each row sums to one, each column to at least one over the number of keys, or,
        with a mask, over the most keys that a query may see.
    """
    return DoublyNormalized()(logits, mask)


# As the modules say it, so that a function is refused under causal masks like them.
vars(doubly_normalized)["mixes_queries"] = True


class Softmax(Normalization):
    """Over the keys alone: the posterior of which key generated a query."""

    mixes_queries = False
    fewest_fused_logits = 256 * 256

    def components(self, sums: LogSums) -> Sequence[Component]:
        """One softmax without a bias."""
        return [Component()]


class DoublyNormalized(Normalization):
    r"""Over queries first and over keys last.

    Args:
        num_heads: With ``num_queries``: each head learns a prior :math:`\log \pi_i` of its queries
            by their position, for a fixed set of queries.
        num_queries: See ``num_heads``.

    Attributes:
        log_prior: "head query", starting at zero, or None.
    """

    fewest_fused_logits = 384 * 384

    def __init__(self, num_heads: int | None = None, num_queries: int | None = None):
        super().__init__()
        if (num_heads is None) != (num_queries is None):
            raise ValueError(
                f"num_heads and num_queries go together, got num_heads={num_heads}, "
                f"num_queries={num_queries}"
            )
        self.num_heads = num_heads
        self.log_prior: nn.Parameter | None = None
        if num_heads is not None and num_queries is not None:
            self.log_prior = nn.Parameter(torch.zeros(num_heads, num_queries))

    def components(self, sums: LogSums) -> Sequence[Component]:
        """One softmax, whose bias makes up for what all queries gave to a key."""
        return [Component(-sums.over_queries(self.log_prior))]

    def attend(self, sums: FusedSums) -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages of the values by fused attention."""
        return sums.attend_doubly_normalized(self.log_prior)

    def extra_repr(self) -> str:
        """The sizes, where a prior is learned."""
        if self.log_prior is None:
            return ""
        return "num_heads={}, num_queries={}".format(*self.log_prior.shape)


class InterpolatedNormalized(Normalization):
    r"""Between softmax and doubly normalized: the bias is :math:`-\lambda \log \sum_i e^{s_{ij}}`.

    Args:
        num_heads: Each head learns its :math:`\lambda`, in (0, 1).
        amount: Where :math:`\lambda` starts.

    Attributes:
        amount_logit: Logit of :math:`\lambda`, for each head.
    """

    def __init__(self, num_heads: int, amount: float = 0.5):
        super().__init__()
        _check_heads(num_heads)
        self.num_heads = num_heads
        if not 0.0 < amount < 1.0:
            raise ValueError(f"amount: expected a number between 0 and 1, got {amount}")
        self.amount_logit = nn.Parameter(torch.full((num_heads,), amount).logit())

    def components(self, sums: LogSums) -> Sequence[Component]:
        """One softmax with a part of the bias of the doubly-normalized weights."""
        total = sums.over_queries()
        return [Component(-self.amount_logit.to(total.dtype).sigmoid()[:, None] * total)]

    def extra_repr(self) -> str:
        """The number of heads."""
        return f"num_heads={len(self.amount_logit)}"


class HybridNormalized(Normalization):
    r"""A mixture of both weights, :math:`u A^{\text{doubly}} + (1 - u) A^{\text{softmax}}`.

    Each column sums to at least u over the number of keys.

    Args:
        num_heads: Each head learns its u.
        retrofit: For networks that were trained with softmax: u starts at .12 in place of .5.

    Attributes:
        share_logit: Logit of u, for each head. It wants no weight decay.
    """

    def __init__(self, num_heads: int, retrofit: bool = False):
        super().__init__()
        _check_heads(num_heads)
        self.num_heads = num_heads
        self.share_logit = nn.Parameter(torch.full((num_heads,), -2.0 if retrofit else 0.0))

    def components(self, sums: LogSums) -> Sequence[Component]:
        """The softmaxes of both."""
        total = sums.over_queries()
        share = self._share(total.dtype)
        return [Component(-total, share), Component(None, 1.0 - share)]

    def attend(self, sums: FusedSums) -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages of the values by fused attention, under either."""
        softmax = sums.attend(Component())
        doubly = sums.attend_doubly_normalized()
        return softmax + self._share(softmax.dtype) * (doubly - softmax)

    def _share(self, dtype: torch.dtype) -> Float[Tensor, "head 1 1"]:
        return self.share_logit.to(dtype).sigmoid()[:, None, None]

    def extra_repr(self) -> str:
        """The number of heads."""
        return f"num_heads={len(self.share_logit)}"


class Sinkhorn(Normalization):
    r"""Sweeps over columns and rows in turn, columns first, rows last.

    .. math:: g_j = -\log \sum_i e^{s_{ij} + f_i}, \qquad f_i = -\log \sum_j e^{s_{ij} + g_j}

    One sweep is doubly normalized; in the limit all columns have the same sum.

    Args:
        num_sweeps: How often both are normalized.
    """

    def __init__(self, num_sweeps: int = 3):
        super().__init__()
        if num_sweeps < 1:
            raise ValueError(f"num_sweeps: expected at least 1, got {num_sweeps}")
        self.num_sweeps = num_sweeps

    def components(self, sums: LogSums) -> Sequence[Component]:
        """One softmax, with the bias of the last sweep."""
        key_bias = -sums.over_queries()
        for _ in range(self.num_sweeps - 1):
            key_bias = -sums.over_queries(-sums.over_keys(key_bias))
        return [Component(key_bias)]

    def extra_repr(self) -> str:
        """The number of sweeps."""
        return f"num_sweeps={self.num_sweeps}"


def _check_heads(num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
