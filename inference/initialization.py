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
from bayesattn.inference.quiet import data_defaults
from bayesattn.inference.running import private_param_store, seeded

__all__ = ["Init", "initial_values", "set_apart"]

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
        ValueError: If ``init`` is of another kind, or its values do not fit the model's sites.
    """
    if init is None:
        start = 4 * torch.rand(count, density.dim, generator=generator, dtype=torch.float64) - 2
        return start.to(density.device, density.dtype)
    if isinstance(init, Posterior):
        values = _picked(density, init, count, generator)
    elif isinstance(init, Mapping):
        values = _given(density, init, count)
    elif callable(init):
        values = _by_strategy(density, init, count, generator)
    else:
        raise ValueError(
            "init must be a Posterior, a mapping from sites to values, one of Pyro's init_to_* or "
            f"None, got {type(init).__name__}"
        )
    try:
        return density.unconstrain(values)
    except ValueError as error:
        raise ValueError(f"init does not fit the model: {error}") from error


def set_apart(
    particles: Float[Tensor, "particle dim"], generator: torch.Generator
) -> Float[Tensor, "particle dim"]:
    """Move particles a little where some are equal: equal particles would stay equal forever.

    The noise is a hundredth of the particles' spread, or of one where all are equal.
    """
    if len(particles) < 2 or len(particles.unique(dim=0)) == len(particles):
        return particles
    spread = particles.std(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    noise = torch.randn(particles.shape, generator=generator, dtype=torch.float64).to(particles)
    return particles + 0.01 * spread * noise


def _picked(
    density: LogDensity, posterior: Posterior, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    values = posterior.network_samples()
    missing = [site.name for site in density.sites if site.name not in values]
    if missing:
        raise ValueError(
            f"init must hold every latent site of the model, but the posterior lacks {missing}"
        )
    for site in density.sites:
        _check_shape(site.name, values[site.name].shape[1:], site.shape)
    total = len(values[density.sites[0].name])
    rounds = -(-count // total)
    order = torch.cat([torch.randperm(total, generator=generator) for _ in range(rounds)])[:count]
    return {
        site.name: values[site.name][order.to(values[site.name].device)] for site in density.sites
    }


def _given(density: LogDensity, init: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    names = [site.name for site in density.sites]
    if set(init) != set(names):
        raise ValueError(f"init must give values for the sites {names}, got {sorted(init)}")
    values = {}
    for site in density.sites:
        value = torch.as_tensor(init[site.name]).detach().to(density.device, site.dtype)
        if value.shape == site.shape:
            value = value.expand(count, *site.shape)
        if value.shape != (count, *site.shape):
            raise ValueError(
                f"init[{site.name!r}] must have shape {tuple(site.shape)}, or "
                f"{(count, *site.shape)} for {count} starts, got {tuple(value.shape)}"
            )
        values[site.name] = value
    return values


def _by_strategy(
    density: LogDensity, strategy: Callable, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {site.name: [] for site in density.sites}
    seed = int(torch.randint(2**31, (), generator=generator))

    def of_latents(site: Any) -> Tensor | None:
        if site["name"] not in rows:
            return None
        value = torch.as_tensor(strategy(site))
        _check_shape(site["name"], value.shape, site["fn"].shape())
        return value

    with (
        seeded(seed, density.device),
        poutine.block(),
        private_param_store(),
        data_defaults(density.args, density.kwargs),
        torch.no_grad(),
    ):
        for _ in range(count):
            with InitMessenger(of_latents):
                trace = poutine.trace(density.model).get_trace(*density.args, **density.kwargs)
            for name, values in rows.items():
                value = trace.nodes[name]["value"]
                assert value is not None
                values.append(value.detach())
    return {name: torch.stack(values) for name, values in rows.items()}


def _check_shape(site: str, shape: torch.Size, expected: torch.Size) -> None:
    if shape != expected:
        raise ValueError(f"init[{site!r}] must have shape {tuple(expected)}, got {tuple(shape)}")
