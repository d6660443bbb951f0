"""Checks of plain arguments; each says the name, what was expected, and what came."""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

__all__ = ["check_choice", "check_count", "check_not_negative", "check_positive", "check_type"]


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


def check_type(name: str, value: Any, *types: type) -> None:
    """Refuse what is of none of some types, a class in place of an object too.

    Raises:
        TypeError: With the name, the types and what came.
    """
    if not isinstance(value, types):
        expected = " or ".join(cls.__name__ for cls in types)
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} must be of type {expected}, got {got}")
