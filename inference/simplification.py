"""Making a recorded graph smaller without changing what it computes.

A recording holds what Pyro and the transforms do once for a scalar and again for a batch: literals,
copies of literals, views onto the same shape, sums with zero, sums over one entry, formulas written
twice. On small models these are most of the graph, and each costs as much as any other operation.
"""

import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["simplify"]

_aten = torch.ops.aten

# Entries that a precomputed tensor may have: enough for what small models repeat, and no burden.
_LARGEST_CONSTANT = 2**16

_PASS_THROUGH = (_aten.detach.default, _aten.alias.default)
_VIEWS = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.slice.Tensor,
    _aten.squeeze.dims,
)
# Operations whose result depends on their tensor's shape only, with the value that fills it.
_FILLED: dict[Any, Callable[[Node], Any]] = {
    _aten.zeros_like.default: lambda node: 0,
    _aten.new_zeros.default: lambda node: 0,
    _aten.ones_like.default: lambda node: 1,
    _aten.new_ones.default: lambda node: 1,
    _aten.full_like.default: lambda node: node.args[1],
    _aten.new_full.default: lambda node: node.args[2],
}
_NEUTRAL = {
    _aten.add.Tensor: 0,
    _aten.sub.Tensor: 0,
    _aten.mul.Tensor: 1,
    _aten.div.Tensor: 1,
    _aten.pow.Tensor_Scalar: 1,
}


def simplify(graph: GraphModule) -> None:
    """Precompute literals, drop what does nothing, merge equal operations; all in place.

    What is written in place, draws random numbers, or shares memory with a result is left as it is.
    """
    literals = _literals(graph)
    for node in list(graph.graph.nodes):
        if node.target in _PASS_THROUGH:
            _replace(graph, node, node.args[0])
    memory = _Memory(graph)
    _precompute(graph, literals, memory)
    _drop_neutral(graph, memory)
    _merge_equal(graph, memory)
    graph.graph.eliminate_dead_code()
    graph.recompile()


class _Memory:
    """Which nodes share memory, and which of them may be moved, shared or computed beforehand."""

    def __init__(self, graph: GraphModule):
        self._parent: dict[Node, Node] = {}
        written: list[Node] = []
        for node in graph.graph.nodes:
            for source, is_written in _aliased_inputs(node):
                self._parent[self._root(source)] = self._root(node)
                if is_written:
                    written.append(node)
        self._written = {self._root(node) for node in written}
        self._results = {self._root(n) for n in _output(graph).all_input_nodes}

    def is_pure(self, node: Node) -> bool:
        """Whether a node's result follows from its inputs alone, whenever it is computed."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
            return False
        return not any(self._root(n) in self._written for n in (node, *node.all_input_nodes))

    def is_inner(self, node: Node) -> bool:
        """Whether no result of the graph shares memory with a node."""
        return self._root(node) not in self._results

    def _root(self, node: Node) -> Node:
        while node in self._parent and self._parent[node] is not node:
            node = self._parent[node]
        return node


def _literals(graph: GraphModule) -> set[Node]:
    """Constants that the function wrote down, not those that it found outside of itself."""
    literals = set()
    copies = _aten.lift_fresh_copy.default
    for node in graph.graph.find_nodes(op="get_attr"):
        if all(user.target is copies for user in node.users):
            literals.update(node.users)
    return literals


def _aliased_inputs(node: Node) -> Iterator[tuple[Node, bool]]:
    """Inputs whose memory a node's result shares or which it writes, and whether it writes them."""
    if node.target is operator.getitem:
        yield node.args[0], False  # type: ignore[misc]
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None and node.target is not _aten._unsafe_view.default:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for source in tree_leaves(given):
            if isinstance(source, Node):
                yield source, argument.alias_info is not None and argument.alias_info.is_write


def _precompute(graph: GraphModule, literals: set[Node], memory: _Memory) -> None:
    known: dict[Node, Tensor] = {}
    for node in graph.graph.nodes:
        value = _value_of(graph, node, literals, memory, known)
        if value is not None:
            known[node] = value
    for node, value in known.items():
        if any(user not in known for user in node.users) and memory.is_inner(node):
            name = f"_known_{node.name}"
            # An attribute of its own, which is found faster than a buffer.
            setattr(graph, name, value)
            with graph.graph.inserting_before(node):
                constant = graph.graph.create_node("get_attr", name)
            constant.meta["val"] = node.meta["val"]
            constant.meta["known"] = value
            node.replace_all_uses_with(constant)
    graph.graph.eliminate_dead_code()


def _value_of(
    graph: GraphModule,
    node: Node,
    literals: set[Node],
    memory: _Memory,
    known: dict[Node, Tensor],
) -> Tensor | None:
    """Value of a node that no input of the graph decides, or None."""
    shape: Any = node.meta.get("val")
    if not _is_static(shape) or not memory.is_pure(node):
        return None
    if node in literals:
        return getattr(graph, node.args[0].target)  # type: ignore[union-attr]
    if shape.numel() > _LARGEST_CONSTANT:
        return None
    filling = _FILLED.get(node.target, lambda node: None)(node)
    if isinstance(filling, int | float):
        options: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        return torch.empty_strided(shape.shape, shape.stride(), **options).fill_(filling)
    if not all(source in known for source in node.all_input_nodes):
        return None
    args, kwargs = tree_map(
        lambda leaf: known[leaf] if isinstance(leaf, Node) else leaf, (node.args, node.kwargs)
    )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _drop_neutral(graph: GraphModule, memory: _Memory) -> None:
    """Drop views onto the same shape, sums with zero, products with one, sums over one entry."""
    for node in list(graph.graph.nodes):
        source = _same_value(node)
        if source is None or not _have_one_layout(node, source) or not memory.is_pure(node):
            continue
        if node.target in _VIEWS or memory.is_inner(node):
            _replace(graph, node, source)


def _same_value(node: Node) -> Node | None:
    """Input that a node's value equals if their layouts do, or None."""
    if node.target in _VIEWS:
        return node.args[0]  # type: ignore[return-value]
    if node.target in _NEUTRAL and not node.kwargs:
        left, right = node.args
        neutral = _NEUTRAL[node.target]  # type: ignore[index]
        if _is_filled(right, neutral) and isinstance(left, Node):
            return left
        commutes = node.target in (_aten.add.Tensor, _aten.mul.Tensor)
        if commutes and _is_filled(left, neutral) and isinstance(right, Node):
            return right
    if node.target is _aten.sum.dim_IntList:
        summed: Any = node.args[0]
        if summed.target is _aten.unsqueeze.default and _is_static(summed.meta["val"]):
            entries = summed.meta["val"].numel()
            return summed.args[0] if entries == node.meta["val"].numel() else None
    return None


def _merge_equal(graph: GraphModule, memory: _Memory) -> None:
    seen: dict[Hashable, Node] = {}
    for node in list(graph.graph.nodes):
        if not memory.is_pure(node) or not memory.is_inner(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        if key in seen:
            _replace(graph, node, seen[key])
        else:
            seen[key] = node


def _frozen(value: Any) -> Hashable:
    """Arguments of a node as a key, in which 1, 1.0 and True differ, as do zeros of either sign."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    return value if isinstance(value, Node) else (type(value), repr(value))


def _is_filled(value: Any, number: int) -> bool:
    if isinstance(value, Node):
        value = value.meta.get("known")
        return value is not None and bool((value == number).all())
    return isinstance(value, int | float) and value == number


def _have_one_layout(node: Node, source: Node) -> bool:
    one: Any = node.meta.get("val")
    other: Any = source.meta.get("val")
    if not _is_static(one) or not _is_static(other):
        return False
    return (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())


def _is_static(value: Any) -> bool:
    """Whether a recorded value is a tensor whose shape no data decide."""
    return isinstance(value, Tensor) and all(
        isinstance(size, int) for size in (*value.shape, *value.stride())
    )


def _output(graph: GraphModule) -> Node:
    return next(iter(reversed(graph.graph.nodes)))


def _replace(graph: GraphModule, node: Node, other: Node) -> None:
    node.replace_all_uses_with(other)
    graph.graph.erase_node(node)
