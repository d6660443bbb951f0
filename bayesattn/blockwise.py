r"""Attention's logsumexp and gradients, block by block: exact, without ever holding all weights.

.. math:: \ell_i = \log \sum_j e^{s_{ij} + b_j}, \qquad A_{ij} = e^{s_{ij} + b_j - \ell_i}, \qquad
    s_{ij} = \alpha\, q_i \cdot k_j

Each block is some rows against all columns, small enough for a processor's cache. What is added to
rows or columns of a matrix product rides in it as one more column of its factors, so that between
two products there is one elementwise pass. The gradient of attention, and that of doubly-normalized
attention too, takes five matrix products and one exponential for each entry: what softmax
attention's own takes, and products with a vector or two besides.

Plain functions here, on one batch axis and without autograd; :mod:`bayesattn.fused_operators` makes
operators of them.

Source:
    Blocks: Dao et al. (2022), FlashAttention, arXiv:2205.14135. The one-sweep gradient of the
    doubly-normalized weights: derived in :func:`attention_gradient`.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["attention_gradient", "blockwise_logsumexp", "logsumexp_gradient"]

# A block of so many entries stays in cache: 2 MiB in single precision. Fewer rows than these would
# leave its matrix products too flat.
_BLOCK_ENTRIES, _FEWEST_ROWS = 2**19, 256


def blockwise_logsumexp(
    query: Float[Tensor, "batch query dim"],
    key: Float[Tensor, "batch key dim"],
    key_bias: Float[Tensor, "batch key"] | None,
    scale: float,
) -> Float[Tensor, "batch query"]:
    """Logsumexp of each query's logits.

    Args:
        query: Not scaled yet.
        key: As wide as the queries.
        key_bias: Finite, added to the logits; none if None.
        scale: Of the inner products.
    """
    result = query.new_full(query.shape[:2], -torch.inf)
    if key.shape[1] == 0:
        return result
    for batch, blocks in _groups(query, key):
        left, right = _with_bias(query[batch] * scale, key[batch], _of(key_bias, batch))
        for rows, buffers in blocks:
            logits = torch.bmm(left[:, rows], right.mT, out=buffers[0])
            largest = logits.amax(-1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(-1)
            result[batch, rows] = total.log_().add_(largest.squeeze(-1))
    return result


def logsumexp_gradient(
    gradient: Float[Tensor, "batch query"],
    query: Float[Tensor, "batch query dim"],
    key: Float[Tensor, "batch key dim"],
    key_bias: Float[Tensor, "batch key"] | None,
    logsumexp: Float[Tensor, "batch query"],
    scale: float,
) -> tuple[
    Float[Tensor, "batch query dim"], Float[Tensor, "batch key dim"], Float[Tensor, "batch key"]
]:
    """Gradients of :func:`blockwise_logsumexp` with regard to query, key and key bias."""
    # Sums over blocks gather faster with the long axis last.
    to_query, to_key = query.new_empty(query.shape), key.new_zeros(key.mT.shape)
    to_bias = key.new_zeros(key.shape[:2])
    for batch, blocks in _groups(query, key):
        bias, total = _of(key_bias, batch), logsumexp[batch]
        left, right = _with_bias(query[batch] * scale, key[batch], bias, total)
        for rows, buffers in blocks:
            weights = torch.bmm(left[:, rows], right.mT, out=buffers[0]).exp_()
            weights.mul_(gradient[batch, rows, None])
            torch.bmm(weights, key[batch], out=to_query[batch, rows])
            to_key[batch].baddbmm_(query[batch, rows].mT, weights)
            if bias is not None:
                to_bias[batch] += weights.sum(-2)
    return to_query.mul_(scale), to_key.mT.contiguous().mul_(scale), to_bias


def attention_gradient(
    gradient: Float[Tensor, "batch query value_dim"],
    query: Float[Tensor, "batch query dim"],
    key: Float[Tensor, "batch key dim"],
    value: Float[Tensor, "batch key value_dim"],
    key_bias: Float[Tensor, "batch key"],
    output: Float[Tensor, "batch query value_dim"],
    logsumexp: Float[Tensor, "batch query"],
    query_mass: Float[Tensor, "batch query"] | None,
    scale: float,
) -> tuple[
    Float[Tensor, "batch query dim"],
    Float[Tensor, "batch key dim"],
    Float[Tensor, "batch key value_dim"],
    Float[Tensor, "batch key"],
    Float[Tensor, "batch query"],
]:
    r"""Gradients of attention with a bias for each key, in one sweep over blocks of keys.

    With :math:`P_{ij} = \dot o_i \cdot v_j` and :math:`\Delta_i = \dot o_i \cdot o_i`, the gradient
    at the logits is :math:`A_{ij} (P_{ij} - \Delta_i)`, and its column sums :math:`g_j` are that of
    the bias. Where the bias is itself :math:`-\log \sum_i e^{s_{ij} + a_i}`, its own gradient adds
    :math:`-\xi_{ij} g_j` with :math:`\xi_{ij} = e^{s_{ij} + a_i + b_j} = A_{ij} r_i` and
    :math:`r_i = e^{\ell_i + a_i}`. A block has all queries, so :math:`g_j` is complete in it.

    Args:
        gradient: Of the loss at the result, :math:`\dot o`.
        query: Not scaled yet.
        key: As wide as the queries.
        value: One for each key.
        key_bias: Finite, :math:`b`.
        output: Attention's result, :math:`o`.
        logsumexp: :math:`\ell`.
        query_mass: :math:`r`, if the bias comes from the logits so.
        scale: Of the inner products.

    Returns:
        Gradients of query, key, value, key bias (zeros if it comes from the logits), and query bias
        :math:`a` (zeros if there is none).
    """
    to_value, to_bias = value.new_empty(value.shape), key.new_zeros(key.shape[:2])
    to_query, to_key = query.new_zeros(query.mT.shape), key.new_empty(key.shape)
    to_query_bias = query.new_zeros(query.shape[:2])
    for batch, blocks in _groups(key, query, num_buffers=2):
        left, right = _with_bias(
            query[batch] * scale, key[batch], key_bias[batch], logsumexp[batch]
        )
        mass = _of(query_mass, batch)
        averages = (gradient[batch] * output[batch]).sum(-1, keepdim=True)
        columns = [gradient[batch], averages]
        upstream = torch.cat(columns if mass is None else [*columns, mass[..., None]], -1)
        for rows, buffers in blocks:
            weights = torch.bmm(right[:, rows], left.mT, out=buffers[0]).exp_()
            sums = torch.bmm(weights, gradient[batch], out=to_value[batch, rows])
            excess = (sums * value[batch, rows]).sum(-1)
            excess -= torch.bmm(weights, averages).squeeze(-1)
            factors = [value[batch, rows], value.new_full((*excess.shape, 1), -1.0)]
            if mass is None:
                to_bias[batch, rows] = excess
            else:
                factors.append(-excess[..., None])
                to_query_bias[batch] -= torch.bmm(excess[:, None], weights).squeeze(1) * mass
            inner = torch.bmm(torch.cat(factors, -1), upstream.mT, out=buffers[1]).mul_(weights)
            torch.bmm(inner, query[batch], out=to_key[batch, rows])
            to_query[batch].baddbmm_(key[batch, rows].mT, inner)
    to_query = to_query.mT.contiguous().mul_(scale)
    return to_query, to_key.mul_(scale), to_value, to_bias, to_query_bias


def _with_bias(
    query: Float[Tensor, "batch query dim"],
    key: Float[Tensor, "batch key dim"],
    key_bias: Float[Tensor, "batch key"] | None,
    logsumexp: Float[Tensor, "batch query"] | None = None,
) -> tuple[Float[Tensor, "batch query wide"], Float[Tensor, "batch key wide"]]:
    """Factors whose product is the logits, with the bias and less the logsumexp where given."""
    left, right = [query], [key]
    if key_bias is not None:
        left.append(query.new_ones(*query.shape[:2], 1))
        right.append(key_bias[..., None])
    if logsumexp is not None:
        left.append(logsumexp[..., None])
        right.append(key.new_full((*key.shape[:2], 1), -1.0))
    return torch.cat(left, -1), torch.cat(right, -1)


def _of(part: Tensor | None, batch: slice) -> Tensor | None:
    return None if part is None else part[batch]


Blocks = Iterator[tuple[slice, list[Float[Tensor, "group block column"]]]]


def _groups(
    rows: Float[Tensor, "batch row dim"], columns: Float[Tensor, "batch column dim"], num_buffers=1
) -> Iterator[tuple[slice, Blocks]]:
    """Parts of the batch, each with its blocks of rows and where to put rows by columns."""
    num_rows, num_columns = rows.shape[1], columns.shape[1]
    height = min(num_rows, max(_FEWEST_ROWS, _BLOCK_ENTRIES // max(1, num_columns)))
    depth = max(1, min(rows.shape[0], _BLOCK_ENTRIES // max(1, height * num_columns)))
    memory = [rows.new_empty(depth * height * num_columns) for _ in range(num_buffers)]

    def blocks(size: int) -> Blocks:
        for top in range(0, num_rows, height):
            block = slice(top, min(top + height, num_rows))
            shape = (size, block.stop - top, num_columns)
            yield block, [part[: math.prod(shape)].view(shape) for part in memory]

    for first in range(0, rows.shape[0], depth):
        batch = slice(first, min(first + depth, rows.shape[0]))
        yield batch, blocks(batch.stop - first)
