"""What all routines share: a model that is checked, and its log density, whose graphs are kept."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayesattn.inference.compilation import Compile, resolved_mode
from bayesattn.inference.log_density import DensitySettings, LogDensity
from bayesattn.inference.posterior import Posterior

__all__ = ["DensityOptions", "Routine"]


class DensityOptions(TypedDict, total=False):
    """Options of :class:`bayesattn.inference.DensitySettings` that a routine passes on."""

    compile: Compile
    chunk_size: int | None
    stochastic: bool
    max_plate_nesting: int | None


class Routine:
    """A model with settings; subclasses add ``run``.

    Args:
        model: A Pyro program.
        **density: See :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: If the model is no callable or has a parameter that bears one of run's names.
        TypeError: If an option is unknown.
    """

    def __init__(self, model: Callable, **density: Any):
        if not callable(model):
            raise ValueError(f"model must be a Pyro program, that is callable, got {model!r}")
        unknown = sorted(density.keys() - DensityOptions.__annotations__.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no options {unknown}; its options are {self._options()}"
            )
        taken = _keyword_only(type(self).run)  # type: ignore[attr-defined]
        clash = sorted(taken.intersection(_open_parameters(model)))
        if clash:
            raise ValueError(
                f"the model's parameters {clash} bear names that {type(self).__name__}.run takes "
                "for itself; fix them with functools.partial, or rename them"
            )
        self.model = model
        self.density_settings = DensitySettings(**density)

    def log_density(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The model's log density given its arguments; graphs are shared between runs."""
        return self.log_density_for(None, args, kwargs)

    def log_density_for(
        self, num_steps: int | None, args: tuple, kwargs: Mapping[str, Any]
    ) -> LogDensity:
        """The same for a run of so many steps, which says what ``compile="auto"`` means."""
        tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        mode = resolved_mode(self.density_settings.compile, device, num_steps)
        settings = dataclasses.replace(self.density_settings, compile=mode)
        return LogDensity(self.model, *args, settings=settings, **kwargs)

    def posterior(
        self, density: LogDensity, draws: Mapping[str, Tensor], **fields: Any
    ) -> Posterior:
        """Draws of this routine as a posterior that knows its model and data."""
        return Posterior(
            draws,
            method=type(self).__name__,
            model=self.model,
            args=density.args,
            kwargs=density.kwargs,
            **fields,
        )

    def _options(self) -> list[str]:
        own = inspect.signature(type(self).__init__).parameters.values()
        named = [p.name for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
        return [*named, *DensityOptions.__annotations__]


def _keyword_only(function: Callable) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _open_parameters(model: Callable) -> set[str]:
    """Names of the parameters that are still to be given."""
    fixed: set[str] = set()
    given: tuple = ()
    if isinstance(model, functools.partial):
        model, fixed, given = model.func, set(model.keywords), model.args
    target = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return set(inspect.signature(functools.partial(target, *given)).parameters) - fixed
    except (TypeError, ValueError):
        return set()
