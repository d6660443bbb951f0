"""What a Pyro program shows of itself in one run: its sample sites."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine.subsample_messenger import _Subsample

__all__ = ["Site", "read_sites"]


class Site(NamedTuple):
    """One sample site, as a run of the program showed it.

    Attributes:
        name: The site's name.
        kind: ``"given"`` a value from outside, ``"free"`` (neither given nor observed),
            ``"observed"``, ``"deterministic"`` or ``"factor"``.
        value: Its value in that run.
        batch_shape: Of its distribution, plates included.
        event_shape: Of its distribution.
        plates: The plates around it: axis, counted from the right of the batch axes from minus one
            on, to (name, size).
        is_summable: Whether it is discrete, hidden, and its support can be enumerated.
    """

    name: str
    kind: str
    value: Any
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: dict[int, tuple[str, int]]
    is_summable: bool

    @property
    def shape(self) -> torch.Size:
        """Of a value that fills all plates."""
        return self.batch_shape + self.event_shape

    @property
    def plate_names(self) -> set[str]:
        """Names of the plates around it."""
        return {name for name, _ in self.plates.values()}

    @property
    def axis_names(self) -> list[str | None]:
        """Name of the plate along each axis of :attr:`shape`, None along the others."""
        names: list[str | None] = [None] * len(self.shape)
        for axis, (name, size) in self.plates.items():
            place = len(self.batch_shape) + axis
            if place >= 0 and self.shape[place] == size:
                names[place] = name
        return names


def read_sites(nodes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Site]:
    """Read the sample sites off a trace, subsampling of plates left out.

    Args:
        nodes: Of a Pyro trace.
        given: Names of the sites whose values came from outside.
    """
    return {
        name: _read_site(name, node, name in given)
        for name, node in nodes.items()
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
    }


def _read_site(name: str, node: Any, is_given: bool) -> Site:
    distribution, value = node["fn"], node["value"]
    if node["infer"].get("_deterministic"):
        kind = "deterministic"
    elif node["is_observed"]:
        kind = "factor" if type(distribution).__name__ == "Unit" else "observed"
    else:
        kind = "given" if is_given else "free"
    plates = {
        frame.dim: (frame.name, frame.size)
        for frame in node["cond_indep_stack"]
        if frame.vectorized
    }
    batch_shape, event_shape = distribution.batch_shape, distribution.event_shape
    if kind == "deterministic":
        batch_shape, event_shape = _deterministic_shapes(value, len(event_shape), plates)
    is_hidden = kind in ("free", "given")
    is_summable = is_hidden and distribution.has_enumerate_support
    return Site(name, kind, value, batch_shape, event_shape, plates, is_summable)


def _deterministic_shapes(
    value: Any, event_dim: int, plates: Mapping[int, tuple[str, int]]
) -> tuple[torch.Size, torch.Size]:
    """Find which axes of a deterministic value are its plates'.

    Pyro takes all of them for event axes unless told; where exactly one other reading fits the
    sizes of the plates, that is taken.
    """
    shape = torch.as_tensor(value).shape
    if event_dim < len(shape) or not plates:
        return shape[: len(shape) - event_dim], shape[len(shape) - event_dim :]
    fits = [
        split
        for split in range(len(shape) + 1)
        if all(-axis <= split and shape[split + axis] == plates[axis][1] for axis in plates)
    ]
    split = fits[0] if len(fits) == 1 else 0
    return shape[:split], shape[split:]
