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

Coordinates alone are slow where sides trade lengths, and where a needless component shrinks. So two
more moves follow, along which the bound is known too: sides are rescaled at no change of their
product, and components are shrunk with their precision.

Source:
    Bishop (1999), Variational principal components, ICANN, for the prior; Zhao, Zhang and Cichocki
    (2015), Bayesian CP factorization of incomplete tensors with automatic rank determination, IEEE
    TPAMI 37, arXiv:1401.6497. Differs from it: the tolerance is fixed, the products are given by
    their sides, and scales move by themselves, as in Qi and Jaakkola (2006), Parameter expanded
    variational Bayesian methods, NIPS 19.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
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
_BISECTIONS = 60


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
        count = sum(state[name].shape[1] for name in SIDES)
        state["precision_shape"] = torch.full_like(precision, self.prior.shape + count / 2)
        state["precision_rate"] = state["precision_shape"] / precision
        return state

    def laws(self, state: Mapping[str, Tensor]) -> dict[str, TorchDistributionMixin]:
        """Law of each site."""
        sides = {
            name: MatrixNormal(state[name], state[f"{name}_covariance"], validate_args=False)
            for name in SIDES
        }
        return {"precision": dist.Gamma(state["precision_shape"], state["precision_rate"]), **sides}

    def renewed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give each side its best law in turn, then the precisions, then components their scale."""
        state = dict(state)
        for name in SIDES:
            state |= self.renewed_side(state, name)
        state["precision_rate"] = self.prior.rate + _squares(state) / 2
        return self._without_the_needless(self._balanced(state))

    def renewed_side(self, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """Parameters of the best law of one side given all others."""
        first, second = (_second_moment(state, side) for side in SIDES if side != name)
        precision = state["precision_shape"] / state["precision_rate"]
        inverse = first * second / self.tolerance**2 + precision.diag()
        factor = torch.linalg.cholesky(inverse)
        mean = torch.cholesky_solve(self._seen_by(name, state) / self.tolerance**2, factor)
        return {name: mean, f"{name}_covariance": torch.cholesky_inverse(factor)}

    def elbo(self, state: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Evidence lower bound, in nats."""
        query, key, mixing = (_second_moment(state, name) for name in SIDES)
        agreement = (state["mixing"] * self._seen_by("mixing", state)).sum()
        explained = 2 * agreement - (query * key * mixing).sum()
        likelihood = self.products.log_likelihood(explained, self.tolerance)
        shape, rate = state["precision_shape"], state["precision_rate"]
        precision, log_precision = shape / rate, shape.digamma() - rate.log()
        count = sum(state[name].shape[1] for name in SIDES)
        sides = count * (log_precision - math.log(2 * math.pi)) - precision * _squares(state)
        entropy = sum(law.entropy().sum() for law in self.laws(state).values())
        prior = self._expected_prior(precision, log_precision)
        return likelihood + sides.sum() / 2 + prior + entropy

    def _balanced(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        r"""Rescale the sides of each component, at no change of their product, where it is best.

        At scales :math:`v_i` with product one the bound changes by
        :math:`\sum_i n_i \log v_i - \lambda v_i^2 S_i / 2`, n entries of mean squared norm S.
        """
        counts = torch.tensor([float(state[name].shape[1]) for name in SIDES]).to(state[SIDES[0]])
        squares = torch.stack([_second_moment(state, name).diagonal() for name in SIDES], -1)
        weighed = squares * (state["precision_shape"] / state["precision_rate"])[:, None]
        # The root of a function that rises, between where it is negative and where it is positive.
        low = -counts.amin().expand(len(weighed))
        high = weighed.amax(-1)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_below = ((counts + middle[:, None]) / weighed).log().sum(-1) < 0
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        scales = ((counts + high[:, None]) / weighed).sqrt()
        scales = scales / scales.log().mean(-1, keepdim=True).exp()
        return state | _rescaled(state, dict(zip(SIDES, scales.unbind(-1), strict=True)))

    def _without_the_needless(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        r"""Shrink components, one after the other, where that raises the bound, the most first.

        If the sides of a component are scaled by :math:`v` and its precision by :math:`v^{-2}`, the
        bound changes by a parabola in :math:`v^3` and by
        :math:`-2 c \log v - d \lambda (v^{-2} - 1)`, c and d the prior's shape and rate. What
        nothing needs would come to the latter's maximum in steps of :math:`2 c` over the number of
        a component's entries, which are small.
        """
        query, key, mixing = (_second_moment(state, name) for name in SIDES)
        gram = query * key * mixing / self.tolerance**2
        seen = (state["mixing"] * self._seen_by("mixing", state)).sum(1) / self.tolerance**2
        precision = state["precision_shape"] / state["precision_rate"]
        least = (self.prior.rate * precision / self.prior.shape).sqrt()
        gained = -2 * self.prior.shape * least.log() - self.prior.rate * precision * (least**-2 - 1)
        change = least**3 - 1
        gained = gained - change**2 * gram.diagonal() / 2
        volume, scale = torch.ones_like(least), torch.ones_like(least)
        for _ in range(len(least)):
            raised = gained + change * (seen - gram @ volume)
            raised = torch.where((scale == 1) & (least < 1), raised, -torch.inf)
            best = raised.argmax()
            if not raised[best] > 0:
                break
            scale[best], volume[best] = least[best], least[best] ** 3
        rates = {"precision_rate": state["precision_rate"] * scale**2}
        return state | rates | _rescaled(state, dict.fromkeys(SIDES, scale))

    def _expected_prior(
        self, precision: Float[Tensor, " component"], log_precision: Float[Tensor, " component"]
    ) -> Float[Tensor, ""]:
        """Mean of the log prior density of the precisions."""
        shape, rate = self.prior.shape, self.prior.rate
        constant = shape * math.log(rate) - math.lgamma(shape)
        return (constant + (shape - 1) * log_precision - rate * precision).sum()

    def _seen_by(self, name: str, state: Mapping[str, Tensor]) -> Float[Tensor, "component size"]:
        """Products of the heads with the two other sides' means."""
        query, key, mixing = (state[side] for side in SIDES)
        if name == "query_component":
            return self.products.query_products(key, mixing)
        if name == "key_component":
            return self.products.key_products(query, mixing)
        return self.products.inner_products(query, key)


def _rescaled(
    state: Mapping[str, Tensor], scales: Mapping[str, Float[Tensor, " component"]]
) -> dict[str, Tensor]:
    """Laws of sides whose rows are scaled."""
    found = {}
    for name, scale in scales.items():
        found[name] = scale[:, None] * state[name]
        found[f"{name}_covariance"] = scale[:, None] * state[f"{name}_covariance"] * scale
    return found


def _second_moment(state: Mapping[str, Tensor], name: str) -> Float[Tensor, "component component"]:
    """Mean inner products of the rows of a side."""
    mean = state[name]
    return mean @ mean.mT + mean.shape[1] * state[f"{name}_covariance"]


def _squares(state: Mapping[str, Tensor]) -> Float[Tensor, " component"]:
    """Mean squared norm of a component's three rows together."""
    return torch.stack([_second_moment(state, name).diagonal() for name in SIDES]).sum(0)
