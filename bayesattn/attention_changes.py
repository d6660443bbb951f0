r"""How far the attention of heads is from what it was, or from that of another model.

.. math:: \mathrm{TV}_i = \tfrac12 \sum_j \lvert a_{ij} - a'_{ij} \rvert, \qquad
    \mathrm{JS}_i = H\!\left(\tfrac{a_i + a'_i}2\right) - \tfrac{H(a_i) + H(a'_i)}2

Source:
    Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bayesattn.head_similarity import jensen_shannon
from bayesattn.kernels.distances import widened
from bayesattn.logits.implicit import GivenKernel
from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.taps import watch_attention

__all__ = ["AttentionChange", "attention_change", "attention_snapshot"]

# Entries of the weights that are held at once, each of them before and after.
_ENTRIES = 2**22
_CHOICES = ("logits", "normalization")


class AttentionChange(NamedTuple):
    """How far the attention of each head is from what it was, mean over queries.

    Attributes:
        total_variation: Share of the attention that went to other keys, in [0, 1].
        jensen_shannon: In [0, log 2] nats.
        num_queries: How many were compared, in all sentences.
    """

    total_variation: Float[Tensor, " head"]
    jensen_shannon: Float[Tensor, " head"]
    num_queries: Int[Tensor, " head"]


@contextmanager
def attention_snapshot(model: nn.Module) -> Iterator[dict[str, list[AttentionCall]]]:
    """Collect calls as :func:`bayesattn.networks.attention_calls` does, for comparisons later.

    They keep what weights are made of, and nothing else, in copies that training does not change::

        with attention_snapshot(model) as before:
            model(tokens)
        ...
        with attention_snapshot(model) as after:
            model(tokens)
        attention_change(before, after)["layers.0.self_attn"].total_variation  # (head,)

    Args:
        model: Any module, best in evaluation mode, without dropout.

    Yields:
        For each layer, the calls so far, without values, outputs and gradients.
    """
    calls: dict[str, list[AttentionCall]] = {}
    with watch_attention(model, lambda name, call: calls[name].append(_copied(call))) as layers:
        calls |= {name: [] for name in layers}
        yield calls


@torch.no_grad()
def attention_change(
    before: Mapping[str, Sequence[AttentionCall]], after: Mapping[str, Sequence[AttentionCall]]
) -> dict[str, AttentionChange]:
    """Compare the attention of one model at two times, or of two models, on the same inputs.

    Weights are formed for some sentences of one layer at a time.

    Args:
        before: Calls of each layer, of :func:`attention_snapshot`; or of
            :func:`bayesattn.networks.attention_calls`, where the models are two.
        after: As many calls of the same layers, of the same tokens.

    Returns:
        For each layer that was called.

    Raises:
        ValueError: If layers, numbers of calls, shapes or padding differ, nothing was called, or
            calls before share learned parts with those after, so that they are not what they were.
    """
    if set(before) != set(after):
        raise ValueError(
            f"before and after: expected the same layers, got {sorted(before)} and {sorted(after)}"
        )
    changes = {}
    for name, calls in before.items():
        others = after[name]
        if len(calls) != len(others):
            raise ValueError(
                f"{name or 'the layer'}: expected as many calls after as before, got "
                f"{len(others)} and {len(calls)}"
            )
        if calls:
            pairs = zip(calls, others, strict=True)
            sums = torch.stack([_compared(name, *pair) for pair in pairs]).sum(0)
            variation, divergence, count = sums
            changes[name] = AttentionChange(variation / count, divergence / count, count.long())
    if not changes:
        raise ValueError("before: expected a call of an attention layer, got none")
    return changes


def _compared(name: str, before: AttentionCall, after: AttentionCall) -> Tensor:
    """Sums over queries of total variation and of divergence, and their number, "3 head"."""
    _check_pair(name, before, after)
    query_mask, _ = before.cloud_masks()
    num_sentences, num_heads, num_queries, _ = before.query.shape
    some = max(1, _ENTRIES // (num_heads * num_queries * before.key.shape[2]))
    total = 0.0
    for first in range(0, num_sentences, some):
        rows = slice(first, first + some)
        pair = [widened(_part(call, rows).weights()) for call in (before, after)]
        pair = torch.stack(pair, 2)
        mask = query_mask[rows]
        count = mask.sum(-1).to(pair.dtype)
        divergence = jensen_shannon(pair, mask)[..., 0, 1]
        variation = (pair[:, :, 0] - pair[:, :, 1]).abs().sum(-1) / 2
        sums = [(variation * mask).sum(-1), torch.where(count > 0, divergence * count, 0.0), count]
        total = total + torch.stack(sums).sum(1)
    assert isinstance(total, Tensor)
    return total


def _check_pair(name: str, before: AttentionCall, after: AttentionCall) -> None:
    name = name or "the layer"
    shapes = [(*call.query.shape[:3], call.key.shape[2]) for call in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name}: expected weights of one shape 'batch head query key' before and after, got "
            f"{shapes[0]} and {shapes[1]}"
        )
    masks = [call.cloud_masks() for call in (before, after)]
    if not all(torch.equal(*pair) for pair in zip(*masks, strict=True)):
        raise ValueError(f"{name}: expected the same padding before and after, found another")
    if before is not after and _shares_learned_parts(before, after):
        raise ValueError(
            f"{name}: its calls before and after share learned parts of attention, whose values "
            "before are lost; record both with attention_snapshot"
        )


def _shares_learned_parts(before: AttentionCall, after: AttentionCall) -> bool:
    if before.query.data_ptr() == after.query.data_ptr():
        # Such as queries that are parameters themselves.
        return True
    choices = [[call[4].get(choice) for choice in _CHOICES] for call in (before, after)]
    return any(
        one is other and isinstance(one, nn.Module) and any(True for _ in one.parameters())
        for one, other in zip(*choices, strict=True)
    )


def _part(call: AttentionCall, rows: slice) -> AttentionCall:
    """The call of some sentences."""
    size = len(call.query)
    if size == 1:
        return call
    # Masks may lack the axis of sentences, or have it of size one.
    ranks = {"attn_mask": 4, "query_mask": 2, "key_mask": 2}
    settings = dict(call.settings)
    for name, rank in ranks.items():
        mask = settings.get(name)
        if mask is not None and mask.ndim == rank and len(mask) == size:
            settings[name] = mask[rows]
    logits = settings.get("logits")
    if isinstance(logits, GivenKernel):
        settings["logits"] = logits._replace(kernel=logits.kernel.of_sequences(rows))
    tensors = {name: getattr(call, name)[rows] for name in ("query", "key", "value")}
    return call._replace(**tensors, head_outputs=call.head_outputs[rows], settings=settings)


@torch.no_grad()
def _copied(call: AttentionCall) -> AttentionCall:
    def copied(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.clone()
        return copy.deepcopy(part) if isinstance(part, nn.Module | GivenKernel) else part

    return call._replace(
        query=copied(call.query),
        key=copied(call.key),
        value=copied(call.value[..., :0]),
        head_outputs=copied(call.head_outputs[..., :0]),
        # Of graphs, by place: masks of all pairs are not formed yet.
        settings={name: copied(part) for name, part in call[4].items()},
    )
