"""What mixtures of queries and keys are given: their data, what may see what, and plates."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyro
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.masking import combine_masks

__all__ = ["MixtureProblem", "make_plates", "read_problem", "standing_in"]

# Names of the leading axes, from the right.
_AXES = ("head", "batch")


class MixtureProblem(NamedTuple):
    """Independent mixtures, one for each entry of the leading axes.

    Attributes:
        query: The queries.
        key: The keys.
        value: The values, the keys where none were given.
        visible: Which query and key may belong together.
    """

    query: Float[Tensor, "*problem query dim"]
    key: Float[Tensor, "*problem key dim"]
    value: Float[Tensor, "*problem key value_dim"]
    visible: Bool[Tensor, "*problem query key"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return tuple(self.query.shape[:-2])

    @property
    def live_queries(self) -> Bool[Tensor, "*problem query"]:
        """Queries that see a key."""
        return self.visible.any(-1)

    @property
    def live_keys(self) -> Bool[Tensor, "*problem key"]:
        """Keys that a query sees."""
        return self.visible.any(-2)

    def indices(self) -> tuple[Tensor, ...]:
        """Indices of the leading axes, to stand beside one of the last axis of plates."""
        ranges = (torch.arange(size, device=self.query.device) for size in self.shape)
        ndim = len(self.shape)
        return tuple(r.reshape(-1, *(1,) * (ndim - axis)) for axis, r in enumerate(ranges))


def read_problem(
    queries: Float[Tensor, "*_problem _query _dim"],
    keys: Float[Tensor, "*_problem _key _dim"],
    values: Float[Tensor, "*_problem _key _value_dim"] | None = None,
    *,
    query_mask: Shaped[Tensor, "*_batch _query"] | None = None,
    key_mask: Shaped[Tensor, "*_batch _key"] | None = None,
    attn_mask: Shaped[Tensor, "*_batch _query _key"] | None = None,
) -> MixtureProblem:
    """Check the arguments of a mixture's program.

    Args:
        queries: "query dim", "head query dim" or "batch head query dim".
        keys: As many leading axes, and as wide.
        values: One for each key; the keys themselves by default.
        query_mask: "*batch query", without the head axis: which queries are not padding.
        key_mask: "*batch key", without the head axis: which keys are not padding.
        attn_mask: "*batch head query key", boolean: which may belong together.

    Raises:
        ValueError: If shapes or types do not fit.
    """
    parts = {"queries": queries, "keys": keys} | ({} if values is None else {"values": values})
    got = ", ".join(f"{name} {part.dtype} {tuple(part.shape)}" for name, part in parts.items())
    if not 2 <= queries.ndim <= 2 + len(_AXES):
        raise ValueError(f"queries must be '[[batch] head] query dim', got {got}")
    leads = {part.shape[:-2] for part in parts.values()}
    if len(leads) > 1 or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries and keys must share leading axes and width, got {got}")
    if values is not None and values.shape[-2] != keys.shape[-2]:
        raise ValueError(f"values must be one for each key, got {got}")
    if len({part.dtype for part in parts.values()}) > 1 or not queries.is_floating_point():
        raise ValueError(f"queries, keys and values must have one floating type, got {got}")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise ValueError(f"attn_mask must be boolean, got {attn_mask.dtype}")
    shape = (*queries.shape[:-1], keys.shape[-2])
    pairs = combine_masks(
        shape, attn_mask=attn_mask, query_mask=query_mask, key_mask=key_mask
    ).pairs()
    every = torch.ones(shape, dtype=torch.bool, device=queries.device)
    visible = every if pairs is None else every & pairs
    return MixtureProblem(queries, keys, keys if values is None else values, visible)


def make_plates(shape: tuple[int, ...]) -> list[pyro.plate]:
    """Plates of the leading axes, ``batch`` and ``head``, left of one more plate."""
    sizes = enumerate(reversed(shape))
    return [pyro.plate(_AXES[axis], size, dim=-2 - axis) for axis, size in sizes][::-1]


@contextlib.contextmanager
def standing_in(plates: Sequence[pyro.plate]) -> Iterator[None]:
    """Stand in all of some plates."""
    with contextlib.ExitStack() as stack:
        for plate in plates:
            stack.enter_context(plate)
        yield
