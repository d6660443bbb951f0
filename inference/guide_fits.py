r"""How one guide is fitted: its parameters climb the ELBO, whatever it is fitted to.

.. math:: \mathrm{ELBO}(\lambda) = \mathbb{E}_{q_\lambda(u)} [\log p(u) - \log q_\lambda(u)]
"""

import abc
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from jaxtyping import Bool, Float
from pyro.infer import autoguide
from torch import Tensor

from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.optimizers import ScheduledOptimizer
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.quiet import data_defaults
from bayesattn.inference.running import Watched
from bayesattn.inference.step_loop import StepLoop

__all__ = ["FIRST_SCALE", "GUIDES", "GuideFit", "SVIInfo"]

GUIDES: dict[str, Callable[..., Any]] = {
    "normal": autoguide.AutoNormal,
    "multivariate_normal": autoguide.AutoMultivariateNormal,
    "low_rank": autoguide.AutoLowRankMultivariateNormal,
    "delta": autoguide.AutoDelta,
}
# Standard deviation of a named guide at first, in raw coordinates.
FIRST_SCALE = 0.1


class SVIInfo(NamedTuple):
    """What the reader of a run needs of one step; never read back.

    Attributes:
        elbo: Estimate before the step, in nats.
        watched: The same, and the score at draws of the guide or gradients by its parameters.
    """

    elbo: Float[Tensor, " run"]
    watched: Watched


class GuideFit(abc.ABC):
    """One guide and what it is fitted to, as a loop of steps needs it.

    Args:
        density: Of the program.
        loop: That will run it; its generator draws what is random here.
        make_optimizer: Of the parameters.
        make_posterior: Of draws and other fields.
        num_samples: Draws of the fitted guide.
    """

    dim: int
    device: torch.device
    elbo: Any
    model: Callable
    guide: Callable

    def __init__(
        self,
        density: LogDensity,
        loop: StepLoop,
        *,
        make_optimizer: Callable[[list[Tensor]], ScheduledOptimizer],
        make_posterior: Callable[..., Posterior],
        num_samples: int,
    ):
        self.density, self.loop, self.device = density, loop, density.device
        self.num_samples, self.make_posterior = num_samples, make_posterior
        self.make_optimizer = make_optimizer
        self.parameters: dict[str, Tensor] = {}

    @abc.abstractmethod
    def watched(self) -> Float[Tensor, "evaluation dim"]:
        """What is watched of the last loss beside its value."""

    @abc.abstractmethod
    def names(self, entries: Bool[Tensor, " dim"]) -> list[str]:
        """Names of some entries of what is watched."""

    @abc.abstractmethod
    def fields(self) -> dict[str, Any]:
        """Draws of the fitted guide, one run's, and what else a posterior of them has."""

    def begin(self, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Run model and guide once, which makes their parameters, and an optimizer of these."""
        self.args, self.kwargs = args, dict(kwargs or {})
        self.differentiate()
        self.optimizer = self.make_optimizer(list(self.parameters.values()))

    def differentiate(self) -> Float[Tensor, ""]:
        """Return the negative ELBO; parameters get its gradients."""
        with (
            # Validation would stop at a non-finite value that the watch is to report.
            pyro.validation_enabled(False),
            data_defaults(self.density.args, self.density.kwargs),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="Encountered ")
            with poutine.trace(param_only=True) as met:
                loss = self.elbo.differentiable_loss(
                    self.model, self.guide, *self.args, **self.kwargs
                )
            nodes: Any = met.trace.nodes
            found = {name: site["value"].unconstrained() for name, site in nodes.items()}
            found = {name: value for name, value in found.items() if value.requires_grad}
            gradients = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
        for value, gradient in zip(found.values(), gradients, strict=True):
            value.grad = gradient
        self.parameters |= found
        return loss.detach()

    def advance(self, step: int) -> SVIInfo:
        """Move the parameters once."""
        known = len(self.parameters)
        elbo = -self.differentiate()[None]
        self.optimizer.extend(list(self.parameters.values())[known:])
        info = SVIInfo(elbo, Watched.of(elbo, self.watched()))
        self.optimizer.step(step / self.loop.num_steps)
        return info

    def evaluate(self) -> Watched:
        """Sums of the parameters, which are finite where they all are."""
        sums = torch.stack([value.detach().sum() for value in self.parameters.values()])
        return Watched(sums.sum(), sums.new_zeros(self.dim))

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def is_settled(self) -> bool:
        """A fit does all its steps."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Parameters and the optimizer's state."""
        return {"parameters": self.snapshot(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken.

        Raises:
            ValueError: If the parameters are others.
        """
        saved = state["parameters"]
        if saved.keys() != self.parameters.keys():
            raise ValueError(
                f"the checkpoint has the parameters {sorted(saved)}, but this run begins with "
                f"{sorted(self.parameters)}; parameters that come later cannot be gone on with"
            )
        with torch.no_grad():
            for name, value in saved.items():
                self.parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def figures(self, info: SVIInfo) -> dict[str, float]:
        """What the bar shows."""
        return {"elbo": float(info.elbo)}

    def finish(
        self, snapshot: dict[str, Tensor], curves: dict[str, Tensor], attrs: dict[str, Any]
    ) -> Posterior:
        """Posterior of draws of the guide with these parameters."""
        with torch.no_grad():
            for name, value in snapshot.items():
                self.parameters[name].copy_(value)
            with (
                pyro.validation_enabled(False),
                data_defaults(self.density.args, self.density.kwargs),
            ):
                fields = self.fields()
        return self.make_posterior(optimization=curves, attrs=attrs, **fields)

    def log_density(self, unconstrained: Float[Tensor, "draw all"]) -> Float[Tensor, " draw"]:
        """Log density of draws; of minibatches where plates are subsampled."""
        subsample = self.density.draw_subsample(self.loop.generator)
        return self.density.value_and_score(unconstrained, subsample, is_in_loop=False)[0]
