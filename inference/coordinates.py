r"""Affine coordinates in which a posterior is near unit scale, from its curvature at the mode.

.. math:: u = m + S v, \qquad S S^\top = (-\nabla^2 \log p(m))^{-1}

The mode :math:`m` is found by damped Newton ascent from several starts at once. The Hessian is
scaled by its own diagonal before it is factorized, so that units of any size survive the
arithmetic.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.log_density import LogDensity

__all__ = [
    "Affine",
    "check_hessians",
    "composed",
    "differentiable_value",
    "identity",
    "inverse_factor",
    "laplace",
]

_LARGEST_HESSIAN = 500


class Affine(NamedTuple):
    """An affine map from working coordinates to unconstrained ones.

    Attributes:
        location: Image of the origin.
        scale: Lower triangular matrix, or the diagonal of a diagonal one.
    """

    location: Float[Tensor, "*batch dim"]
    scale: Float[Tensor, "*batch dim dim"] | Float[Tensor, "*batch dim"]

    @property
    def is_diagonal(self) -> bool:
        """Whether ``scale`` is a diagonal."""
        return self.scale.ndim == self.location.ndim

    def apply(
        self, working: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Map working coordinates to unconstrained ones."""
        if self.is_diagonal:
            return self.location[..., None, :] + working * self.scale[..., None, :]
        return self.location[..., None, :] + working @ self.scale.mT

    def invert(
        self, unconstrained: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Map unconstrained coordinates to working ones."""
        centered = unconstrained - self.location[..., None, :]
        if self.is_diagonal:
            return centered / self.scale[..., None, :]
        return torch.linalg.solve_triangular(self.scale, centered.mT, upper=False).mT

    def pull_back(
        self, score: Float[Tensor, "*batch particle dim"]
    ) -> Float[Tensor, "*batch particle dim"]:
        """Turn the score by unconstrained coordinates into the score by working ones."""
        return score * self.scale[..., None, :] if self.is_diagonal else score @ self.scale

    def log_determinant(self) -> Float[Tensor, "*batch"]:
        """Log absolute determinant."""
        diagonal = self.scale if self.is_diagonal else self.scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.abs().log().sum(-1)

    def expand(self, num_runs: int) -> "Affine":
        """The same map for each of several runs."""
        location, scale = (part.expand(num_runs, *part.shape) for part in self)
        return Affine(location, scale)


def identity(like: Float[Tensor, "*batch dim"]) -> Affine:
    """The map that changes nothing."""
    return Affine(torch.zeros_like(like), torch.ones_like(like))


def composed(outer: Affine, inner: Affine) -> Affine:
    """The map that applies the inner one first; both triangular, and so is what comes of them."""
    location = outer.apply(inner.location[..., None, :])[..., 0, :]
    if outer.is_diagonal and inner.is_diagonal:
        return Affine(location, outer.scale * inner.scale)
    if inner.is_diagonal:
        return Affine(location, outer.scale * inner.scale[..., None, :])
    if outer.is_diagonal:
        return Affine(location, outer.scale[..., :, None] * inner.scale)
    return Affine(location, outer.scale @ inner.scale)


def differentiable_value(
    working: Float[Tensor, "*batch dim"],
    density: LogDensity,
    frame: Affine,
    subsample: Mapping[str, Tensor] | None = None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
    """Log density by working coordinates as autograd sees it, and its score there.

    The value is the recorded one plus a term that is zero and has the recorded score as its
    gradient, so that autograd never enters the graph.
    """
    rows = working.detach().reshape(-1, working.shape[-1])
    values, scores = density.value_and_score(frame.apply(rows), subsample)
    scores = frame.pull_back(scores).reshape(working.shape)
    tangent = ((working - working.detach()) * scores).sum(-1)
    return values.reshape(working.shape[:-1]) + tangent, scores


def laplace(
    density: LogDensity,
    *,
    num_starts: int = 20,
    num_steps: int = 200,
    generator: torch.Generator | None = None,
    starts: Float[Tensor, "start dim"] | None = None,
) -> Affine:
    """Find the highest mode and the map that gives it unit curvature.

    Args:
        density: Of a program whose plates are not subsampled.
        num_starts: How many random starts, uniform in [-2, 2].
        num_steps: Most Newton steps.
        generator: Draws the starts.
        starts: Further starts of one's own.

    Returns:
        Map with the mode as location and a Cholesky factor of the inverse curvature as scale.

    Raises:
        ValueError: If a plate is subsampled, the dimension is too large for Hessians, or no start
            reaches a finite log density.
    """
    check_hessians(density, "Laplace coordinates", instead="coordinates='raw'")
    points = 4 * torch.rand(num_starts, density.dim, generator=generator, dtype=torch.float64) - 2
    points = points.to(density.device, density.dtype)
    if starts is not None:
        points = torch.cat([points, starts.to(points)])
    points, values, curvature = _newton_ascent(density, points, num_steps)
    if not bool(values.isfinite().any()):
        raise ValueError("no start of the search for the mode has a finite log density")
    best = values.nan_to_num(nan=-torch.inf).argmax()
    return Affine(points[best], inverse_factor(curvature[best]))


def check_hessians(density: LogDensity, what: str, *, instead: str) -> None:
    """Refuse what needs Hessians of a density that has none to give.

    Args:
        density: Whose Hessians they would be.
        what: Needs them, in the plural.
        instead: What to use.

    Raises:
        ValueError: If a plate is subsampled, or the dimension is too large.
    """
    if density.program.subsamples:
        raise ValueError(
            f"{what} need the full data, but these plates are subsampled: "
            f"{sorted(density.program.subsamples)}"
        )
    if density.dim > _LARGEST_HESSIAN:
        raise ValueError(
            f"{what} factorize Hessians, at most {_LARGEST_HESSIAN} wide; this model has dimension "
            f"{density.dim}: use {instead}"
        )


def inverse_factor(curvature: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """Cholesky factor of the inverse of a curvature, which is made positive first.

    Where it is negative its size is taken, and what is next to none is floored.
    """
    unit, eigenvalues, vectors = _scaled_spectrum(curvature)
    covariance = (vectors / eigenvalues[..., None, :]) @ vectors.mT
    return unit[..., :, None] * torch.linalg.cholesky((covariance + covariance.mT) / 2)


def _newton_ascent(
    density: LogDensity, points: Tensor, num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Levenberg-Marquardt ascent of all starts together; returns points, values and -Hessians."""
    tolerance = torch.finfo(points.dtype).eps ** 0.5
    values, scores, hessians = density.value_score_and_hessian(points)
    damping = torch.ones_like(values)
    for _ in range(num_steps):
        step, decrement = _damped_step(scores, -hessians, damping)
        # A start is done once a full Newton step promises no visible gain of log density.
        active = ~(decrement < tolerance) & values.isfinite() & (damping < 1e12)
        if not bool(active.any()):
            break
        trial = torch.where(active[:, None], points + step, points)
        new_values, new_scores, new_hessians = density.value_score_and_hessian(trial)
        finite = new_values.isfinite() & new_scores.isfinite().all(-1)
        finite &= new_hessians.isfinite().flatten(1).all(-1)
        better = active & finite & (new_values > values)
        points = torch.where(better[:, None], trial, points)
        values = torch.where(better, new_values, values)
        scores = torch.where(better[:, None], new_scores, scores)
        hessians = torch.where(better[:, None, None], new_hessians, hessians)
        damping = torch.where(better, damping / 4, damping * 4).clamp(min=1e-10)
    return points, values, -hessians


def _damped_step(score: Tensor, curvature: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    unit, eigenvalues, vectors = _scaled_spectrum(curvature)
    along = (vectors.mT @ (unit * score)[..., None])[..., 0]
    step = along / (eigenvalues + damping[..., None])
    decrement = (along.square() / eigenvalues).sum(-1)
    return unit * (vectors @ step[..., None])[..., 0], decrement


def _scaled_spectrum(curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of the Jacobi-scaled curvature, made positive and floored, with the scaling."""
    curvature = curvature.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    diagonal = curvature.diagonal(dim1=-2, dim2=-1).abs()
    tiny = torch.finfo(curvature.dtype).tiny ** 0.5
    unit = torch.where(diagonal > tiny, diagonal.clamp(min=tiny).rsqrt(), torch.ones_like(diagonal))
    scaled = unit[..., :, None] * curvature * unit[..., None, :]
    eigenvalues, vectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    floor = 1e-8 if curvature.dtype == torch.float64 else 1e-5
    largest = eigenvalues.abs().amax(-1, keepdim=True).clamp(min=tiny)
    return unit, torch.maximum(eigenvalues.abs(), floor * largest), vectors
