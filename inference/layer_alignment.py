r"""Alignment: the queries and keys of a network's heads are drawn together while it is trained.

.. math:: L = -\log p(y \mid x) + \lambda \sum_{l h} \frac1n \sum_i D(p^Q_{ilh}, p^K_{ilh})

In each sentence i and head h of layer l, queries and keys are two clouds of points, whose order and
pairing do not matter. Only training sees the term: inference is the network's own.

Source:
    Zhang et al. (2021), Alignment attention by matching key and query distributions,
    arXiv:2110.12567, eq. 2. There λ = 0.01 for the sum over heads.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn

from bayesattn.divergences import Divergence
from bayesattn.divergences.point_clouds import check_divergence, takes
from bayesattn.inference.observed_clouds import mean_divergence
from bayesattn.inference.observed_layers import (
    check_factor,
    chosen_layers,
    head_factors,
    place_counts,
)
from bayesattn.inference.schedules import Number
from bayesattn.networks import AttentionCall, AttentionLayer, ObservedCalls

__all__ = ["Alignment"]

# From a layer's number of heads and their width to a divergence with parameters of its own.
Adversary = Callable[[int, int], nn.Module]


class Alignment(nn.Module):
    """Adds up how far the queries of a model's heads are from their keys, as a term of the loss.

    ::

        alignment = Alignment(model, ConditionalTransport.learned, weight=0.01)
        learned = alignment.parameter_groups(lr=1e-3)
        optimizer = AdamW([{"params": model.parameters()}, *learned], lr=1e-4)
        for tokens, target in batches:
            optimizer.zero_grad()
            with alignment.observe():
                loss = cross_entropy(model(tokens), target)
            (loss + alignment.loss()).backward()
            optimizer.step()
            alignment.step()

    It is a module that holds what is learned beside the model, such as critics, and nothing of the
    model's state; nothing is left on the model either. Padding takes no part: what no query may
    see, and in self-attention queries in the same places; elsewhere tell by ``query_mask``. What
    learns does so only if an optimizer has it, and its gradients grow with λ. A compiled model runs
    as it is written while it is observed. Under data-parallel training, call
    :meth:`sync_gradients` after the backward pass.

    Args:
        model: Any module with attention layers that :mod:`bayesattn.networks` knows.
        divergence: One of :mod:`bayesattn.divergences`, the same for all layers; or, to have one
            that learns in each layer, what makes it of the layer's number of heads and their
            width, such as :class:`~bayesattn.divergences.Adversarial` or
            :meth:`ConditionalTransport.learned <bayesattn.divergences.ConditionalTransport>`.
        weight: λ, not negative; or a function that gives it from the number of steps so far.
        layers: Names of the layers that count; all if None.
        layer_weights: By the names of layers, a further factor on them, or one for each head.
        reduction: "sum" over layers and heads, as published, or "mean" over them.
        places: In how many places of the model each layer stands, where it is called more than
            once in a pass and what learns shall be apart for each; a number, or by names.
        seed: Of the initial values of what learns; torch's own random state is left as it is.

    Raises:
        ValueError: If the model has no such layers, names are unknown, weights are not finite
            numbers or negative, or the divergence is neither of the two.
    """

    def __init__(
        self,
        model: nn.Module,
        divergence: Divergence | Adversary,
        weight: Number | Callable[[int], Number] = 0.01,
        *,
        layers: Sequence[str] | None = None,
        layer_weights: Mapping[str, Number | Sequence[Number]] | None = None,
        reduction: str = "sum",
        places: int | Mapping[str, int] = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
        found = chosen_layers(model, layers)
        self.reduction, self.num_steps, self._weight = reduction, 0, weight
        if isinstance(weight, Tensor):
            raise ValueError(
                f"weight: expected a number, or a function of the steps, got a tensor: {weight}; "
                "what is learned along would fall to zero"
            )
        check_factor("weight", self.weight)
        self._factors = head_factors(found, layer_weights or {})
        self._observed = ObservedCalls(model, "Alignment")
        # One for all layers, or the numbers of those of each layer and place.
        self._shared: Divergence | None = None
        self._numbers: dict[tuple[str, int], int] = {}
        self.adversaries = nn.ModuleList()
        self._is_shared_out = False
        self._query_mask: Tensor | None = None
        is_class = isinstance(divergence, type)
        if takes(divergence, 5) and not is_class:
            self._shared = cast(Divergence, divergence)
        elif takes(divergence, 2) and (not is_class or issubclass(divergence, nn.Module)):
            counts = place_counts(found, places)
            self._make_adversaries(found, counts, cast(Adversary, divergence), seed)
        elif is_class:
            check_divergence(divergence)
        else:
            raise ValueError(
                "divergence: expected one of bayesattn.divergences, or what makes one of a number "
                f"of heads and their width, got {divergence!r}"
            )
        # Of the last call of loss(), by layer, or by layer and place where there are several.
        self.head_divergences: dict[str, Float[Tensor, " head"]] = {}

    @property
    def weight(self) -> Number:
        """λ at the present step."""
        return self._weight(self.num_steps) if callable(self._weight) else self._weight

    def observe(
        self, *, query_mask: Bool[Tensor, "batch query"] | None = None
    ) -> AbstractContextManager[None]:
        """Collect what the layers are called with; what was collected earlier is forgotten.

        Args:
            query_mask: Where queries attend to other tokens, as a decoder's do to its encoder,
                which of them take part: no mask of keys tells. For all layers whose queries have
                this shape, those of self-attention apart.

        Raises:
            RuntimeError: If a layer is called without gradients in a context that has them, as
                activation checkpointing does with ``use_reentrant=True``.
        """
        if _is_distributed() and not self._is_shared_out:
            # All processes begin with what the first one drew.
            for parameter in self.parameters():
                distributed.broadcast(parameter.detach(), 0)
            self._is_shared_out = True
        self._query_mask = query_mask
        return self._observed.observe()

    def loss(self) -> Float[Tensor, ""]:
        """λ times the sum, or the mean, over layers and heads of the mean over sentences.

        :attr:`head_divergences` then holds each head's, without λ and gradients.

        Raises:
            RuntimeError: If no call was observed, or what learns does not suffice for all places of
                a layer.
            ValueError: If λ is negative or no finite number.
        """
        weight = self.weight
        check_factor("weight", weight)
        terms, factors, self.head_divergences = [], [], {}
        for (name, place), calls in self._calls_by_place().items():
            found = mean_divergence(self._divergence(name, place), calls)
            label = name if place == 0 else f"{name}[{place}]"
            self.head_divergences[label] = found.detach()
            own = self._factors[name]
            # Numbers become a tensor only where heads differ: a GPU would be waited for.
            is_one = len(set(own)) == 1
            terms.append(own[0] * found.sum() if is_one else (found.new_tensor(own) * found).sum())
            factors.extend(own)
        total = weight * torch.stack(terms).sum()
        return total / sum(factors) if self.reduction == "mean" else total

    def step(self) -> None:
        """Count a step, for λ that changes with them; call it after the optimizer's."""
        self.num_steps += 1

    def parameter_groups(self, **settings: Any) -> list[dict[str, Any]]:
        """Give an optimizer what learns beside the model, if anything does.

        Args:
            settings: The optimizer's for these parameters, such as ``lr``.
        """
        parameters = [value for value in self.parameters() if value.requires_grad]
        return [{"params": parameters, **settings}] if parameters else []

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Average over processes the gradients of what learns beside the model.

        There is nothing to do outside of ``torch.distributed``, or if nothing learns.
        """
        if not _is_distributed():
            return
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()

    def get_extra_state(self) -> dict[str, Any]:
        """Number of steps, and whose what learns is, for ``state_dict``."""
        return {"num_steps": self.num_steps, "learned": self._owners()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from a number of steps.

        Raises:
            ValueError: If what learned belongs to other layers, or there is no such state.
        """
        if not state.keys() >= {"num_steps", "learned"}:
            raise ValueError(f"state_dict: expected that of an Alignment, got {sorted(state)}")
        if state["learned"] != self._owners():
            raise ValueError(
                f"state_dict: expected what learns for {self._owners()}, got that for "
                f"{state['learned']}"
            )
        self.num_steps = state["num_steps"]

    def _owners(self) -> list[str]:
        """Layers, and their places, of what learns, in its order."""
        return [f"{name}[{place}]" for name, place in self._numbers]

    def extra_repr(self) -> str:
        """What is aligned, and how much."""
        return f"weight={self.weight}, reduction={self.reduction!r}, layers={len(self._factors)}"

    def _make_adversaries(
        self,
        layers: Mapping[str, AttentionLayer],
        places: Mapping[str, int],
        make: Adversary,
        seed: int,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, layer in layers.items():
                for place in range(places[name]):
                    made = make(layer.num_heads, layer.query_dim)
                    if not isinstance(made, nn.Module):
                        raise ValueError(
                            "divergence: expected one of bayesattn.divergences, or what makes a "
                            f"module of a number of heads and their width, got {made!r} of it"
                        )
                    like = next(layer.module.parameters())
                    wide = torch.promote_types(like.dtype, torch.float32)
                    self._numbers[name, place] = len(self.adversaries)
                    self.adversaries.append(made.to(like.device, wide))

    def _divergence(self, name: str, place: int) -> Any:
        if self._shared is not None:
            return self._shared
        if (name, place) not in self._numbers:
            count = sum(1 for other, _ in self._numbers if other == name)
            raise RuntimeError(
                f"Alignment: layer '{name}' was called {place + 1} times or more in one pass of "
                f"the model, and has what learns for {count}; say places={{'{name}': ...}}"
            )
        return self.adversaries[self._numbers[name, place]]

    def _calls_by_place(self) -> dict[tuple[str, int], list[AttentionCall]]:
        found: dict[tuple[str, int], list[AttentionCall]] = {}
        for name, placed in self._observed.calls().items():
            for place, call in placed if name in self._factors else ():
                found.setdefault((name, place), []).append(self._masked(call))
        if not found:
            raise RuntimeError("Alignment.loss() needs a call of a layer that counts")
        return found

    def _masked(self, call: AttentionCall) -> AttentionCall:
        mask = self._query_mask
        if mask is None or call.is_self_attention or type(call) is not AttentionCall:
            return call
        if mask.shape != (len(call.query), call.query.shape[2]):
            return call
        return call._replace(settings=call.settings | {"query_mask": mask})


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
