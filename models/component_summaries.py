"""What may be said of components that have no order and no signs, as deterministic sites."""

import pyro
from jaxtyping import Float
from torch import Tensor

from bayesattn.models.head_products import ScaledProducts

__all__ = ["COMPONENT_DIMS", "note_components", "note_logits"]

Number = float | int

# Names of the last axes of sites and arguments that all programs of components have.
COMPONENT_DIMS = {
    "query_weight": ["head", "dim", "query_feature"],
    "key_weight": ["head", "dim", "key_feature"],
    "query_tokens": ["query", "query_feature"],
    "key_tokens": ["key", "key_feature"],
    "energy": ["component"],
    "logits": ["head", "query", "key"],
}


def note_components(
    products: ScaledProducts,
    energy: Float[Tensor, " component"],
    explained: Float[Tensor, ""],
    share: Number,
) -> None:
    """Note ``energy``, ``width`` and ``relative_error``.

    Args:
        products: Of the heads.
        energy: Frobenius norm of each component's part of the products.
        explained: By how much the components lower the squared norm of what is left.
        share: Of the largest energy, above which a component counts.
    """
    energy = energy.sort(-1, descending=True).values
    pyro.deterministic("energy", energy, event_dim=1)
    width = (energy > share * energy[..., 0].unsqueeze(-1)).sum(-1).to(energy)
    pyro.deterministic("width", width, event_dim=0)
    left = (products.num_entries - explained).clamp(min=0) / products.num_entries
    pyro.deterministic("relative_error", left.sqrt(), event_dim=0)


def note_logits(
    products: ScaledProducts,
    sides: tuple[Tensor, Tensor, Tensor],
    query_tokens: Float[Tensor, "query query_feature"] | None,
    key_tokens: Float[Tensor, "key key_feature"] | None,
) -> None:
    """Note ``logits`` of tokens, where both are given.

    Raises:
        ValueError: If only one of them is.
    """
    if query_tokens is None and key_tokens is None:
        return
    if query_tokens is None or key_tokens is None:
        missing = "query_tokens" if query_tokens is None else "key_tokens"
        raise ValueError(f"logits need query_tokens and key_tokens, got no {missing}")
    logits = products.logits(*sides, query_tokens, key_tokens)
    pyro.deterministic("logits", logits, event_dim=3)
