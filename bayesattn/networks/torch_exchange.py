"""Shared projections in PyTorch's multi-head attention, and in ours."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bayesattn.attention_choices import mixes_queries, name_of_choice
from bayesattn.logits import DotProduct
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks.projection_exchange import HeadProjections
from bayesattn.shared_projections import Collaborative, SharedProjections

__all__ = ["MultiheadExchange", "carry_over"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class MultiheadExchange:
    """The exchange of ``torch.nn.MultiheadAttention`` and :class:`bayesattn.MultiheadAttention`."""

    def obstacle(self, module: Any) -> str:
        """A learned key, a zero key beside biased keys, other logits, or a forward of its own."""
        forwards = (nn.MultiheadAttention.forward, MultiheadAttention.forward)
        if type(module).forward not in forwards:
            return f"{type(module).__name__} has a forward of its own"
        if parametrize.is_parametrized(module):
            return "its weights are parametrized"
        if module.bias_k is not None:
            return "it appends a learned key (add_bias_kv), which is one head's"
        if module.add_zero_attn and module.in_proj_bias is not None:
            return (
                "it appends a key of zeros (add_zero_attn), to which a bias of keys does not apply"
            )
        logits = getattr(module, "logits", None)
        if logits is not None and type(logits) is not DotProduct:
            return (
                "its logits are no inner products of queries and keys, but "
                f"{name_of_choice(logits)}; "
                "convert(model, logits=DotProduct()) would make them such"
            )
        return ""

    def shared(self, module: Any) -> SharedProjections | None:
        """Those of our layer."""
        return getattr(module, "projections", None)

    def scale(self, module: Any) -> float:
        """One over the root of a head's width, or what the logits say."""
        given = getattr(getattr(module, "logits", None), "scale", None)
        return module.head_dim**-0.5 if given is None else float(given)

    def mixes_queries(self, module: Any) -> bool:
        """As the layer's normalization says."""
        return mixes_queries(getattr(module, "normalization", None))

    def cached_features(self, shared: SharedProjections) -> int:
        """As they are."""
        return shared.key_features

    def share(self, module: Any, shared: SharedProjections) -> MultiheadAttention:
        """One of our layers with the other parameters of this one."""
        layer = MultiheadAttention.empty_like(module, Collaborative(shared.width))
        layer.projections = shared
        layer.v_proj_weight, layer.v_proj_bias = _values(module)
        return _finished(layer, module)

    def separate(self, module: Any, projections: HeadProjections) -> MultiheadAttention:
        """One of our layers with projections of its own."""
        layer = MultiheadAttention.empty_like(module)
        weight, bias = _values(module)
        parts = [projections.query_weight.flatten(0, 1), projections.key_weight.flatten(0, 1)]
        if layer.in_proj_weight is None:
            layer.q_proj_weight, layer.k_proj_weight = map(nn.Parameter, parts)
            layer.v_proj_weight = weight
        else:
            layer.in_proj_weight = nn.Parameter(torch.cat([*parts, weight.detach()]))
        if bias is not None:
            biases = [
                torch.zeros_like(bias) if part is None else part.flatten()
                for part in (projections.query_bias, projections.key_bias)
            ]
            layer.in_proj_bias = nn.Parameter(torch.cat([*biases, bias.detach()]))
        layer.logits = None
        scale = float(module.projections.scale)
        # As near as the type that it is stored in can tell.
        rounding = max(1e-6, torch.finfo(module.projections.scale.dtype).eps)
        if abs(scale * layer.head_dim**0.5 - 1) > rounding:
            layer.logits = DotProduct(scale)
        return _finished(layer, module)


def carry_over(new: nn.Module, old: nn.Module) -> None:
    """Let hooks, and handles that remove them, go on with another module."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def _values(module: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Parameters of the values' projection; copies where they stand beside others."""
    weight, bias = module.v_proj_weight, getattr(module, "v_proj_bias", None)
    if weight is None:
        weight = _copied(module.in_proj_weight.chunk(3)[2], module.in_proj_weight)
    if module.in_proj_bias is not None:
        bias = _copied(module.in_proj_bias.chunk(3)[2], module.in_proj_bias)
    return weight, bias


def _copied(part: Tensor, whole: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(part.detach().clone(), requires_grad=whole.requires_grad)


def _finished(layer: MultiheadAttention, module: Any) -> MultiheadAttention:
    layer.out_proj = module.out_proj
    layer.normalization = getattr(module, "normalization", None)
    carry_over(layer, module)
    return layer.train(module.training)
