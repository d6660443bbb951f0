"""Attention as generative models: Pyro programs to run inference on, and to learn from."""

if not __name__.startswith("bayesattn."):
    raise ImportError(
        f"import bayesattn.models, not {__name__}: under two names Python would load two copies"
    )

from bayesattn.models.likelihoods import Bernoulli, Categorical, Likelihood, Normal
from bayesattn.models.pooling import AttentionPooling
from bayesattn.models.self_attention import MultiHeadSelfAttention

__all__ = [
    "AttentionPooling",
    "Bernoulli",
    "Categorical",
    "Likelihood",
    "MultiHeadSelfAttention",
    "Normal",
]
