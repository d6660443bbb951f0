r"""Variational Bayes for components that heads share, in closed form.

.. math:: q(A)\, q(B)\, q(M) \prod_r q(\lambda_r), \qquad
    q(A) = MN(\bar A, \Sigma_A, I), \qquad q(\lambda_r) = \mathrm{Gamma}

Rows of A, B and M are components; :math:`\lambda_r = 1 / s_r^2` is the precision that the three
rows of a component share. The best law of A given the others, and of B and M in the same way, is

.. math:: \Sigma_A^{-1} = \operatorname{diag}(\mathbb{E} \lambda)
        + \frac{\mathbb{E}[B B^\top] * \mathbb{E}[M M^\top]}{\sigma^2}, \qquad
    \bar A = \frac{\Sigma_A}{\sigma^2} \sum_h \bigl((\bar B W_{K,h}^\top) * \bar m_h\bigr) W_{Q,h}

so that nothing larger than the weights is formed. Precisions of components that nothing needs grow
until their rows are as good as zero.

Source:
    Bishop (1999), Variational principal components, ICANN, for the prior; Zhao, Zhang and Cichocki
    (2015), Bayesian CP factorization of incomplete tensors with automatic rank determination, IEEE
    TPAMI 37, arXiv:1401.6497. Differs from it: the tolerance is fixed, and the products are given
    by their sides.
"""

from collections.abc import Mapping
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.models.component_scales import AutomaticRelevance
from bayesattn.models.head_products import ScaledProducts
from bayesattn.models.matrix_normal import MatrixNormal

__all__ = ["SIDES", "MeanFieldComponents"]

Number = float | int

# Sites of the three sides of a component, in the order of the program.
SIDES = ("query_component", "key_component", "mixing")
# First variance of each entry, in units of the mean square of its side.
_FIRST_VARIANCE = 0.01


class MeanFieldComponents(NamedTuple):
    """Independent laws of the sides and precisions of components, and how they are renewed.

    A state has the means of the three sides under their sites' names, ``<site>_covariance`` of each
    column of a side, and ``precision_shape`` and ``precision_rate`` of each component.

    Attributes:
        products: Of the heads.
        prior: Of the precisions.
        tolerance: Standard deviation of each entry.
    """

    products: ScaledProducts
    prior: AutomaticRelevance
    tolerance: Number

    def around(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Narrow laws around given values."""
        state = {}
        for name in SIDES:
            mean = values[name].double()
            variance = _FIRST_VARIANCE * mean.square().mean().clamp(min=torch.finfo(mean.dtype).eps)
            state[name] = mean
            state[f"{name}_covariance"] = variance * torch.eye(len(mean)).to(mean)
        precision = values["precision"].double()
        state["precision_shape"] = self._posterior_shape().to(precision).expand(precision.shape)
        state["precision_rate"] = state["precision_shape"] / precision
        return state

    def laws(
        self, state: Mapping[str, Tensor]
    ) -> dict[str, MatrixNormal | dist.TorchDistribution]:
        """Law of each site."""
        sides = {name: MatrixNormal(state[name], state[f"{name}_covariance"]) for name in SIDES}
        return {"precision": dist.Gamma(state["precision_shape"], state["precision_rate"]), **sides}

    def renewed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the three sides, and then the precisions, their best laws in turn."""
        state = dict(state)
        precision = state["precision_shape"] / state["precision_rate"]
        for name in SIDES:
            others = [self._second_moment(state, other) for other in SIDES if other != name]
            inverse = others[0] * others[1] / self.tolerance**2 + precision.diag()
            factor = torch.linalg.cholesky(inverse)
            gathered = self.products.gathered(name, *(state[side] for side in SIDES))
            state[name] = torch.cholesky_solve(gathered / self.tolerance**2, factor)
            state[f"{name}_covariance"] = torch.cholesky_inverse(factor)
        squares = sum(self._second_moment(state, name).diagonal() for name in SIDES)
        state["precision_rate"] = self.prior.rate + squares / 2
        return state

    def elbo(self, state: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Evidence lower bound, in nats."""
        laws = self.laws(state)
        moments = [self._second_moment(state, name) for name in SIDES]
        means = [state[name] for name in SIDES]
        explained = (
            2 * (means[2] * self.products.inner_products(means[0], means[1])).sum()
            - (moments[0] * moments[1] * moments[2]).sum()
        )
        shape, rate = state["precision_shape"], state["precision_rate"]
        precision, log_precision = shape / rate, shape.digamma() - rate.log()
        squares = sum(moment.diagonal() for moment in moments)
        constant = self._width() * torch.pi_like(precision) if False else None
        raise NotImplementedError(constant, laws, log_precision, squares, explained)
