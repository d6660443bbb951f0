"""Sentences as padded vectors with their masks, words and intents, sliced together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Inputs", "TextDataset"]

Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a model of sentences reads: ``model(*inputs)`` is ``model(tokens, mask)``.

    An index chooses sentences, in both tensors: ``model(*inputs[:5])``. An integer keeps the
    axis, as a slice of one.

    Attributes:
        tokens: Vector of each word, zero at the padding.
        mask: True where there is a word.
    """

    tokens: Float[Tensor, "sentence token dim"]
    mask: Bool[Tensor, "sentence token"]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.tokens, self.mask))

    def __getitem__(self, index: Index) -> "Inputs":
        rows = _rows(index, len(self.tokens))
        return Inputs(self.tokens[rows], self.mask[rows])


@dataclass(frozen=True, eq=False)
class TextDataset:
    """Sentences with one intent each; an index, a slice or a list of them gives a smaller one.

    Attributes:
        tokens: Vector of each word, zero at the padding.
        mask: True where there is a word.
        intent: Number of each sentence's intent in ``intent_names``.
        words: The words of each sentence, without padding.
        intent_names: Name of each class.
    """

    tokens: Float[Tensor, "sentence token dim"]
    mask: Bool[Tensor, "sentence token"]
    intent: Int[Tensor, " sentence"]
    words: tuple[tuple[str, ...], ...]
    intent_names: tuple[str, ...]

    @property
    def inputs(self) -> Inputs:
        """Tokens and mask together."""
        return Inputs(self.tokens, self.mask)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "TextDataset":
        """Move every tensor to a device, and the vectors to a dtype."""
        return replace(
            self,
            tokens=self.tokens.to(device=device, dtype=dtype),
            mask=self.mask.to(device=device),
            intent=self.intent.to(device=device),
        )

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: Index) -> "TextDataset":
        rows = _rows(index, len(self))
        chosen = torch.arange(len(self), device=self.intent.device)[rows]
        return replace(
            self,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            intent=self.intent[rows],
            words=tuple(self.words[row] for row in chosen.tolist()),
        )

    def __repr__(self) -> str:
        sentences, longest, dim = self.tokens.shape
        return (
            f"TextDataset({sentences} sentences, up to {longest} words, {dim}-dimensional vectors, "
            f"{len(self.intent_names)} intents)"
        )


def _rows(index: Index, size: int) -> slice | Tensor:
    if isinstance(index, slice):
        return index
    if not isinstance(index, int):
        return torch.as_tensor(index)
    if not -size <= index < size:
        raise IndexError(f"index must be in [{-size}, {size}), got {index}")
    return slice(index % size, index % size + 1)
