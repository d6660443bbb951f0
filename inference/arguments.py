"""A Pyro program's arguments: bound, by name, and in words."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Bound", "bound", "describe_arguments", "found_nan", "named_arguments"]


class Bound(NamedTuple):
    """A program with all its arguments.

    Attributes:
        model: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    model: Callable
    args: tuple
    kwargs: dict[str, Any]


def bound(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Bound:
    """Count what :func:`functools.partial` holds among the arguments, so that it is data too."""
    while type(model) is functools.partial:
        args, kwargs, model = (*model.args, *args), {**model.keywords, **kwargs}, model.func
    return Bound(model, args, dict(kwargs))


def named_arguments(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names of the program's parameters.

    Raises:
        ValueError: If the program does not take them, or a tensor among them is empty.
    """
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the model does not take the {describe_arguments(args, kwargs)}: {error}"
        ) from error
    named: dict[str, Any] = {}
    for name, value in parameters.arguments.items():
        kind = parameters.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}_{index}": entry for index, entry in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    for name, value in named.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor | np.ndarray) and 0 in leaf.shape:
                raise ValueError(f"argument {name!r} is empty: its shape is {tuple(leaf.shape)}")
    return named


def found_nan(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Say, to append to a message, which arguments have NaN; empty if none has."""
    suspects = [
        name
        for name, value in named_arguments(model, args, kwargs).items()
        if any(_has_nan(leaf) for leaf in tree_leaves(value))
    ]
    names = ", ".join(map(repr, suspects))
    return f"; NaN was found in the data: argument {names}" if suspects else ""


def describe_arguments(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Say the arguments' shapes in one line."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
        return type(value).__name__ if len(repr(value)) > 20 else repr(value)

    parts = [one(value) for value in args]
    parts += [f"{name}={one(value)}" for name, value in kwargs.items()]
    return f"arguments ({', '.join(parts)})"


def _has_nan(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
        return bool(np.isnan(leaf).any())
    return isinstance(leaf, Tensor) and bool(leaf.isnan().any())
