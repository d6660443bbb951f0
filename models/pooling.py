r"""Attention pooling: each head averages a sentence's tokens, a readout tells what they mean.

.. math:: a_{hj} = \mathrm{softmax}_j(w_h \cdot \phi(x_j)), \qquad
          F_h = \sum_j a_{hj} x_j, \qquad
          \phi(x) = x / \sqrt d \ \text{ or } \ \tanh(W x)

Heads stand in a plate ``head``, so they can be the particles of one network.

Source:
    Lin et al. (2017), A structured self-attentive sentence embedding, arXiv:1703.03130.
    Heads as particles: An et al. (2020), Repulsive attention, arXiv:2009.09364.
"""

from dataclasses import dataclass

import pyro
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.functional import attention, attention_weights
from bayesattn.models.checks import check_settings
from bayesattn.models.likelihoods import Likelihood
from bayesattn.models.sentences import minibatch, normal_prior, observe, shared_dims

__all__ = ["AttentionPooling", "pool"]


@dataclass(frozen=True)
class AttentionPooling:
    """A Pyro program: attention pooling over the tokens of a sentence.

    Sites: ``query_weight`` in plate ``head``; with a hidden layer, ``hidden_weight``; those of
    :func:`~bayesattn.models.sentences.observe`. Deterministic: ``attention``, (sentence, head,
    token), and ``expected_target``.

    Attributes:
        num_heads: Number of heads.
        likelihood: Such as :class:`bayesattn.models.Categorical`.
        hidden_dim: Width of a tanh layer before the queries, shared by the heads; none by default.
        query_scale: Prior standard deviation of the queries' entries.
        readout_scale: Prior standard deviation of the readout's entries and bias.
        batch_size: Sentences drawn for each evaluation; all by default.
    """

    num_heads: int
    likelihood: Likelihood
    hidden_dim: int | None = None
    query_scale: float = 1.0
    readout_scale: float = 0.3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of each site and argument, for ArviZ."""
        return {
            "query_weight": ["head", "feature" if self.hidden_dim is None else "hidden"],
            "hidden_weight": ["hidden", "feature"],
            "attention": ["sentence", "head", "token"],
            **shared_dims(self.likelihood, "feature"),
        }

    def __call__(
        self,
        tokens: Float[Tensor, "sentence token dim"],
        mask: Bool[Tensor, "sentence token"] | None = None,
        target: Shaped[Tensor, " sentence"] | None = None,
    ) -> None:
        """Run the program; arguments: :func:`~bayesattn.models.sentences.minibatch`."""
        batch = minibatch(tokens, mask, target, self.batch_size)
        dim = tokens.shape[-1]
        hidden, width = None, dim
        if self.hidden_dim is not None:
            width = self.hidden_dim
            prior = normal_prior(tokens, width, dim, scale=dim**-0.5)
            hidden = pyro.sample("hidden_weight", prior)
        with pyro.plate("head", self.num_heads):
            query = pyro.sample("query_weight", normal_prior(tokens, width, scale=self.query_scale))
        pooled, weights = pool(query, batch.tokens, batch.mask, hidden)
        with batch.plate:
            pyro.deterministic("attention", weights, event_dim=2)
        observe(batch, pooled, self.likelihood, self.readout_scale)


def pool(
    query: Float[Tensor, "head width"],
    tokens: Float[Tensor, "sentence token dim"],
    mask: Bool[Tensor, "sentence token"] | None = None,
    hidden: Float[Tensor, "width dim"] | None = None,
) -> tuple[Float[Tensor, "sentence head dim"], Float[Tensor, "sentence head token"]]:
    """Average each sentence's tokens under each head's attention.

    Args:
        query: What each head looks for.
        tokens: Token vectors, the values of the attention.
        mask: True where there is a token, not padding; all if None.
        hidden: Of the tanh layer that turns tokens into keys; if None, tokens are keys, and the dot
            product is over the square root of their width.

    Returns:
        Averages, and attention weights; both zero where a sentence has no token.
    """
    key = tokens if hidden is None else torch.tanh(tokens @ hidden.mT)
    scale = None if hidden is None else 1.0
    query, key, value = query[:, None], key[:, None], tokens[:, None]
    pooled = attention(query, key, value, key_mask=mask, scale=scale)
    weights = attention_weights(query, key, key_mask=mask, scale=scale)
    return pooled.squeeze(-2), weights.squeeze(-2)
