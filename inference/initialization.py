"""Where a run starts: a posterior, given values, one of Pyro's ``init_to_*``, or a uniform draw."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from jaxtyping import Float
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.program import apart_from_handlers, data_defaults
from bayesattn.inference.running import private_param_store, seeded

__all__ = ["Init", "initial_values"]

Init = Posterior | Mapping[str, Any] | Callable[..., Tensor] | None


def initial_values(
    density: LogDensity, count: int, init: Init, generator: torch.Generator
) -> Float[Tensor, "count dim"]:
    """Choose unconstrained starting values.

    Args:
        density: Of the model.
        count: How many rows.
        init: A posterior, whose draws are taken at random, without replacement while they last;
            a mapping from every site to its constrained value, or to ``count`` of them; one of
            Pyro's ``init_to_*`` strategies; or None: uniform in [-2, 2] on the unconstrained scale.
        generator: Draws what is random.

    Raises:
        ValueError: If ``init`` is of another kind or does not fit the model's sites.
    """
    if init is None:
        start = 4 * torch.rand(count, density.dim, generator=generator, dtype=torch.float64) - 2
        return start.to(density.device, density.dtype)
    if isinstance(init, Posterior):
        return _apart(density.unconstrain(_picked(density, init, count, generator)), generator)
    if isinstance(init, Mapping):
        return _apart(density.unconstrain(_given(density, init, count)), generator)
    if callable(init):
        return _by_strategy(density, init, count, generator)
    raise ValueError(
        "init must be a Posterior, a mapping from sites to values, one of Pyro's init_to_* or None, "
        f"got {type(init).__name__}"
    )


def _picked(
    density: LogDensity, posterior: Posterior, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    values = posterior.network_samples()
    missing = [site.name for site in density.sites if site.name not in values]
    if missing:
        raise ValueError(
            f"init must hold every latent site of the model, but the posterior lacks {missing}"
        )
    total = len(values[density.sites[0].name])
    rounds = -(-count // total)
    order = torch.cat([torch.randperm(total, generator=generator) for _ in range(rounds)])[:count]
    return {site.name: values[site.name][order.to(density.device)] for site in density.sites}


def _given(density: LogDensity, init: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    names = [site.name for site in density.sites]
    if set(init) != set(names):
        raise ValueError(f"init must give values for the sites {names}, got {sorted(init)}")
    values = {}
    for site in density.sites:
        value = torch.as_tensor(init[site.name], device=density.device, dtype=site.dtype)
        if value.shape == site.shape:
            value = value.expand(count, *site.shape)
        if value.shape != (count, *site.shape):
            raise ValueError(
                f"init[{site.name!r}] must have shape {tuple(site.shape)} or "
                f"{(count, *site.shape)}, got {tuple(value.shape)}"
            )
        values[site.name] = value
    return values


def _by_strategy(
    density: LogDensity, strategy: Callable, count: int, generator: torch.Generator
) -> Tensor:
    rows: dict[str, list[Tensor]] = {site.name: [] for site in density.sites}
    seed = int(torch.randint(2**31, (), generator=generator))
    with (
        seeded(seed, density.device),
        apart_from_handlers(),
        private_param_store(),
        data_defaults(density.args, density.kwargs),
        torch.no_grad(),
    ):
        for _ in range(count):
            with InitMessenger(strategy):
                trace = poutine.trace(density.model).get_trace(*density.args, **density.kwargs)
            for name, values in rows.items():
                values.append(trace.nodes[name]["value"].detach())
    stacked = {name: torch.stack(values) for name, values in rows.items()}
    return _apart(density.unconstrain(stacked), generator)


def _apart(particles: Tensor, generator: torch.Generator) -> Tensor:
    """Move equal rows a little apart: equal particles would stay equal forever."""
    if len(particles) < 2 or len(particles.unique(dim=0)) == len(particles):
        return particles
    noise = torch.randn(particles.shape, generator=generator, dtype=torch.float64).to(particles)
    return particles + 0.01 * noise
