r"""Working coordinates from a cloud of particles, in which the posterior is near unit scale.

.. math:: x = \bar x + B w, \qquad B B^\top = \widehat{\mathrm{cov}}(x) \quad \text{or} \quad
    B B^\top = \Bigl( -\frac1M \sum_i \nabla^2 \log p(x_i) \Bigr)^{-1}

Source:
    Wang et al. (2019), Stein variational gradient descent with matrix-valued kernels,
    arXiv:1910.12794, for the average curvature.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.coordinates import Affine, composed, inverse_factor
from bayesattn.inference.log_density import LogDensity

__all__ = ["Metric", "MetricChoice", "chosen_metric", "curvature_metric", "metric_of"]

Metric = Literal["full", "diagonal", "none", "curvature"]
MetricChoice = Literal["auto", "full", "diagonal", "none", "curvature"]

# Particles of a run, evenly spaced, over which curvatures are averaged.
_MOST_HESSIANS = 100


def chosen_metric(
    metric: MetricChoice, num_particles: int, dim: int, *, may_mix: bool = True
) -> Metric:
    """Settle what ``"auto"`` means for a cloud of this size.

    Full from four particles a dimension on, if coordinates may be mixed, else diagonal from 20
    particles on, else none.

    Raises:
        ValueError: If a full metric is asked of particles that are too few to span it.
    """
    if metric == "full" and num_particles <= dim:
        raise ValueError(
            f"metric='full' needs more particles than the {dim} dimensions of one, got "
            f"{num_particles}; take metric='diagonal'"
        )
    if metric == "diagonal" and num_particles < 2:
        raise ValueError(f"metric='diagonal' needs two particles or more, got {num_particles}")
    if metric != "auto":
        return metric
    if may_mix and num_particles >= 4 * dim:
        return "full"
    return "diagonal" if num_particles >= 20 else "none"


def metric_of(
    particles: Float[Tensor, "*run particle dim"],
    metric: Literal["full", "diagonal", "none"],
    frame: Affine,
) -> Affine:
    """Map that gives the particles unit covariance, or unit variances.

    Args:
        particles: Unconstrained.
        metric: ``"full"``, ``"diagonal"``, or ``"none"``, which leaves the frame as it is.
        frame: Coordinates that the particles are measured in; a diagonal metric keeps its
            correlations.
    """
    if metric == "none":
        return frame
    inner = frame.invert(particles)
    location = inner.mean(-2)
    centered = inner - location[..., None, :]
    variance = centered.square().sum(-2) / (inner.shape[-2] - 1)
    # Where all particles agree there is no scale to learn.
    spread = variance > torch.finfo(variance.dtype).tiny
    deviation = torch.where(spread, variance, torch.ones_like(variance)).sqrt()
    if metric == "diagonal":
        return composed(frame, Affine(location, deviation))
    unit = centered / deviation[..., None, :]
    factor = _correlation_factor(unit.mT @ unit / (inner.shape[-2] - 1))
    return composed(frame, Affine(location, deviation[..., :, None] * factor))


def curvature_metric(
    density: LogDensity, particles: Float[Tensor, "run particle dim"], frame: Affine
) -> Affine:
    """Map about the particles' mean that gives the average curvature at them unit size.

    Args:
        density: Of a program whose plates are not subsampled.
        particles: Unconstrained; at most a hundred of each run are looked at.
        frame: Coordinates in which the curvature is factorized.
    """
    stride = -(-particles.shape[-2] // _MOST_HESSIANS)
    # One run at a time: their Hessians are the largest tensors of all.
    hessians = [density.value_score_and_hessian(run[::stride])[2].mean(0) for run in particles]
    half = frame.pull_back(-torch.stack(hessians))
    factor = inverse_factor(frame.pull_back(half.mT))
    return composed(frame, Affine(frame.invert(particles).mean(-2), factor))


def _correlation_factor(correlation: Float[Tensor, "*run dim dim"]) -> Tensor:
    """Cholesky factor, of a matrix that rounding may have made a little indefinite."""
    eye = torch.eye(correlation.shape[-1], device=correlation.device, dtype=correlation.dtype)
    ridge = 1e-6 if correlation.dtype == torch.float64 else 1e-4
    # A coordinate without spread has no correlations, and keeps its scale.
    diagonal = correlation.diagonal(dim1=-2, dim2=-1)
    missing = torch.diag_embed((diagonal == 0).to(correlation.dtype))
    factor, failure = torch.linalg.cholesky_ex((1 - ridge) * correlation + missing + ridge * eye)
    # Where particles are no numbers any more, the watch is to say so, not this.
    return torch.where(failure[..., None, None] > 0, eye, factor)
