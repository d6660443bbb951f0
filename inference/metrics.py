r"""Working coordinates from a cloud of particles, in which its covariance is near the identity.

.. math:: x = \bar x + B w, \qquad B B^\top = \widehat{\mathrm{cov}}(x)
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.inference.coordinates import Affine, composed

__all__ = ["Metric", "MetricChoice", "chosen_metric", "metric_of"]

Metric = Literal["full", "diagonal", "none"]
MetricChoice = Literal["auto", "full", "diagonal", "none"]


def chosen_metric(metric: MetricChoice, num_particles: int, dim: int) -> Metric:
    """Settle what ``"auto"`` means for a cloud of this size.

    Full from four particles a dimension on, else diagonal from 20 particles on, else none.

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
    if num_particles >= 4 * dim:
        return "full"
    return "diagonal" if num_particles >= 20 else "none"


def metric_of(
    particles: Float[Tensor, "*run particle dim"], metric: Metric, frame: Affine
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
