r"""Taking the projections of queries and keys out of an attention layer, and putting others in.

.. math:: s_{h,ij} = c\,(W_{Q,h} x_i + b_{Q,h}) \cdot (W_{K,h} y_j + b_{K,h})

One kind of layer differs from another in where the parameters stand, which its layout says, and in
what its code lets stand there, which its exchange knows.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.networks.head_slices import HeadLayout, HeadSlice
from bayesattn.shared_projections import SharedProjections

__all__ = ["Exchange", "HeadProjections", "read_projections"]


class HeadProjections(NamedTuple):
    """Projections of heads side by side.

    Attributes:
        query_weight: Of queries.
        key_weight: Of keys; repeated where several heads share one.
        query_bias: Of queries, or None.
        key_bias: Of keys, or None.
    """

    query_weight: Float[Tensor, "head dim query_feature"]
    key_weight: Float[Tensor, "head dim key_feature"]
    query_bias: Float[Tensor, "head dim"] | None = None
    key_bias: Float[Tensor, "head dim"] | None = None

    @property
    def key_content(self) -> Float[Tensor, "head key_feature"] | None:
        """What a bias of queries adds to the logits, as a function of keys."""
        return _content(self.query_bias, self.key_weight)

    @property
    def query_content(self) -> Float[Tensor, "head query_feature"] | None:
        """What a bias of keys adds to the logits, as a function of queries."""
        return _content(self.key_bias, self.query_weight)


@runtime_checkable
class Exchange(Protocol):
    """How layers of a kind have their projections exchanged."""

    def obstacle(self, module: Any) -> str:
        """Why this layer's heads cannot share projections; empty if they can."""
        ...

    def shared(self, module: Any) -> SharedProjections | None:
        """Projections that the heads share, if they do."""
        ...

    def scale(self, module: Any) -> float:
        """Factor of the logits."""
        ...

    def mixes_queries(self, module: Any) -> bool:
        """Whether a bias of keys counts."""
        ...

    def cached_features(self, shared: SharedProjections) -> int:
        """Numbers that a cache holds for the shared key of one token."""
        ...

    def share(self, module: Any, shared: SharedProjections) -> nn.Module:
        """Let the heads share projections; the layer, changed, or another for its place."""
        ...

    def separate(self, module: Any, projections: HeadProjections) -> nn.Module:
        """Give each head projections of its own; the layer, changed, or another for its place."""
        ...


def read_projections(module: nn.Module, layout: HeadLayout) -> HeadProjections:
    """Copy the projections of a layer's queries and keys.

    Raises:
        ValueError: If they are not of one width, or the numbers of heads do not fit.
    """
    query, key = (_read(module, layout[role].weight) for role in ("query", "key"))
    if query.shape[1] != key.shape[1] or len(query) % len(key):
        raise ValueError(
            "layer: expected heads of queries and keys of one width, and a multiple of the heads "
            f"of keys, got {len(query)} of width {query.shape[1]} and {len(key)} of width "
            f"{key.shape[1]}"
        )
    biases = [layout[role].bias for role in ("query", "key")]
    of_query, of_key = (None if bias is None else _read(module, bias) for bias in biases)
    sharing = len(query) // len(key)
    key = key.repeat_interleave(sharing, 0)
    of_key = None if of_key is None else of_key.repeat_interleave(sharing, 0)
    return HeadProjections(query, key, of_query, of_key)


def _read(module: nn.Module, part: HeadSlice) -> Tensor:
    heads = part.heads(module.get_parameter(part.parameter).detach())
    return heads.clone()


def _content(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if bias is None else torch.einsum("hd,hdf->hf", bias, weight)
