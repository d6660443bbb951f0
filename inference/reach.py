"""What a Pyro program can reach besides its arguments: modules, and variables that its code names.

A recorded graph takes the modules' tensors as inputs and bakes in the rest, so that the rest, seen
through :meth:`Reach.observe`, belongs to the key that the graph is kept under.
"""

import contextlib
import dis
import functools
import inspect
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayesattn.inference.fingerprints import BY_VALUE, fingerprint
from bayesattn.inference.module_state import module_tensors, places, replaced

__all__ = ["Reach", "modules_of"]

# How many steps from variable to variable are followed.
_DEEPEST = 4
_LONGEST_CONTAINER = 2**12
_FOREIGN = frozenset({"torch", "pyro", "numpy", "scipy"}) | sys.stdlib_module_names - {"__main__"}
# What torch and Pyro keep in a module's dictionary for themselves.
_INTERNAL = frozenset(vars(torch.nn.Module())) | {"_pyro_context", "_pyro_name"}
_MISSING = object()


class Reach:
    """Modules and variables that a program can reach, and what is now in them.

    Helper functions are followed where they belong to the program's own package.

    Args:
        model: A Pyro program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        unwatched: Variables that are not looked at.

    Attributes:
        modules: The modules by name.
        parts: All their submodules, themselves included.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        unwatched: frozenset["Variable"] = frozenset(),
    ):
        walk = _Walk(model, args, kwargs)
        self.modules = walk.modules
        self.parts = list(dict.fromkeys(p for m in self.modules.values() for p in m.modules()))
        self._unwatched = unwatched
        found = [*walk.variables, *(v for part in self.parts for v in _attributes(part))]
        self._variables = [variable for variable in found if variable not in unwatched]
        self._at_first = {variable: fingerprint(variable.value) for variable in self._variables}

    def changed_since(self, before: "Reach") -> frozenset["Variable"]:
        """Variables that are new, or hold something else, than at an earlier look."""
        now = self._at_first.items()
        return frozenset(v for v, seen in now if before._at_first.get(v, _MISSING) != seen)

    def renewed(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> "Reach":
        """Look again from the start, leaving out the same variables."""
        return Reach(model, args, kwargs, self._unwatched)

    def observe(self) -> tuple[Hashable, ...]:
        """Say what the variables hold and which modules are where: equal if nothing changed."""
        seen: list[Hashable] = []
        for part in self.parts:
            seen += (part.training, *part._modules.values())
        for table, key in self._variables:
            value = table.get(key, _MISSING)
            kind = type(value)
            seen.append((kind, value) if kind in BY_VALUE else fingerprint(value))
        return tuple(seen)

    def tensors(self) -> list[Tensor]:
        """Present parameters and buffers of all parts, each as often as it is in use."""
        found: list[Tensor | None] = []
        for part in self.parts:
            found += part._parameters.values()
            found += part._buffers.values()
        return [tensor for tensor in found if tensor is not None]

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors in reach, of modules and in variables, by name."""
        held = {variable.key: variable.value for variable in self._variables}
        return {name: t for name, t in held.items() if isinstance(t, Tensor)} | module_tensors(
            self.modules
        )

    def substituted(self, stand_ins: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Put other tensors in the places of :meth:`tensors`, and put those back."""
        return replaced(list(zip(places(self.parts), stand_ins, strict=True)))


class Variable(NamedTuple):
    """A place that holds a value: a global name, a closure's cell, or an attribute.

    Attributes:
        table: What is asked for the value by its key.
        key: Its name.
    """

    table: Any
    key: str

    @property
    def value(self) -> Any:
        """What it holds now."""
        return self.table.get(self.key, _MISSING)

    def __hash__(self) -> int:
        return hash((id(self.table), self.key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variable) and other.table is self.table and other.key == self.key


def modules_of(
    model: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, torch.nn.Module]:
    """Modules that a program can reach: itself, what it closes over, its globals and arguments."""
    return _Walk(model, args, kwargs).modules


class _Cell:
    """A closure's cell, asked like a table."""

    def __init__(self, cell: CellType):
        self._cell = cell

    def get(self, key: str, default: Any) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return default


class _Walk:
    """Finds modules and variables, following functions and objects of the program's own package."""

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]):
        self.modules: dict[str, torch.nn.Module] = {}
        self.variables: dict[Variable, None] = {}
        self._cells: dict[int, _Cell] = {}
        self._met: dict[int, Any] = {}
        self._home = _packages(model) - _FOREIGN
        self._visit("arguments", (args, dict(kwargs)), 0)
        self._visit("model", model, 0)

    def _visit(self, name: str, value: Any, depth: int) -> None:
        if id(value) in self._met or depth > _DEEPEST or isinstance(value, Tensor | ModuleType):
            return
        self._met[id(value)] = value
        if isinstance(value, torch.nn.Module):
            taken = name in self.modules
            self.modules[f"{name}_{len(self.modules)}" if taken else name] = value
            for part in value.modules():
                self._visit_class(type(part), depth)
        elif isinstance(value, dict | list | tuple | set | frozenset):
            if len(value) <= _LONGEST_CONTAINER:
                for entry in value.values() if isinstance(value, dict) else value:
                    self._visit(name, entry, depth)
        elif isinstance(value, functools.partial):
            self._visit(name, (value.func, value.args, value.keywords), depth)
        elif isinstance(value, MethodType):
            self._visit(name, value.__self__, depth)
            self._visit(name, value.__func__, depth)
        elif isinstance(value, FunctionType):
            self._visit_function(value, depth)
        elif not isinstance(value, type):
            self._visit_object(name, value, depth)

    def _visit_function(self, function: Any, depth: int) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._visit(function.__name__, wrapped, depth)
        if _package(function) not in self._home:
            return
        code = function.__code__
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._note(self._cells.setdefault(id(cell), _Cell(cell)), key, depth)
        for key in sorted(_global_names(code)):
            if not isinstance(function.__globals__.get(key), ModuleType | None):
                self._note(function.__globals__, key, depth)
        self._visit(function.__name__, (function.__defaults__, function.__kwdefaults__), depth)

    def _visit_object(self, name: str, value: Any, depth: int) -> None:
        is_given = depth == 0 or name == "arguments" or isinstance(value, Messenger)
        if not is_given and _package(type(value)) not in self._home:
            return
        for key in list(getattr(value, "__dict__", ())):
            self._note(vars(value), key, depth)
        self._visit_class(type(value), depth)

    def _visit_class(self, kind: type, depth: int) -> None:
        for base in kind.__mro__:
            if _package(base) in self._home:
                for entry in vars(base).values():
                    function = getattr(entry, "__func__", getattr(entry, "fget", entry))
                    if isinstance(function, FunctionType):
                        self._visit(function.__name__, function, depth + 1)

    def _note(self, table: Any, key: str, depth: int) -> None:
        variable = Variable(table, key)
        self.variables[variable] = None
        self._visit(key, variable.value, depth + 1)


def _attributes(part: torch.nn.Module) -> list[Variable]:
    return [Variable(vars(part), key) for key in vars(part) if key not in _INTERNAL]


def _packages(model: Any) -> set[str]:
    """Packages of a program, below the handlers and partial arguments that wrap it."""
    if isinstance(model, functools.partial):
        wrapped = [model.func, *(entry for entry in model.args if callable(entry))]
        return set().union(*(_packages(entry) for entry in wrapped))
    if isinstance(model, MethodType):
        return _packages(model.__func__) | {_package(type(model.__self__))}
    if inspect.isroutine(model):
        return {_package(inspect.unwrap(model)), _package(model)}
    return {_package(type(model))}


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").split(".")[0]


def _global_names(code: CodeType) -> set[str]:
    """Names that a function and the functions inside of it look up among the globals."""
    instructions = dis.get_instructions(code)
    names = {str(i.argval) for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names.union(*(_global_names(constant) for constant in inner))
