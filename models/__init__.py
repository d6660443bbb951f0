"""Attention as generative models: Pyro programs to run inference on, and to learn from."""

if not __name__.startswith("bayesattn."):
    raise ImportError(
        f"import bayesattn.models, not {__name__}: under two names Python would load two copies"
    )

from bayesattn.models.attention_mixtures import AttentionMixture, VariancePrior
from bayesattn.models.component_scales import (
    AutomaticRelevance,
    ComponentScales,
    GammaProcess,
    Horseshoe,
    MultiplicativeGamma,
)
from bayesattn.models.density_guides import DensityGuide
from bayesattn.models.gibbs_alignment import AlignmentFactor
from bayesattn.models.hybrid_attention import HybridAttention
from bayesattn.models.implicit_attention import ImplicitKernelAttention
from bayesattn.models.keys_from_queries import KeysFromQueries
from bayesattn.models.likelihoods import Bernoulli, Categorical, Likelihood, Normal
from bayesattn.models.magnitude_priors import MagnitudePrior
from bayesattn.models.marginal_components import ComponentScalesAlone, MarginalComponents
from bayesattn.models.mixing import DirichletMixing, Mixing, NormMixing, UniformMixing
from bayesattn.models.pooling import AttentionPooling
from bayesattn.models.queries_from_keys import QueriesFromKeys
from bayesattn.models.self_attention import MultiHeadSelfAttention
from bayesattn.models.shared_components import SharedComponents
from bayesattn.models.spectral_mixtures import FrequencyMixture
from bayesattn.models.spectral_priors import FrequencyPairs, KernelPrior, RandomFrequencies
from bayesattn.models.spectral_regression import AttentionRegression

__all__ = [
    "AlignmentFactor",
    "AttentionMixture",
    "AttentionPooling",
    "AttentionRegression",
    "AutomaticRelevance",
    "Bernoulli",
    "Categorical",
    "ComponentScales",
    "ComponentScalesAlone",
    "DensityGuide",
    "DirichletMixing",
    "FrequencyMixture",
    "FrequencyPairs",
    "GammaProcess",
    "Horseshoe",
    "HybridAttention",
    "ImplicitKernelAttention",
    "KernelPrior",
    "KeysFromQueries",
    "Likelihood",
    "MagnitudePrior",
    "MarginalComponents",
    "Mixing",
    "MultiHeadSelfAttention",
    "MultiplicativeGamma",
    "NormMixing",
    "Normal",
    "QueriesFromKeys",
    "RandomFrequencies",
    "SharedComponents",
    "UniformMixing",
    "VariancePrior",
]
