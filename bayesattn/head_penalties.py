r"""Penalties on heads that are alike, to be added to a loss; the rivals of repulsive forces.

.. math:: \lVert A A^\top - I \rVert_F^2, \qquad
    \frac{1}{M(M-1)} \sum_{i \ne j} \cos^2(x_i, x_j), \qquad
    \frac1M \sum_i \log \sum_j k(x_i, \bar x_j)

The last one is the density of the heads in the space of what they do, each head against what the
others are at present: its gradient, times α M, is the repulsion of an ensemble in function space
(and times the number of layers as well, over which :class:`HeadPenalty` takes the mean).

Source:
    Lin et al. (2017), A structured self-attentive sentence embedding, arXiv:1703.03130, eq. 8.
    D'Angelo and Fortuin (2021), Repulsive deep ensembles are Bayesian, arXiv:2106.11642.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.autocasting import full_precision
from bayesattn.head_similarity import cosine_similarity, mean_over_pairs
from bayesattn.kernels import IMQ, RBF
from bayesattn.kernels.distances import widened
from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.observation import ObservedCalls

__all__ = [
    "HeadPenalty",
    "cosine_penalty",
    "density_penalty",
    "head_outputs",
    "head_weights",
    "orthogonality_penalty",
]


def orthogonality_penalty(weights: Float[Tensor, "*batch head key"]) -> Float[Tensor, "*batch"]:
    """Penalize heads that attend to the same keys, and heads that attend to many, as Lin et al. do.

    Args:
        weights: Of attention, at one query.
    """
    weights = widened(weights)
    with full_precision(weights):
        products = weights @ weights.mT
    eye = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
    return (products - eye).square().sum((-2, -1))


def cosine_penalty(rows: Float[Tensor, "*batch head dim"]) -> Float[Tensor, "*batch"]:
    """Mean squared cosine between different heads; zero for one head alone."""
    if rows.shape[-2] == 1:
        return 0 * rows.sum((-2, -1))
    return mean_over_pairs(cosine_similarity(rows).square())


def density_penalty(
    rows: Float[Tensor, "*batch head dim"], kernel: RBF | IMQ | None = None
) -> Float[Tensor, "*batch"]:
    """Mean log density of heads among what they all are at present.

    Args:
        rows: What heads do, such as their outputs.
        kernel: Of the density estimate; RBF with the median rule by default.
    """
    kernel = RBF() if kernel is None else kernel
    # The bandwidth goes by the first argument, and the gradient by the second.
    return kernel.gram(rows.detach(), rows).sum(-2).log().mean(-1)


def head_weights(call: AttentionCall) -> Float[Tensor, "row head key"]:
    """Attention weights of a call, one row for each query of each sentence."""
    weights = call.weights()
    return weights.transpose(-3, -2).flatten(0, -3)


def head_outputs(call: AttentionCall) -> Float[Tensor, "head dim"]:
    """Outputs of each head at all queries of a call, in one row."""
    return call.head_outputs.movedim(-3, 0).flatten(1)


class HeadPenalty:
    """Adds up a penalty over the attention layers of a model.

    A compiled model runs as it is written while it is observed::

        diversity = HeadPenalty(model, orthogonality_penalty)
        with diversity.observe():
            loss = cross_entropy(model(tokens), target)
        loss = loss + 0.1 * diversity.loss()

    Under data-parallel training each process has the penalty of its own part of a batch.

    Args:
        model: Any module with attention layers that :mod:`bayesattn.networks` knows.
        penalty: From rows, "... head dim", to numbers, whose mean over a layer's calls counts.
        rows: From a call to these: :func:`head_weights` (the default) or :func:`head_outputs`.

    Raises:
        ValueError: If one of these is no function.
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: Callable[[Tensor], Tensor],
        rows: Callable[[AttentionCall], Tensor] = head_weights,
    ):
        if not callable(penalty) or not callable(rows):
            raise ValueError(
                "HeadPenalty: expected functions, such as orthogonality_penalty and head_weights, "
                f"got {penalty!r} and {rows!r}"
            )
        self._penalty, self._rows = penalty, rows
        self._observed = ObservedCalls(model, "HeadPenalty")

    def observe(self) -> AbstractContextManager[None]:
        """Collect the calls of the layers within the context; earlier ones are forgotten.

        Raises:
            ValueError: If the model has no such layer.
            RuntimeError: If a layer is called without gradients, as activation checkpointing does
                with ``use_reentrant=True``.
        """
        return self._observed.observe()

    def loss(self) -> Float[Tensor, ""]:
        """Mean over layers of the mean over their calls.

        Raises:
            RuntimeError: If no call was observed.
        """
        means = []
        for placed in self._observed.calls().values():
            values = [self._penalty(self._rows(call)).mean() for _, call in placed]
            means.append(torch.stack(values).mean())
        return torch.stack(means).mean()
