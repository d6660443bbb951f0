r"""Running a Pyro program under handlers: what its sites are, and its log joint at given unconstrained values.

.. math:: \log p(x(u), y) + \log |\det \partial x / \partial u|

where each latent site's value :math:`x` comes from its slice of :math:`u` by the bijection onto the
support that the site has *in that run*, so that supports may depend on other latents.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine import runtime
from pyro.poutine.runtime import NonlocalExit
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.utils._pytree import tree_leaves

from bayesattn.inference import enumeration
from bayesattn.inference.running import private_param_store, seeded

__all__ = [
    "Latent",
    "Plate",
    "Program",
    "apart_from_handlers",
    "data_defaults",
    "modules_of",
    "quiet_pyro",
    "read_program",
    "substituted_tensors",
]

_EMPTY_STORE: dict[str, Any] = {"params": {}, "constraints": {}}


class Plate(NamedTuple):
    """One plate around a latent site.

    Attributes:
        name: The plate's name, which is an axis name.
        axis: Its axis in the site's own shape, counted from the left.
        size: Its length.
    """

    name: str
    axis: int
    size: int


class Latent(NamedTuple):
    """One continuous latent site and its slice of the unconstrained vector.

    Attributes:
        name: The site's name.
        shape: Of the constrained value.
        unconstrained_shape: Of the value on the real line; batch axes lead in both.
        plates: The plates around it, outermost axis first.
        support: As it was in the first run; it may move with other latents.
        dtype: Of the site's value in the program.
        start: First entry of its slice.
        stop: One past the last.
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    plates: tuple[Plate, ...]
    support: Constraint
    dtype: torch.dtype
    start: int
    stop: int


class Program(NamedTuple):
    """What one run of a Pyro program tells about it.

    Attributes:
        latents: Continuous latent sites in the order of the program.
        discrete: Names of the discrete latent sites, which are summed out.
        observed: Names of observed sample sites.
        factors: Names of :func:`pyro.factor` sites.
        deterministic: Names of :func:`pyro.deterministic` sites.
        subsamples: Subsampled plates: name to (full size, subsample size).
        parameters: ``pyro.param`` sites that belong to no known module: name to value.
        plate_nesting: Number of nested plates.
        device: Where the latents live.
        dtype: Of the unconstrained vector: the sites' promoted dtype, at least float32.
    """

    latents: tuple[Latent, ...]
    discrete: tuple[str, ...]
    observed: tuple[str, ...]
    factors: tuple[str, ...]
    deterministic: tuple[str, ...]
    subsamples: dict[str, tuple[int, int]]
    parameters: dict[str, Tensor]
    plate_nesting: int
    device: torch.device
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        """Length of the unconstrained vector."""
        return self.latents[-1].stop

    @property
    def event_start(self) -> int:
        """First tensor dimension, from the right, that enumeration may use."""
        return -1 - self.plate_nesting


def read_program(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    max_plate_nesting: int | None = None,
) -> Program:
    """Run the program once, outside of any transform, and note its sites.

    Raises:
        ValueError: If the program fails on its arguments, has no continuous latent site, a latent
            inside a subsampled plate, or a discrete or manifold-valued latent that is not supported.
    """
    trace = _first_trace(model, args, kwargs)
    modules = modules_of(model, args, kwargs)
    _refuse_written_buffers(modules, trace.written)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    subsamples = {
        name: (site["fn"].size, site["fn"].subsample_size)
        for name, site in sites.items()
        if _is_subsample(site) and (site["fn"].subsample_size or site["fn"].size) < site["fn"].size
    }
    sites = {name: site for name, site in sites.items() if not _is_subsample(site)}
    hidden = {name: site for name, site in sites.items() if not site["is_observed"]}
    discrete = tuple(name for name, site in hidden.items() if _is_discrete(site))
    _refuse_unsupported_discrete({name: hidden[name] for name in discrete})
    continuous = {name: site for name, site in hidden.items() if name not in discrete}
    if not continuous:
        raise ValueError(
            "the model has no continuous latent site, so there is nothing to infer; sites found: "
            f"{sorted(trace.nodes.keys() - {'_INPUT', '_RETURN'}) or 'none'}"
        )
    latents = _lay_out(continuous, subsamples)
    dims = [f.dim for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized]
    dtype = functools.reduce(torch.promote_types, (site.dtype for site in latents), torch.float32)
    return Program(
        latents=latents,
        discrete=discrete,
        observed=tuple(
            name
            for name, site in sites.items()
            if site["is_observed"] and not _is_deterministic(site) and not _is_factor(site)
        ),
        factors=tuple(name for name, site in sites.items() if _is_factor(site)),
        deterministic=tuple(name for name, site in sites.items() if _is_deterministic(site)),
        subsamples=subsamples,
        parameters=_free_parameters(trace, modules),
        plate_nesting=-min(dims, default=0) if max_plate_nesting is None else max_plate_nesting,
        device=next(iter(continuous.values()))["value"].device,
        dtype=dtype,
    )


class Substitution(Messenger):
    """Gives a run its latent values, subsample indices and parameters, and sums log determinants.

    Args:
        program: What the first run told.
        unconstrained: The unconstrained vector, or None where ``constrained`` is given.
        constrained: Values of the latent sites; their unconstrained images are collected.
        subsample: Indices of the subsampled plates.
        parameters: Values of the ``pyro.param`` sites.
    """

    def __init__(
        self,
        program: Program,
        *,
        unconstrained: Tensor | None = None,
        constrained: Mapping[str, Tensor] | None = None,
        subsample: Mapping[str, Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self._latents = {site.name: site for site in program.latents}
        self._unconstrained = unconstrained
        self._constrained = {} if constrained is None else constrained
        self._subsample = {} if subsample is None else subsample
        self._parameters = {} if parameters is None else parameters
        self.values: dict[str, Tensor] = {}
        self.images: dict[str, Tensor] = {}
        self.log_determinants: list[Tensor] = []
        self.last_site = "the first site"

    def _pyro_sample(self, msg: Any) -> None:
        self.last_site = msg["name"]
        if isinstance(msg["fn"], _Subsample):
            if msg["name"] in self._subsample:
                msg["value"] = self._subsample[msg["name"]]
            return
        site = self._latents.get(msg["name"])
        if site is None or msg["is_observed"]:
            return
        transform = biject_to(msg["fn"].support)
        if self._unconstrained is None:
            value = self._constrained[site.name]
            image = transform.inv(value)
        else:
            image = self._unconstrained[site.start : site.stop]
            image = image.reshape(site.unconstrained_shape).to(site.dtype)
            value = transform(image)
        if msg["fn"].support is not torch.distributions.constraints.real:
            self.log_determinants.append(transform.log_abs_det_jacobian(image, value).sum())
        self.values[site.name], self.images[site.name] = value, image
        msg["value"], msg["done"] = value, True

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self._parameters:
            msg["value"], msg["done"] = self._parameters[msg["name"]], True


def log_joint(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], program: Program, run: Substitution
) -> Tensor:
    """Log joint density of one run under the given substitution, log determinants included, in nats."""
    if program.discrete:
        model = enumeration.enumerated(model, program.event_start)
    with run:
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    if program.discrete:
        total = enumeration.log_joint(trace)
    else:
        total = trace.log_prob_sum()
    return total + sum(run.log_determinants)


@contextlib.contextmanager
def apart_from_handlers() -> Iterator[None]:
    """Run Pyro code as if no handler or plate were active around it.

    Handlers of an outer program would see the sites of this one, and its plates would push the
    plates of this one to other dimensions.
    """
    allocator = runtime._DIM_ALLOCATOR
    outer, allocator._stack = allocator._stack, []
    try:
        with poutine.block():
            yield
    finally:
        allocator._stack = outer


@contextlib.contextmanager
def quiet_pyro(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Run Pyro code as a pure function: no validation, an empty private parameter store, math attention.

    Validation reads tensors in Python, which no transform allows; fused attention and the encoder
    layer's inference path have no rule for every transform, their plain formulas do.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with (
        pyro.validation_enabled(False),
        apart_from_handlers(),
        private_param_store(_EMPTY_STORE),
        data_defaults(args, kwargs),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        # Slow batching rules inside of torch are not the caller's concern.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def data_defaults(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let constants in the program, such as ``Normal(0., 1.)``, take the data's float dtype and device."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    before = torch.get_default_dtype()
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    try:
        if floats:
            torch.set_default_dtype(functools.reduce(torch.promote_types, floats))
        with contextlib.nullcontext() if device is None else device:
            yield
    finally:
        torch.set_default_dtype(before)


def modules_of(
    model: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, torch.nn.Module]:
    """Modules that a program can reach: itself, what it closes over, its globals and arguments."""
    found: dict[str, torch.nn.Module] = {}

    def add(name: str, value: Any) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.nn.Module) and all(leaf is not m for m in found.values()):
                found[name if name not in found else f"{name}_{len(found)}"] = leaf

    add("arguments", (args, dict(kwargs)))
    while isinstance(model, functools.partial):
        add("partial", (model.args, model.keywords))
        model = model.func
    add("model", model)
    owner = getattr(model, "__self__", None)
    add("model", owner)
    if not isinstance(model, torch.nn.Module) and not inspect.isroutine(model):
        owner, model = model, type(model).__call__
    if owner is not None and not isinstance(owner, torch.nn.Module):
        for name, value in getattr(owner, "__dict__", {}).items():
            add(name, value)
    function = inspect.unwrap(getattr(model, "__func__", model))
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        for name, value in {**variables.globals, **variables.nonlocals}.items():
            add(name, value)
    return found


@contextlib.contextmanager
def substituted_tensors(
    modules: Mapping[str, torch.nn.Module], replacements: Mapping[int, Tensor]
) -> Iterator[None]:
    """Put other tensors in the place of parameters and buffers, tied ones included, and put them back.

    Args:
        modules: Modules to look through.
        replacements: ``id`` of a present tensor to what stands in for it.
    """
    undo: list[tuple[dict, str, Tensor]] = []
    try:
        for module in modules.values():
            for part in module.modules():
                for table in (part._parameters, part._buffers):
                    for key, tensor in table.items():
                        if tensor is not None and id(tensor) in replacements:
                            undo.append((table, key, tensor))
        for table, key, tensor in undo:
            table[key] = replacements[id(tensor)]
        yield
    finally:
        for table, key, tensor in undo:
            table[key] = tensor


def module_tensors(modules: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of the given modules by their dotted names."""
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


class _FirstTrace(NamedTuple):
    nodes: Mapping[str, Any]
    written: list[str]


class _LastSite(Messenger):
    """Remembers the last site, to say where a program failed."""

    name = "the first site"

    def _process_message(self, msg: Any) -> None:
        if msg["name"] is not None:
            self.name = f"site {msg['name']!r}"


def _first_trace(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> _FirstTrace:
    watch = _LastSite()
    buffers = {
        name: (tensor, tensor._version, tensor.detach().clone())
        for name, tensor in module_tensors(modules_of(model, args, kwargs)).items()
        if not isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)
        and not isinstance(tensor, torch.nn.Parameter)
    }
    with (
        seeded(0),
        apart_from_handlers(),
        private_param_store(),
        data_defaults(args, kwargs),
        torch.no_grad(),
    ):
        try:
            with watch:
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        except NonlocalExit:
            raise
        except Exception as error:
            raise ValueError(
                f"the model failed at or after {watch.name} when run on "
                f"{describe_arguments(args, kwargs)}: {type(error).__name__}: {error}"
            ) from error
    written = [name for name, (tensor, version, _) in buffers.items() if tensor._version != version]
    with torch.no_grad():
        for name in written:
            buffers[name][0].copy_(buffers[name][2])
    return _FirstTrace(trace.nodes, written)


def describe_arguments(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Say the arguments' shapes in one line."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
        return type(value).__name__ if len(repr(value)) > 20 else repr(value)

    parts = [one(value) for value in args]
    parts += [f"{name}={one(value)}" for name, value in kwargs.items()]
    return f"arguments ({', '.join(parts)})"


def _refuse_written_buffers(modules: Mapping[str, torch.nn.Module], written: list[str]) -> None:
    if written:
        raise ValueError(
            f"the model writes module buffers {written}, so its log density would change from call to "
            "call; call .eval() on the module (batch norm), or keep such state outside of the model"
        )


def _is_subsample(site: Any) -> bool:
    return isinstance(site["fn"], _Subsample)


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _is_factor(site: Any) -> bool:
    return site["is_observed"] and type(site["fn"]).__name__ == "Unit"


def _is_discrete(site: Any) -> bool:
    support = getattr(site["fn"], "support", None)
    return site["fn"].has_enumerate_support or bool(getattr(support, "is_discrete", False))


def _refuse_unsupported_discrete(sites: Mapping[str, Any]) -> None:
    for name, site in sites.items():
        if not site["fn"].has_enumerate_support:
            raise ValueError(
                f"discrete site {name!r} has the distribution {_kind(site['fn'])}, whose support cannot "
                "be enumerated, so it cannot be summed out; marginalize it by hand or observe it"
            )
        if site["infer"].get("enumerate", "parallel") != "parallel":
            raise ValueError(
                f"discrete site {name!r} asks for {site['infer']['enumerate']!r} enumeration; only "
                "'parallel' is supported: remove the request or write 'parallel'"
            )


def _lay_out(
    sites: Mapping[str, Any], subsamples: Mapping[str, tuple[int, int]]
) -> tuple[Latent, ...]:
    latents: list[Latent] = []
    start = 0
    for name, site in sites.items():
        value, batch_ndim = site["value"], len(site["fn"].batch_shape)
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        for frame in site["cond_indep_stack"]:
            if frame.name in subsamples:
                raise ValueError(
                    f"latent site {name!r} is inside the subsampled plate {frame.name!r}: its value "
                    "would have to be kept for rows that are not drawn; use the full plate"
                )
        try:
            image = biject_to(site["fn"].support).inv(value)
        except NotImplementedError as error:
            raise ValueError(
                f"latent site {name!r} ({_kind(site['fn'])}) has the support {site['fn'].support}, onto "
                "which there is no bijection from the reals; reparametrize it"
            ) from error
        plates = sorted((batch_ndim + frame.dim, frame.name) for frame in frames)
        latents.append(
            Latent(
                name=name,
                shape=value.shape,
                unconstrained_shape=image.shape,
                plates=tuple(Plate(plate, axis, value.shape[axis]) for axis, plate in plates),
                support=site["fn"].support,
                dtype=value.dtype,
                start=start,
                stop=start + image.numel(),
            )
        )
        start += image.numel()
    return tuple(latents)


def _free_parameters(trace: Any, modules: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    known = {id(tensor) for tensor in module_tensors(modules).values()}
    free = {}
    for name, site in trace.nodes.items():
        if site["type"] != "param":
            continue
        value = site["value"]
        origin = value.unconstrained() if hasattr(value, "unconstrained") else value
        if id(origin) not in known:
            free[name] = value.detach()
    return free


def _kind(distribution: Any) -> str:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return type(distribution).__name__
