r"""Evaluating a program at many particles: under ``vmap``, recorded once as a static tensor graph.

.. math:: u \mapsto \log p(u), \quad \nabla_u \log p(u), \quad \nabla^2_u \log p(u), \quad x(u)

Data, subsample indices, parameters and buffers are inputs of a graph; all else that a recording
bakes in is part of the key that the graph is kept under.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayesattn.inference.arguments import Bound
from bayesattn.inference.compilation import Mode
from bayesattn.inference.fingerprints import Same, fingerprint
from bayesattn.inference.particle_functions import KINDS
from bayesattn.inference.program import Program
from bayesattn.inference.quiet import quiet_pyro
from bayesattn.inference.reach import Reach
from bayesattn.inference.recording import (
    GraphCache,
    RecordedGraph,
    RecordingError,
    record,
    tensor_layout,
)
from bayesattn.inference.running import seeded
from bayesattn.inference.substitution import Substitution, joint_trace, log_joint

__all__ = ["Evaluator", "current_parameters"]


class Evaluator:
    """A program with its arguments, ready to be evaluated at rows of values.

    Tensors among the arguments are looked at anew at each call; containers, numbers and arrays are
    taken as they are when this is made.

    Args:
        bound: The program with its arguments.
        program: Its sites.
        reach: Its modules and variables.
        graphs: Where recorded graphs are kept, or None to run Pyro's handlers at every call.
        stochastic: Whether random operations are allowed; each row sees the same ones.
        mode: ``"inductor"`` to compile the graphs that run in loops.
    """

    def __init__(
        self,
        bound: Bound,
        program: Program,
        reach: Reach,
        graphs: GraphCache | None,
        stochastic: bool,
        mode: Mode = "record",
    ):
        self._mode = mode
        self._last_run: Substitution | None = None
        self._bound, self._program, self._reach = bound, program, reach
        self._graphs, self._stochastic = graphs, stochastic
        leaves, self._spec = tree_flatten((bound.args, bound.kwargs))
        self._leaves = [leaf.copy() if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
        self._data = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._one_by_one = False
        self._token = None if graphs is None else graphs.token(self._constants())

    def __call__(
        self, kind: str, rows: Tensor, subsample: Mapping[str, Tensor], seed: int = 0
    ) -> tuple[Tensor, ...]:
        """Evaluate at each row.

        Args:
            kind: ``"value_and_score"``, ``"once"`` (the same outside of loops), ``"hessian"``,
                ``"constrain"`` or ``"unconstrain"``.
            rows: Unconstrained values, or constrained ones, flattened, to ``"unconstrain"``.
            subsample: Indices of all subsampled plates.
            seed: Of random operations where the program is stochastic.

        Raises:
            RecordingError: If the program cannot be recorded.
        """
        parameters = current_parameters(self._program)
        with torch.no_grad(), self._noise(seed):
            # Inverse bijections select by masks, which recording is slow at; none runs in a loop.
            if self._graphs is None or kind == "unconstrain":
                inputs = [rows, *self._shared(subsample, parameters)]
                return self._run_unrecorded(kind, inputs, tuple(parameters), seed)
            function = self._function(kind, tuple(parameters))
            graph = self._graph(self._graphs, kind, function, (rows,), subsample, parameters)
            return tuple(graph(rows, *self._shared(subsample, parameters)))

    def fused(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        key: Hashable,
        tensors: tuple[Tensor, ...],
        subsample: Mapping[str, Tensor],
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Record a function that has the log density in it as one graph.

        Args:
            function: Takes value and score, as a function of rows, and tensors; pure.
            key: Stands for the function: equal keys, equal functions.
            tensors: Examples.
            subsample: An example.

        Returns:
            Function of tensors, subsample and a seed. As long as it is used, modules and variables
            that the program can reach must stay the same ones; their tensors may be written.

        Raises:
            RecordingError: If the function or the program cannot be recorded.
        """
        parameters = current_parameters(self._program)
        density = self._function("value_and_score", tuple(parameters))
        count = len(tensors)

        def whole(*inputs: Tensor) -> tuple[Tensor, ...]:
            shared = inputs[count:]
            return tuple(function(lambda rows: density(rows, *shared), *inputs[:count]))

        assert self._graphs is not None
        with torch.no_grad(), self._noise(0):
            head = ("fused", key)
            graph = self._graph(self._graphs, head, whole, tensors, subsample, parameters)

        def replay(
            tensors: tuple[Tensor, ...], subsample: Mapping[str, Tensor], seed: int = 0
        ) -> tuple[Tensor, ...]:
            shared = self._shared(subsample, current_parameters(self._program))
            if not self._stochastic:
                return graph(*tensors, *shared)
            with self._noise(seed):
                return graph(*tensors, *shared)

        return replay

    def _graph(
        self,
        graphs: GraphCache,
        kind: Hashable,
        function: Callable[..., tuple[Tensor, ...]],
        leading: tuple[Tensor, ...],
        subsample: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
    ) -> RecordedGraph:
        """Graph of a function of some tensors and what all graphs share, recorded if need be."""
        if kind == "once" and self._mode != "inductor":
            kind = "value_and_score"
        inputs = [*leading, *self._shared(subsample, parameters)]
        key = self._key(kind, inputs, parameters)
        if key not in graphs.graphs:
            # A module or function that was replaced may reach others than the one before.
            self._reach = self._reach.renewed(*self._bound)
            inputs = [*leading, *self._shared(subsample, parameters)]
            key = self._key(kind, inputs, parameters)

        def make() -> RecordedGraph:
            graph = self._record(function, inputs, len(leading))
            return graph.compile(inputs) if self._is_compiled(kind) else graph

        return graphs.get(key, make)

    def _is_compiled(self, kind: Hashable) -> bool:
        """Whether a graph is compiled: those that run in loops are, if any is."""
        return self._mode == "inductor" and kind not in ("once", "hessian", "constrain")

    def _shared(
        self, subsample: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Inputs of all graphs, after their own."""
        moving = (*subsample.values(), *parameters.values())
        return [*self._data, *moving, *self._reach.tensors()]

    def _key(
        self, kind: Hashable, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor]
    ) -> Hashable:
        device = inputs[0].device.type
        return (
            self._token,
            kind,
            self._is_compiled(kind),
            torch.get_default_dtype(),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            tuple(parameters),
            tuple([tensor_layout(tensor) for tensor in inputs]),
            self._reach.observe(),
        )

    def _constants(self) -> Hashable:
        """What else a recording bakes in, which cannot change as long as this lives."""
        model, program = self._bound.model, self._program
        return (
            # Bound methods are made anew at each look; what they bind is not.
            Same(getattr(model, "__self__", None)),
            Same(getattr(model, "__func__", model)),
            repr(self._spec),
            tuple(fingerprint(x) for x in self._leaves if not isinstance(x, Tensor)),
            tuple(site._replace(support=None) for site in program.latents),  # type: ignore[arg-type]
            (program.discrete, program.plate_nesting, program.dtype, self._stochastic),
        )

    def _record(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        num_batched: int,
    ) -> RecordedGraph:
        self._last_run = None
        try:
            return record(function, tuple(tensor.detach() for tensor in inputs), num_batched)
        except RecordingError as error:
            last = self._last_run.last_site if self._last_run else None
            place = "before its first site" if last is None else f"at or after site {last!r}"
            raise RecordingError(
                f"the model cannot be recorded: {place}, {error}. Write choices with torch.where "
                "or masks, pass what is fixed as a Python number, or ask for the slow unrecorded "
                "evaluation by compile='none'"
            ) from error

    def _run_unrecorded(
        self, kind: str, inputs: Sequence[Tensor], parameters: tuple[str, ...], seed: int
    ) -> tuple[Tensor, ...]:
        """Run under ``vmap`` where the program allows it, else row by row, as Pyro itself would."""
        function = self._function(kind, parameters)
        rows, *rest = (tensor.detach() for tensor in inputs)
        if not self._one_by_one:
            try:
                return function(rows, *rest)
            except Exception:
                # The same mistake, if it is one, is met again below, and told more plainly.
                self._one_by_one = True
        results = []
        for row in rows.split(1):
            with self._noise(seed):
                results.append(
                    function(row, *rest, vectorize=lambda single, **_: _unbatched(single))
                )
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    def _function(
        self,
        kind: str,
        parameters: tuple[str, ...],
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Return the pure function of all inputs that a kind of evaluation is."""
        program, single = self._program, KINDS[kind]

        def function(rows: Tensor, *rest: Tensor, vectorize: Any = vmap) -> tuple[Tensor, ...]:
            inputs = iter(rest)
            bound = self._with_data(islice(inputs, len(self._data)))
            given: dict[str, Any] = {
                "subsample": dict(zip(program.subsamples, inputs, strict=False)),
                "parameters": dict(zip(parameters, inputs, strict=False)),
            }

            def joint(**values: Any) -> tuple[Tensor, Substitution]:
                run = Substitution(program, **values, **given)
                self._last_run = run
                return log_joint(joint_trace(bound, program, run), program, run), run

            randomness = "same" if self._stochastic else "error"
            with (
                quiet_pyro(bound.args, bound.kwargs),
                self._reach.substituted(list(inputs)),
            ):
                return vectorize(partial(single, joint, program), randomness=randomness)(rows)

        return function

    def _with_data(self, data: Iterable[Tensor]) -> Bound:
        data = iter(data)
        leaves = [next(data) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return Bound(self._bound.model, args, kwargs)

    def _noise(self, seed: int) -> contextlib.AbstractContextManager[None]:
        if not self._stochastic:
            return contextlib.nullcontext()
        return seeded(seed, self._program.device)


def current_parameters(program: Program) -> dict[str, Tensor]:
    """Values of free ``pyro.param`` sites: the store's where it has them, else their first."""
    if not program.parameters:
        return {}
    store = pyro.get_param_store()
    return {
        name: store.get_param(name).detach() if name in store else value
        for name, value in program.parameters.items()
    }


def _unbatched(single: Callable) -> Callable:
    return lambda rows: tuple(part[None] for part in single(rows[0]))
