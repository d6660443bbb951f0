r"""What a normalization is: from logits to weights, whose rows are mixtures of softmaxes.

.. math:: A_{ij} = \sum_c w_c\, \mathrm{softmax}_j (s_{ij} + g_{cj})

Softmax attention has one component without a bias; doubly-normalized attention has
:math:`g_j = -\log \sum_i e^{s_{ij}}`. A normalization states its components in terms of two sums,
over queries and over keys, and so once for the dense formula and the fused one.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from bayesattn.masking import masked_softmax

__all__ = ["Component", "DenseSums", "FusedSums", "LogSums", "Normalization", "mixture"]

# Where nothing takes part; far below any logit, and finite, so that no gradient is NaN.
_LOWEST = -1e30


@runtime_checkable
class LogSums(Protocol):
    """Sums of the exponentiated logits, by their logarithms; zero where nothing takes part."""

    def over_queries(
        self, bias: Shaped[Tensor, "*_batch query"] | None = None
    ) -> Float[Tensor, "*_batch key"]:
        """Logsumexp over the queries, with a bias for each."""
        ...

    def over_keys(
        self, bias: Shaped[Tensor, "*_batch key"] | None = None
    ) -> Float[Tensor, "*_batch query"]:
        """Logsumexp over the keys, with a bias for each."""
        ...


@runtime_checkable
class FusedSums(LogSums, Protocol):
    """Sums and averages in memory linear in the sequence; see :mod:`bayesattn.fused_route`."""

    def attend(self, component: "Component") -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages of the values under one softmax."""
        ...

    def attend_doubly_normalized(
        self, log_prior: Shaped[Tensor, "*_batch query"] | None = None
    ) -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages under doubly-normalized weights, cheaper than by their component."""
        ...


class Component(NamedTuple):
    """A softmax over keys that a row of weights is made of.

    Attributes:
        key_bias: Added to the logits; none if None.
        weight: Its share, to broadcast to "*batch head query key"; one if None.
    """

    key_bias: Float[Tensor, "*_batch key"] | None = None
    weight: Float[Tensor, "*_share 1 1"] | None = None


class DenseSums:
    """Sums from logits that are all there.

    Args:
        logits: In nats.
        mask: Which pairs take part; all if None.
    """

    def __init__(
        self,
        logits: Float[Tensor, "*_batch query key"],
        mask: Bool[Tensor, "*_batch _query _key"] | None,
    ):
        self.mask = mask
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.logits = logits if mask is None else torch.where(mask, logits, _LOWEST)

    def over_queries(
        self, bias: Shaped[Tensor, "*_batch query"] | None = None
    ) -> Float[Tensor, "*_batch key"]:
        """Logsumexp over the queries, with a bias for each."""
        return self._log_sum(None if bias is None else bias[..., :, None], -2)

    def over_keys(
        self, bias: Shaped[Tensor, "*_batch key"] | None = None
    ) -> Float[Tensor, "*_batch query"]:
        """Logsumexp over the keys, with a bias for each."""
        return self._log_sum(None if bias is None else bias[..., None, :], -1)

    def _log_sum(self, bias: Tensor | None, axis: int) -> Tensor:
        logits = self.logits if bias is None else self.logits + bias
        total = logits.logsumexp(axis)
        if self.mask is None:
            return total
        return torch.where(self.mask.expand(logits.shape).any(axis), total, 0.0)


class Normalization(nn.Module):
    """A choice of normalization. A subclass defines ``components``, or else ``forward``.

    Attributes:
        mixes_queries: Whether a query's weights depend on the other queries. Then padded queries
            must be told, and a single query is a special case.
        is_causal: Whether it sees to causality itself. One that mixes queries and does not would
            leak the future under a causal mask.
        fewest_fused_logits: From so many pairs of a query and a key in each head on, ``auto`` takes
            fused attention; below, the dense formula is faster.
    """

    mixes_queries: bool = True
    is_causal: bool = False
    fewest_fused_logits: int = 640 * 640

    def components(self, sums: LogSums) -> Sequence[Component] | None:
        """The softmaxes that rows are made of, or None where there is only the dense formula."""
        return None

    def attend(self, sums: FusedSums) -> Float[Tensor, "*_batch query _value_dim"] | None:
        """Averages of the values by fused attention; None where only the dense formula exists."""
        parts = self.components(sums)
        if not parts:
            return None
        output = None
        for part in parts:
            share = sums.attend(part)
            output = share if output is None else output + share
        return output

    def forward(
        self,
        logits: Float[Tensor, "*_batch query key"],
        mask: Bool[Tensor, "*_batch _query _key"] | None = None,
    ) -> Float[Tensor, "*_batch query key"]:
        """Weights, zero where masked.

        Args:
            logits: In nats.
            mask: Which pairs take part; all if None.

        Raises:
            TypeError: If a subclass defines neither this nor ``components``.
        """
        sums = DenseSums(logits, mask)
        parts = self.components(sums)
        if not parts:
            raise TypeError(f"{type(self).__name__} must define components or forward")
        return mixture(logits.to(sums.logits.dtype), parts, mask).to(logits.dtype)


def mixture(
    logits: Float[Tensor, "*_batch query key"],
    components: Sequence[Component],
    mask: Bool[Tensor, "*_batch _query _key"] | None,
) -> Float[Tensor, "*_batch query key"]:
    """Weights of some queries, from their logits and the components of all."""
    weights = None
    for part in components:
        biased = logits if part.key_bias is None else logits + part.key_bias[..., None, :]
        share = masked_softmax(biased, mask)
        share = share if part.weight is None else part.weight * share
        weights = share if weights is None else weights + share
    assert weights is not None
    return weights
