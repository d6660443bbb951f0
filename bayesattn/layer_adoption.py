"""What a layer takes over from one of PyTorch's or ours, and how heads come to share projections.

The layer itself is :class:`bayesattn.MultiheadAttention`.
"""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from bayesattn.attention_choices import LogitsFunction, NormalizationFunction, mixes_queries
from bayesattn.logits import DotProduct
from bayesattn.shared_projections import SharedProjections

__all__ = ["adopted_projections", "check_adoptable", "constructor_settings", "dot_product_scale"]


def check_adoptable(module: nn.MultiheadAttention, own: type[nn.MultiheadAttention]) -> None:
    """Refuse a layer that computes something else, or whose weights are parametrized.

    Args:
        module: PyTorch's layer, or one of ours.
        own: Our class.

    Raises:
        ValueError: If it is such.
    """
    if type(module).forward not in (nn.MultiheadAttention.forward, own.forward):
        raise ValueError(
            "from_torch: expected torch.nn.MultiheadAttention, got "
            f"{type(module).__name__} with a forward of its own"
        )
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        raise ValueError("from_torch: expected plain parameters, got parametrized ones")


def constructor_settings(module: nn.MultiheadAttention) -> dict[str, Any]:
    """Sizes and options of a layer, by the constructor's names."""
    shared_bias = getattr(module, "v_proj_bias", None)
    return {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "dropout": module.dropout,
        "bias": module.in_proj_bias is not None or shared_bias is not None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
        "kdim": module.kdim,
        "vdim": module.vdim,
        "batch_first": module.batch_first,
    }


def adopted_projections(
    shared: SharedProjections | None,
    normalization: NormalizationFunction | None,
    logits: LogitsFunction | None,
) -> tuple[SharedProjections | None, LogitsFunction | None]:
    """Shared projections under a scale that logits give, and the logits that are left then.

    Raises:
        ValueError: If these choices do not go with the content vectors there are.
    """
    if shared is None:
        return shared, logits
    scale, logits = dot_product_scale(logits)
    shared = shared if scale is None else shared.with_scale(scale)
    if shared.key_content is None:
        return shared, logits
    if logits is not None:
        raise ValueError(
            "logits: expected None for heads that share projections with content vectors, "
            f"which are those of the dot product, got {logits!r}"
        )
    if shared.query_content is None and mixes_queries(normalization):
        raise ValueError(
            "normalization: expected one over keys alone for heads that share projections "
            f"without a bias of keys, which it would see, got {normalization!r}; convert "
            "projections and normalization at once, or the normalization first"
        )
    return shared, logits


def dot_product_scale(
    logits: LogitsFunction | None,
) -> tuple[float | None, LogitsFunction | None]:
    """The scale that a dot product gives, and logits, of which none are left then.

    Shared projections know the scale themselves, and their content vectors need it too.
    """
    return (logits.scale, None) if type(logits) is DotProduct else (None, logits)
