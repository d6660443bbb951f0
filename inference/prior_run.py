"""The first run of a Pyro program: outside of any transform, at a draw from its prior.

It lets lazy modules find their shapes, shows the program's sites, and meets what the program must
not do before it is done: no data, module or outer variable is written.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import ImproperUniform
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import NonlocalExit
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from bayesattn.inference.arguments import describe_arguments, found_nan, named_arguments
from bayesattn.inference.bijections import bijection
from bayesattn.inference.handlers import first_line
from bayesattn.inference.module_state import module_tensors
from bayesattn.inference.quiet import apart_from_handlers, data_defaults
from bayesattn.inference.reach import Reach, modules_of
from bayesattn.inference.running import private_param_store, seeded
from bayesattn.inference.watches import OperationWatch, WriteRefusedError

__all__ = ["FirstRun", "first_run", "protected_tensors", "unwrapped"]


class FirstRun(NamedTuple):
    """What a program did.

    Attributes:
        nodes: Of the Pyro trace.
        parameters: ``pyro.param`` sites that belong to no module in reach: name to value.
    """

    nodes: Mapping[str, Any]
    parameters: dict[str, Tensor]


def first_run(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> FirstRun:
    """Run the program at a draw from its prior; where it fails at two, at the supports' origin."""
    failure: tuple[str, Exception] | None = None
    protected = protected_tensors(model, args, kwargs)
    for seed, at_origin in enumerate((False, False, True)):
        watch = _LastSite()
        with (
            seeded(seed),
            apart_from_handlers(),
            private_param_store(),
            data_defaults(args, kwargs),
            torch.no_grad(),
        ):
            try:
                with watch, _FeasibleValues(at_origin), OperationWatch(protected):
                    trace = poutine.trace(model).get_trace(*args, **kwargs)
                return FirstRun(trace.nodes, _free_parameters(trace, model, args, kwargs))
            except NonlocalExit:
                raise
            except WriteRefusedError as error:
                raise WriteRefusedError(first_line(error)) from error
            except Exception as error:
                failure = failure or (watch.name, error)
                # Distributions and factorizations may refuse a draw; nothing else is an accident.
                if not isinstance(error, ValueError | LinAlgError):
                    break
    assert failure is not None
    name, error = failure
    raise ValueError(
        f"the model failed at or after {name} when run on {describe_arguments(args, kwargs)}: "
        f"{type(error).__name__}: {first_line(error)}{found_nan(model, args, kwargs)}"
    ) from error


def protected_tensors(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that a program must not write, by what to call them: data, modules', variables."""
    reach = Reach(model, args, kwargs)
    # A module that waits for its shapes writes all that it holds once it knows them.
    held = ([*part._parameters.values(), *part._buffers.values()] for part in reach.parts)
    unmade = {id(t) for own in held if any(map(is_lazy, own)) for t in own}
    tensors = {
        f"the outer tensor {name!r}": tensor
        for name, tensor in reach.named_tensors().items()
        if id(tensor) not in unmade
    }
    for name, value in named_arguments(model, args, kwargs).items():
        for position, leaf in enumerate(tree_leaves(value)):
            if isinstance(leaf, Tensor):
                inside = "" if leaf is value else f", tensor {position}"
                tensors[f"the argument {name!r}{inside}"] = leaf
    return tensors


def unwrapped(distribution: Any) -> Any:
    """Return the distribution below reinterpreted axes, masks and expansions."""
    while isinstance(distribution, Independent | MaskedDistribution | ExpandedDistribution):
        distribution = distribution.base_dist
    return distribution


class _LastSite(Messenger):
    """Remembers the last site, to say where a program failed."""

    name = "the first site"

    def _process_message(self, msg: Any) -> None:
        if msg["name"] is not None:
            self.name = f"site {msg['name']!r}"


class _FeasibleValues(Messenger):
    """Gives latent sites, or only those that cannot be sampled, the origin of their support."""

    def __init__(self, everywhere: bool):
        super().__init__()
        self._everywhere = everywhere

    def _pyro_sample(self, msg: Any) -> None:
        distribution = unwrapped(msg["fn"])
        if msg["is_observed"] or isinstance(distribution, _Subsample):
            return
        if not self._everywhere and not isinstance(distribution, ImproperUniform):
            return
        if getattr(distribution, "has_enumerate_support", False):
            return
        transform = bijection(msg["fn"].support)
        shape = transform.inverse_shape(msg["fn"].batch_shape + msg["fn"].event_shape)
        msg["value"], msg["done"] = transform(torch.zeros(shape)), True


def _free_parameters(
    trace: Any, model: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Values of parameters that belong to no module, whole where a plate subsamples them."""
    known = {id(tensor) for tensor in module_tensors(modules_of(model, args, kwargs)).values()}
    store, free = pyro.get_param_store(), {}
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            value = store.get_param(name) if name in store else site["value"]
            origin = getattr(value, "unconstrained", lambda value=value: value)()
            if id(origin) not in known:
                free[name] = value.detach()
    return free
