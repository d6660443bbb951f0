r"""Stochastic gradient Langevin dynamics of a Pyro program.

.. math:: x \leftarrow x + \eta \nabla \log p(x) + \sqrt{2 \eta}\, \xi

It is :class:`bayesattn.inference.SPOS` without interaction between particles: each of them climbs
first, then it is a chain of its own.

Source:
    Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics. Differs
    from the paper: the step size is constant, in coordinates measured once.
"""

from collections.abc import Callable
from typing import Literal, Unpack

from bayesattn.inference.metrics import MetricChoice
from bayesattn.inference.routine import DensityOptions
from bayesattn.inference.schedules import Number
from bayesattn.inference.spos import SPOS
from bayesattn.kernels import Separate

__all__ = ["SGLD"]


class SGLD(SPOS):
    """Stochastic gradient Langevin dynamics of a Pyro program.

    Args:
        model: A Pyro program.
        num_particles: Chains of all latents; 20 by default.
        particle_plate: Instead: name of a plate whose slices take the place of particles. They do
            not repel each other; the network samples its joint posterior, and is the chain.
        step_size: η, in working coordinates; see :class:`bayesattn.inference.SPOS`.
        outside: With ``particle_plate``, what sites outside of it do: see
            :class:`bayesattn.inference.SPOS`.
        metric: Working coordinates from the particles' spread. Before the chains begin, particles
            climb without noise, so that what they have left of a spread says little: ``"none"`` by
            default, ``"curvature"`` where the scales of a posterior differ.
        coordinates: ``"raw"``, or ``"laplace"`` for badly scaled posteriors of some ten dimensions.
        **density: ``compile``, ``chunk_size``, ``stochastic``, ``max_plate_nesting``: see
            :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: On settings that do not go together.
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_particles: int | None = None,
        particle_plate: str | None = None,
        step_size: Number = 0.05,
        outside: Literal["sample", "fixed"] = "sample",
        metric: MetricChoice = "none",
        coordinates: Literal["raw", "laplace"] = "raw",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(
            model,
            num_particles=num_particles,
            particle_plate=particle_plate,
            langevin=0.0,
            step_size=step_size,
            outside=outside,
            kernel=Separate(),
            metric=metric,
            coordinates=coordinates,
            **density,
        )
