r"""Regression by attention, with a prior of its kernels: each point is near what it attends to.

.. math:: y_i \sim N\Bigl(\sum_h \rho_h \sum_j a_{hij} y_j,\; \sigma^2\Bigr), \qquad
    a_{hij} = \mathrm{softmax}_j \bigl(\log(k_h(x_i, x_j)^2 + \epsilon) + m_h(x_j)\bigr)

over a context, or over all points but i itself. In the latter case the likelihood is the product of
each target's density given all others, a pseudo-likelihood, which is the density of no draw of all
targets together.

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147, for the logits. Besag (1975),
    Statistical analysis of non-lattice data, The Statistician 24, for pseudo-likelihoods. The model
    is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.argument_checks import check_numbers, check_type
from bayesattn.logits.spectral_features import log_of_square
from bayesattn.masking import masked_softmax
from bayesattn.models.checks import check_settings
from bayesattn.models.magnitude_priors import MagnitudePrior
from bayesattn.models.mixture_problems import standing_in
from bayesattn.models.regression_problems import RegressionProblem, read_regression
from bayesattn.models.spectral_priors import Kernel, KernelPrior

__all__ = ["AttentionRegression"]


@dataclass(frozen=True)
class AttentionRegression:
    """A Pyro program: regression by heads of attention whose kernels have a prior.

    Sites: those of the kernels and magnitudes; ``readout``, the heads' shares of the prediction,
    where there are several; ``noise_scale``; and ``target``. All but the last stand outside of the
    plates ``series`` and ``point`` of the data, so that queries, keys and all series have one
    kernel. Deterministic: ``kernel``, (head, lag), between the origin and the lags, and
    ``squared_kernel``, which is all that attention sees of it; ``attention``,
    (series, point, head, context); ``expected_target``.

    Posteriors predict at new points given a context, such as the training points::

        posterior.predict(new, context_inputs=inputs, context_target=target)

    Attributes:
        kernels: Such as :class:`bayesattn.models.RandomFrequencies`.
        num_heads: Number of heads.
        lags: Distances at which ``kernel`` is noted, along ``direction``.
        direction: Of the lags, as wide as inputs; the first axis by default.
        magnitudes: What keys weigh by themselves; nothing by default.
        readout_concentration: Of the readout's Dirichlet prior.
        noise_prior_scale: Of the half-normal prior of ``noise_scale``, in units of the target.
        floor: Added to squared kernels.
    """

    kernels: KernelPrior
    num_heads: int = 1
    lags: Sequence[float] = (0.0,)
    direction: Sequence[float] | None = None
    magnitudes: MagnitudePrior | None = None
    readout_concentration: int | float = 1.0
    noise_prior_scale: int | float = 1.0
    floor: int | float = 1e-5

    def __post_init__(self) -> None:
        check_type("kernels", self.kernels, KernelPrior)
        if self.magnitudes is not None:
            check_type("magnitudes", self.magnitudes, MagnitudePrior)
        check_settings(self)
        object.__setattr__(self, "lags", check_numbers("lags", self.lags))
        if self.direction is not None:
            object.__setattr__(self, "direction", check_numbers("direction", self.direction))
            if not any(self.direction):
                raise ValueError("direction must not be zero, got zeros alone")

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the last axes of each site and argument, for ArviZ."""
        return {
            "inputs": ["point", "feature"],
            "mask": ["point"],
            "context_inputs": ["context", "feature"],
            "context_target": ["context"],
            "context_mask": ["context"],
            "kernel": ["head", "lag"],
            "squared_kernel": ["head", "lag"],
            "attention": ["head", "context"],
            "readout": ["head"],
            **self.kernels.dims,
            **({} if self.magnitudes is None else self.magnitudes.dims),
        }

    @property
    def coords(self) -> dict[str, list[float]]:
        """Labels of axes, for ArviZ."""
        return {"lag": list(self.lags)}

    def __call__(
        self,
        inputs: Float[Tensor, "*series point dim"],
        target: Float[Tensor, "*series point"] | None = None,
        context_inputs: Float[Tensor, "*series context dim"] | None = None,
        context_target: Float[Tensor, "*series context"] | None = None,
        mask: Bool[Tensor, "*series point"] | None = None,
        context_mask: Bool[Tensor, "*series context"] | None = None,
    ) -> None:
        """Run the program.

        Arguments: :func:`~bayesattn.models.regression_problems.read_regression`. A point that sees
        nothing has the expectation zero.
        """
        problem = read_regression(
            inputs, target, context_inputs, context_target, mask, context_mask
        )
        heads = pyro.plate("head", self.num_heads)
        kernel = self.kernels.sample(heads, problem.query)
        noted = pyro.deterministic("kernel", self._at_lags(kernel, inputs))
        pyro.deterministic("squared_kernel", noted.square())
        logits = log_of_square(kernel(problem.query, problem.key).square(), self.floor)
        if self.magnitudes is not None:
            logits = logits + self.magnitudes.sample(heads, problem.key)[..., None, :]
        visible = None if problem.visible is None else problem.visible.unsqueeze(-3)
        weights = masked_softmax(logits, visible)
        by_head = torch.einsum("...hpc,...c->...hp", weights, problem.value)
        expected = torch.einsum("...hp,h->...p", by_head, self._readout(inputs))
        self._observe(problem, weights, expected)

    def _at_lags(
        self, kernel: Kernel, inputs: Float[Tensor, "*series point dim"]
    ) -> Float[Tensor, "head lag"]:
        axis = [1.0] + [0.0] * (inputs.shape[-1] - 1)
        direction = inputs.new_tensor(axis if self.direction is None else list(self.direction))
        if direction.shape != inputs.shape[-1:]:
            raise ValueError(
                f"direction must be as wide as inputs, {inputs.shape[-1]}, got {self.direction}"
            )
        lags = inputs.new_tensor(list(self.lags))[:, None] * direction / direction.norm()
        return kernel(torch.zeros_like(lags[:1]), lags).squeeze(-2)

    def _readout(self, like: Tensor) -> Float[Tensor, " head"]:
        if self.num_heads == 1:
            return like.new_ones(1)
        shares = like.new_full((self.num_heads,), float(self.readout_concentration))
        return pyro.sample("readout", dist.Dirichlet(shares))

    def _observe(
        self, problem: RegressionProblem, weights: Tensor, expected: Float[Tensor, "*series point"]
    ) -> None:
        prior = dist.HalfNormal(expected.new_full((), float(self.noise_prior_scale)))
        law = dist.Normal(expected, pyro.sample("noise_scale", prior))
        law = law if problem.mask is None else law.mask(problem.mask)
        with standing_in(problem.plates()):
            pyro.deterministic("attention", weights.transpose(-3, -2), event_dim=2)
            pyro.deterministic("expected_target", expected)
            pyro.sample("target", law, obs=problem.target)
