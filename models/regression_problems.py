"""What a regression by attention is about: points, what they attend to, and which take part.

Without a context each point attends to all others, never to itself.
"""

from typing import NamedTuple

import pyro
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.argument_checks import check_type

__all__ = ["RegressionProblem", "read_regression"]


class RegressionProblem(NamedTuple):
    """Points and their context, of one data set or of a series of such.

    Attributes:
        query: Inputs of the points.
        key: Inputs of the context.
        value: Targets of the context.
        visible: Which of the context each point sees; None where it is all of it.
        target: Of the points, or None.
        mask: True where there is a point, not padding; None without padding.
    """

    query: Float[Tensor, "*series point dim"]
    key: Float[Tensor, "*series context dim"]
    value: Float[Tensor, "*series context"]
    visible: Bool[Tensor, "*#series #point context"] | None
    target: Float[Tensor, "*series point"] | None
    mask: Bool[Tensor, "*series point"] | None

    def plates(self) -> list[pyro.plate]:
        """Plates of the points: ``series``, where there are several, and ``point``."""
        sizes = zip(("point", "series"), reversed(self.query.shape[:-1]), strict=False)
        axes = enumerate(sizes, start=1)
        return [pyro.plate(name, size, dim=-axis) for axis, (name, size) in axes][::-1]


def read_regression(
    inputs: Tensor,
    target: Tensor | None = None,
    context_inputs: Tensor | None = None,
    context_target: Tensor | None = None,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
) -> RegressionProblem:
    """Check the data of a regression.

    Args:
        inputs: "point dim", or "series point dim" for several data sets under one kernel, finite at
            padding too.
        target: One number a point.
        context_inputs: What the points attend to; each other, if None.
        context_target: One number for each of the context.
        mask: Boolean, True where there is a point.
        context_mask: Boolean, True where there is one of the context.

    Raises:
        TypeError: If one is no tensor.
        ValueError: If shapes or types do not fit, or there is nothing to attend to.
    """
    given = {
        "inputs": inputs,
        "target": target,
        "context_inputs": context_inputs,
        "context_target": context_target,
        "mask": mask,
        "context_mask": context_mask,
    }
    for name, part in given.items():
        if part is not None:
            check_type(name, part, Tensor)
    _check_part("", inputs, target, mask)
    if (context_inputs is None) != (context_target is None):
        raise ValueError("context_inputs and context_target go together, and one of them is None")
    if context_inputs is not None and context_target is not None:
        _check_part("context_", context_inputs, context_target, context_mask)
        if context_inputs.dtype != inputs.dtype:
            raise ValueError(
                f"context_inputs must be of the type of inputs, {inputs.dtype}, got "
                f"{context_inputs.dtype}"
            )
        widths = [(*part.shape[:-2], part.shape[-1]) for part in (context_inputs, inputs)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"context_inputs must be of as many series and as wide as inputs, of shape "
                f"{tuple(inputs.shape)}, got shape {tuple(context_inputs.shape)}"
            )
        visible = None if context_mask is None else context_mask[..., None, :]
        return RegressionProblem(inputs, context_inputs, context_target, visible, target, mask)
    if context_mask is not None:
        raise ValueError("context_mask goes with context_inputs, which is None")
    if target is None:
        raise ValueError(
            "points without a target have nothing to attend to; give context_inputs and "
            "context_target"
        )
    visible = ~torch.eye(inputs.shape[-2], dtype=torch.bool, device=inputs.device)
    visible = visible if mask is None else visible & mask[..., None, :]
    return RegressionProblem(inputs, inputs, target, visible, target, mask)


def _check_part(prefix: str, inputs: Tensor, target: Tensor | None, mask: Tensor | None) -> None:
    if inputs.ndim not in (2, 3) or not inputs.is_floating_point():
        raise ValueError(
            f"{prefix}inputs must be floating point vectors of shape (point, dim) or (series, "
            f"point, dim), got {inputs.dtype} of shape {tuple(inputs.shape)}"
        )
    shape = tuple(inputs.shape[:-1])
    if target is not None and (target.shape != shape or target.dtype != inputs.dtype):
        raise ValueError(
            f"{prefix}target must have one number a point, of type {inputs.dtype} as the inputs "
            f"and shape {shape}, got {target.dtype} of shape {tuple(target.shape)}"
        )
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(
            f"{prefix}mask must be boolean, True where there is a point, of shape {shape}, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
