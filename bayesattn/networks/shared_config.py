"""Hugging Face's configuration as a layer sees it whose heads share projections.

The model's own configuration stays as it is, so its masks and ``set_attn_implementation`` do too.
Such a layer reads another name in it, under which attention first unpacks queries and keys.
"""

from typing import Any

from torch import Tensor, nn

from bayesattn.networks.interface_functions import (
    AttentionFunction,
    attention_function,
    attention_functions,
    check_implementation,
)
from bayesattn.shared_projections import SharedProjections

__all__ = ["SHARED", "SharedConfig", "underlying_config"]

# Under which a layer holds its shared projections.
SHARED = "shared_projections"
_PREFIX = "shared projections, "


class SharedConfig:
    """A configuration that names another implementation, and is the given one in all else."""

    def __init__(self, base: Any) -> None:
        object.__setattr__(self, "base", base)

    @property
    def _attn_implementation(self) -> str:
        implementation = self.base._attn_implementation or "eager"
        name = _PREFIX + implementation
        functions = attention_functions()
        if name not in functions():
            # A tap that looks on calls what it covers, which was checked.
            check_implementation(implementation, functions().get(implementation))
            functions.register(name, _unpacking(implementation))
        return name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.base, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedConfig, (self.base,)


def underlying_config(config: Any) -> Any:
    """Return the model's own configuration."""
    return config.base if isinstance(config, SharedConfig) else config


def _unpacking(implementation: str) -> AttentionFunction:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        shared: Any = getattr(module, SHARED)
        if kwargs.get("scaling") is None:
            kwargs["scaling"] = shared.head_dim**-0.5
        query, key = _unpacked(shared, query, key)
        call = attention_function(module, implementation)
        return call(module, query, key, value, attention_mask, **kwargs)

    return attend


def _unpacked(shared: SharedProjections, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of all heads, from features that stood in the places of heads."""
    packed_query, packed_key = (part.transpose(1, 2).flatten(2) for part in (query, key))
    packed_query = packed_query[..., : len(shared.packed_query_weight())]
    packed_key = packed_key[..., : len(shared.packed_key_weight())]
    mixed = shared.mixed(packed_query, is_scaled=False)
    return mixed, shared.extended(packed_key)[:, None].expand(-1, shared.num_heads, -1, -1)
