"""A matrix that cannot be factorized makes its own row of particles not finite, not all rows fail.

Far out, where a search or a trajectory may look, a covariance can be indefinite to rounding. What
is met there is a log density that is not finite, which samplers reject and optimizers report.
"""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["spare_other_rows"]

_aten = torch.ops.aten


def spare_other_rows(graph: Graph, num_inputs: int) -> None:
    """Put NaN in the place of factors, inverses and solutions that failed, and raise no more.

    Matrices that hang on data alone are left as they are: if one of them fails, all rows do, and
    the error says why.

    Args:
        graph: Recorded under ``vmap``; changed in place.
        num_inputs: How many of the first inputs have the particles in them.
    """
    particles = graph.find_nodes(op="placeholder")[:num_inputs]
    moving: set[Node] = set(particles)
    for node in graph.nodes:
        if moving.intersection(node.all_input_nodes):
            moving.add(node)
    for check in graph.find_nodes(op="call_function", target=_aten._linalg_check_errors.default):
        info = check.args[0]
        if info in moving and info.meta["val"].ndim and info.target is operator.getitem:
            for result in info.args[0].users:
                if result.meta["val"].is_floating_point():
                    _spoil(graph, result, info, check)
            graph.erase_node(check)


def _spoil(graph: Graph, result: Node, info: Node, check: Node) -> None:
    """Write NaN over a result where an operation says that it failed, from its check on."""

    def call(target: Any, source: Node, argument: Any) -> Node:
        node = graph.call_function(target, (source, argument))
        node.meta["val"] = target(source.meta["val"], argument)
        return node

    users = list(result.users)
    with graph.inserting_before(check):
        spoilt = call(_aten.ne.Scalar, info, 0)
        for dim in range(info.meta["val"].ndim, result.meta["val"].ndim):
            spoilt = call(_aten.unsqueeze.default, spoilt, dim)
        spoilt = graph.call_function(_aten.masked_fill.Scalar, (result, spoilt, float("nan")))
    spoilt.meta["val"] = result.meta["val"]
    for user in users:
        user.replace_input_with(result, spoilt)
