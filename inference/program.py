"""Reading a Pyro program: what its sites, plates and parameters are, as one run shows them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.unit import Unit
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions.constraints import Constraint

from bayesattn.inference.bijections import bijection
from bayesattn.inference.observations import check_observations
from bayesattn.inference.prior_run import first_run, unwrapped

__all__ = ["Latent", "Plate", "Program", "read_program"]


class Plate(NamedTuple):
    """One plate around a latent site.

    Attributes:
        name: The plate's name, which is an axis name.
        axis: Its axis in the site's own shape, counted from the left.
        size: Its length.
    """

    name: str
    axis: int
    size: int


class Latent(NamedTuple):
    """One continuous latent site and its slice of the unconstrained vector.

    Attributes:
        name: The site's name.
        shape: Of the constrained value.
        unconstrained_shape: Of the value on the real line; batch axes lead in both.
        plates: The plates around it, outermost axis first.
        support: As it was in the first run; it may move with other latents.
        dtype: Of the site's value in the program.
        start: First entry of its slice.
        stop: One past the last.
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    plates: tuple[Plate, ...]
    support: Constraint
    dtype: torch.dtype
    start: int
    stop: int


class Program(NamedTuple):
    """What one run of a Pyro program tells about it.

    Attributes:
        latents: Continuous latent sites in the order of the program.
        discrete: Names of the discrete latent sites, which are summed out.
        observed: Names of observed sample sites.
        factors: Names of :func:`pyro.factor` sites.
        deterministic: Names of :func:`pyro.deterministic` sites.
        subsamples: Subsampled plates: name to (full size, subsample size).
        parameters: ``pyro.param`` sites that belong to no known module: name to value.
        first_values: The latents' constrained values in that run.
        plate_nesting: Number of nested plates.
        device: Where the latents live.
        dtype: Of the unconstrained vector: the sites' promoted dtype, at least float32.
    """

    latents: tuple[Latent, ...]
    discrete: tuple[str, ...]
    observed: tuple[str, ...]
    factors: tuple[str, ...]
    deterministic: tuple[str, ...]
    subsamples: dict[str, tuple[int, int]]
    parameters: dict[str, Tensor]
    first_values: dict[str, Tensor]
    plate_nesting: int
    device: torch.device
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        """Length of the unconstrained vector."""
        return self.latents[-1].stop

    @property
    def event_start(self) -> int:
        """First tensor dimension, from the right, that enumeration may use."""
        return -1 - self.plate_nesting


def read_program(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    max_plate_nesting: int | None = None,
) -> Program:
    """Run the program once, outside of any transform, and note its sites.

    Raises:
        ValueError: If the program fails on its arguments or writes what is not its own, observes
            values that its distributions cannot take, has no continuous latent site, a latent
            inside a subsampled plate, or a latent of a kind that is not supported.
    """
    trace = first_run(model, args, kwargs)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    subsamples = {
        name: (site["fn"].size, site["fn"].subsample_size)
        for name, site in sites.items()
        if _is_subsample(site) and (site["fn"].subsample_size or site["fn"].size) < site["fn"].size
    }
    sites = {name: site for name, site in sites.items() if not _is_subsample(site)}
    check_observations({n: site for n, site in sites.items() if _is_observation(site)})
    hidden = {name: site for name, site in sites.items() if not site["is_observed"]}
    discrete = tuple(name for name, site in hidden.items() if _is_discrete(site))
    _refuse_unsupported_discrete({name: hidden[name] for name in discrete})
    continuous = {name: site for name, site in hidden.items() if name not in discrete}
    if not continuous:
        raise ValueError(
            "the model has no continuous latent site, so there is nothing to infer; sites found: "
            f"{sorted(trace.nodes.keys() - {'_INPUT', '_RETURN'}) or 'none'}"
        )
    latents = _lay_out(continuous)
    dims = [f.dim for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized]
    return Program(
        latents=latents,
        discrete=discrete,
        observed=tuple(name for name, site in sites.items() if _is_observation(site)),
        factors=tuple(name for name, site in sites.items() if _is_factor(site)),
        deterministic=tuple(name for name, site in sites.items() if _is_deterministic(site)),
        subsamples=subsamples,
        parameters=trace.parameters,
        first_values={site.name: continuous[site.name]["value"] for site in latents},
        plate_nesting=-min(dims, default=0) if max_plate_nesting is None else max_plate_nesting,
        device=next(iter(continuous.values()))["value"].device,
        dtype=functools.reduce(torch.promote_types, (s.dtype for s in latents), torch.float32),
    )


def _is_subsample(site: Any) -> bool:
    return isinstance(site["fn"], _Subsample)


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _is_observation(site: Any) -> bool:
    return site["is_observed"] and not _is_deterministic(site) and not _is_factor(site)


def _is_factor(site: Any) -> bool:
    return site["is_observed"] and isinstance(site["fn"], Unit)


def _is_discrete(site: Any) -> bool:
    support = getattr(site["fn"], "support", None)
    return site["fn"].has_enumerate_support or bool(getattr(support, "is_discrete", False))


def _refuse_unsupported_discrete(sites: Mapping[str, Any]) -> None:
    for name, site in sites.items():
        inner = unwrapped(site["fn"])
        if inner.has_enumerate_support and not site["fn"].has_enumerate_support:
            raise ValueError(
                f"discrete site {name!r} gathers its elements by to_event, so that they cannot be "
                "summed out one by one; put them in a plate"
            )
        if not inner.has_enumerate_support:
            raise ValueError(
                f"discrete site {name!r} is a {type(inner).__name__}, whose "
                "support cannot be enumerated, so it cannot be summed out; marginalize it by hand "
                "or observe it"
            )
        if site["infer"].get("enumerate", "parallel") != "parallel":
            raise ValueError(
                f"discrete site {name!r} asks for {site['infer']['enumerate']!r} enumeration; only "
                "'parallel' is supported: remove the request or write 'parallel'"
            )


def _lay_out(sites: Mapping[str, Any]) -> tuple[Latent, ...]:
    latents: list[Latent] = []
    start = 0
    for name, site in sites.items():
        _refuse_unsupported_latent(name, site)
        value, batch_ndim = site["value"], len(site["fn"].batch_shape)
        transform: Any = bijection(site["fn"].support)
        image = transform.inv(value)
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        plates = sorted((batch_ndim + frame.dim, frame.name) for frame in frames)
        latents.append(
            Latent(
                name=name,
                shape=value.shape,
                unconstrained_shape=image.shape,
                plates=tuple(Plate(plate, axis, value.shape[axis]) for axis, plate in plates),
                support=site["fn"].support,
                dtype=value.dtype,
                start=start,
                stop=start + image.numel(),
            )
        )
        start += image.numel()
    return tuple(latents)


def _refuse_unsupported_latent(name: str, site: Any) -> None:
    for frame in site["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"latent site {name!r} is inside the subsampled plate {frame.name!r}: its value "
                "would have to be kept for rows that are not drawn; use the full plate"
            )
    distribution = unwrapped(site["fn"])
    if isinstance(distribution, Delta):
        raise ValueError(
            f"latent site {name!r} is a Delta, which has no density on the real line; write "
            "pyro.deterministic for a value that follows from others"
        )
    support = getattr(distribution, "support", None)
    try:
        bijection(site["fn"].support)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"latent site {name!r} ({type(distribution).__name__}) has the support {support}, onto "
            "which there is no bijection from the reals; reparametrize it"
        ) from error
