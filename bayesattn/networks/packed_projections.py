"""Modules in the places of a Hugging Face layer's linear maps, where heads share projections.

Such a layer cuts what comes into heads of one width. What heads share is handed through this in
pieces of that width, filled up with zeros, and put together again where attention begins; so the
layer's code, its masks and its cache stay as they are, and the cache holds the shared keys.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.shared_projections import SharedProjections

__all__ = ["PackedKeys", "PackedProjections", "PackedQueries"]


class _Packed(nn.Module):
    """A part of shared projections, which stand elsewhere in the layer and are not held again.

    Args:
        shared: The projections.
    """

    def __init__(self, shared: SharedProjections) -> None:
        super().__init__()
        # Not as a submodule, so that parameters are there once.
        self._shared = [shared]

    @property
    def shared(self) -> SharedProjections:
        """The projections."""
        return self._shared[0]

    @property
    def out_features(self) -> int:
        """Number of features, zeros included."""
        return -(-len(self._weight()) // self.shared.head_dim) * self.shared.head_dim

    def forward(
        self, tokens: Float[Tensor, "*batch token feature"]
    ) -> Float[Tensor, "*batch token packed"]:
        """Project, and fill up with zeros."""
        features = F.linear(tokens, self._weight())
        return F.pad(features, (0, self.out_features - features.shape[-1]))

    def _weight(self) -> Tensor:
        raise NotImplementedError


class PackedQueries(_Packed):
    """What heads share of their queries."""

    def _weight(self) -> Tensor:
        return self.shared.packed_query_weight()


class PackedKeys(_Packed):
    """What heads share of their keys."""

    def _weight(self) -> Tensor:
        return self.shared.packed_key_weight()


class PackedProjections(nn.Module):
    """Several projections side by side, as GPT-2 has them.

    Args:
        parts: Shared ones.
        value: Of values, as it was.
    """

    def __init__(self, parts: list[_Packed], value: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.value = value

    @property
    def sizes(self) -> list[int]:
        """Number of features of each."""
        parts: Any = self.parts
        value: Any = self.value
        return [*(part.out_features for part in parts), value.weight.shape[1]]

    def forward(
        self, tokens: Float[Tensor, "*batch token feature"]
    ) -> Float[Tensor, "*batch token packed"]:
        """Project to all."""
        return torch.cat([*(part(tokens) for part in self.parts), self.value(tokens)], -1)
