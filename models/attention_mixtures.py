r"""What the two mixtures of attention share: a component for each datum, known or summed out.

.. math:: p(x_n) = \sum_m \pi_m N(x_n \mid c_m, \sigma^2 I)

Either way round, queries and keys are data and centers of one mixture of normal laws, and the
posterior over the assignment of a datum to a center is made of the same table of log densities,
"query key"; only the axis that is normalized differs.

Source:
    Ding et al. (2020), Attention that does not explain away, arXiv:2009.14308; the derivation is
    ours, as only its abstract was at hand.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bayesattn.contraction import weighted_sums
from bayesattn.iterated_attention import log_shares
from bayesattn.masking import masked_softmax
from bayesattn.models.checks import check_settings
from bayesattn.models.mixing import DirichletMixing, Mixing, NormMixing
from bayesattn.models.mixture_problems import MixtureProblem, make_plates, read_problem, standing_in

__all__ = ["AttentionMixture", "State", "VariancePrior"]

# Site to value, in the shape that the site has in the program.
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class VariancePrior:
    """An inverse gamma prior of the variance, which makes it the latent site ``variance``.

    Attributes:
        shape: Above zero.
        rate: Above zero; the mode is ``rate / (shape + 1)``.
    """

    shape: int | float
    rate: int | float

    def __post_init__(self) -> None:
        check_settings(self)

    def mode(self, count: Tensor, squares: Tensor) -> Tensor:
        """Variance of highest posterior density, given a sum of so many squares."""
        return (self.rate + squares / 2) / (self.shape + 1 + count.to(squares) / 2)


@dataclass(frozen=True)
class AttentionMixture(ABC):
    """A Pyro program with the closed forms of EM; subclasses say which are data and centers.

    Called with (queries, keys, values) and masks it runs the program; see
    :func:`~bayesattn.models.mixture_problems.read_problem` for the arguments. Leading axes are the
    plates ``batch`` and ``head``, and each of their entries is a mixture of its own. Sites
    ``mixing`` and ``variance`` are latent where they have priors. Deterministic: ``weights``, of
    each query over the keys, and ``output``, the values averaged under them.

    The closed forms take a state, site to value, and the program's arguments.

    Attributes:
        variance: Of each component; None is the square root of the width, as in attention; a
            :class:`VariancePrior` makes it latent.
        mixing: Shares of the components; by their norms, as in attention, by default.
    """

    variance: int | float | VariancePrior | None = None
    mixing: Mixing = field(default_factory=NormMixing)

    component_axis: ClassVar[int]
    component_name: ClassVar[str]

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.variance, VariancePrior) and isinstance(self.mixing, NormMixing):
            raise ValueError(
                "mixing=NormMixing() needs a variance that is given: shares that hang on a latent "
                "one leave no closed form; take UniformMixing() or DirichletMixing()"
            )

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the last axes of each site and argument, for ArviZ."""
        of_queries = ("queries", "center", "retrieved_query", "observed_query")
        return {
            **{name: ["query", "feature"] for name in of_queries},
            **{name: ["key", "feature"] for name in ("keys", "observed_key")},
            **{name: ["key", "value_feature"] for name in ("values", "observed_value")},
            "value_center": ["query", "value_feature"],
            "mixing": [self.component_name],
            "query_mask": ["query"],
            "key_mask": ["key"],
            "attn_mask": ["query", "key"],
            "weights": ["query", "key"],
            "output": ["query", "value_feature"],
        }

    def __call__(
        self,
        queries: Float[Tensor, "*_problem _query _dim"],
        keys: Float[Tensor, "*_problem _key _dim"],
        values: Float[Tensor, "*_problem _key _value_dim"] | None = None,
        *,
        query_mask: Shaped[Tensor, "*_batch _query"] | None = None,
        key_mask: Shaped[Tensor, "*_batch _key"] | None = None,
        attn_mask: Shaped[Tensor, "*_batch _query _key"] | None = None,
    ) -> None:
        """Run the program; arguments: :func:`~bayesattn.models.mixture_problems.read_problem`."""
        masks = {"query_mask": query_mask, "key_mask": key_mask, "attn_mask": attn_mask}
        problem = self.read(queries, keys, values, **masks)
        query_plate = pyro.plate("query", problem.query.shape[-2], dim=-1)
        with standing_in(make_plates(problem.shape)):
            state = self._sample_shared(problem)
            state |= self._sample(state, problem, query_plate)
            with query_plate:
                log_responsibilities = self._log_joint(state, problem).log_softmax(
                    self.component_axis
                )
                weights = masked_softmax(log_responsibilities, problem.visible)
                pyro.deterministic("weights", weights, event_dim=1)
                output = weighted_sums(weights, problem.value)
                pyro.deterministic("output", output, event_dim=1)

    def initial_state(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Start latent centers from the queries given, shares and variances from priors' modes."""
        problem, state = self.read(*args, **kwargs), {}
        lead = (*problem.shape, 1) if problem.shape else ()
        if isinstance(self.variance, VariancePrior):
            mode = self.variance.rate / (self.variance.shape + 1)
            state["variance"] = problem.query.new_full(lead, mode)
        if isinstance(self.mixing, DirichletMixing):
            size = problem.visible.shape[self.component_axis]
            state["mixing"] = problem.query.new_full((*lead, size), 1 / size)
        return self._with_centers(state, problem)

    def log_density(self, state: State, *args: Any, **kwargs: Any) -> Float[Tensor, "*problem"]:
        """Log joint density of each mixture's data and state, assignments summed out, in nats."""
        problem = self.read(*args, **kwargs)
        total = self._data_log_density(state, problem)
        if isinstance(self.variance, VariancePrior):
            law = self._variance_law(problem)
            total = total + law.log_prob(state["variance"]).reshape(problem.shape)
        if isinstance(self.mixing, DirichletMixing):
            law = self._mixing_law(problem)
            total = total + law.log_prob(state["mixing"]).reshape(problem.shape)
        return total

    def e_step(
        self, state: State, *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*problem query key"]:
        """Log responsibilities: of each center for a datum, minus infinity where unseen."""
        problem = self.read(*args, **kwargs)
        posterior = self._log_joint(state, problem).log_softmax(self.component_axis)
        return torch.where(problem.visible, posterior, -torch.inf)

    def responsibilities(
        self, state: State, *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*problem query key"]:
        """Posterior over the assignment of each datum: sums to one over centers, if any is seen."""
        return self.e_step(state, *args, **kwargs).exp()

    def weights(
        self, state: State, *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*problem query key"]:
        """Each query's responsibilities over their sum: the attention that the mixture is."""
        visible = self.read(*args, **kwargs).visible
        return masked_softmax(self.e_step(state, *args, **kwargs), visible)

    @abstractmethod
    def m_step(
        self,
        state: State,
        log_responsibilities: Float[Tensor, "*problem query key"],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Maximize the expected log joint density over centers, then shares and variances."""

    def read(self, *args: Any, **kwargs: Any) -> MixtureProblem:
        """Check the program's arguments.

        Raises:
            ValueError: If they do not fit, or shares cannot be learned under the masks.
        """
        if isinstance(self.mixing, DirichletMixing) and kwargs.get("attn_mask") is not None:
            raise ValueError(
                "attn_mask goes with shares that are given: learned ones have no closed form where "
                "each datum sees other components; got mixing=DirichletMixing()"
            )
        return read_problem(*args, **kwargs)

    @abstractmethod
    def _with_centers(self, state: dict[str, Tensor], problem: MixtureProblem) -> dict[str, Tensor]:
        """Add starting values of the sites that a subclass has."""

    @abstractmethod
    def _sample(self, state: State, problem: MixtureProblem, plate: pyro.plate) -> State:
        """Draw what a subclass adds to the state, and observe the data."""

    @abstractmethod
    def _data_log_density(self, state: State, problem: MixtureProblem) -> Float[Tensor, "*problem"]:
        """Log density without the priors of shares and variances."""

    @abstractmethod
    def _log_joint(
        self, state: State, problem: MixtureProblem
    ) -> Float[Tensor, "*problem query key"]:
        """Log density of each datum and its assignment."""

    def _components(self, problem: MixtureProblem) -> Tensor:
        return problem.query if self.component_axis == -2 else problem.key

    def _log_prior(self, state: State, problem: MixtureProblem) -> Tensor:
        """Log probability of each assignment before the datum is seen, "*problem query key"."""
        size = problem.visible.shape[self.component_axis]
        if isinstance(self.mixing, DirichletMixing):
            logits = state["mixing"].reshape(*problem.shape, size).log()
        else:
            logits = self.mixing.logits(self._components(problem), self._variance(state, problem))
        return log_shares(
            logits.unsqueeze(-3 - self.component_axis), problem.visible, self.component_axis
        )

    def _variance(self, state: State, problem: MixtureProblem) -> Float[Tensor, "*#problem 1 1"]:
        if isinstance(self.variance, VariancePrior):
            return state["variance"].reshape(*problem.shape, 1, 1)
        number = problem.query.shape[-1] ** 0.5 if self.variance is None else self.variance
        return problem.query.new_full((1, 1), number)

    def _sample_shared(self, problem: MixtureProblem) -> dict[str, Tensor]:
        """Draw what all of a mixture's components have in common."""
        state = {}
        if isinstance(self.variance, VariancePrior):
            state["variance"] = pyro.sample("variance", self._variance_law(problem))
        if isinstance(self.mixing, DirichletMixing):
            state["mixing"] = pyro.sample("mixing", self._mixing_law(problem))
        return state

    def _variance_law(self, problem: MixtureProblem) -> Any:
        assert isinstance(self.variance, VariancePrior)
        like = problem.query
        shape, rate = (like.new_tensor(x) for x in (self.variance.shape, self.variance.rate))
        return dist.InverseGamma(shape, rate).expand((*problem.shape, 1) if problem.shape else ())

    def _mixing_law(self, problem: MixtureProblem) -> Any:
        assert isinstance(self.mixing, DirichletMixing)
        size = problem.visible.shape[self.component_axis]
        law = dist.Dirichlet(problem.query.new_full((size,), self.mixing.concentration))
        return law.expand((*problem.shape, 1) if problem.shape else ())
