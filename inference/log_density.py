r"""The bridge from a Pyro program to its log density on the real line, with its score.

.. math:: \log p(u) = \log p(x(u), y) + \log |\det \partial x / \partial u|, \qquad
          \text{score}(u) = \nabla_u \log p(u)

The program is run by Pyro's handlers once, under ``vmap``, and recorded as a static tensor graph of
value and gradient. That graph, not Pyro, runs at every call. Data, subsample indices, parameters and
buffers are inputs of the graph; all else that it bakes in is part of the key it is kept under.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import pyro.poutine as poutine
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from bayesattn.inference import enumeration
from bayesattn.inference import program as programs
from bayesattn.inference.program import Latent, Program, Substitution
from bayesattn.inference.recording import (
    GraphCache,
    RandomOperationWatch,
    RecordingError,
    leaf_key,
    record,
)
from bayesattn.inference.running import seeded

__all__ = ["DensitySettings", "LogDensity"]

Subsample = Mapping[str, Int[Tensor, " index"]]


@dataclass(frozen=True)
class DensitySettings:
    """How a log density is evaluated.

    Attributes:
        compile: ``"record"`` replays a recorded graph; ``"none"`` runs Pyro's handlers at every call,
            which is slow and allows control flow on latent values.
        chunk_size: Most particles evaluated at once, to bound memory; all by default.
        stochastic: Allow random operations other than sample sites; each call draws them anew,
            shared by all particles.
        max_plate_nesting: Number of nested plates; found by running the model by default.
        graphs: Where recorded graphs are kept; give the same to several densities to share them.
    """

    compile: Literal["record", "none"] = "record"
    chunk_size: int | None = None
    stochastic: bool = False
    max_plate_nesting: int | None = None
    graphs: GraphCache = field(default_factory=GraphCache, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.compile not in ("record", "none"):
            raise ValueError(f"compile must be 'record' or 'none', got {self.compile!r}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least one particle, got {self.chunk_size}")


class LogDensity:
    """Log density of a Pyro program's continuous latents, on the real line, given its arguments.

    Args:
        model: A Pyro program: any callable with :func:`pyro.sample` statements. Discrete latent sites
            are summed out exactly.
        *args: The program's positional arguments; tensors among them are data.
        settings: How to evaluate; see :class:`DensitySettings`.
        **kwargs: The program's keyword arguments.

    Attributes:
        program: The program's sites, as one run showed them.
        settings: As given.

    Raises:
        ValueError: If the program fails on its arguments, has nothing to infer, or does what a log
            density cannot (the message says what and where).
    """

    def __init__(
        self, model: Callable, *args: Any, settings: DensitySettings | None = None, **kwargs: Any
    ):
        if not callable(model):
            raise ValueError(f"model must be a Pyro program, that is callable, got {model!r}")
        self.model, self.args, self.kwargs = model, args, kwargs
        self.settings = DensitySettings() if settings is None else settings
        _refuse_empty(args, kwargs)
        self.program: Program = programs.read_program(
            model, args, kwargs, max_plate_nesting=self.settings.max_plate_nesting
        )
        self._last_run: Substitution | None = None
        self._modules = programs.modules_of(model, args, kwargs)
        self._generator = torch.Generator().manual_seed(0)
        self._check_first_value()

    @property
    def dim(self) -> int:
        """Length of the unconstrained vector."""
        return self.program.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of particles."""
        return self.program.dtype

    @property
    def device(self) -> torch.device:
        """Of particles."""
        return self.program.device

    @property
    def sites(self) -> tuple[Latent, ...]:
        """Continuous latent sites in the order of the unconstrained vector."""
        return self.program.latents

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name}{tuple(site.shape)}" for site in self.sites)
        return f"LogDensity(dim={self.dim}, sites=[{sites}], {self.settings})"

    def value_and_score(
        self, particles: Float[Tensor, "particle dim"], subsample: Subsample | None = None
    ) -> tuple[Float[Tensor, " particle"], Float[Tensor, "particle dim"]]:
        """Log density and its gradient at each particle.

        Args:
            particles: Unconstrained values.
            subsample: Indices of each subsampled plate (see :meth:`draw_subsample`).

        Returns:
            Unnormalized log density in nats, and score; both detached.
        """
        score, value = self._run("value_and_score", particles, subsample)
        return value, score

    def value_score_and_hessian(
        self, particles: Float[Tensor, "particle dim"], subsample: Subsample | None = None
    ) -> tuple[
        Float[Tensor, " particle"],
        Float[Tensor, "particle dim"],
        Float[Tensor, "particle dim dim"],
    ]:
        """Log density with its first and second derivatives at each particle."""
        second, score, value = self._run("hessian", particles, subsample)
        return value, score, second

    def constrain(self, particles: Float[Tensor, "particle dim"]) -> dict[str, Tensor]:
        """Map unconstrained particles to the values of each site: name to (particle, \\*shape)."""
        _, *values = self._run("constrain", particles, self._any_subsample())
        return {site.name: value for site, value in zip(self.sites, values, strict=True)}

    def log_determinant(
        self, particles: Float[Tensor, "particle dim"]
    ) -> Float[Tensor, " particle"]:
        """Log absolute determinant of the map from unconstrained particles to constrained values."""
        return self._run("constrain", particles, self._any_subsample())[0]

    def unconstrain(self, values: Mapping[str, Tensor]) -> Float[Tensor, "particle dim"]:
        """Map values of all sites, each (particle, \\*shape), to unconstrained particles.

        Raises:
            ValueError: If a site is missing, unknown, or of another shape.
        """
        names = [site.name for site in self.sites]
        if set(values) != set(names):
            raise ValueError(f"values must have the sites {names}, got {sorted(values)}")
        for site in self.sites:
            if values[site.name].shape[1:] != site.shape:
                raise ValueError(
                    f"values[{site.name!r}] must have shape (particle, {', '.join(map(str, site.shape))}), "
                    f"got {tuple(values[site.name].shape)}"
                )
        columns = [values[n].to(self.device, self.dtype).reshape(len(values[n]), -1) for n in names]
        (result,) = self._run("unconstrain", torch.cat(columns, 1), self._any_subsample())
        return result

    def draw_subsample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw indices for each subsampled plate, uniformly and without replacement."""
        return {
            name: torch.randperm(size, generator=generator)[:count].to(self.device)
            for name, (size, count) in self.program.subsamples.items()
        }

    def particle_index(
        self, plate: str
    ) -> tuple[Int[Tensor, "particle dim"], Int[Tensor, " outside"]]:
        """Say which entries of the unconstrained vector belong to each slice of a plate.

        Args:
            plate: Name of a plate around at least one latent site.

        Returns:
            For each slice its entries, sites in program order; and the entries outside of the plate.

        Raises:
            ValueError: If no latent site stands in such a plate.
        """
        inside, outside = [], []
        for site in self.sites:
            index = torch.arange(site.start, site.stop).reshape(site.unconstrained_shape)
            axis = next((p.axis for p in site.plates if p.name == plate), None)
            if axis is None:
                outside.append(index.flatten())
            else:
                inside.append(index.movedim(axis, 0).flatten(1))
        if not inside:
            known = sorted({p.name for site in self.sites for p in site.plates})
            raise ValueError(
                f"no latent site stands in a plate named {plate!r}; plates around latent sites: "
                f"{known or 'none'}"
            )
        empty = torch.zeros(0, dtype=torch.int64)
        return torch.cat(inside, 1).to(self.device), torch.cat([*outside, empty]).to(self.device)

    def site_names(self, bad: Tensor) -> list[str]:
        """Names of the sites with a True among their entries of a boolean vector ``(dim,)``."""
        return [site.name for site in self.sites if bool(bad[site.start : site.stop].any())]

    def _run(self, kind: str, particles: Tensor, subsample: Subsample | None) -> Any:
        expected = self._columns(kind)
        if particles.ndim != 2 or particles.shape[1] != expected:
            raise ValueError(
                f"particles must have shape (particle, {expected}), got {tuple(particles.shape)}"
            )
        if len(particles) == 0:
            raise ValueError("at least one particle is needed, got none")
        subsample = self._checked_subsample(subsample)
        size = self.settings.chunk_size or len(particles)
        particles = particles.detach().to(self.device, self.dtype)
        with self._randomness():
            chunks = [self._run_chunk(kind, part, subsample) for part in particles.split(size)]
        if len(chunks) == 1:
            return chunks[0]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _columns(self, kind: str) -> int:
        if kind == "unconstrain":
            return sum(site.shape.numel() for site in self.sites)
        return self.dim

    def _run_chunk(self, kind: str, particles: Tensor, subsample: Subsample) -> Any:
        leaves, spec = tree_flatten((self.args, self.kwargs))
        is_data = [isinstance(leaf, Tensor) for leaf in leaves]
        data = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        module_tensors = programs.module_tensors(self._modules)
        parameters = self._current_parameters()
        groups = (
            data,
            list(subsample.values()),
            list(parameters.values()),
            [tensor.detach() for tensor in module_tensors.values()],
        )
        inputs = (particles, *(tensor for group in groups for tensor in group))
        sizes = [len(group) for group in groups]

        def function(particles: Tensor, *flat: Tensor, one_by_one: bool = False) -> Any:
            data, indices, values, stand_ins = _split(flat, sizes)
            rest = iter(data)
            filled = [
                next(rest) if of_data else leaf
                for leaf, of_data in zip(leaves, is_data, strict=True)
            ]
            args, kwargs = tree_unflatten(filled, spec)
            replacements = {
                id(old): new for old, new in zip(module_tensors.values(), stand_ins, strict=True)
            }
            single = self._single(
                kind,
                args,
                kwargs,
                dict(zip(subsample, indices, strict=True)),
                dict(zip(parameters, values, strict=True)),
            )
            randomness = "same" if self.settings.stochastic else "error"
            with (
                programs.quiet_pyro(args, kwargs),
                programs.substituted_tensors(self._modules, replacements),
            ):
                if one_by_one:
                    rows = [single(particle) for particle in particles]
                    return [torch.stack(parts) for parts in zip(*rows, strict=True)]
                return vmap(single, randomness=randomness)(particles)

        with torch.no_grad():
            # Inverse transforms index by masks, which fake tensors cannot; they run once, not in a loop.
            if self.settings.compile == "none" or kind == "unconstrain":
                return self._run_unrecorded(function, inputs)
            key = (
                kind,
                spec,
                tuple(leaf_key(leaf) for leaf in leaves),
                tuple(leaf_key(tensor) for tensor in inputs),
                tuple(subsample),
                tuple(parameters),
                tuple(part.training for m in self._modules.values() for part in m.modules()),
                torch.get_default_dtype(),
                self.settings.stochastic,
                id(self.model),
            )
            graph = self.settings.graphs.get(
                key,
                lambda: self._record(function, inputs),
                keep=(self.model, [leaf for leaf in leaves if not isinstance(leaf, Tensor)]),
            )
            return graph(*inputs)

    def _record(self, function: Callable, inputs: tuple[Tensor, ...]) -> Callable:
        try:
            return record(function, inputs)
        except RecordingError as error:
            site = "the first site" if self._last_run is None else repr(self._last_run.last_site)
            raise RecordingError(
                f"the model cannot be recorded: at or after site {site}, {error}. Write the choice with "
                "torch.where or masks, pass what is fixed as a Python number, or ask for the slow "
                "unrecorded evaluation by compile='none'"
            ) from error

    def _run_unrecorded(self, function: Callable, inputs: tuple[Tensor, ...]) -> Any:
        try:
            return function(*inputs)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
        return function(*inputs, one_by_one=True)

    def _single(
        self,
        kind: str,
        args: tuple,
        kwargs: Mapping[str, Any],
        subsample: Subsample,
        parameters: Mapping[str, Tensor],
    ) -> Callable[[Tensor], Any]:
        """Return the function of one particle that a kind of graph maps over all."""

        def value(particle: Tensor, **values: Any) -> Tensor:
            run = Substitution(
                self.program,
                unconstrained=None if values else particle,
                subsample=subsample,
                parameters=parameters,
                **values,
            )
            self._last_run = run
            return programs.log_joint(self.model, args, kwargs, self.program, run)

        def constrain(particle: Tensor) -> tuple[Tensor, ...]:
            value(particle)
            assert self._last_run is not None
            values = [self._last_run.values[site.name] for site in self.sites]
            determinant = sum(self._last_run.log_determinants, particle.new_zeros(()))
            return (determinant, *values)

        def unconstrain(row: Tensor) -> tuple[Tensor]:
            parts = row.split([site.shape.numel() for site in self.sites])
            given = {
                site.name: part.reshape(site.shape).to(site.dtype)
                for site, part in zip(self.sites, parts, strict=True)
            }
            value(row, constrained=given)
            assert self._last_run is not None
            images = [self._last_run.images[site.name].flatten() for site in self.sites]
            return (torch.cat([image.to(self.dtype) for image in images]),)

        def second(particle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (jacrev(grad(value))(particle), *grad_and_value(value)(particle))

        kinds: dict[str, Callable[[Tensor], Any]] = {
            "value_and_score": grad_and_value(value),
            "hessian": second,
            "constrain": constrain,
            "unconstrain": unconstrain,
        }
        return kinds[kind]

    def _current_parameters(self) -> dict[str, Tensor]:
        """Values of free ``pyro.param`` sites: the store's where it has them, else their first."""
        store = pyro.get_param_store()
        return {
            name: store.get_param(name).detach() if name in store else value
            for name, value in self.program.parameters.items()
        }

    def _checked_subsample(self, subsample: Subsample | None) -> Subsample:
        given = {} if subsample is None else subsample
        for name, (_, count) in self.program.subsamples.items():
            if name not in given:
                raise ValueError(
                    f"plate {name!r} is subsampled: give subsample={{{name!r}: {count} indices}}, for "
                    "example from draw_subsample()"
                )
            if len(given[name]) != count:
                raise ValueError(
                    f"subsample[{name!r}] must have {count} indices, got {len(given[name])}"
                )
        return {name: given[name] for name in self.program.subsamples}

    def _any_subsample(self) -> dict[str, Tensor]:
        return {
            name: torch.arange(count, device=self.device)
            for name, (_, count) in self.program.subsamples.items()
        }

    def _randomness(self) -> contextlib.AbstractContextManager[None]:
        """Give random operations of a stochastic model a random state of their own."""
        if not self.settings.stochastic:
            return contextlib.nullcontext()
        seed = int(torch.randint(2**31, (), generator=self._generator))
        return seeded(seed, self.device)

    def _check_first_value(self) -> None:
        """Evaluate the log joint once, eagerly, at a prior draw: NaN and random operations show here."""
        with seeded(0, self.device), torch.no_grad():
            values = _prior_draw(self)
            run = Substitution(
                self.program,
                constrained=values,
                subsample=self._any_subsample(),
                parameters=self._current_parameters(),
            )
            watch = RandomOperationWatch()
            with programs.quiet_pyro(self.args, self.kwargs), run, watch:
                trace = poutine.trace(self._without_discrete(run)).get_trace(
                    *self.args, **self.kwargs
                )
                trace.compute_log_prob()
        if watch.operations and not self.settings.stochastic:
            raise ValueError(
                f"the model draws random numbers by {watch.operations} outside of pyro.sample, so its log "
                "density is not a function; call .eval() on modules with dropout, or ask for "
                "stochastic=True, which draws them anew at each evaluation, shared by all particles"
            )
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and bool(site["log_prob"].isnan().any()):
                count = int(site["log_prob"].isnan().sum())
                suspects = _arguments_with_nan(self.args, self.kwargs)
                raise ValueError(
                    f"the log probability at site {name!r} is NaN in {count} of "
                    f"{site['log_prob'].numel()} entries"
                    + (f"; NaN was found in the data: {', '.join(suspects)}" if suspects else "")
                )

    def _without_discrete(self, run: Substitution) -> Callable:
        if not self.program.discrete:
            return self.model
        return enumeration.enumerated(self.model, self.program.event_start)


def _prior_draw(density: LogDensity) -> dict[str, Tensor]:
    with (
        programs.apart_from_handlers(),
        programs.private_param_store(),
        programs.data_defaults(density.args, density.kwargs),
    ):
        trace = poutine.trace(density.model).get_trace(*density.args, **density.kwargs)
    return {site.name: trace.nodes[site.name]["value"] for site in density.sites}


def _split(flat: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(flat[start : start + size])
        start += size
    return parts


def _refuse_empty(args: tuple, kwargs: Mapping[str, Any]) -> None:
    for name, value in _named_arguments(args, kwargs):
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.numel() == 0:
                raise ValueError(f"{name} is empty: a tensor of shape {tuple(leaf.shape)}")


def _arguments_with_nan(args: tuple, kwargs: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in _named_arguments(args, kwargs)
        if any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in tree_leaves(value))
    ]


def _named_arguments(args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    positional = [(f"positional argument {index}", value) for index, value in enumerate(args)]
    return positional + [(f"argument {name!r}", value) for name, value in kwargs.items()]
