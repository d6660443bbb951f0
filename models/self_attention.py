r"""Multi-head self-attention with full query, key and value projections, all of them latent.

.. math:: o_h = \mathrm{softmax}\!\left(\frac{(X Q_h)(X K_h)^\top}{\sqrt{d_h}}\right) X V_h, \qquad
          y \sim p(\,\cdot \mid R\, \overline{[o_1, \dots, o_H]} + b)

The bar is the mean over a sentence's tokens. Heads stand in a plate ``head``.

Source:
    Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762.
"""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.functional import attention, attention_weights
from bayesattn.models.checks import check_batch
from bayesattn.models.likelihoods import Likelihood

__all__ = ["MultiHeadSelfAttention"]


@dataclass(frozen=True)
class MultiHeadSelfAttention:
    """A Pyro program: multi-head self-attention, mean pooling and a readout.

    Sites: ``query_weight``, ``key_weight``, ``value_weight`` in plate ``head``; ``readout_weight`` and
    ``readout_bias``; the likelihood's own; ``target`` in plate ``sentence``. Deterministic:
    ``attention`` (sentence, head, query, key), ``expected_target``.

    Attributes:
        num_heads: Number of heads.
        head_dim: Width of each head.
        likelihood: Such as :class:`bayesattn.models.Categorical`.
        projection_scale: Prior standard deviation of a projected unit-scale token's entries.
        readout_scale: Prior standard deviation of the readout's entries and bias.
        batch_size: Sentences drawn for each evaluation; all by default.
    """

    num_heads: int
    head_dim: int
    likelihood: Likelihood
    projection_scale: float = 1.0
    readout_scale: float = 0.3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least one, got {getattr(self, name)}")

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of all axes of each site, for ArviZ."""
        return {
            "query_weight": ["head", "feature", "component"],
            "key_weight": ["head", "feature", "component"],
            "value_weight": ["head", "feature", "component"],
            "readout_weight": ["pooled_feature", "output"],
            "readout_bias": ["output"],
            "attention": ["sentence", "head", "query", "key"],
            **self.likelihood.dims,
        }

    def __call__(
        self,
        tokens: Float[Tensor, "sentence token dim"],
        mask: Bool[Tensor, "sentence token"] | None = None,
        target: Shaped[Tensor, " sentence"] | None = None,
    ) -> None:
        """Run the program.

        Args:
            tokens: Token vectors.
            mask: True where there is a token, not padding; all by default.
            target: Observations; sampled where None.

        Raises:
            ValueError: If shapes do not fit together.
        """
        check_batch(tokens, mask, target)
        dim, outputs = tokens.shape[-1], self.likelihood.num_outputs
        prior = dist.Normal(
            tokens.new_zeros(dim, self.head_dim), self.projection_scale * dim**-0.5
        ).to_event(2)
        with pyro.plate("head", self.num_heads):
            query_weight = pyro.sample("query_weight", prior)
            key_weight = pyro.sample("key_weight", prior)
            value_weight = pyro.sample("value_weight", prior)
        shape = (self.num_heads * self.head_dim, outputs)
        readout = pyro.sample(
            "readout_weight", dist.Normal(tokens.new_zeros(shape), self.readout_scale).to_event(2)
        )
        bias = pyro.sample(
            "readout_bias",
            dist.Normal(tokens.new_zeros(outputs), self.readout_scale).to_event(1),
        )
        sentences = pyro.plate("sentence", len(tokens), subsample_size=self.batch_size)
        if self.batch_size is not None:
            index = sentences.indices
            tokens, mask, target = (
                None if part is None else part[index] for part in (tokens, mask, target)
            )
        attended, weights = attend(tokens, mask, query_weight, key_weight, value_weight)
        pyro.deterministic("attention", weights, event_dim=4)
        pooled = masked_mean(attended, mask)
        distribution, expected = self.likelihood(pooled @ readout + bias)
        pyro.deterministic("expected_target", expected, event_dim=expected.ndim)
        with sentences:
            pyro.sample("target", distribution, obs=target)


def attend(
    tokens: Float[Tensor, "sentence token dim"],
    mask: Bool[Tensor, "sentence token"] | None,
    query_weight: Float[Tensor, "head dim component"],
    key_weight: Float[Tensor, "head dim component"],
    value_weight: Float[Tensor, "head dim component"],
) -> tuple[Float[Tensor, "sentence token features"], Float[Tensor, "sentence head token token"]]:
    """Self-attention of every head, heads side by side, and the attention weights."""
    query, key, value = (
        torch.einsum("std,hdc->shtc", tokens, weight)
        for weight in (query_weight, key_weight, value_weight)
    )
    weights = attention_weights(query, key, key_mask=mask)
    attended = attention(query, key, value, key_mask=mask)
    return attended.transpose(1, 2).flatten(2), weights


def masked_mean(
    values: Float[Tensor, "sentence token dim"], mask: Bool[Tensor, "sentence token"] | None
) -> Float[Tensor, "sentence dim"]:
    """Mean over a sentence's tokens, padding left out; zero where there is no token."""
    if mask is None:
        return values.mean(1)
    total = torch.where(mask[..., None], values, 0.0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)
