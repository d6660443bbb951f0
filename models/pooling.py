r"""Attention pooling: each head averages a sentence's tokens under its own attention, a readout decides.

.. math:: a_{hj} = \mathrm{softmax}_j(w_h \cdot \phi(x_j)), \qquad
          o = R\, [\textstyle\sum_j a_{hj} x_j]_h + b, \qquad
          \phi(x) = x / \sqrt d \ \text{ or } \ \tanh(W x)

Heads stand in a plate ``head``, so they can be the particles of one network.

Source:
    Lin et al. (2017), A structured self-attentive sentence embedding, arXiv:1703.03130.
    An et al. (2020), Repulsive attention, arXiv:2009.09364, for heads as particles.
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

__all__ = ["AttentionPooling"]


@dataclass(frozen=True)
class AttentionPooling:
    """A Pyro program: multi-head attention pooling over the tokens of a sentence.

    Sites: ``query_weight`` in plate ``head``; ``hidden_weight`` where there is a hidden layer;
    ``readout_weight`` and ``readout_bias``; the likelihood's own; ``target`` in plate ``sentence``.
    Deterministic: ``attention`` (sentence, head, token), ``expected_target``.

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
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least one, got {self.num_heads}")
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least one, got {self.hidden_dim}")

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of all axes of each site, for ArviZ."""
        return {
            "query_weight": ["head", "feature" if self.hidden_dim is None else "hidden"],
            "hidden_weight": ["hidden", "feature"],
            "readout_weight": ["pooled_feature", "output"],
            "readout_bias": ["output"],
            "attention": ["sentence", "head", "token"],
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
        width = dim if self.hidden_dim is None else self.hidden_dim
        with pyro.plate("head", self.num_heads):
            prior = dist.Normal(tokens.new_zeros(width), self.query_scale).to_event(1)
            query = pyro.sample("query_weight", prior)
        hidden = None
        if self.hidden_dim is not None:
            prior = dist.Normal(tokens.new_zeros(width, dim), dim**-0.5).to_event(2)
            hidden = pyro.sample("hidden_weight", prior)
        shape = (self.num_heads * dim, outputs)
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
        pooled, weights = pool(query, tokens, mask, hidden)
        pyro.deterministic("attention", weights, event_dim=3)
        distribution, expected = self.likelihood(pooled.flatten(1) @ readout + bias)
        pyro.deterministic("expected_target", expected, event_dim=expected.ndim)
        with sentences:
            pyro.sample("target", distribution, obs=target)


def pool(
    query: Float[Tensor, "head width"],
    tokens: Float[Tensor, "sentence token dim"],
    mask: Bool[Tensor, "sentence token"] | None,
    hidden: Float[Tensor, "width dim"] | None = None,
) -> tuple[Float[Tensor, "sentence head dim"], Float[Tensor, "sentence head token"]]:
    """Average each sentence's tokens under each head's attention; return averages and weights."""
    key = tokens if hidden is None else torch.tanh(tokens @ hidden.mT)
    scale = None if hidden is None else 1.0
    options = {"key_mask": mask, "scale": scale}
    weights = attention_weights(query[:, None], key[:, None], **options)
    averages = attention(query[:, None], key[:, None], tokens[:, None], **options)
    return averages[..., 0, :], weights[..., 0, :]
