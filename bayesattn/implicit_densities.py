"""Training and evaluation of networks with implicit densities: divergences, warm-up and draws.

The evidence lower bound of a network whose attention draws latents is the expected log likelihood
less the divergence of all latents from their prior, over all layers.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147; its code counts the last layer
    alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_count
from bayesattn.logits.implicit import ImplicitSpectralLogits

__all__ = ["DensityTerms", "density_draws", "density_terms", "sampled_outputs", "warm_up"]


class DensityTerms:
    """Divergences of the latents of all calls of all layers, each within its graph of gradients.

    Attributes:
        local: For each call, those of the latents that a sequence has to itself.
        shared: For each call, those of latents that all sequences have in common.
    """

    def __init__(self) -> None:
        self.local: list[Float[Tensor, "*_batch"]] = []
        self.shared: list[Float[Tensor, ""]] = []

    def hear(self, layer: ImplicitSpectralLogits, divergence: Float[Tensor, "*_batch"]) -> None:
        """Take up the divergence of one frequency's latents of a layer."""
        divergence = layer.num_frequencies * divergence
        if layer.law.pool == "none":
            self.shared.append(divergence)
        else:
            self.local.append(divergence)

    def total(self, num_sequences: int | None = None) -> Float[Tensor, ""]:
        """Sum over calls of layers of the divergence of a sequence, the mean over the batch.

        To be added to the mean over sequences of the negative log likelihood. Of one pass of the
        model: each further pass adds its own.

        Args:
            num_sequences: In all data; latents that they share (``pool="none"``) count by its
                inverse, so it must be told where there are such, and only there.

        Raises:
            ValueError: If no layer was called, or the number of sequences is missing.
        """
        if self.shared and num_sequences is None:
            raise ValueError(
                "num_sequences: expected the number of sequences in all data, which share the "
                "latents of layers with pool='none', got None"
            )
        if not self.local and not self.shared:
            raise ValueError("density_terms: expected a call of the model, got none")
        means = [divergence.mean() for divergence in self.local]
        if self.shared:
            number = check_count("num_sequences", num_sequences)
            means += [divergence / number for divergence in self.shared]
        return torch.stack(means).sum()


@contextmanager
def density_terms(model: nn.Module) -> Iterator[DensityTerms]:
    """Collect the divergences of all layers with implicit densities, from the calls within.

    ::

        with density_terms(model) as terms:
            output = model(tokens)
        loss = nll(output, target) + warm_up(step, 1000) * terms.total()

    Under reentrant activation checkpointing, the first pass of which has no gradients, terms have
    none; the other kind serves.

    Args:
        model: Any module with :class:`bayesattn.logits.ImplicitSpectralLogits` in it.

    Raises:
        ValueError: If there is none.
    """
    terms = DensityTerms()
    layers = _densities(model)
    for layer in layers:
        layer.listeners.append(terms)
    try:
        yield terms
    finally:
        for layer in layers:
            layer.listeners.remove(terms)


@contextmanager
def density_draws(model: nn.Module) -> Iterator[None]:
    """Let layers with implicit densities draw frequencies in evaluation too.

    Raises:
        ValueError: If there is none.
    """
    layers = _densities(model)
    before = [layer.draws_in_evaluation for layer in layers]
    for layer in layers:
        layer.draws_in_evaluation = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.draws_in_evaluation = was


def sampled_outputs(
    model: nn.Module, call: Callable[[], Tensor], *, num_draws: int = 8, seed: int = 0
) -> Float[Tensor, "draw *output"]:
    """What a call gives under several draws of the frequencies; their mean is the prediction.

    Probabilities are to be averaged, not their logits. Random state is left as it was. Gradients
    are those of the call; ``torch.no_grad()`` saves their memory.

    Args:
        model: What has the densities; best in evaluation mode, without dropout.
        call: Such as ``lambda: model(tokens).softmax(-1)``.
        num_draws: How many.
        seed: Of the draws.

    Raises:
        ValueError: If the model has no implicit density, or no draw is asked for.
    """
    check_count("num_draws", num_draws)
    devices = {part.device for part in model.parameters() if part.device.type == "cuda"}
    with density_draws(model), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        return torch.stack([call() for _ in range(num_draws)])


def warm_up(step: int, num_steps: int) -> float:
    """Weight of the divergence, which rises from zero to one in so many steps.

    Raises:
        ValueError: If a number is negative, or the warm-up has no step.
    """
    check_count("step", step, 0)
    return min(1.0, step / check_count("num_steps", num_steps))


def _densities(model: nn.Module) -> list[ImplicitSpectralLogits]:
    found = [part for part in model.modules() if isinstance(part, ImplicitSpectralLogits)]
    if not found:
        raise ValueError(
            "model: expected a layer with logits=ImplicitSpectralLogits(...), found none"
        )
    return found
