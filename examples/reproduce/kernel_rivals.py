"""Kernels in the place of the scaled dot product, and what their training and predictions need.

``dot`` is the baseline. Under ``rbf_p`` each head learns the power norm of its magnitudes; under
``spectral`` the frequencies of its kernel. Under ``implicit`` a network of the mean query and key
gives the law of the frequencies, and they are drawn, in each head by itself; under
``implicit_copula`` for all heads together. ``schoenberg`` is a mixture of RBF kernels, positive by
construction. All start with the attention of the baseline, or near it.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.implicit_densities import density_terms, sampled_outputs, warm_up
from bayesattn.logits import (
    ImplicitSpectralLogits,
    Logits,
    Magnitude,
    RBFMagnitude,
    SchoenbergMixture,
    SpectralLogits,
)

__all__ = ["LOGITS", "LogitsOf", "LogitsRun", "drawn", "norms"]

# From the number of heads and their width.
LogitsOf = Callable[[int, int], Logits]

_NUM_FREQUENCIES, _NUM_COMPONENTS = 32, 8


class LogitsRun:
    """What one training has besides its task, so that all logits learn as they should.

    Parameters of logits do not decay: at zero they are no more likely than elsewhere. To the loss
    is added the divergence of what logits draw, whose weight rises over the first half of the
    steps, so that the loss ends as the negative evidence lower bound.

    Args:
        terms_per_sequence: How many terms of the task's loss, of which that is the mean, share what
            is drawn for one sequence.
    """

    def __init__(self, terms_per_sequence: int = 1):
        self.terms_per_sequence = terms_per_sequence
        self.model: nn.Module | None = None
        self.num_steps, self.step = 0, 0

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int
    ) -> Callable[[], None]:
        """Begin with an untrained model, and give what is called before each step."""
        self.model = model if _draws(model) else None
        self.num_steps, self.step = num_steps, 0
        logits = [part for part in model.modules() if isinstance(part, Logits)]
        own = {id(value) for part in logits for value in part.parameters()}
        apart: list[Tensor] = []
        for group in optimizer.param_groups:
            apart += [value for value in group["params"] if id(value) in own]
            group["params"] = [value for value in group["params"] if id(value) not in own]
        still = [group for group in optimizer.param_groups if not group["weight_decay"]]
        # Schedules know the groups that are there.
        if still:
            still[0]["params"] += apart
        elif apart:
            optimizer.add_param_group({"params": apart, "weight_decay": 0.0})

        def before_step() -> None:
            self.step += 1

        return before_step

    def loss(self, compute: Callable[[], Tensor]) -> Float[Tensor, ""]:
        """Compute the loss of the task, within which the model is called, and add to it."""
        if self.model is None:
            return compute()
        with density_terms(self.model) as terms:
            value = compute()
        weight = warm_up(self.step, max(1, self.num_steps // 2))
        return value + weight * terms.total() / self.terms_per_sequence


def drawn(
    model: nn.Module, call: Callable[[], Tensor], num_draws: int, seed: int = 0
) -> Float[Tensor, "draw ..."]:
    """Give what a call gives under several draws of the frequencies; once if nothing is drawn."""
    if not _draws(model):
        return call()[None]
    return sampled_outputs(model, call, num_draws=num_draws, seed=seed)


@torch.no_grad()
def norms(model: nn.Module) -> list[list[float]]:
    """Give the power p of each head's magnitudes, "layer head", where heads learn it."""
    found = [part.p for part in model.modules() if isinstance(part, Magnitude)]
    return [p.tolist() for p in found if isinstance(p, Tensor)]


def _draws(model: nn.Module) -> bool:
    return any(isinstance(part, ImplicitSpectralLogits) for part in model.modules())


def _learned_norm(num_heads: int, dim: int) -> Logits:
    del dim
    return RBFMagnitude(num_heads=num_heads)


def _spectral(num_heads: int, dim: int) -> Logits:
    return SpectralLogits(num_heads, dim, _NUM_FREQUENCIES)


def _implicit(num_heads: int, dim: int) -> Logits:
    return ImplicitSpectralLogits(num_heads, dim, _NUM_FREQUENCIES, couples_heads=False)


def _coupled(num_heads: int, dim: int) -> Logits:
    return ImplicitSpectralLogits(num_heads, dim, _NUM_FREQUENCIES)


def _schoenberg(num_heads: int, dim: int) -> Logits:
    return SchoenbergMixture(num_heads, dim, _NUM_COMPONENTS)


LOGITS: Mapping[str, LogitsOf | None] = {
    "dot": None,
    "rbf_p": _learned_norm,
    "spectral": _spectral,
    "implicit": _implicit,
    "implicit_copula": _coupled,
    "schoenberg": _schoenberg,
}
