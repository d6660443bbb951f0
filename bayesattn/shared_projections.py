r"""Collaborative attention: queries and keys of all heads from projections that the heads share.

.. math:: s_{h,ij} = c\, (X W_Q)_i^\top \operatorname{diag}(m_h)\, (Y W_K)_j + c\, v_h \cdot y_j

Heads of one width side by side are the special case in which each component is mixed into one head
alone. A bias of the queries lives on as the content vector :math:`v_h = W_{K,h}^\top b_{Q,h}`; one
of the keys moves all logits of a query alike, which a softmax does not see.

Source:
    Cordonnier, Loukas and Jaggi (2020), Multi-head attention: collaborate instead of concatenate,
    arXiv:2006.16362. The scale c is that of the layer which is replaced, where the released code
    takes the new width's; content vectors are scaled with the logits.
"""

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.argument_checks import check_count

__all__ = ["Collaborative", "SharedProjections", "block_mixing"]

Number = float | int


@dataclass(frozen=True)
class Collaborative:
    """A choice of projections: heads share those of queries and of keys.

    Attributes:
        width: Number of shared components, in place of heads times width of a head.

    Raises:
        ValueError: If the width is no whole number, or not positive.
    """

    width: int

    def __post_init__(self) -> None:
        check_count("width", self.width)


def block_mixing(
    num_heads: int,
    head_dim: int,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "head component"]:
    """Mixing of heads that share nothing: ones for a head's own components, zeros for others'."""
    own = torch.eye(num_heads, device=device, dtype=dtype)
    return own.repeat_interleave(head_dim, 1)


class SharedProjections(nn.Module):
    """Projections of queries and keys that the heads share, mixed on the queries' side.

    Logits are inner products of what :meth:`queries` and :meth:`keys` give, which have one more
    feature for each content vector: keys are the same for all heads, so that a cache of them
    holds ``width`` features a token, and as many as there are heads for the content.

    Args:
        num_heads: Number of heads.
        width: Number of shared components.
        head_dim: Width of a head of the layer that this one stands for; gives the scale.
        query_dim: Width of what asks.
        key_dim: Width of what is asked; that of what asks if None.
        key_content: Whether keys have content vectors, one for each head.
        query_content: Whether queries have some too, as a bias of keys becomes where the
            normalization runs over queries.
        num_packed: How many projections of one size share an initialization with these; see
            :meth:`reset_parameters`.
        device: Where the parameters are.
        dtype: Type of the parameters.

    Attributes:
        query_weight: "component query_feature".
        key_weight: "component key_feature".
        mixing: "head component".
        key_content: "head key_feature", or None.
        query_content: "head query_feature", or None.
        scale: Of the logits; a buffer, since it is that of the original head's width.

    Raises:
        ValueError: If a size is not positive.
    """

    scale: Tensor

    def __init__(
        self,
        num_heads: int,
        width: int,
        head_dim: int,
        query_dim: int,
        key_dim: int | None = None,
        *,
        key_content: bool = True,
        query_content: bool = False,
        num_packed: int = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        sizes = {"num_heads": num_heads, "width": width, "head_dim": head_dim}
        sizes |= {"query_dim": query_dim, "key_dim": key_dim, "num_packed": num_packed}
        for name, size in sizes.items():
            check_count(name, size)
        self.num_heads, self.width, self.head_dim = num_heads, width, head_dim
        self._num_packed = num_packed

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.query_weight = parameter(width, query_dim)
        self.key_weight = parameter(width, key_dim)
        self.mixing = parameter(num_heads, width)
        self.key_content = parameter(num_heads, key_dim) if key_content else None
        self.query_content = parameter(num_heads, query_dim) if query_content else None
        scale = torch.full((), head_dim**-0.5, device=device, dtype=dtype)
        self.register_buffer("scale", scale)
        if not scale.is_meta:
            self.reset_parameters()

    @property
    def key_features(self) -> int:
        """Features of a shared key: components, and what carries content."""
        from_queries = 0 if self.query_content is None else 1
        return self.width + (0 if self.key_content is None else self.num_heads) + from_queries

    def reset_parameters(self) -> None:
        r"""Start with logits as large as those of heads side by side, and without content.

        Weights are as in ``torch.nn.MultiheadAttention``, and mixing is normal with variance
        :math:`d / \tilde D`, head width over shared width, so that the variance of the logits is
        that of d components.
        """
        stacked = self._num_packed * self.num_heads * self.head_dim
        for weight in (self.query_weight, self.key_weight):
            bound = math.sqrt(6.0 / (stacked + weight.shape[1]))
            nn.init.uniform_(weight, -bound, bound)
        nn.init.normal_(self.mixing, std=math.sqrt(self.head_dim / self.width))
        for content in (self.key_content, self.query_content):
            if content is not None:
                nn.init.zeros_(content)

    def with_scale(self, scale: float) -> "SharedProjections":
        """Projections with the very same parameters, under another scale of the logits."""
        other = copy.copy(self)
        other.__dict__["_buffers"] = {"scale": torch.full_like(self.scale, scale)}
        return other

    def queries(
        self, tokens: Float[Tensor, "*batch query query_feature"], *, is_scaled: bool = True
    ) -> Float[Tensor, "*batch {self.num_heads} query {self.key_features}"]:
        """Project what asks, and mix the components for each head.

        Args:
            tokens: What asks.
            is_scaled: Whether inner products with keys are to be logits; else they are what is
                to be scaled.
        """
        return self.mixed(F.linear(tokens, self.packed_query_weight()), is_scaled=is_scaled)

    def keys(
        self, tokens: Float[Tensor, "*batch key key_feature"]
    ) -> Float[Tensor, "*batch key {self.key_features}"]:
        """Project what is asked, for all heads at once."""
        return self.extended(F.linear(tokens, self.packed_key_weight()))

    def packed_query_weight(self) -> Float[Tensor, "packed query_feature"]:
        """Weights of all that is projected of queries: components, and then content."""
        return _stacked(self.query_weight, self.query_content)

    def packed_key_weight(self) -> Float[Tensor, "packed key_feature"]:
        """Weights of all that is projected of keys: components, and then content."""
        return _stacked(self.key_weight, self.key_content)

    def mixed(
        self, projected: Float[Tensor, "*batch query packed"], *, is_scaled: bool = True
    ) -> Float[Tensor, "*batch {self.num_heads} query {self.key_features}"]:
        """Queries of each head, from what was projected for all; content follows components."""
        shared = projected[..., : self.width].unsqueeze(-3)
        parts = [shared * self.mixing.to(shared.dtype).unsqueeze(-2)]
        rows = parts[0].shape[:-1]
        if self.key_content is not None:
            own = torch.eye(self.num_heads, dtype=shared.dtype, device=shared.device)
            parts.append(own.unsqueeze(-2).expand(*rows, self.num_heads))
        if self.query_content is not None:
            parts.append(projected[..., self.width :].mT.unsqueeze(-1))
        queries = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return queries * self.scale.to(queries.dtype) if is_scaled else queries

    def extended(
        self, projected: Float[Tensor, "*batch key packed"]
    ) -> Float[Tensor, "*batch key {self.key_features}"]:
        """Keys, from what was projected: with a one where queries carry their content."""
        return projected if self.query_content is None else F.pad(projected, (0, 1), value=1.0)

    def components(
        self,
        query: Float[Tensor, "*batch head query feature"],
        key: Float[Tensor, "*batch #head key feature"],
    ) -> tuple[
        Float[Tensor, "*batch head query component"], Float[Tensor, "*batch #head key component"]
    ]:
        """What of queries and keys the heads compare, without what carries content."""
        return query[..., : self.width], key[..., : self.width]

    def standardized(
        self,
        query: Float[Tensor, "*batch head query feature"],
        key: Float[Tensor, "*batch #head key feature"],
    ) -> tuple[
        Float[Tensor, "*batch head query feature"], Float[Tensor, "*batch #head key feature"]
    ]:
        """Queries and keys, not scaled yet, so that their scaled dot product is that of the heads.

        Of what the scale is more than the width's, each side takes the root, as kernels ask.
        """
        root = (self.scale * self.width**0.5).sqrt()
        return query * root.to(query.dtype), key * root.to(key.dtype)

    def head_weights(
        self,
    ) -> tuple[
        Float[Tensor, "head component query_feature"], Float[Tensor, "head component key_feature"]
    ]:
        """Weights of heads side by side that compute the same, each as wide as all components."""
        query = self.mixing[..., None] * self.query_weight
        return query, self.key_weight.expand(self.num_heads, -1, -1)

    def extra_repr(self) -> str:
        """Sizes."""
        kinds = {"key_content": self.key_content, "query_content": self.query_content}
        content = "".join(f", {name}" for name, part in kinds.items() if part is not None)
        return (
            f"num_heads={self.num_heads}, width={self.width}, head_dim={self.head_dim}, "
            f"query_dim={self.query_weight.shape[1]}, key_dim={self.key_weight.shape[1]}{content}"
        )


def _stacked(weight: Tensor, content: Tensor | None) -> Tensor:
    return weight if content is None else torch.cat([weight, content])
