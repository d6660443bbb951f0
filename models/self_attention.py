r"""Multi-head self-attention with full query, key and value projections, all of them latent.

.. math:: A_h = \mathrm{softmax}\!\left(\frac{(X Q_h)(X K_h)^\top}{\sqrt{d_h}}\right), \qquad
          F_h = \frac1n \sum_i (A_h X V_h)_i

over the n tokens of a sentence. A readout tells what the features F of all heads mean. Heads stand
in a plate ``head``, so they can be the particles of one network.

Source:
    Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762, section 3.2.2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.functional import attention, attention_weights
from bayesattn.models.checks import check_settings
from bayesattn.models.gibbs_alignment import AlignmentFactor
from bayesattn.models.likelihoods import Likelihood
from bayesattn.models.sentences import Batch, minibatch, normal_prior, observe, shared_dims

__all__ = ["MultiHeadSelfAttention", "mean_over_tokens", "projected", "self_attend"]


@dataclass(frozen=True)
class MultiHeadSelfAttention:
    """A Pyro program: multi-head self-attention, its mean over a sentence's tokens, and a readout.

    Sites: ``query_weight``, ``key_weight``, ``value_weight`` in plate ``head``; those of
    :func:`~bayesattn.models.sentences.observe`. Deterministic: ``attention``, (sentence, head,
    query, key), and ``expected_target``. With ``alignment``, those of
    :class:`bayesattn.models.AlignmentFactor` too; the factor ``alignment`` stands beside
    observations only, so that predictions leave it out.

    Attributes:
        num_heads: Number of heads.
        head_dim: Width of each head.
        likelihood: Such as :class:`bayesattn.models.Categorical`.
        projection_scale: Prior standard deviation of each entry of a unit-scale token's projection.
        readout_scale: Prior standard deviation of the readout's entries and bias.
        batch_size: Sentences drawn for each evaluation; all by default.
        alignment: Draws queries and keys of a sentence together; none by default.
    """

    num_heads: int
    head_dim: int
    likelihood: Likelihood
    projection_scale: float = 1.0
    readout_scale: float = 0.3
    batch_size: int | None = None
    alignment: AlignmentFactor | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of each site and argument, for ArviZ."""
        return {
            "query_weight": ["head", "feature", "component"],
            "key_weight": ["head", "feature", "component"],
            "value_weight": ["head", "feature", "component"],
            "attention": ["sentence", "head", "query", "key"],
            "divergence": ["sentence", "head"],
            "unlabeled_divergence": ["unlabeled", "head"],
            "unlabeled_tokens": ["unlabeled", "unlabeled_token", "feature"],
            "unlabeled_mask": ["unlabeled", "unlabeled_token"],
            **shared_dims(self.likelihood, "component"),
        }

    def __call__(
        self,
        tokens: Float[Tensor, "sentence token dim"],
        mask: Bool[Tensor, "sentence token"] | None = None,
        target: Shaped[Tensor, " sentence"] | None = None,
        unlabeled_tokens: Float[Tensor, "unlabeled unlabeled_token dim"] | None = None,
        unlabeled_mask: Bool[Tensor, "unlabeled unlabeled_token"] | None = None,
    ) -> None:
        """Run the program; arguments: :func:`~bayesattn.models.sentences.minibatch`.

        Args:
            tokens: Token vectors, finite at padding too.
            mask: True where there is a token, not padding.
            target: One observation a sentence.
            unlabeled_tokens: Of further sentences, which only ``alignment`` sees, in minibatches of
                their own; their sites are ``unlabeled_alignment`` and ``unlabeled_divergence``.
            unlabeled_mask: True where there is a token of these.

        Raises:
            ValueError: If shapes or types do not fit, or there is no alignment to see sentences.
        """
        batch = minibatch(tokens, mask, target, self.batch_size)
        dim = tokens.shape[-1]
        prior = normal_prior(tokens, dim, self.head_dim, scale=self.projection_scale * dim**-0.5)
        with pyro.plate("head", self.num_heads):
            query = pyro.sample("query_weight", prior)
            key = pyro.sample("key_weight", prior)
            value = pyro.sample("value_weight", prior)
        attended, weights = self_attend(batch.tokens, query, key, value, batch.mask)
        with batch.plate:
            pyro.deterministic("attention", weights, event_dim=3)
        if self.alignment is not None:
            site = self.alignment.note if target is None else self.alignment
            _align(site, batch, query, key)
        if unlabeled_tokens is not None:
            if self.alignment is None:
                raise ValueError("unlabeled_tokens enter alignment only, and there is none")
            further = self._unlabeled(unlabeled_tokens, unlabeled_mask, dim)
            _align(self.alignment, further, query, key, prefix="unlabeled_")
        observe(batch, mean_over_tokens(attended, batch.mask), self.likelihood, self.readout_scale)

    def _unlabeled(self, tokens: Tensor, mask: Tensor | None, dim: int) -> Batch:
        names = {"axis": "unlabeled", "prefix": "unlabeled_"}
        batch = minibatch(tokens, mask, None, self.batch_size, **names)
        if tokens.shape[-1] != dim:
            raise ValueError(
                f"unlabeled_tokens must be as wide as tokens, {dim}, got {tokens.shape[-1]}"
            )
        return batch


def self_attend(
    tokens: Float[Tensor, "sentence token dim"],
    query_weight: Float[Tensor, "head dim component"],
    key_weight: Float[Tensor, "head dim component"],
    value_weight: Float[Tensor, "head dim value_component"],
    mask: Bool[Tensor, "sentence token"] | None = None,
) -> tuple[
    Float[Tensor, "sentence head token value_component"],
    Float[Tensor, "sentence head token token"],
]:
    """Let each token of a sentence attend to all of them, under each head's projections.

    Args:
        tokens: Token vectors.
        query_weight: Projects tokens to queries.
        key_weight: Projects tokens to keys.
        value_weight: Projects tokens to values.
        mask: True where there is a token, not padding; all if None.

    Returns:
        Averages of the values, and attention weights; zero for padding.
    """
    query, key, value = (projected(tokens, w) for w in (query_weight, key_weight, value_weight))
    attended = attention(query, key, value, query_mask=mask, key_mask=mask)
    return attended, attention_weights(query, key, query_mask=mask, key_mask=mask)


def projected(
    tokens: Float[Tensor, "sentence token dim"], weight: Float[Tensor, "head dim component"]
) -> Float[Tensor, "sentence head token component"]:
    """Token vectors under each head's projection."""
    return torch.einsum("std,hdc->shtc", tokens, weight)


def mean_over_tokens(
    values: Float[Tensor, "sentence head token component"],
    mask: Bool[Tensor, "sentence token"] | None = None,
) -> Float[Tensor, "sentence head component"]:
    """Mean over a sentence's tokens of values that are zero at padding; zero without a token."""
    if mask is None:
        return values.mean(-2)
    return values.sum(-2) / mask.sum(-1).clamp(min=1)[:, None, None]


def _align(
    site: Callable[..., object],
    batch: Batch,
    query_weight: Tensor,
    key_weight: Tensor,
    prefix: str = "",
) -> None:
    query, key = (projected(batch.tokens, weight) for weight in (query_weight, key_weight))
    with batch.plate:
        site(query, key, batch.mask, batch.mask, prefix=prefix)
