r"""Alignment of queries and keys as a factor of a Gibbs posterior.

.. math:: \pi(\theta \mid X, y) \propto p(\theta) \prod_i p(y_i \mid x_i, \theta) \,
    \exp\Big(-\lambda \sum_i \sum_h D_{ih}(\theta)\Big), \qquad D \ge 0

D is a divergence between the queries and the keys of sentence i under head h. The factor is no
likelihood of queries and keys: they are functions of the weights, and nothing is observed of them.
Its normalizer hangs on the weight λ, which therefore cannot be learned along: the evidence lower
bound lacks the normalizer and is largest at λ = 0. Fix it, validate it, or take the weight at which
the mean of D is what you ask for, :func:`bayesattn.inference.weight_for_target`.

Source:
    Zhang et al. (2021), Alignment attention by matching key and query distributions,
    arXiv:2110.12567, whose penalized training is the mode of this posterior.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pyro
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.contraction import inside_transform
from bayesattn.divergences import Divergence
from bayesattn.divergences.empty_clouds import divergence_or_zero
from bayesattn.divergences.point_clouds import check_divergence
from bayesattn.kernels.bandwidths import Number

__all__ = ["AlignmentFactor"]


@dataclass(frozen=True)
class AlignmentFactor:
    """Factor exp(-λ Σ_h D_h) of each sentence, for use inside the data's plate of a Pyro program.

    Sites: the factor ``alignment``. Deterministic: ``divergence``, D of each sentence and head,
    zero where a sentence has no token. A subsampled plate scales the factor as it does the
    likelihood. It needs inputs only, so sentences without a target may have it; predictions need
    none, and a posterior's log likelihood leaves it out.

    Args:
        divergence: Such as :class:`~bayesattn.divergences.MMD`: a fixed function, best one that is
            never negative, since one that may be rewards more than agreement. A critic in it must
            be frozen: adversaries are optimized, by :class:`bayesattn.inference.Alignment`, and
            never sampled.
        weight: λ; for every head, or one a head. With the loss of ``Alignment`` over N sentences,
            it is the same λ if the loss is N times the mean. As a tensor it is data to a recorded
            graph: given to the program as an argument, or written in place, it may change without
            another recording. A number is a part of the graph.

    Raises:
        ValueError: If the divergence is no fixed function, or the weight is negative, not finite,
            or to be learned.
    """

    divergence: Divergence
    weight: Number | Float[Tensor, ""] | Float[Tensor, " head"] = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.divergence, type) or not callable(self.divergence):
            check_divergence(self.divergence)
        _refuse_energy_that_moves(self.divergence)
        _check_weight(self.weight)

    def __call__(
        self,
        query: Float[Tensor, "*batch head query dim"],
        key: Float[Tensor, "*batch head key dim"],
        query_mask: Bool[Tensor, "*batch query"] | None = None,
        key_mask: Bool[Tensor, "*batch key"] | None = None,
        *,
        prefix: str = "",
    ) -> None:
        """Put the factor in, and note the divergences.

        Args:
            query: Projected queries of each sentence; the batch axes are the data's plates.
            key: Projected keys.
            query_mask: True takes part.
            key_mask: True takes part.
            prefix: Of the names of both sites, for one factor of several in a program.
        """
        divergences = self.note(query, key, query_mask, key_mask, prefix=prefix)
        if isinstance(self.weight, Tensor) and self.weight.ndim:
            expected, got = divergences.shape[-1], self.weight.shape[0]
            if got != expected:
                raise ValueError(f"weight: expected one a head, {expected}, got {got}")
        weight = self.weight.to(divergences) if isinstance(self.weight, Tensor) else self.weight
        pyro.factor(f"{prefix}alignment", -(weight * divergences).sum(-1))

    def note(
        self,
        query: Float[Tensor, "*batch head query dim"],
        key: Float[Tensor, "*batch head key dim"],
        query_mask: Bool[Tensor, "*batch query"] | None = None,
        key_mask: Bool[Tensor, "*batch key"] | None = None,
        *,
        prefix: str = "",
    ) -> Float[Tensor, "*batch head"]:
        """Note the divergences without the factor, as predictions do; arguments as in a call."""
        divergences = self._divergences(query, key, query_mask, key_mask)
        return pyro.deterministic(f"{prefix}divergence", divergences, event_dim=1)

    def _divergences(
        self, query: Tensor, key: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        if query_mask is None and key_mask is None:
            return self.divergence(query, key)
        shapes = (query.shape[:-3] + query.shape[-2:-1], key.shape[:-3] + key.shape[-2:-1])
        # Masks have no axis of heads.
        masks = (
            (query.new_ones(shape, dtype=torch.bool) if mask is None else mask)[..., None, :]
            for mask, shape in zip((query_mask, key_mask), shapes, strict=True)
        )
        return divergence_or_zero(self.divergence, query, key, *masks)[0]


def _refuse_energy_that_moves(divergence: Divergence) -> None:
    for part in _parts(divergence, {}):
        if isinstance(part, Tensor) and part.requires_grad:
            raise ValueError(
                "divergence: expected a fixed energy, got one with parameters that require "
                "gradients: an adversary is optimized, never sampled, and a posterior given a "
                "moving one is of no density; train it first and freeze it by requires_grad_(False)"
            )
        if isinstance(part, torch.Generator):
            raise ValueError(
                "divergence: expected a fixed energy, got one that draws from a generator at every "
                "call; give it a whole number as seed"
            )
        named = part if isinstance(part, dict) else getattr(part, "__dict__", {})
        if named.get("debiased") is True:
            raise ValueError(
                "divergence: expected one that is never negative, got debiased conditional "
                "transport, which is lowest where points gather in clusters; use debiased=False, "
                "or SinkhornDivergence"
            )
        if named.get("unbiased") is True:
            raise ValueError(
                "divergence: expected one that is never negative, got an unbiased estimate, which "
                "is lowest where the points spread, not where they agree; use unbiased=False"
            )


def _parts(value: Any, met: dict[int, Any]) -> Iterator[Any]:
    """What a callable holds: its attributes, containers, partial arguments and closure."""
    if id(value) in met or isinstance(value, type | ModuleType):
        return
    met[id(value)] = value
    yield value
    for inner in _held(value):
        yield from _parts(inner, met)


def _held(value: Any) -> list[Any]:
    if isinstance(value, Tensor | torch.Generator):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        found = [value.__globals__.get(name) for name in value.__code__.co_names]
        named = [one for one in found if isinstance(one, nn.Module | Tensor | torch.Generator)]
        return [value.__kwdefaults__, value.__defaults__, *cells, *named]
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    held = [getattr(value, name, None) for name in slots]
    return [*held, *getattr(value, "__dict__", {}).values()]


def _check_weight(weight: Any) -> None:
    if isinstance(weight, Tensor):
        if weight.requires_grad or isinstance(weight, nn.Parameter):
            raise ValueError(
                "weight: expected one that is given, got a tensor that requires a gradient: the "
                "factor's normalizer hangs on the weight and is not known, so that learning the "
                "weight only makes it zero; fix it, or use bayesattn.inference.weight_for_target"
            )
        if weight.ndim > 1 or not weight.is_floating_point():
            raise ValueError(
                "weight: expected floating-point numbers of shape () or (head,), got "
                f"{weight.dtype} of shape {tuple(weight.shape)}"
            )
        if inside_transform() or torch.compiler.is_compiling():
            return
        least, largest = weight.min().item(), weight.max().item()
    else:
        least = largest = weight
    if isinstance(weight, bool) or not (least >= 0 and math.isfinite(largest)):
        raise ValueError(f"weight: expected finite numbers that are not negative, got {weight}")
