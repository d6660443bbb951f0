r"""Whether queries and keys of a head are alike, and beside it whether attention changed at all.

.. math:: q \to A^{-\top} q, \quad k \to A (k + c) \quad \text{turns} \quad
    q^\top k \;\text{ into }\; q^\top k + q^\top c

which no softmax over keys sees. So a network can bring the two clouds together, and any distance
between them to nearly nothing, while its attention stays what it was: a fall of the one is no
evidence of a change of the other, and both are to be told side by side.

Source:
    Zhang et al. (2021), Alignment attention by matching key and query distributions,
    arXiv:2110.12567, which reports the squared MMD alone.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bayesattn.attention_diagnostics import attention_statistics
from bayesattn.divergences.energy import energy_distance
from bayesattn.divergences.permutation import PermutationTest, permutation_test
from bayesattn.kernels.distances import widened
from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.taps import last_calls

__all__ = ["AlignmentStatistics", "alignment_statistics"]

# Entries of Gram matrices that are held at once.
_ENTRIES = 2**22


class AlignmentStatistics(NamedTuple):
    """How far queries and keys of each head are apart, within sentences; NaN where there are none.

    Attributes:
        squared_mmd: Mean over sentences, with a Gaussian kernel whose bandwidth is the median of
            each sentence.
        chance: The same of random splits of the points of each sentence: what it would be, in the
            mean, if they were one cloud.
        p_value: Of the permutation test of the mean, which splits within sentences.
        energy_distance: Mean over sentences.
        entropy: Of attention, in nats, mean over queries.
        num_sentences: That have a query and a key.
    """

    squared_mmd: Float[Tensor, " head"]
    chance: Float[Tensor, " head"]
    p_value: Float[Tensor, " head"]
    energy_distance: Float[Tensor, " head"]
    entropy: Float[Tensor, " head"]
    num_sentences: Int[Tensor, " head"]


def alignment_statistics(
    model: nn.Module, *, num_permutations: int = 200, seed: int | torch.Generator = 0
) -> AbstractContextManager[dict[str, AlignmentStatistics]]:
    """Collect how far queries and keys are apart, in every attention layer.

    Within the context each call of a layer puts its statistics into the dictionary, under the
    layer's name; the last call counts. Padding is left out as
    :meth:`~bayesattn.networks.AttentionCall.cloud_masks` tells it. Nothing is left on the modules::

        with alignment_statistics(model) as statistics:
            model(tokens)
        statistics["layers.0.self_attn"].p_value  # (head,)

    What the test takes for granted :func:`bayesattn.divergences.permutation_test` says.

    Args:
        model: Any module, best in evaluation mode, without dropout.
        num_permutations: Of each test.
        seed: A whole number for the same permutations at every call; a generator for new ones.

    Raises:
        ValueError: If the model has no such layer.
    """

    def statistics(call: AttentionCall) -> AlignmentStatistics:
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        return _statistics(call, num_permutations, generator)

    return last_calls(model, statistics, caller="alignment_statistics")


@torch.no_grad()
def _statistics(
    call: AttentionCall, num_permutations: int, generator: torch.Generator
) -> AlignmentStatistics:
    query, key, (query_mask, key_mask) = call.query, call.key_of_each_head(), call.cloud_masks()
    counted = query_mask.any(-1) & key_mask.any(-1)
    count = counted.sum(0)
    # Of each sentence and head the energy distance, the squared MMD, and that of random splits.
    figures = widened(query.new_zeros(2 + num_permutations, *counted.shape))
    some = max(1, _ENTRIES // (query.shape[2] + key.shape[2]) ** 2)
    places = counted.nonzero()
    for first in range(0, len(places), some):
        place = tuple(places[first : first + some].T)
        points, masks = (query[place], key[place]), (query_mask[place], key_mask[place])
        test = permutation_test(*points, *masks, num_permutations=num_permutations, seed=generator)
        energy = energy_distance(*points, *masks)
        figures[:, *place] = torch.cat([energy[None], test.statistic[None], test.null])
    # As many sentences for every head, those that do not count being zero: p stays what it is.
    p_value = PermutationTest(figures[1], figures[2:]).mean(0).p_value
    energy, squared_mmd, *splits = figures.sum(1) / count
    return AlignmentStatistics(
        squared_mmd,
        torch.stack(splits).mean(0),
        torch.where(count > 0, p_value, torch.nan),
        energy,
        _entropy(call),
        count,
    )


def _entropy(call: AttentionCall) -> Tensor:
    found = attention_statistics(call.query, call.key, **call.settings)
    query_mask, _ = call.cloud_masks()
    total = torch.where(query_mask, found.entropy, 0.0).sum((0, 2))
    return total / query_mask.sum((0, 2))
