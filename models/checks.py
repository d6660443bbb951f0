"""Checks of what the attention models are given."""

from torch import Tensor

__all__ = ["check_batch"]


def check_batch(tokens: Tensor, mask: Tensor | None, target: Tensor | None) -> None:
    """Check that tokens, mask and observations belong together.

    Raises:
        ValueError: Saying the argument, what was expected, and what came.
    """
    if tokens.ndim != 3:
        raise ValueError(
            f"tokens must have shape (sentence, token, dim), got {tuple(tokens.shape)}"
        )
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"mask must have the shape (sentence, token) of tokens, {tuple(tokens.shape[:2])}, got "
            f"{tuple(mask.shape)}"
        )
    if target is not None and target.shape != tokens.shape[:1]:
        raise ValueError(
            f"target must have one entry a sentence, {tuple(tokens.shape[:1])}, got "
            f"{tuple(target.shape)}"
        )
