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
    from bayesattn import inference as inference
    from bayesattn import kernels as kernels
    from bayesattn import models as models
    from bayesattn import networks as networks
    from bayesattn import normalizations as normalizations
    from bayesattn import plots as plots
    from bayesattn.attention_diagnostics import attention_statistics as attention_statistics
    from bayesattn.attention_diagnostics import layer_statistics as layer_statistics
    from bayesattn.encoder import TransformerEncoder as TransformerEncoder
    from bayesattn.encoder import TransformerEncoderLayer as TransformerEncoderLayer
    from bayesattn.functional import attention as attention
    from bayesattn.functional import attention_weights as attention_weights
    from bayesattn.multihead import MultiheadAttention as MultiheadAttention
    from bayesattn.structured_pooling import StructuredSelfAttention as StructuredSelfAttention

    __version__: str

__all__ = [
    "MultiheadAttention",
    "StructuredSelfAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "__version__",
    "attention",
    "attention_statistics",
    "attention_weights",
    "calibration",
    "datasets",
    "divergences",
    "functional",
    "inference",
    "kernels",
    "layer_statistics",
    "models",
    "networks",
    "normalizations",
    "plots",
]

_MODULE_OF = {
    "MultiheadAttention": "bayesattn.multihead",
    "StructuredSelfAttention": "bayesattn.structured_pooling",
    "TransformerEncoder": "bayesattn.encoder",
    "TransformerEncoderLayer": "bayesattn.encoder",
    "attention": "bayesattn.functional",
    "attention_statistics": "bayesattn.attention_diagnostics",
    "attention_weights": "bayesattn.functional",
    "layer_statistics": "bayesattn.attention_diagnostics",
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
