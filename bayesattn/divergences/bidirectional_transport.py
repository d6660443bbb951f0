r"""Bidirectional conditional transport: each query moves to keys near it, and each key to queries.

.. math:: \pi(j \mid i) \propto b_j\, e^{s_{ij}}, \quad \pi(i \mid j) \propto a_i\, e^{s_{ij}},
    \qquad \mathrm{CT} = \tfrac12 \sum_i a_i \sum_j \pi(j \mid i)\, c_{ij}
    + \tfrac12 \sum_j b_j \sum_i \pi(i \mid j)\, c_{ij}

The navigator says who is near, :math:`s_{ij} = \tau(x_i) \cdot \tau(y_j)`; without one costs do,
:math:`s_{ij} = -c_{ij} / T`. The critic says what a move costs. A plan is attention between the
clouds, and a mean cost under it a mean of features, so memory is linear in the points.

At finite temperature CT(p, p) is positive, and its gradient rescales the cloud. Debiased it is

.. math:: \mathrm{CT}(p, q) - \tfrac12 \mathrm{CT}(p, p) - \tfrac12 \mathrm{CT}(q, q),

zero at equality, and at high temperature the squared distance of the means of what costs compare.
It is no metric: at low temperature it is negative where points gather in clusters that the plans of
a cloud with itself mix, and descent ends there; the Sinkhorn divergence has no such end.

Source:
    Zheng and Zhou (2021), Exploiting chain rule and Bayes' theorem to compare probability
    distributions, arXiv:2012.14100; for attention Zhang et al. (2021), arXiv:2110.12567, eq. 6.
    The debiased form and the linear memory are ours.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.autocasting import full_precision
from bayesattn.contraction import inner_products
from bayesattn.divergences.headwise_networks import HeadwiseMLP, Highway, call_reversed
from bayesattn.divergences.point_clouds import Weights, log_weights, weighted_clouds
from bayesattn.divergences.transport_costs import (
    TransportCost,
    check_cost,
    cost_features,
    squared_costs,
)
from bayesattn.fused import attention_with_key_bias
from bayesattn.fused_route import check_route

__all__ = ["ConditionalTransport", "conditional_transport"]

Number = float | int
# From so many pairs on, the fused route is the faster one.
_FEWEST_FUSED_PAIRS = 256**2


def conditional_transport(
    query: Float[Tensor, "*#batch query dim"],
    key: Float[Tensor, "*#batch key dim"],
    query_mask: Bool[Tensor, "*#batch query"] | None = None,
    key_mask: Bool[Tensor, "*#batch key"] | None = None,
    weights: Weights | None = None,
    *,
    cost: TransportCost = "cosine",
    temperature: Number = 0.1,
    debiased: bool = False,
    route: str = "auto",
) -> Float[Tensor, "*batch"]:
    """Conditional transport cost between two clouds, with plans that go by the costs themselves.

    Args:
        query: First cloud.
        key: Second cloud.
        query_mask: True takes part.
        key_mask: True takes part.
        weights: How much each query and each key counts: nonnegative, of any positive sum.
        cost: "cosine", or "squared" for squared distances.
        temperature: T, in the costs' unit: as it falls, each point goes to the nearest.
        debiased: Take off what the clouds cost by themselves.
        route: "fused" holds no matrix of pairs, and has no second derivatives; "dense" does; "auto"
            chooses by size.

    Returns:
        In float32 or wider; not negative, unless debiased.

    Raises:
        ValueError: As :func:`~bayesattn.divergences.weighted_clouds` does, or for an unknown cost
            or route, or a temperature that is not positive.
    """
    transport = ConditionalTransport(
        cost=cost, temperature=temperature, debiased=debiased, route=route
    )
    return transport(query, key, query_mask, key_mask, weights)


class ConditionalTransport(nn.Module):
    """Bidirectional conditional transport; see the module's formula.

    Without navigator and critic it is a fixed function of the clouds. With them, the parameters of
    the navigator descend with the network that makes the clouds, and those of the critic ascend, by
    one backward pass.

    Args:
        navigator: From "*batch head point dim" to features whose inner products say who is near;
            costs do if None.
        critic: From the same to features whose cost is taken; the points themselves if None.
        cost: "cosine", or "squared" for squared distances.
        temperature: Of plans without a navigator, in the costs' unit.
        debiased: Take off what the clouds cost by themselves.
        route: "fused" holds no matrix of pairs, and has no second derivatives; "dense" does; "auto"
            chooses by size.

    Raises:
        ValueError: For an unknown cost or route, or a temperature that is not positive.
    """

    def __init__(
        self,
        navigator: nn.Module | None = None,
        critic: nn.Module | None = None,
        *,
        cost: TransportCost = "cosine",
        temperature: Number = 0.1,
        debiased: bool = False,
        route: str = "auto",
    ) -> None:
        super().__init__()
        check_cost(cost)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        check_route(route)
        self.navigator, self.critic = navigator, critic
        self.cost: TransportCost = cost
        self.temperature, self.debiased, self.route = float(temperature), debiased, route

    @classmethod
    def learned(
        cls,
        num_heads: int,
        dim: int,
        *,
        cost: TransportCost = "cosine",
        debiased: bool = False,
        route: str = "auto",
    ) -> "ConditionalTransport":
        """Make one whose navigator and critic are learned, as published but for one each head.

        Args:
            num_heads: Number of heads, the last batch axis of the clouds.
            dim: Width of their points.
            cost: As for the constructor.
            debiased: As for the constructor.
            route: As for the constructor.
        """
        navigator = HeadwiseMLP(num_heads, dim, dim, dim)
        critic = nn.Sequential(Highway(num_heads, dim), HeadwiseMLP(num_heads, dim, dim, dim))
        return cls(navigator, critic, cost=cost, debiased=debiased, route=route)

    def forward(
        self,
        query: Float[Tensor, "*#batch query dim"],
        key: Float[Tensor, "*#batch key dim"],
        query_mask: Bool[Tensor, "*#batch query"] | None = None,
        key_mask: Bool[Tensor, "*#batch key"] | None = None,
        weights: Weights | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Transport cost of two clouds; see :class:`~bayesattn.divergences.Divergence`."""
        clouds = weighted_clouds(query, key, query_mask, key_mask, weights)
        with full_precision(clouds.query):
            points = torch.cat([clouds.query, clouds.key], -2)
            sizes = [clouds.query.shape[-2], clouds.key.shape[-2]]
            seen = clouds
            if self.critic is not None:
                judged = call_reversed(self.critic, points).split(sizes, -2)
                seen = clouds._replace(query=judged[0], key=judged[1])
            costs = cost_features(seen, self.cost)
            guides = costs
            if self.navigator is not None:
                guides = self.navigator(points).split(sizes, -2)
            first = _Cloud(guides[0], costs[0], clouds.query_weights)
            second = _Cloud(guides[1], costs[1], clouds.key_weights)
            total = self._both_ways(first, second)
            if not self.debiased:
                return total.clamp_min(0.0)
            return total - 0.5 * (self._to_itself(first) + self._to_itself(second))

    def extra_repr(self) -> str:
        """Choices."""
        return (
            f"cost={self.cost!r}, temperature={self.temperature}, debiased={self.debiased}, "
            f"route={self.route!r}"
        )

    def _both_ways(self, first: "_Cloud", second: "_Cloud") -> Tensor:
        if self._is_fused(first, second):
            return 0.5 * (self._one_way(first, second) + self._one_way(second, first))
        # Both plans are made of one matrix of logits.
        apart = squared_costs(first.costs, second.costs)
        logits = -apart / self.temperature
        if self.navigator is not None:
            logits = inner_products(first.guides, second.guides)
        to_second = (logits + log_weights(second.weights)[..., None, :]).softmax(-1)
        to_first = (logits + log_weights(first.weights)[..., None]).softmax(-2)
        moved = first.weights[..., None] * to_second + second.weights[..., None, :] * to_first
        return 0.5 * (moved * apart).sum((-2, -1))

    def _to_itself(self, cloud: "_Cloud") -> Tensor:
        # Both ways are one.
        is_fused = self._is_fused(cloud, cloud)
        return self._one_way(cloud, cloud) if is_fused else self._both_ways(cloud, cloud)

    def _one_way(self, origin: "_Cloud", goal: "_Cloud") -> Tensor:
        """Mean cost of moving the points of one cloud to another, by attention."""
        bias, scale = log_weights(goal.weights), 1.0
        squared = goal.costs.square().sum(-1)
        if self.navigator is None:
            # Of minus the squared distance, what the origin's points have in common is left out.
            scale = 2.0 / self.temperature
            bias = bias - squared / self.temperature
        values = torch.cat([goal.costs, squared[..., None]], -1)
        mean = attention_with_key_bias(origin.guides, goal.guides, values, bias, scale=scale)
        between = (origin.costs * mean[..., :-1]).sum(-1)
        costs = origin.costs.square().sum(-1) + mean[..., -1] - 2 * between
        return (origin.weights * costs).sum(-1)

    def _is_fused(self, origin: "_Cloud", goal: "_Cloud") -> bool:
        pairs = origin.costs.shape[-2] * goal.costs.shape[-2]
        return self.route == "fused" or (self.route == "auto" and pairs >= _FEWEST_FUSED_PAIRS)


class _Cloud(NamedTuple):
    """What is asked of a cloud: who is near, what a move costs, and how much each point counts."""

    guides: Float[Tensor, "*batch point feature"]
    costs: Float[Tensor, "*batch point dim"]
    weights: Float[Tensor, "*batch point"]
