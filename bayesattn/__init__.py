"""Attention as a Bayesian model: functions, Pyro programs, and how to find their posteriors.

Names load at first use, so that ``import bayesattn`` is light and loads no Pyro.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesattn import calibration as calibration
    from bayesattn import datasets as datasets
    from bayesattn import divergences as divergences
    from bayesattn import functional as functional
    from bayesattn import head_penalties as head_penalties
    from bayesattn import head_similarity as head_similarity
    from bayesattn import inference as inference
    from bayesattn import kernels as kernels
    from bayesattn import logits as logits
    from bayesattn import models as models
    from bayesattn import networks as networks
    from bayesattn import normalizations as normalizations
    from bayesattn import plots as plots
    from bayesattn.alignment_diagnostics import alignment_statistics as alignment_statistics
    from bayesattn.attention_changes import attention_change as attention_change
    from bayesattn.attention_changes import attention_snapshot as attention_snapshot
    from bayesattn.attention_diagnostics import attention_statistics as attention_statistics
    from bayesattn.attention_diagnostics import layer_statistics as layer_statistics
    from bayesattn.conversion import convert as convert
    from bayesattn.encoder import TransformerEncoder as TransformerEncoder
    from bayesattn.encoder import TransformerEncoderLayer as TransformerEncoderLayer
    from bayesattn.factorization import factorize as factorize
    from bayesattn.functional import attention as attention
    from bayesattn.functional import attention_weights as attention_weights
    from bayesattn.graph_layers import GraphAttention as GraphAttention
    from bayesattn.head_diagnostics import circuit_similarity as circuit_similarity
    from bayesattn.head_diagnostics import head_statistics as head_statistics
    from bayesattn.head_diagnostics import warn_of_collapse as warn_of_collapse
    from bayesattn.head_diagnostics import weight_similarity as weight_similarity
    from bayesattn.head_penalties import HeadPenalty as HeadPenalty
    from bayesattn.implicit_densities import density_draws as density_draws
    from bayesattn.implicit_densities import density_terms as density_terms
    from bayesattn.implicit_densities import sampled_outputs as sampled_outputs
    from bayesattn.multihead import MultiheadAttention as MultiheadAttention
    from bayesattn.projection_conversion import CollaborativeFit as CollaborativeFit
    from bayesattn.projection_conversion import Separate as Separate
    from bayesattn.shared_projections import Collaborative as Collaborative
    from bayesattn.structured_pooling import StructuredSelfAttention as StructuredSelfAttention

    __version__: str

__all__ = [
    "Collaborative",
    "CollaborativeFit",
    "GraphAttention",
    "HeadPenalty",
    "MultiheadAttention",
    "Separate",
    "StructuredSelfAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "__version__",
    "alignment_statistics",
    "attention",
    "attention_change",
    "attention_snapshot",
    "attention_statistics",
    "attention_weights",
    "calibration",
    "circuit_similarity",
    "convert",
    "datasets",
    "density_draws",
    "density_terms",
    "divergences",
    "factorize",
    "functional",
    "head_penalties",
    "head_similarity",
    "head_statistics",
    "inference",
    "kernels",
    "layer_statistics",
    "logits",
    "models",
    "networks",
    "normalizations",
    "plots",
    "sampled_outputs",
    "warn_of_collapse",
    "weight_similarity",
]

_MODULE_OF = {
    "Collaborative": "bayesattn.shared_projections",
    "CollaborativeFit": "bayesattn.projection_conversion",
    "GraphAttention": "bayesattn.graph_layers",
    "HeadPenalty": "bayesattn.head_penalties",
    "MultiheadAttention": "bayesattn.multihead",
    "Separate": "bayesattn.projection_conversion",
    "StructuredSelfAttention": "bayesattn.structured_pooling",
    "TransformerEncoder": "bayesattn.encoder",
    "TransformerEncoderLayer": "bayesattn.encoder",
    "alignment_statistics": "bayesattn.alignment_diagnostics",
    "attention": "bayesattn.functional",
    "attention_change": "bayesattn.attention_changes",
    "attention_snapshot": "bayesattn.attention_changes",
    "attention_statistics": "bayesattn.attention_diagnostics",
    "attention_weights": "bayesattn.functional",
    "circuit_similarity": "bayesattn.head_diagnostics",
    "convert": "bayesattn.conversion",
    "density_draws": "bayesattn.implicit_densities",
    "density_terms": "bayesattn.implicit_densities",
    "factorize": "bayesattn.factorization",
    "head_statistics": "bayesattn.head_diagnostics",
    "layer_statistics": "bayesattn.attention_diagnostics",
    "sampled_outputs": "bayesattn.implicit_densities",
    "warn_of_collapse": "bayesattn.head_diagnostics",
    "weight_similarity": "bayesattn.head_diagnostics",
}


def __getattr__(name: str) -> Any:
    """Load a public name at first use."""
    if name == "__version__":
        return metadata.version("bayesattn")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    if name in __all__:
        return importlib.import_module(f"bayesattn.{name}")
    raise AttributeError(f"module 'bayesattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
