r"""Wasserstein gradient descent with a kernel density estimate, as repulsive ensembles take it.

.. math:: x_i \leftarrow x_i + \epsilon \left[ \nabla \log p(x_i)
          + \frac{\sum_j \nabla_{x_j} k(x_j, x_i)}{\sum_j k(x_i, x_j)} \right]

Each particle climbs by its own score, and is pushed from where the estimated density of the
particles is high. The estimate is smoother than the particles: at rest, these are narrower than the
posterior by the kernel's own width (for a unit normal and an RBF kernel of fixed bandwidth h the
variance is 1 - h²).

Source:
    D'Angelo and Fortuin (2021), Repulsive deep ensembles are Bayesian, arXiv:2106.11642.
"""

from collections.abc import Callable
from typing import Any

from bayesattn.inference.directions import Direction, wasserstein_direction
from bayesattn.inference.svgd import SVGD
from bayesattn.kernels import IMQ, RBF, Kernel, PerSite, SiteKernel

__all__ = ["WGD"]


class WGD(SVGD):
    """Wasserstein gradient descent on a Pyro program: a repulsive ensemble.

    Args:
        model: A Pyro program.
        kernel: A radial one, :class:`~bayesattn.kernels.RBF` or :class:`~bayesattn.kernels.IMQ`, or
            one of these for each site; RBF with the median rule by default.
        **settings: As for :class:`bayesattn.inference.SVGD`.

    Raises:
        ValueError: If the kernel is not radial, or settings do not go together.
    """

    direction: Direction = staticmethod(wasserstein_direction)

    def __init__(
        self, model: Callable, *, kernel: Kernel | SiteKernel | None = None, **settings: Any
    ):
        kernel = RBF() if kernel is None else kernel
        parts = [kernel]
        if isinstance(kernel, PerSite):
            parts = [kernel.kernel, *kernel.sites.values()]
        if not all(isinstance(part, RBF | IMQ) for part in parts):
            raise ValueError(
                f"kernel: WGD estimates a density, so it expects RBF or IMQ, or PerSite of those, "
                f"got {kernel!r}"
            )
        super().__init__(model, kernel=kernel, **settings)
