"""Shared projections in Hugging Face's attention layers, which stay the modules that they are."""

from typing import Any

import torch
from torch import Tensor, nn

from bayesattn.networks.huggingface_layouts import LINEAR_NAMES, LayerNames, present_names
from bayesattn.networks.packed_projections import PackedKeys, PackedProjections, PackedQueries
from bayesattn.networks.projection_exchange import Exchange, HeadProjections
from bayesattn.networks.shared_config import SHARED, SharedConfig, underlying_config
from bayesattn.networks.torch_exchange import carry_over
from bayesattn.shared_projections import SharedProjections

__all__ = ["EXCHANGES"]

# Where a layer does something between its projections and attention, no product of weights is left.
_ROTARY = (
    "it rotates queries and keys by their positions (RoPE), so that its logits are not one "
    "bilinear form in the tokens"
)
_NORMALIZED = "it normalizes each head's queries and keys, so that its logits are no bilinear form"
_PLAIN = (nn.Linear, PackedQueries, PackedKeys)


class LinearExchange:
    """The exchange of layers with a linear map for each role.

    Args:
        choices: Names that the maps may have.
    """

    def __init__(self, choices: tuple[LayerNames, ...]) -> None:
        self._choices = choices

    def obstacle(self, module: nn.Module) -> str:
        """Norms between projections and attention, or maps that something is wrapped around."""
        names, inner = self._parts(module)
        if any(hasattr(inner, name) for name in ("q_norm", "k_norm", "query_norm", "key_norm")):
            return _NORMALIZED
        for name in (names.query, names.key):
            part = module.get_submodule(name)
            if type(part) not in _PLAIN:
                return f"its {name} is no torch.nn.Linear, but {type(part).__name__}"
        return ""

    def shared(self, module: nn.Module) -> SharedProjections | None:
        """Those that the layer was given."""
        return getattr(self._parts(module)[1], SHARED, None)

    def scale(self, module: nn.Module) -> float:
        """The layer's own."""
        inner = self._parts(module)[1]
        width = getattr(inner, "head_dim", None) or inner.attention_head_size
        return float(getattr(inner, "scaling", width**-0.5))

    def mixes_queries(self, module: nn.Module) -> bool:
        """Never: the softmax is theirs."""
        return False

    def cached_features(self, shared: SharedProjections) -> int:
        """Filled up to whole heads."""
        return PackedKeys(shared).out_features

    def share(self, module: nn.Module, shared: SharedProjections) -> nn.Module:
        """Put shared maps in the places of queries' and keys'."""
        names, inner = self._parts(module)
        self._replace(module, names.query, PackedQueries(shared))
        self._replace(module, names.key, PackedKeys(shared))
        _hold(inner, shared)
        return module

    def separate(self, module: nn.Module, projections: HeadProjections) -> nn.Module:
        """Put linear maps back."""
        names, inner = self._parts(module)
        has_bias = getattr(inner, SHARED).key_content is not None
        query, key, query_bias, key_bias = projections
        self._replace(module, names.query, _linear(query, query_bias, has_bias=has_bias))
        self._replace(module, names.key, _linear(key, key_bias, has_bias=has_bias))
        _release(inner)
        return module

    def _parts(self, module: nn.Module) -> tuple[LayerNames, Any]:
        names = present_names(module, self._choices)
        assert names is not None
        return names, module.get_submodule(names.inner)

    def _replace(self, module: nn.Module, name: str, new: nn.Module) -> None:
        old = module.get_submodule(name)
        carry_over(new, old)
        module.set_submodule(name, new.train(old.training))


class GPT2Exchange:
    """The exchange of GPT-2's layer, which has its projections side by side in one map."""

    def obstacle(self, module: Any) -> str:
        """Maps that something is wrapped around."""
        for name in ("c_attn", "q_attn") if module.is_cross_attention else ("c_attn",):
            part = getattr(module, name)
            if type(part).__name__ not in ("Conv1D", "PackedProjections", "PackedQueries"):
                return f"its {name} is no Conv1D, but {type(part).__name__}"
        return ""

    def shared(self, module: Any) -> SharedProjections | None:
        """Those that the layer was given."""
        return getattr(module, SHARED, None)

    def scale(self, module: Any) -> float:
        """The layer's own, which may hang on its depth."""
        return float(module.scaling)

    def mixes_queries(self, module: Any) -> bool:
        """Never: the softmax is theirs."""
        return False

    def cached_features(self, shared: SharedProjections) -> int:
        """Filled up to whole heads."""
        return PackedKeys(shared).out_features

    def share(self, module: Any, shared: SharedProjections) -> nn.Module:
        """Put shared maps beside that of values, and let the layer cut where they end."""
        value = _columns(module.c_attn, slice(-module.embed_dim, None))
        if module.is_cross_attention:
            _exchange(module, "q_attn", PackedQueries(shared))
            joint = PackedProjections([PackedKeys(shared)], value)
        else:
            joint = PackedProjections([PackedQueries(shared), PackedKeys(shared)], value)
        _exchange(module, "c_attn", joint)
        module.split_size = joint.sizes
        _hold(module, shared)
        return module

    def separate(self, module: Any, projections: HeadProjections) -> nn.Module:
        """Put one map for all back."""
        value = module.c_attn.value
        query, key = (
            _conv1d(value, weight, bias)
            for weight, bias in zip(projections[:2], projections[2:], strict=True)
        )
        if module.is_cross_attention:
            _exchange(module, "q_attn", query)
            _exchange(module, "c_attn", _joined(key, value))
        else:
            _exchange(module, "c_attn", _joined(query, key, value))
        module.split_size = module.embed_dim
        _release(module)
        return module


EXCHANGES: dict[str, Exchange | str] = {
    **{name: LinearExchange(choices) for name, choices in LINEAR_NAMES.items()},
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": GPT2Exchange(),
    "transformers.models.llama.modeling_llama.LlamaAttention": _ROTARY,
}


def _hold(inner: Any, shared: SharedProjections) -> None:
    setattr(inner, SHARED, shared)
    inner.config = SharedConfig(underlying_config(inner.config))


def _release(inner: Any) -> None:
    delattr(inner, SHARED)
    inner.config = underlying_config(inner.config)


def _exchange(module: nn.Module, name: str, new: nn.Module) -> None:
    old = getattr(module, name)
    carry_over(new, old)
    setattr(module, name, new.train(old.training))


def _linear(weight: Tensor, bias: Tensor | None, *, has_bias: bool) -> nn.Linear:
    heads, width, features = weight.shape
    made = nn.Linear(features, heads * width, bias=has_bias, device="meta")
    made.weight = nn.Parameter(weight.flatten(0, 1).contiguous())
    if has_bias:
        empty = weight.new_zeros(heads * width)
        made.bias = nn.Parameter(empty if bias is None else bias.flatten())
    return made


def _columns(whole: Any, columns: slice) -> Any:
    """Some outputs of a ``Conv1D`` as one of its own."""
    cls: Any = type(whole)
    part = cls.__new__(cls)
    nn.Module.__init__(part)
    part.nx = whole.nx
    for name in ("weight", "bias"):
        parameter = getattr(whole, name)
        own = nn.Parameter(
            parameter.detach()[..., columns].clone(), requires_grad=parameter.requires_grad
        )
        setattr(part, name, own)
    part.nf = part.weight.shape[1]
    return part


def _conv1d(like: Any, weight: Tensor, bias: Tensor | None) -> Any:
    part = _columns(like, slice(None))
    part.weight = nn.Parameter(weight.flatten(0, 1).mT.contiguous())
    part.nx, part.nf = part.weight.shape
    part.bias = nn.Parameter(weight.new_zeros(part.nf) if bias is None else bias.flatten())
    return part


def _joined(*parts: Any) -> Any:
    whole = _columns(parts[0], slice(None))
    whole.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts], 1))
    whole.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
    whole.nf = whole.weight.shape[1]
    return whole
