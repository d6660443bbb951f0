r"""Hybrid attention with a latent share: each query is read in one of two ways, nobody knows which.

.. math:: u \sim \mathrm{Beta}(\alpha, \beta), \qquad r_i \sim \mathrm{Bernoulli}(u), \qquad
    a_i \mid r_i \sim \mathrm{Categorical}(A^{(r_i)}_i), \qquad
    o_i \mid a_i \sim N(v_{a_i}, \tau^2 I)

:math:`A^{(1)}` is doubly normalized and :math:`A^{(0)}` the softmax, so that the mean of an output
is hybrid attention, :math:`\sum_j (u A^{(1)}_{ij} + (1 - u) A^{(0)}_{ij}) v_j`. Outputs that are
seen tell how much of either there is.

Source:
    Ding et al. (2020), Attention that does not explain away, arXiv:2009.14308, for the hybrid; the
    program is ours.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bayesattn.contraction import weighted_sums
from bayesattn.functional import attention_weights
from bayesattn.iterated_attention import log_normal
from bayesattn.models.checks import check_settings
from bayesattn.models.mixture_problems import MixtureProblem, make_plates, read_problem, standing_in
from bayesattn.normalizations import doubly_normalized

__all__ = ["HybridAttention"]

# Site to value, in the shape that the site has in the program.
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class HybridAttention:
    """A Pyro program, with the closed forms of EM: hybrid attention as a mixture of two readings.

    Sites: ``share`` of the doubly normalized, one a head, in plate ``head``; in plate ``query``
    ``reading`` and ``assignment``, discrete, and ``observed_output``. Deterministic: ``weights``,
    and ``output``, the mean under them.

    Attributes:
        doubly_concentration: Alpha of the share's prior; above one, so that it has a mode inside.
        softmax_concentration: Beta; above one too.
        value_variance: Of an output around the value that it is read from.
        scale: Factor of the dot product; one over the square root of the width if None.
    """

    doubly_concentration: int | float = 2.0
    softmax_concentration: int | float = 2.0
    value_variance: int | float = 1.0
    scale: int | float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("doubly_concentration", "softmax_concentration"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} must be above one, got {getattr(self, name)}")

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the last axes of each site and argument, for ArviZ."""
        return {
            "queries": ["query", "feature"],
            "keys": ["key", "feature"],
            "values": ["key", "value_feature"],
            "weights": ["query", "key"],
            **{
                name: ["query", "value_feature"]
                for name in ("outputs", "output", "observed_output")
            },
        }

    def __call__(
        self,
        queries: Float[Tensor, "*_problem _query _dim"],
        keys: Float[Tensor, "*_problem _key _dim"],
        values: Float[Tensor, "*_problem _key _value_dim"],
        outputs: Float[Tensor, "*_problem _query _value_dim"] | None = None,
        **masks: Shaped[Tensor, "..."] | None,
    ) -> None:
        """Run the program.

        Args:
            queries: "query dim", "head query dim" or "batch head query dim".
            keys: As many leading axes, and as wide.
            values: One for each key.
            outputs: One for each query, as they were seen; drawn if None.
            **masks: As in :func:`~bayesattn.models.mixture_problems.read_problem`.
        """
        problem, outputs = self._read(queries, keys, values, outputs, **masks)
        live, readings = problem.live_queries, self._log_readings(problem)
        plates = make_plates(problem.shape)
        with standing_in(plates[-1:]):
            share = pyro.sample("share", self._law(problem))
        weights = _mixed(share, readings, live)
        with standing_in([*plates, pyro.plate("query", live.shape[-1], dim=-1)]):
            pyro.deterministic("weights", weights, event_dim=1)
            pyro.deterministic("output", weighted_sums(weights, problem.value), event_dim=1)
            law = dist.Bernoulli(probs=share.expand(live.shape))
            reading = pyro.sample("reading", law, infer={"enumerate": "parallel"})
            logits = torch.where(reading[..., None] > 0, readings[0], readings[1])
            law = dist.Categorical(logits=logits)
            chosen = pyro.sample("assignment", law, infer={"enumerate": "parallel"})
            value = problem.value[(*problem.indices(), chosen)]
            law = dist.Normal(value, self.value_variance**0.5).to_event(1)
            pyro.sample("observed_output", law.mask(live), obs=outputs)

    def initial_state(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Start the shares at the mode of their prior."""
        problem = self._read(*args, **kwargs)[0]
        shape = (*problem.shape[-1:], 1) if problem.shape else ()
        above = self.doubly_concentration - 1
        mode = above / (above + self.softmax_concentration - 1)
        return {"share": problem.query.new_full(shape, mode)}

    def log_density(self, state: State, *args: Any, **kwargs: Any) -> Float[Tensor, "*head"]:
        """Log joint density of each head's outputs and share, in nats."""
        problem, outputs = self._read(*args, **kwargs)
        evidence = self._log_joint(state, problem, outputs).logsumexp(0)
        evidence = torch.where(problem.live_queries, evidence, 0.0).sum(-1)
        prior = self._law(problem).log_prob(state["share"])
        if problem.shape:
            return evidence.reshape(-1, problem.shape[-1]).sum(0) + prior.squeeze(-1)
        return evidence + prior

    def e_step(self, state: State, *args: Any, **kwargs: Any) -> Float[Tensor, "*problem query"]:
        """Posterior probability that each query is read by the doubly normalized."""
        problem, outputs = self._read(*args, **kwargs)
        return self._log_joint(state, problem, outputs).softmax(0)[0]

    def m_step(
        self,
        state: State,
        responsibilities: Float[Tensor, "*problem query"],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Shares of highest expected log joint density."""
        problem = self._read(*args, **kwargs)[0]
        live = problem.live_queries.to(responsibilities)
        heads = problem.shape[-1:]
        counts = [
            part.sum(-1).reshape(-1, *heads).sum(0) for part in (live * responsibilities, live)
        ]
        above = self.doubly_concentration - 1
        share = (counts[0] + above) / (counts[1] + above + self.softmax_concentration - 1)
        return {**state, "share": share.reshape(state["share"].shape)}

    def weights(
        self, state: State, *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*problem query key"]:
        """Hybrid attention at given shares."""
        problem = self._read(*args, **kwargs)[0]
        return _mixed(state["share"], self._log_readings(problem), problem.live_queries)

    def _read(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        outputs: Tensor | None = None,
        **masks: Tensor | None,
    ) -> tuple[MixtureProblem, Tensor | None]:
        problem = read_problem(queries, keys, values, **masks)
        expected = (*queries.shape[:-1], values.shape[-1])
        if outputs is not None and outputs.shape != expected:
            raise ValueError(
                f"outputs must be one for each query, as wide as values, {expected}, got "
                f"{tuple(outputs.shape)}"
            )
        return problem, outputs

    def _log_readings(self, problem: MixtureProblem) -> Float[Tensor, "2 *problem query key"]:
        """Log weights, doubly normalized and softmax; equal where a query sees no key."""
        weigh = functools.partial(
            attention_weights,
            problem.query,
            problem.key,
            attn_mask=problem.visible,
            scale=self.scale,
        )
        doubly, softmax = weigh(normalization=doubly_normalized), weigh()
        weights = torch.stack([doubly, softmax])
        weights = torch.where(problem.live_queries[..., None], weights, 1 / weights.shape[-1])
        # Of zeros, no gradient is wanted: it would be NaN.
        positive = weights > 0
        return torch.where(positive, torch.where(positive, weights, 1.0).log(), -torch.inf)

    def _log_joint(
        self, state: State, problem: MixtureProblem, outputs: Tensor | None
    ) -> Float[Tensor, "2 *problem query"]:
        """Log density of each output and its reading."""
        if outputs is None:
            raise ValueError("outputs must be given for closed forms, got None")
        of_values = log_normal(outputs, problem.value, self.value_variance)
        evidence = (self._log_readings(problem) + of_values).logsumexp(-1)
        share = state["share"]
        return evidence + torch.stack([share.log(), torch.log1p(-share)]).reshape(
            2, *(1,) * (evidence.ndim - 1 - share.ndim), *share.shape
        )

    def _law(self, problem: MixtureProblem) -> Any:
        like = problem.query
        alpha, beta = (
            like.new_tensor(count)
            for count in (self.doubly_concentration, self.softmax_concentration)
        )
        law = dist.Beta(alpha, beta)
        return law.expand((*problem.shape[-1:], 1) if problem.shape else ())


def _mixed(
    share: Float[Tensor, "..."],
    log_readings: Float[Tensor, "2 *problem query key"],
    live: Bool[Tensor, "*problem query"],
) -> Float[Tensor, "*problem query key"]:
    """Hybrid weights, zero where a query sees no key."""
    doubly, softmax = log_readings.exp()
    return live[..., None] * (softmax + share[..., None] * (doubly - softmax))
