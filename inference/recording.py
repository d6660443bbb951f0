"""Recording a pure tensor function once as a static graph, and replaying the graph.

The function runs with fake tensors, so recording costs no memory of the data's size, and any Python
decision on a tensor's value is met and refused rather than silently frozen into the graph.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

from bayesattn.inference.compilation import compiled, silent
from bayesattn.inference.failed_factorizations import spare_other_rows
from bayesattn.inference.simplification import simplify

__all__ = ["GraphCache", "RecordedGraph", "RecordingError", "record", "tensor_layout"]


# Where torch tells of what it cannot trace, which is our error to raise.
_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")


class RecordingError(ValueError):
    """A model does what a static graph cannot hold."""


class RecordedGraph:
    """A recorded function, called like the function itself; autograd does not see what it does.

    Attributes:
        module: The graph and its constants.
    """

    def __init__(self, module: GraphModule, pinned: Sequence[Tensor]):
        self.module = module
        self._forward: Callable[..., Any] = self._recorded
        self._pinned = [(tensor, tensor._version) for tensor in pinned if not tensor.is_inference()]

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay on inputs of the recorded shapes, strides, dtypes and devices."""
        return self._forward(*inputs)

    def compile(self, inputs: Sequence[Tensor]) -> "RecordedGraph":
        """Replay machine code from now on, made for inputs like these."""
        # Turns autograd off by itself.
        self._forward = compiled(self.module, inputs)
        return self

    def _recorded(self, *inputs: Tensor) -> Any:
        with torch.no_grad():
            # Not the module itself, whose call machinery costs as much as some operations.
            return self.module.forward(*inputs)

    @property
    def is_current(self) -> bool:
        """Whether no tensor whose values are baked in has been written since."""
        return all(tensor._version == version for tensor, version in self._pinned)


class GraphCache:
    """Recorded graphs by everything that a recording bakes in; the least used are dropped.

    Args:
        max_graphs: Most graphs kept.

    Attributes:
        graphs: Key to graph, the last used at the end.
        num_recordings: How many recordings were made so far.
    """

    def __init__(self, max_graphs: int = 64):
        self.graphs: OrderedDict[Hashable, RecordedGraph] = OrderedDict()
        self.num_recordings = 0
        self._max_graphs = max_graphs
        self._tokens: dict[Hashable, int] = {}

    def token(self, constants: Hashable) -> int:
        """Return a number that stands for the given constants in keys, equal for equal ones."""
        return self._tokens.setdefault(constants, len(self._tokens))

    def get(self, key: Hashable, make: Callable[[], RecordedGraph]) -> RecordedGraph:
        """Return the graph under this key, made now if there is none.

        Args:
            key: Everything that the recording depends on, inputs' values apart; it keeps alive
                what it names by identity.
            make: Records the graph.
        """
        graph = self.graphs.get(key)
        if graph is None or not graph.is_current:
            graph = self.graphs[key] = make()
            self.num_recordings += 1
        self.graphs.move_to_end(key)
        if len(self.graphs) > self._max_graphs:
            self.graphs.popitem(last=False)
        return graph


def record(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], num_batched: int = 0
) -> RecordedGraph:
    """Record a function of tensors as a graph of tensor operations.

    Args:
        function: Takes the inputs, returns a tensor or a tuple or list of tensors.
        inputs: Example inputs; only shapes, strides, dtypes and devices matter.
        num_batched: How many of the first inputs have one entry for each particle along their first
            axis. What cannot be factorized for some particles is NaN for them, and raises no error.

    Raises:
        RecordingError: If the function reads a tensor's value in Python, writes into a tensor that
            the transforms do not let it write, or else does what cannot be traced.
    """
    try:
        module, pinned = _trace(function, inputs)
    except RecordingError:
        raise
    except Exception as error:
        raise RecordingError(_reason(error)) from error
    _pin_defaults(module)
    spare_other_rows(module.graph, num_batched)
    simplify(module)
    return RecordedGraph(_without_tracers(module), pinned)


def tensor_layout(tensor: Tensor) -> Hashable:
    """Say what a recording bakes in of an input."""
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def _trace(
    function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> tuple[GraphModule, list[Tensor]]:
    """Trace with fake tensors, or with real ones where the function selects by a constant mask.

    A selection's size is unknown to fake tensors. It is safe to bake in if no input decides it and
    no tensor that is met on the way is written later; those are returned too.
    """
    _start_autograd()
    try:
        with silent(_FAKE_TENSOR_LOG):
            return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs), []
    except (DynamicOutputShapeException, GuardOnDataDependentSymNode):
        reads = _ScalarReads()
        module = make_fx(reads.around(function), tracing_mode="real")(*inputs)
    depends: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or depends.intersection(node.all_input_nodes):
            depends.add(node)
        if depends.intersection(_selectors(node)):
            raise RecordingError("it selects by a mask whose number of entries depends on the data")
    constants = module.graph.find_nodes(op="get_attr")
    return module, [*(getattr(module, node.target) for node in constants), *reads.tensors]


@cache
def _start_autograd() -> None:
    """Let autograd start before anything is traced.

    Where it starts within a trace, a PyTorch built for CUDA makes threads for devices even if there
    is none, and then processes that are forked, such as those of chains, cannot differentiate.
    """
    with torch.enable_grad():
        torch.ones((), device="cpu", requires_grad=True).square().backward()


def _pin_defaults(module: GraphModule) -> None:
    """Write out dtype and device of what is made from nothing: defaults may be others later."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or any("Tensor" in str(argument.type) for argument in schema.arguments):
            continue
        made = node.meta.get("val")
        if isinstance(made, Tensor):
            known = {argument.name for argument in schema.arguments}
            fixed = {"dtype": made.dtype, "device": made.device}
            node.kwargs = node.kwargs | {key: fixed[key] for key in known.intersection(fixed)}


def _without_tracers(module: GraphModule) -> GraphModule:
    """Put a copy in the place of the graph, which remembers what the trace was made of."""
    copy = Graph()
    copy.output(copy.graph_copy(module.graph, {}))
    for node in copy.nodes:
        node.meta.clear()
    module.graph = copy
    return module


class _ScalarReads(TorchDispatchMode):
    """Collects the tensors that are read in Python, which with real tensors is not refused."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.tensors.append(args[0])
        return func(*args, **(kwargs or {}))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*inputs: Tensor) -> Any:
            with self:
                return function(*inputs)

        return watched


def _selectors(node: Node) -> list[Node]:
    """Inputs of an operation whose values, not only shapes, decide the shape of its result."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return []
    if node.target is not torch.ops.aten.index.Tensor:
        return node.all_input_nodes
    indices = [index for index in node.args[1] if isinstance(index, Node)]  # type: ignore[union-attr]
    return [index for index in indices if index.meta["val"].dtype in (torch.bool, torch.uint8)]


def _reason(error: Exception) -> str:
    """Say in the caller's words why a trace failed."""
    text = str(error)
    if isinstance(error, DataDependentOutputException):
        return f"it reads a tensor's value in Python ({error.func})"
    if "data-dependent" in text or ".item()" in text or "SymInt" in text:
        return "it reads a tensor's value in Python"
    if "random operation" in text:
        return "it draws random numbers outside of pyro.sample"
    if any(word in text for word in ("inplace", "in-place", "match the broadcast shape")):
        return "it, or a module in it, writes what depends on latent values into a tensor in place"
    first_line = text.strip().split("\n")[0]
    return f"it does what cannot be traced ({type(error).__name__}: {first_line})"
