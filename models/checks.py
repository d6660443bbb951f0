"""Checks of what the models are given; each says the argument, what was expected, and what came."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from bayesattn.argument_checks import check_count

__all__ = ["check_sentences", "check_settings"]

_NUMBERS = (float, int | float)


def check_settings(model: Any) -> None:
    """Check that all numbers among the fields of a dataclass are numbers, and positive.

    Raises:
        ValueError: If one is not.
    """
    for field in fields(model):
        value = getattr(model, field.name)
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{field.name} must be positive, got {value}")
        if field.type is int:
            check_count(field.name, value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.type in _NUMBERS and not is_number:
            raise ValueError(f"{field.name} must be a positive number, got {value!r}")


def check_sentences(
    tokens: Tensor, mask: Tensor | None, target: Tensor | None, *, prefix: str = ""
) -> None:
    """Check that tokens, mask and observations belong together.

    Args:
        tokens: Token vectors.
        mask: True where there is a token.
        target: Observations.
        prefix: Of the names in messages.

    Raises:
        ValueError: If shapes or types do not fit.
    """
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(
            f"{prefix}tokens must be floating point vectors of shape (sentence, token, dim), got "
            f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"{prefix}mask must be boolean, True where there is a token, of shape (sentence, "
            f"token) = {tuple(tokens.shape[:2])}, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if target is not None and target.shape != tokens.shape[:1]:
        raise ValueError(
            f"target must have one entry a sentence, shape {tuple(tokens.shape[:1])}, got shape "
            f"{tuple(target.shape)}"
        )
