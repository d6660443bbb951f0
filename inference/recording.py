"""Recording a pure tensor function once as a static graph, and replaying the graph.

The function runs with fake tensors, so recording costs no memory of the data's size, and any Python
decision on a tensor's value is met and refused rather than silently frozen into the graph.
"""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["GraphCache", "RandomOperationWatch", "RecordingError", "leaf_key", "record"]

_PASS_THROUGH = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class RecordingError(ValueError):
    """A model does what a static graph cannot hold."""


class GraphCache:
    """Recorded graphs by everything that a recording bakes in.

    Attributes:
        graphs: Key to graph.
        num_recordings: How many recordings were made so far.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, Callable[..., Any]] = {}
        self.num_recordings = 0
        self._kept: list[Any] = []

    def get(
        self, key: Hashable, make: Callable[[], Callable[..., Any]], *, keep: Any = None
    ) -> Callable[..., Any]:
        """Return the graph under this key, made now if there is none.

        Args:
            key: Everything that the recording depends on, inputs' values apart.
            make: Records the graph.
            keep: Objects named in the key by ``id``, kept alive so that no other takes that ``id``.
        """
        if key not in self.graphs:
            self.graphs[key] = make()
            self.num_recordings += 1
            self._kept.append(keep)
        return self.graphs[key]


def record(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> GraphModule:
    """Record a function of tensors as a graph of tensor operations.

    Args:
        function: Takes the inputs, returns a tensor or a tuple or list of tensors.
        inputs: Example inputs; only shapes, strides, dtypes and devices matter.

    Raises:
        RecordingError: If the function reads a tensor's value in Python.
    """
    try:
        graph = _trace(function, inputs)
    except DataDependentOutputException as error:
        raise RecordingError(f"it reads a tensor's value in Python ({error.func})") from error
    except RuntimeError as error:
        reason = str(error)
        if "data-dependent" in reason or ".item()" in reason:
            raise RecordingError("it reads a tensor's value in Python") from error
        if "random operation" in reason:
            raise RecordingError("it draws random numbers outside of pyro.sample") from error
        raise
    _simplify(graph)
    return graph


def leaf_key(value: Any) -> Hashable:
    """Say what a recording bakes in of one argument: a tensor's layout, another value itself."""
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), value.stride(), str(value.device))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return (type(value), value)
    return (type(value), id(value))


class RandomOperationWatch(TorchDispatchMode):
    """Collects the names of operations that draw random numbers.

    Attributes:
        operations: Their names, in order, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note its name if torch tags it as seeded."""
        name = str(func).rsplit(".", 1)[0]
        if torch.Tag.nondeterministic_seeded in func.tags and name not in self.operations:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


def _trace(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> GraphModule:
    """Trace with fake tensors, or with real ones where the function selects by a constant mask.

    A selection's size is unknown to fake tensors. It is safe to bake in only if no input decides it.
    """
    try:
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except (DynamicOutputShapeException, GuardOnDataDependentSymNode):
        graph = make_fx(function, tracing_mode="real")(*inputs)
    depends: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or depends.intersection(node.all_input_nodes):
            depends.add(node)
        if depends.intersection(_selectors(node)):
            raise RecordingError("it selects by a mask whose number of entries depends on the data")
    return graph


def _selectors(node: Node) -> list[Node]:
    """Inputs of an operation whose values, not only shapes, decide the shape of its result."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return []
    if node.target is not torch.ops.aten.index.Tensor:
        return node.all_input_nodes
    indices = [index for index in node.args[1] if isinstance(index, Node)]  # type: ignore[union-attr]
    return [index for index in indices if index.meta["val"].dtype in (torch.bool, torch.uint8)]


def _simplify(graph: GraphModule) -> None:
    """Drop dead operations, and copies that only gradient tracking needed."""
    for node in list(graph.graph.nodes):
        if node.target in _PASS_THROUGH or _is_needless_copy(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_needless_copy(node: Node) -> bool:
    if node.target is not torch.ops.aten.lift_fresh_copy.default:
        return False
    return not any(_may_write(user) for user in node.users)


def _may_write(node: Node, depth: int = 4) -> bool:
    """Whether an operation writes to its input, itself or through a view of it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return node.op != "output"
    if any(ret.alias_info is not None for ret in schema.returns):
        return depth == 0 or any(_may_write(user, depth - 1) for user in node.users)
    return False
