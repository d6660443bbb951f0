r"""Attention with any logits and normalization that reduce to the fused primitives.

.. math:: o_i = \sum_c w_c \sum_j \mathrm{softmax}_j(q'_i \cdot k'_j + b_j + g_{cj})\, v_j

Memory is linear in the sequence: no weights are formed.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.attention_choices import LogitsFunction, NormalizationFunction, mixes_queries
from bayesattn.autocasting import autocast_type
from bayesattn.fused import (
    attention_logsumexp,
    attention_with_key_bias,
    doubly_normalized_attention,
)
from bayesattn.logits import DotProduct, FactoredLogits, Logits, ReducedLogits
from bayesattn.masking import Masks
from bayesattn.normalizations.columns import Softmax
from bayesattn.normalizations.protocol import Component, Normalization

__all__ = [
    "FactoredAttention",
    "FusedAttention",
    "attend_fused",
    "check_route",
    "fused_attention",
    "is_fusible",
    "reduce_logits",
    "takes_fused",
]

Number = float | int


def check_route(route: str) -> None:
    """Refuse what is no route.

    Raises:
        ValueError: If it is none.
    """
    if route not in ("auto", "dense", "fused"):
        raise ValueError(f"route: expected 'auto', 'dense' or 'fused', got {route!r}")


def takes_fused(
    route: str,
    query: Tensor,
    key: Tensor,
    masks: Masks,
    logits: LogitsFunction | None,
    normalization: NormalizationFunction | None,
    dropout_p: float,
) -> bool:
    """Whether attention that is not PyTorch's own goes to the fused primitives.

    Raises:
        ValueError: If it is asked to and cannot.
    """
    if route == "dense":
        return False
    obstacle = _obstacle(query, key, masks, logits, normalization)
    if dropout_p > 0 and getattr(logits, "is_factored", False):
        obstacle = obstacle or "with dropout_p= of weights that are sums"
    if route == "fused":
        if obstacle:
            raise ValueError(f"route: expected 'dense' {obstacle}, got 'fused'")
        return True
    choice = normalization if isinstance(normalization, Normalization) else Softmax
    is_large = query.shape[-2] * key.shape[-2] >= choice.fewest_fused_logits
    # With dropout PyTorch's kernels on the CPU form the weights too.
    forms_weights = dropout_p > 0 and query.device.type == "cpu"
    return is_large and not (obstacle or forms_weights)


def is_fusible(
    query: Tensor,
    key: Tensor,
    masks: Masks,
    logits: LogitsFunction | None,
    normalization: NormalizationFunction | None,
) -> bool:
    """Whether the fused primitives can serve these choices and masks."""
    return not _obstacle(query, key, masks, logits, normalization)


def reduce_logits(
    query: Float[Tensor, "*_batch query _dim"],
    key: Float[Tensor, "*_batch key _dim"],
    scale: Number | None,
    logits: LogitsFunction | None,
    normalization: NormalizationFunction | None,
) -> ReducedLogits | FactoredLogits | None:
    """Logits as inner products with biases, or None where they have no such form.

    Those of one normalization's use: biases that it does not see may be missing.
    """
    if logits is None:
        return DotProduct(scale).reduce(query, key)
    if not isinstance(logits, Logits):
        return None
    over_queries = mixes_queries(normalization)
    return logits.reduce(query, key) if over_queries else logits.reduce_over_keys(query, key)


def attend_fused(
    reduced: ReducedLogits | FactoredLogits,
    value: Float[Tensor, "*_batch key _value_dim"],
    masks: Masks,
    normalization: NormalizationFunction | None,
    dropout_p: float,
) -> Float[Tensor, "*_batch query _value_dim"]:
    """Averages of the values under masks that do not pair queries with keys."""
    fused = fused_attention(reduced, masks, value, dropout_p)
    choice = normalization if isinstance(normalization, Normalization) else Softmax()
    output = choice.attend(fused)
    assert output is not None
    output = output.to(value.dtype) if autocast_type(value) is None else output
    return output if masks.queries is None else torch.where(masks.queries, output, 0.0)


def fused_attention(
    logits: ReducedLogits | FactoredLogits,
    masks: Masks,
    value: Float[Tensor, "*_batch key _value_dim"] | None = None,
    dropout_p: float = 0.0,
) -> "FusedAttention | FactoredAttention":
    """What a normalization asks, under masks that do not pair queries with keys."""
    bias = None
    if masks.bias is not None:
        bias = torch.where(masks.bias > -torch.inf, masks.bias, 0.0).squeeze(-2)
    query_mask = None if masks.queries is None else masks.queries.squeeze(-1)
    key_mask = None if masks.keys is None else masks.keys.squeeze(-2)
    if isinstance(logits, FactoredLogits):
        return FactoredAttention(logits, value, query_mask, key_mask, bias)
    return FusedAttention(logits, value, query_mask, key_mask, bias, dropout_p)


class FusedAttention:
    """What a normalization asks of the fused primitives, for given logits and values.

    Args:
        logits: Reduced to inner products with biases.
        value: What is averaged; only for the averages.
        query_mask: "*batch query" with the head axis: which queries count; all if None.
        key_mask: "*batch key" with the head axis: which keys take part; all if None.
        key_bias: Added to the logits of a key.
        dropout_p: Probability of dropping a weight.
    """

    def __init__(
        self,
        logits: ReducedLogits,
        value: Float[Tensor, "*_batch key _value_dim"] | None = None,
        query_mask: Bool[Tensor, "*_batch _query"] | None = None,
        key_mask: Bool[Tensor, "*_batch _key"] | None = None,
        key_bias: Float[Tensor, "*_batch key"] | None = None,
        dropout_p: float = 0.0,
    ):
        self.copies, self.value, self.dropout_p = logits.copies, value, dropout_p
        self.logits = logits._replace(key_bias=_sum(logits.key_bias, self._copied(key_bias)))
        dtype = torch.promote_types(logits.query.dtype, torch.float32)
        self._no_query = None if query_mask is None else _log(query_mask, dtype)
        self._no_key = None if key_mask is None else self._copied(_log(key_mask, dtype))

    def over_queries(
        self, bias: Shaped[Tensor, "*_batch query"] | None = None
    ) -> Float[Tensor, "*_batch key"]:
        """Logsumexp over the queries that count, with a bias for each."""
        query, key, query_bias, key_bias, scale, copies = self.logits
        counted = _sum(query_bias, bias, self._no_query)
        total = attention_logsumexp(key, query, counted, scale=scale)
        if copies == 1:
            return _total(total, key_bias)
        # Zeros where nothing counts, so that no sum of exponentials of infinities has a slope.
        counts = total > -torch.inf
        total = _total(total, key_bias).unflatten(-1, (copies, -1)).logsumexp(-2)
        return torch.where(counts.unflatten(-1, (copies, -1)).any(-2), total, 0.0)

    def over_keys(
        self, bias: Shaped[Tensor, "*_batch key"] | None = None
    ) -> Float[Tensor, "*_batch query"]:
        """Logsumexp over the keys that take part, with a bias for each."""
        query, key, query_bias, key_bias, scale, _ = self.logits
        counted = _sum(key_bias, self._copied(bias), self._no_key)
        total = attention_logsumexp(query, key, counted, scale=scale)
        return _total(total, query_bias)

    def attend(self, component: Component) -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages of the values under one softmax, times its share."""
        query, key, _, key_bias, scale, _ = self.logits
        bias = _sum(key_bias, self._copied(component.key_bias), self._no_key)
        output = attention_with_key_bias(
            query, key, self._values(), bias, scale=scale, dropout_p=self.dropout_p
        )
        return output if component.weight is None else component.weight.to(output.dtype) * output

    def attend_doubly_normalized(
        self, log_prior: Shaped[Tensor, "*_batch query"] | None = None
    ) -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages of the values under doubly-normalized weights, which no key's bias changes."""
        query, key, query_bias, _, scale, copies = self.logits
        if self.dropout_p > 0 or copies > 1:
            return self.attend(Component(-self.over_queries(log_prior)))
        prior = _sum(query_bias, log_prior, self._no_query)
        return doubly_normalized_attention(
            query, key, self._values(), prior, self._no_key, scale=scale
        )

    def values_of(self, queries: slice) -> Float[Tensor, "*_batch chosen key"]:
        """The logits of some queries, masks and the queries' bias left out."""
        return self.logits._replace(query_bias=None).values(queries)

    def _values(self) -> Tensor:
        assert self.value is not None
        return self.value if self.copies == 1 else _repeated(self.value.mT, self.copies).mT

    def _copied(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.copies == 1 else _repeated(bias, self.copies)


class FactoredAttention:
    r"""What a normalization asks of logits through features: two fused attentions in a row.

    .. math:: a_{ij} = \sum_m p(m \mid i)\, p(j \mid m), \quad
        p(j \mid m) \propto e^{B_{mj}}, \quad
        p(m \mid i) \propto e^{A_{im} + \log \sum_j e^{B_{mj}}}

    under a softmax over keys: each feature averages the values, and each query the features. No sum
    can over- or underflow, and nothing is as large as the product of two sequences.

    Args:
        logits: Through features.
        value: What is averaged; only for the averages.
        query_mask: "*batch query" with the head axis: which queries count; all if None.
        key_mask: "*batch key" with the head axis: which keys take part; all if None.
        key_bias: Added to the logits of a key.
    """

    def __init__(
        self,
        logits: FactoredLogits,
        value: Float[Tensor, "*_batch key _value_dim"] | None = None,
        query_mask: Bool[Tensor, "*_batch _query"] | None = None,
        key_mask: Bool[Tensor, "*_batch _key"] | None = None,
        key_bias: Float[Tensor, "*_batch key"] | None = None,
    ):
        self.logits = logits
        self._key_mask, self._key_bias = key_mask, key_bias
        self._queries = FusedAttention(logits.query, query_mask=query_mask)
        self._keys = FusedAttention(logits.key, value, key_mask=key_mask, key_bias=key_bias)

    def over_queries(
        self, bias: Shaped[Tensor, "*_batch query"] | None = None
    ) -> Float[Tensor, "*_batch key"]:
        """Logsumexp over the queries that count, with a bias for each."""
        return self._keys.over_queries(self._queries.over_queries(bias))

    def over_keys(
        self, bias: Shaped[Tensor, "*_batch key"] | None = None
    ) -> Float[Tensor, "*_batch query"]:
        """Logsumexp over the keys that take part, with a bias for each."""
        total = self._queries.over_keys(self._keys.over_keys(bias))
        if self._key_mask is None:
            return total
        return torch.where(self._key_mask.any(-1, keepdim=True), total, 0.0)

    def attend(self, component: Component) -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages of the values under one softmax, times its share."""
        features = self._keys.attend(Component(component.key_bias))
        totals = self._keys.over_keys(component.key_bias)
        through = FusedAttention(self.logits.query, features.to(self.logits.query.query.dtype))
        return through.attend(Component(totals, component.weight))

    def attend_doubly_normalized(
        self, log_prior: Shaped[Tensor, "*_batch query"] | None = None
    ) -> Float[Tensor, "*_batch query _value_dim"]:
        """Averages of the values under doubly-normalized weights."""
        return self.attend(Component(-self.over_queries(log_prior)))

    def values_of(self, queries: slice) -> Float[Tensor, "*_batch chosen key"]:
        """The logits of some queries, masks left out."""
        values = self.logits.values(queries)
        return values if self._key_bias is None else values + self._key_bias[..., None, :]


def _repeated(part: Tensor, copies: int) -> Tensor:
    """Put copies of the last axis one after the other."""
    return part[..., None, :].expand(*part.shape[:-1], copies, -1).flatten(-2)


def _log(mask: Tensor, dtype: torch.dtype) -> Tensor:
    forbidden = torch.full((), -torch.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), forbidden)


def _sum(*parts: Tensor | None) -> Tensor | None:
    given = [part for part in parts if part is not None]
    if not given:
        return None
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in given) else torch.float32
    return sum((part.to(dtype) for part in given[1:]), start=given[0].to(dtype))


def _total(total: Tensor, bias: Tensor | None) -> Tensor:
    total = torch.where(total > -torch.inf, total, 0.0)
    return total if bias is None else total + bias.to(total.dtype)


def _obstacle(
    query: Tensor,
    key: Tensor,
    masks: Masks,
    logits: LogitsFunction | None,
    normalization: NormalizationFunction | None,
) -> str:
    """Why only the dense formula exists; empty if the fused one does."""
    own_logits = getattr(type(logits), "reduce", Logits.reduce)
    if logits is not None and own_logits is Logits.reduce:
        return "with logits= that do not reduce"
    own = getattr(type(normalization), "components", Normalization.components)
    if normalization is not None and own is Normalization.components:
        return "with normalization= that has no components"
    pairs = (masks.keys, masks.bias)
    if any(mask is not None and mask.shape[-2] != 1 for mask in pairs):
        return "with masks that pair queries with keys"
    return "" if query.shape[-2] and key.shape[-2] else "without a query or a key"
