"""Parameters that a program or a guide learns, kept apart from those of the user.

What is trained are copies: in the place of module tensors while a run lasts, and in a private
store.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.module_state import module_tensors, substituted_tensors
from bayesattn.inference.quiet import data_defaults
from bayesattn.inference.reach import modules_of
from bayesattn.inference.running import private_param_store, seeded

__all__ = [
    "copied_guide",
    "learned_names",
    "learned_values",
    "private_parameters",
    "warn_of_held_parameters",
]


def learned_names(density: LogDensity) -> list[str]:
    """Names of the parameters that the program declares and that take gradients."""
    with seeded(0, density.device), private_param_store():
        return list(_declared(density))


def learned_values(density: LogDensity) -> dict[str, Tensor]:
    """Present values of the parameters that the program declares, on their own supports."""
    return {name: value.detach().clone() for name, value in _declared(density).items()}


def warn_of_held_parameters(density: LogDensity, method: str) -> None:
    """Warn of parameters that the program declares to be learned, where a routine learns none."""
    modules = modules_of(density.model, density.args, density.kwargs)
    tensors = (*density.program.parameters.values(), *module_tensors(modules).values())
    # Without such tensors there is no need of another run to know which of them it declares.
    held = learned_names(density) if tensors else []
    if held:
        warnings.warn(
            f"{method} holds the program's parameters {held} fixed at their present values; SVI "
            "learns them, and pyro.sample makes them sites",
            UserWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def private_parameters(density: LogDensity, guide: Any) -> Iterator[None]:
    """Let copies be trained, of module tensors and of Pyro's parameters, and forget them after."""
    modules = modules_of(density.model, density.args, density.kwargs)
    if callable(guide) and not isinstance(guide, torch.nn.Module):
        for name, module in modules_of(guide, (), {}).items():
            modules[f"guide {name}"] = module
    trained = {
        id(tensor): torch.nn.Parameter(tensor.detach().clone())
        for tensor in module_tensors(modules).values()
        if tensor.requires_grad
    }
    # Parameters of a guide that was trained before must not be found by one of the same name.
    store = pyro.get_param_store().get_state()
    names = [name for name in density.program.parameters if name in store["params"]]
    state = {
        "params": {name: store["params"][name].detach().clone().requires_grad_() for name in names},
        "constraints": {name: store["constraints"][name] for name in names},
    }
    with private_param_store(state), substituted_tensors(modules, trained):
        yield


def copied_guide(guide: Any, density: LogDensity) -> Any:
    """Copy a guide that is a module, so that every run begins from the one given.

    Modules that it shares with the program stay shared.

    Raises:
        ValueError: If it cannot be copied.
    """
    if not isinstance(guide, torch.nn.Module):
        return guide
    shared = modules_of(density.model, density.args, density.kwargs).values()
    memo: dict[int, Any] = {id(part): part for module in shared for part in module.modules()}
    # Copying an autoguide makes it forget its model, the original too.
    programs = [(part, part._model, part.master) for part in _autoguides(guide)]
    try:
        copied = copy.deepcopy(guide, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the guide {type(guide).__name__} cannot be copied, and every run begins with a copy: "
            f"{error}"
        ) from error
    finally:
        for part, model, master in programs:
            part._model, part.master = model, master
    for part, (_, model, _) in zip(_autoguides(copied), programs, strict=True):
        part._model = model
    return copied


def _autoguides(guide: torch.nn.Module) -> list[Any]:
    return [part for part in guide.modules() if isinstance(part, AutoGuide)]


def _declared(density: LogDensity) -> dict[str, Tensor]:
    with (
        poutine.block(),
        data_defaults(density.args, density.kwargs),
        warnings.catch_warnings(),
        poutine.trace(param_only=True) as trace,
    ):
        # Frozen modules are meant to be so.
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        density.model(*density.args, **density.kwargs)
    values: dict[str, Any] = {name: node["value"] for name, node in trace.trace.nodes.items()}
    return {n: value for n, value in values.items() if value.unconstrained().requires_grad}
