r"""Normal distributions over heads whose correlations a vector sets, and their divergence.

.. math:: L = I + \operatorname{tril}(c c^\top, -1), \quad S = L L^\top, \quad
    R = D^{-1/2} S D^{-1/2}, \; D = \operatorname{diag} S, \qquad
    z_l \sim N(\mu_l, \operatorname{diag}(\sigma_l) R \operatorname{diag}(\sigma_l))

over heads, for each latent coordinate l by itself. It is the Gaussian copula of R with normal
marginals :math:`N(\mu_{hl}, \sigma_{hl}^2)`, which is no other than a multivariate normal.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147. Differs from its code, whose
    rows of L are not of unit length, whose draws multiply by sums of those rows (so that heads stay
    all but independent), and whose copula entropy is that of no density.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["correlation_tril", "coupled_divergence", "coupled_scale_tril"]


def correlation_tril(coupling: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head head"]:
    """Cholesky factor of the correlations R between heads; the identity where c is zero.

    Args:
        coupling: c, of any size and sign; heads of one sign correlate positively.
    """
    factor = _factor(coupling)
    return factor / factor.square().sum(-1, keepdim=True).sqrt()


def coupled_scale_tril(
    scale: Float[Tensor, "*#batch head latent"], coupling: Float[Tensor, "*#batch head"]
) -> Float[Tensor, "*#batch latent head head"]:
    """Cholesky factor of the covariance over heads of each latent coordinate.

    It is the ``scale_tril`` of a ``MultivariateNormal``, or what standard normals over heads are
    multiplied by.

    Args:
        scale: Standard deviations of the marginals, positive.
        coupling: c; see :func:`correlation_tril`.
    """
    return scale.mT[..., None] * correlation_tril(coupling)[..., None, :, :]


def coupled_divergence(
    mean: Float[Tensor, "*#batch head latent"],
    scale: Float[Tensor, "*#batch head latent"],
    coupling: Float[Tensor, "*#batch head"],
) -> Float[Tensor, "*#batch"]:
    r"""Kullback-Leibler divergence from independent standard normals, of all heads and coordinates.

    .. math:: \sum_{hl} \frac{\mu_{hl}^2 + \sigma_{hl}^2 - 1 - \log \sigma_{hl}^2}{2} +
        \frac{l_{\max}}{2} \sum_h \log S_{hh}

    the marginals' own divergences, and the information between heads in each of the
    :math:`l_{\max}` latent coordinates. With a random sign before the means, one for all heads, the
    distribution is a mixture of two, and this an upper bound on its divergence.

    Args:
        mean: Of the marginals.
        scale: Their standard deviations, positive.
        coupling: c; see :func:`correlation_tril`.

    Returns:
        In nats.
    """
    marginal = (mean.square() + scale.square() - 1) / 2 - scale.log()
    between = _factor(coupling).square().sum(-1).log().sum(-1) / 2
    return marginal.sum((-2, -1)) + scale.shape[-1] * between


def _factor(coupling: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head head"]:
    """L, whose rows' squared lengths are the diagonal of S."""
    identity = torch.eye(coupling.shape[-1], dtype=coupling.dtype, device=coupling.device)
    return identity + (coupling[..., :, None] * coupling[..., None, :]).tril(-1)
