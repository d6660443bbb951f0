"""Whether heads can be moved as they are asked to be, before anything is."""

from collections.abc import Iterable, Sequence

import torch

from bayesattn.argument_checks import check_count, check_positive
from bayesattn.inference.head_diffusion import SteinDiffusion
from bayesattn.inference.head_forces import HeadForce
from bayesattn.inference.learning_rates import LearningRates
from bayesattn.inference.schedules import Number
from bayesattn.kernels import Kernel
from bayesattn.networks import HeadPartition
from bayesattn.networks.head_slices import Region

__all__ = ["check_method", "check_partitions", "check_resolution", "is_trained", "posterior_scale"]


def check_method(method: HeadForce | SteinDiffusion) -> None:
    """Refuse what heads cannot follow.

    Raises:
        ValueError: If it is a kernel, a class, or nothing of the kind.
    """
    # Kernels and classes can be called as forces can.
    is_force = isinstance(method, HeadForce | SteinDiffusion)
    if not is_force or isinstance(method, Kernel | type):
        raise ValueError(f"method: expected a force, such as SteinForce(RBF()), got {method!r}")


def check_partitions(partitions: Sequence[HeadPartition], rates: LearningRates) -> None:
    """Refuse heads that cannot interact, each partition within itself.

    Raises:
        ValueError: If there are none, names or weights stand twice, or the optimizer does not train
            them.
    """
    if not partitions:
        raise ValueError(
            "model: expected attention layers that bayesattn.networks knows, found none; "
            "register_attention_layer makes others known"
        )
    strangers = [part for part in partitions if not isinstance(part, HeadPartition)]
    if strangers:
        raise ValueError(f"heads: expected what head_partitions gives, got {strangers[0]!r}")
    names = [part.name for part in partitions]
    if len(set(names)) < len(names):
        raise ValueError(f"heads: expected partitions of different names, got {names}")
    _check_regions(partitions)
    trained = [part for part in partitions if part.requires_grad]
    if not trained:
        raise ValueError("model: expected heads that are trained, but all are frozen")
    for part in trained:
        rates.check(part)


def check_resolution(partitions: Iterable[HeadPartition]) -> None:
    """Refuse weights in which small steps are lost.

    Raises:
        ValueError: If they are narrower than float32.
    """
    for part in partitions:
        for parameter in part.parameters:
            if torch.finfo(parameter.dtype).bits < 32:
                raise ValueError(
                    f"{part.name}: steps past the optimizer are below the resolution of "
                    f"{parameter.dtype}; expected weights of float32 or wider"
                )


def is_trained(part: HeadPartition) -> bool:
    """Whether heads are trained.

    Raises:
        ValueError: If some of their parameters are and some are not.
    """
    trained = [parameter.requires_grad for parameter in part.parameters]
    if any(trained) and not all(trained):
        raise ValueError(
            f"{part.name}: expected heads that are trained or frozen as a whole, got some of both"
        )
    return all(trained)


def posterior_scale(num_data: int | None, temperature: Number, alpha: Number | None) -> Number:
    """Settle α.

    Raises:
        ValueError: If too little or too much is given.
    """
    check_positive("temperature", temperature)
    if num_data is not None:
        num_data = check_count("num_data", num_data)
    if alpha is None:
        if num_data is None:
            raise ValueError("give num_data, for alpha = temperature / num_data, or alpha itself")
        return temperature / num_data
    if temperature != 1.0:
        raise ValueError(
            f"give alpha or temperature, since alpha = temperature / num_data: "
            f"got {alpha} and {temperature}"
        )
    return alpha


def _check_regions(partitions: Sequence[HeadPartition]) -> None:
    """Refuse partitions that share weights, which would be pushed twice."""
    seen: list[tuple[HeadPartition, Region]] = []
    for part in partitions:
        regions = list(part.regions())
        for other, region in seen:
            if any(own.overlaps(region) for own in regions):
                raise ValueError(f"heads: {part.name} shares weights with {other.name}")
        seen += [(part, region) for region in regions]
