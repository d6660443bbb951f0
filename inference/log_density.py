r"""The bridge from a Pyro program to its log density on the real line, with its score.

.. math:: \log p(u) = \log p(x(u), y) + \log |\det \partial x / \partial u|, \qquad
          \text{score}(u) = \nabla_u \log p(u)

The program is run by Pyro's handlers once, under ``vmap``, and recorded as a static tensor graph of
value and gradient. That graph, not Pyro, runs at every call.
"""

import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.inference.arguments import bound
from bayesattn.inference.compilation import Compile, Mode, resolved_mode
from bayesattn.inference.evaluation import Evaluator, current_parameters
from bayesattn.inference.first_value import check_first_value
from bayesattn.inference.program import Latent, Program, read_program
from bayesattn.inference.reach import Reach
from bayesattn.inference.recording import GraphCache, RecordingError

__all__ = ["DensitySettings", "LogDensity"]

Subsample = Mapping[str, Int[Tensor, " index"]]


@dataclass(frozen=True)
class DensitySettings:
    """How a log density is evaluated.

    Attributes:
        compile: ``"record"`` replays a recorded graph; ``"inductor"`` compiles it to machine code,
            which takes some seconds; ``"none"`` runs Pyro's handlers at every call, which is slow
            and allows control flow on latent values; ``"auto"`` records, and routines compile where
            a run is long enough to pay for it: see :func:`bayesattn.inference.resolved_mode`. In a
            graph, particles for which a matrix cannot be factorized have NaN for a value; by
            ``"none"`` they are an error.
        chunk_size: Most particles evaluated at once, to bound memory; all by default.
        stochastic: Allow random operations other than sample sites; each call draws them anew,
            shared by all particles.
        max_plate_nesting: Number of nested plates; found by running the model by default.
        graphs: Where recorded graphs are kept; give the same to several densities to share them.
    """

    compile: Compile = "auto"
    chunk_size: int | None = None
    stochastic: bool = False
    max_plate_nesting: int | None = None
    graphs: GraphCache = field(default_factory=GraphCache, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.compile not in get_args(Compile):
            choices = ", ".join(map(repr, get_args(Compile)))
            raise ValueError(f"compile must be one of {choices}, got {self.compile!r}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least one particle, got {self.chunk_size}")


class LogDensity:
    """Log density of a Pyro program's continuous latents, on the real line, given its arguments.

    Args:
        model: A Pyro program: any callable with :func:`pyro.sample` statements. Discrete latent
            sites are summed out exactly.
        *args: The program's positional arguments. Tensors among them are data, looked at anew at
            each call; all else is taken as it is now.
        settings: How to evaluate; see :class:`DensitySettings`.
        **kwargs: The program's keyword arguments.

    Attributes:
        program: The program's sites, as one run showed them.
        settings: As given.
        mode: How it is evaluated: ``"none"``, ``"record"`` or ``"inductor"``.
        noise_generator: Seeds what a stochastic program draws.

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
        program = bound(model, args, kwargs)
        before = Reach(*program)
        self.program: Program = read_program(
            *program, max_plate_nesting=self.settings.max_plate_nesting
        )
        # What the program itself changes says nothing of whether it is still the same.
        reach = Reach(*program, unwatched=Reach(*program).changed_since(before))
        self.mode: Mode = resolved_mode(self.settings.compile, self.program.device)
        recorded, stochastic = self.mode != "none", self.settings.stochastic
        check_first_value(
            program,
            self.program,
            subsample=self._any_subsample(),
            parameters=current_parameters(self.program),
            random_numbers=("torch" if recorded else "any") if stochastic else "none",
        )
        graphs = self.settings.graphs if recorded else None
        self._evaluate = Evaluator(program, self.program, reach, graphs, stochastic, self.mode)
        self.noise_generator = torch.Generator().manual_seed(0)

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
        self,
        particles: Float[Tensor, "particle dim"],
        subsample: Subsample | None = None,
        *,
        is_in_loop: bool = True,
    ) -> tuple[Float[Tensor, " particle"], Float[Tensor, "particle dim"]]:
        """Log density and its gradient at each particle.

        Args:
            particles: Unconstrained values.
            subsample: Indices of each subsampled plate (see :meth:`draw_subsample`).
            is_in_loop: Whether there are many such calls, so that compiling may pay.

        Returns:
            Unnormalized log density in nats, and score; both detached.
        """
        kind = "value_and_score" if is_in_loop else "once"
        value, score = self._run(kind, particles, self._checked(subsample))
        return value, score

    def fused(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        key: Hashable,
        tensors: tuple[Tensor, ...],
        subsample: Subsample | None = None,
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Make one graph of a function that has this log density in it.

        Args:
            function: Takes value and score, as a function of particles, and tensors, and returns
                tensors; pure.
            key: Stands for the function among the graphs that are kept: equal keys, equal
                functions.
            tensors: Examples of the tensors.
            subsample: Example of the indices of each subsampled plate.

        Returns:
            Function of the tensors, in a tuple, and subsample indices. Good as long as the program
            reaches the same modules and variables; what their tensors hold may change. Where
            nothing is recorded, or particles go in chunks, or the function cannot be recorded, it
            is simply called.
        """
        if self.mode != "none" and self.settings.chunk_size is None:
            with contextlib.suppress(RecordingError):
                replay = self._evaluate.fused(function, key, tensors, self._checked(subsample))
                return lambda tensors, subsample=None: replay(
                    tensors, self._checked(subsample), self._fresh_seed()
                )

        def call(
            tensors: tuple[Tensor, ...], subsample: Subsample | None = None
        ) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(lambda rows: self.value_and_score(rows, subsample), *tensors)

        return call

    def value_score_and_hessian(
        self, particles: Float[Tensor, "particle dim"], subsample: Subsample | None = None
    ) -> tuple[
        Float[Tensor, " particle"],
        Float[Tensor, "particle dim"],
        Float[Tensor, "particle dim dim"],
    ]:
        """Log density with its first and second derivatives at each particle."""
        value, score, hessian = self._run("hessian", particles, self._checked(subsample))
        return value, score, hessian

    def constrain(self, particles: Float[Tensor, "particle dim"]) -> dict[str, Tensor]:
        r"""Map unconstrained particles to the values of each site: name to (particle, \*shape)."""
        _, *values = self._run("constrain", particles, self._any_subsample())
        return {site.name: value for site, value in zip(self.sites, values, strict=True)}

    def log_determinant(
        self, particles: Float[Tensor, "particle dim"]
    ) -> Float[Tensor, " particle"]:
        """Log absolute determinant of the map from unconstrained to constrained values."""
        return self._run("constrain", particles, self._any_subsample())[0]

    def unconstrain(self, values: Mapping[str, Tensor]) -> Float[Tensor, "particle dim"]:
        r"""Map values of all sites, each (particle, \*shape), to unconstrained particles.

        Raises:
            ValueError: If a site is missing, unknown, of another shape, or outside of its support.
        """
        names = [site.name for site in self.sites]
        if set(values) != set(names):
            raise ValueError(f"values must have the sites {names}, got {sorted(values)}")
        columns = []
        for site in self.sites:
            value = values[site.name]
            expected = (*value.shape[:1], *site.shape)
            if value.ndim == 0 or value.shape != expected:
                raise ValueError(
                    f"values[{site.name!r}] must have shape (particle, "
                    f"{', '.join(map(str, site.shape))}), got {tuple(value.shape)}"
                )
            columns.append(
                value.to(self.device, self.dtype).reshape(len(value), site.shape.numel())
            )
        if len({len(column) for column in columns}) > 1:
            counts = {name: len(values[name]) for name in names}
            raise ValueError(f"values must have equally many particles of each site, got {counts}")
        rows = torch.cat(columns, 1)
        (particles,) = self._run("unconstrain", rows, self._any_subsample())
        outside = self.site_names((~particles.isfinite() & rows.isfinite().all(1)[:, None]).any(0))
        if outside:
            supports = {site.name: site.support for site in self.sites if site.name in outside}
            raise ValueError(f"values must lie in their supports, but not all do: {supports}")
        return particles

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
            Each slice's entries, sites in program order; and the entries outside of the plate.

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
                inside.append(index.movedim(axis, 0).reshape(index.shape[axis], -1))
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

    def _run(self, kind: str, rows: Tensor, subsample: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if rows.ndim != 2 or (kind != "unconstrain" and rows.shape[1] != self.dim):
            raise ValueError(
                f"particles must have shape (particle, {self.dim}), got {tuple(rows.shape)}"
            )
        if len(rows) == 0:
            raise ValueError("at least one particle is needed, got none")
        # One layout of memory, so that no other one asks for a recording of its own.
        rows = rows.detach().to(self.device, self.dtype).contiguous().view(-1).view(rows.shape)
        seed = self._fresh_seed()
        size = self.settings.chunk_size or len(rows)
        if size >= len(rows):
            return self._evaluate(kind, rows, subsample, seed)
        chunks = [self._evaluate(kind, part, subsample, seed) for part in rows.split(size)]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))

    def _fresh_seed(self) -> int:
        if not self.settings.stochastic:
            return 0
        return int(torch.randint(2**31, (), generator=self.noise_generator))

    def _checked(self, subsample: Subsample | None) -> dict[str, Tensor]:
        given = {} if subsample is None else subsample
        if not given and not self.program.subsamples:
            return {}
        for name, (_, count) in self.program.subsamples.items():
            if name not in given:
                raise ValueError(
                    f"plate {name!r} is subsampled: give subsample={{{name!r}: {count} indices}}, "
                    "for example from draw_subsample()"
                )
            if given[name].shape != (count,):
                got = given[name].numel() if given[name].ndim == 1 else tuple(given[name].shape)
                raise ValueError(f"subsample[{name!r}] must have {count} indices, got {got}")
        unknown = sorted(set(given) - set(self.program.subsamples))
        if unknown:
            known = sorted(self.program.subsamples) or "none"
            raise ValueError(f"subsample has unknown plates {unknown}; subsampled are: {known}")
        return {name: given[name].to(self.device) for name in self.program.subsamples}

    def _any_subsample(self) -> dict[str, Tensor]:
        return {
            name: torch.arange(count, device=self.device)
            for name, (_, count) in self.program.subsamples.items()
        }
