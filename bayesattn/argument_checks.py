"""Checks of plain arguments; each says the name, what was expected, and what came."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

__all__ = [
    "check_choice",
    "check_count",
    "check_not_negative",
    "check_numbers",
    "check_positive",
    "check_type",
]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number.

    Raises:
        ValueError: If it is none, or below ``least``.
    """
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or whole < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
    return whole


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a positive number.

    Raises:
        ValueError: With the name and what came.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is not one of some words.

    Raises:
        ValueError: With the name, the words and what came.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    """Refuse what is no finite number, or negative.

    Raises:
        ValueError: With the name and what came.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be a number, not negative, got {value!r}")


def check_numbers(name: str, values: Any) -> tuple[float, ...]:
    """Return finite numbers of a sequence, such as a list, an array or a tensor of one axis.

    Raises:
        ValueError: If it is none, is empty, or has others among them.
    """
    try:
        numbers_in = tuple(float(value) for value in values)
    except (TypeError, ValueError, RuntimeError):
        numbers_in = ()
    if not numbers_in or not all(map(math.isfinite, numbers_in)):
        raise ValueError(f"{name} must be a sequence of finite numbers, got {values!r}")
    return numbers_in


def check_type(name: str, value: Any, *types: type) -> None:
    """Refuse what is of none of some types, a class in place of an object too.

    Raises:
        TypeError: With the name, the types and what came.
    """
    if not isinstance(value, types):
        expected = " or ".join(cls.__name__ for cls in types)
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} must be of type {expected}, got {got}")
