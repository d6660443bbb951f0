"""Tensors as variables of an ArviZ group: arrays with a name for every axis."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesattn.inference.axis_names import AxisNames, placeholder
from bayesattn.inference.sites import Site

__all__ = ["Labels", "array", "variable_name"]


class Labels(NamedTuple):
    """Turns tensors into variables with named axes."""

    names: AxisNames
    sites: Mapping[str, Site]

    def variables(
        self,
        values: Mapping[str, Tensor],
        lead: Sequence[str],
        *,
        are_densities: bool = False,
        are_slices: bool = False,
        are_statistics: bool = False,
    ) -> dict[str, tuple[Sequence[str], np.ndarray]]:
        """Name all axes.

        Args:
            values: Name to tensor.
            lead: Names of the first axes.
            are_densities: Whether event axes are summed.
            are_slices: Whether the axis of the heads' plate became the draw axis.
            are_statistics: Whether these are a routine's, of which one may have a site's name.
        """
        result = {}
        for name, value in values.items():
            shape = tuple(value.shape[len(lead) :])
            site = self.sites.get(name)
            if are_statistics and site is not None:
                labels = tuple(placeholder(name, axis) for axis in range(len(shape)))
            elif are_densities and site is not None and len(shape) == len(site.batch_shape):
                labels = self.names.of(name, site.shape, site.axis_names)[: len(shape)]
            else:
                plates = [] if site is None else _fitting(site, shape, self.names, are_slices)
                labels = self.names.of(name, shape, plates, without_plate=are_slices)
            result[variable_name(name)] = ((*lead, *labels), array(value))
        return result


def array(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to an array; bfloat16, which numpy lacks, becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def variable_name(name: str) -> str:
    """Name of a site's variable: groups are paths, so that no variable may have a slash."""
    return name.replace("/", ".")


def _fitting(
    site: Site, shape: tuple[int, ...], names: AxisNames, is_slice: bool
) -> list[str | None]:
    """Plates along the axes of a value that may lack leading axes of its site, or one plate's."""
    axes = list(zip(site.axis_names, site.shape, strict=True))
    if is_slice:
        axes = [axis for axis in axes if axis[0] != names.dropped]
    axes = axes[max(len(axes) - len(shape), 0) :]
    last = shape[len(shape) - len(axes) :]
    return [name if size == own else None for (name, size), own in zip(axes, last, strict=True)]
