"""A Pyro program run again at each draw: its latent sites take the draw's values, all else follows.

The runs are vectorized over draws where the program allows it, and are made one by one where not.
Nothing of torch's or Pyro's global state is touched, and subsampled plates are run in full.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.func import vmap

from bayesattn.inference.arguments import describe_arguments, named_arguments
from bayesattn.inference.discrete_draws import draw_discrete
from bayesattn.inference.handlers import (
    FreshDraws,
    GivenValues,
    SamplingError,
    ShapeMismatchError,
    first_line,
    full_plates,
)
from bayesattn.inference.module_state import module_tensors, substituted_tensors
from bayesattn.inference.quiet import quiet_pyro
from bayesattn.inference.reach import modules_of
from bayesattn.inference.running import resolve_seed, seeded
from bayesattn.inference.sites import Site, read_sites

__all__ = ["Replay"]

# Entries of all sample sites together that are evaluated at once unless the caller says otherwise:
# 64 MiB in float64, some times that with what the program makes on the way.
_ENTRIES_AT_ONCE = 2**23

Values = Mapping[str, Tensor]


class Replay:
    """A program at given arguments, ready to be run at each draw.

    Args:
        model: A Pyro program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Site or ``pyro.param`` to its values, one row per run: ``(row, *shape)``.
        num_rows: How many runs.
        seed: For what is random in the program; fresh entropy by default.
        chunk_size: Most runs evaluated at once; by default as many as keep memory moderate.

    Attributes:
        arguments: By the names of the program's parameters.
        sites: The program's sample sites, in its order, as the first row shows them.

    Raises:
        ValueError: If the program fails on these arguments, gives a site another shape than its
            values have, or lacks a site that has values.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        values: Values,
        *,
        num_rows: int,
        seed: int | None = None,
        chunk_size: int | None = None,
    ):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least one draw, got {chunk_size}")
        self.arguments = named_arguments(model, args, kwargs)
        self._model, self._args, self._kwargs = model, args, kwargs
        self._values, self._num_rows = dict(values), num_rows
        self._seed = resolve_seed(seed)
        self._modules = modules_of(model, args, kwargs)
        self._owned: dict[str, int] = {}
        self._parameters: dict[str, Tensor] = {}
        self.sites: dict[str, Site] = {}
        self.sites = self._first_run()
        entries = sum(math.prod(site.shape) for site in self.sites.values())
        self._chunk_size = chunk_size or max(1, _ENTRIES_AT_ONCE // max(entries, 1))

    def names(self, *kinds: str) -> list[str]:
        """Names of the sites of the given kinds, in the program's order."""
        return [site.name for site in self.sites.values() if site.kind in kinds]

    @property
    def summable(self) -> list[str]:
        """Names of discrete sites that are neither given nor observed."""
        return [name for name in self.names("free") if self.sites[name].is_summable]

    @property
    def first_free_axis(self) -> int:
        """First tensor dimension, from the right, left of all plates."""
        plates = [axis for site in self.sites.values() for axis in site.plates]
        return min(plates, default=0) - 1

    def prior(self, num_rows: int) -> "Replay":
        """Make the same program ready to draw all its sites, at the parameters of the first row."""
        parameters = {
            name: value[:1].expand(num_rows, *value.shape[1:])
            for name, value in self._values.items()
            if name not in self.sites
        }
        return Replay(
            self._model,
            self._args,
            self._kwargs,
            parameters,
            num_rows=num_rows,
            seed=self._seed,
            chunk_size=self._chunk_size,
        )

    def map(
        self,
        function: Callable[[Any], Mapping[str, Any]],
        *,
        resample: Collection[str] = (),
        summed_out: Collection[str] = (),
        handler: Callable[[Callable], Callable] = lambda model: model,
    ) -> dict[str, Tensor]:
        """Run the program once per row, and stack what the function makes of each trace.

        Args:
            function: From a Pyro trace to named tensors.
            resample: Observed sites that are drawn anew.
            summed_out: Discrete sites that are first drawn given the row and the data.
            handler: Wraps the program before it is traced.

        Returns:
            Name to tensor, the row axis first.
        """

        def run(_: Tensor, values: Values) -> dict[str, Tensor]:
            if summed_out:
                program = functools.partial(self._run, values)
                discrete = draw_discrete(program, summed_out, self.first_free_axis)
                values = {**values, **discrete}
            result = function(self._trace(values, resample, handler))
            return {name: torch.as_tensor(value) for name, value in result.items()}

        rows = torch.arange(self._num_rows)
        with self._context():
            try:
                batched: Any = vmap(run, randomness="different", chunk_size=self._chunk_size)
                return batched(rows, self._values)
            except Exception as error:
                obstacle = error
            each = [run(row, {name: v[row] for name, v in self._values.items()}) for row in rows]
        if not isinstance(obstacle, SamplingError):
            warnings.warn(
                "the model was run draw by draw, since it cannot be vectorized over draws "
                f"({type(obstacle).__name__}: {first_line(obstacle)})",
                RuntimeWarning,
                stacklevel=2,
            )
        return {name: torch.stack([result[name] for result in each]) for name in each[0]}

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        stored = {name: value.detach() for name, value in pyro.get_param_store().items()}
        device = next((value.device for value in self._values.values()), None)
        with (
            seeded(self._seed, device),
            quiet_pyro((*self._args, *self._values.values()), self._kwargs),
            warnings.catch_warnings(),
            full_plates(),
            torch.no_grad(),
            # The store is private, and empty; what the user trained still counts.
            GivenValues({}, parameters=stored),
        ):
            # Slow batching rules inside of torch are not the caller's concern.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            warnings.filterwarnings("ignore", message="An output with one or more elements was")
            yield

    def _run(self, values: Values) -> Any:
        # As if observed, so that Pyro's enumeration knows which discrete sites they hang on.
        told = {
            name: value
            for name, value in values.items()
            if name in self.sites and not self.sites[name].is_summable
        }
        with self._given(values):
            return poutine.condition(self._model, told)(*self._args, **self._kwargs)

    def _trace(
        self,
        values: Values,
        resample: Collection[str] = (),
        handler: Callable[[Callable], Callable] = lambda model: model,
    ) -> Any:
        # A module uses its own tensors, whatever pyro.param says, so they give way themselves.
        tensors = {self._owned[name]: values[name] for name in self._owned.keys() & values.keys()}
        with (
            substituted_tensors(self._modules, tensors),
            FreshDraws(),
            self._given(values, resample),
        ):
            return poutine.trace(handler(self._model)).get_trace(*self._args, **self._kwargs)

    def _given(self, values: Values, resample: Collection[str] = ()) -> GivenValues:
        depth = -self.first_free_axis - 1 if self.sites else None
        return GivenValues(values, resample, {**self._parameters, **values}, depth)

    def _first_run(self) -> dict[str, Site]:
        first = {name: value[0] for name, value in self._values.items()}
        with self._context():
            try:
                nodes = self._trace(first).nodes
            except ShapeMismatchError as error:
                raise ValueError(first_line(error)) from None
            except Exception as error:
                raise ValueError(
                    f"the model failed on the {describe_arguments(self._args, self._kwargs)}: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        # A parameter cannot be registered under vmap, so later runs are given what this one has.
        self._parameters = {
            name: node["value"] for name, node in nodes.items() if node["type"] == "param"
        }
        self._owned = _owned_parameters(nodes, module_tensors(self._modules).values())
        missing = [name for name in first if name not in nodes]
        if missing:
            raise ValueError(
                f"the draws have values of {missing}, which the model does not visit at these "
                f"arguments; it visits {[name for name in nodes if not name.startswith('_')]}"
            )
        return read_sites(nodes, first)


def _owned_parameters(nodes: Mapping[str, Any], tensors: Iterable[Tensor]) -> dict[str, int]:
    """Name of each parameter site that is a module's own tensor, to that tensor's ``id``."""
    known = {id(tensor) for tensor in tensors}
    given = {
        name: node["args"][1]
        for name, node in nodes.items()
        if node["type"] == "param" and len(node["args"]) > 1
    }
    return {name: id(tensor) for name, tensor in given.items() if id(tensor) in known}
