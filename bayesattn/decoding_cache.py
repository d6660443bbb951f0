r"""Keys and values of tokens seen so far, so that decoding one token projects that token alone.

With projections that heads share, the keys of all heads are one: a token then takes

.. math:: \tilde D + H + D_v \quad\text{rather than}\quad H d + D_v

numbers, a content feature for each head included.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.argument_checks import check_count

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """What one attention layer keeps of the tokens that it saw; each layer needs its own.

    Attributes:
        length: Number of tokens.
    """

    def __init__(self) -> None:
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    @property
    def num_floats(self) -> int:
        """Numbers that the tokens take; room for more is not counted."""
        return sum(part.numel() for part in (self.key, self.value) if part is not None)

    @property
    def key(self) -> Float[Tensor, "batch key_head key feature"] | None:
        """Keys of all tokens, or None before the first."""
        return None if self._key is None else self._key[..., : self.length, :]

    @property
    def value(self) -> Float[Tensor, "batch head key value_dim"] | None:
        """Values of all tokens, or None before the first."""
        return None if self._value is None else self._value[..., : self.length, :]

    def append(
        self,
        key: Float[Tensor, "batch key_head new feature"],
        value: Float[Tensor, "batch head new value_dim"],
    ) -> tuple[
        Float[Tensor, "batch key_head key feature"], Float[Tensor, "batch head key value_dim"]
    ]:
        """Add tokens, and return all.

        Room grows by doubling, where no gradient needs the older tensors.

        Raises:
            ValueError: If the tokens do not go with those that are there.
        """
        if self._key is not None and self._value is not None:
            self._check(key, value)
        before, self.length = self.length, self.length + key.shape[-2]
        self._key = _grown(self._key, key, before)
        self._value = _grown(self._value, value, before)
        return self._key[..., : self.length, :], self._value[..., : self.length, :]

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep some sequences of the batch, in this order, each as often as asked for: beams."""
        if self._key is not None and self._value is not None:
            self._key, self._value = self._key[rows], self._value[rows]

    def crop(self, length: int) -> None:
        """Forget all tokens from a place on, which is what a rejected draft needs.

        What comes next is written in their place, also in views taken before.

        Raises:
            ValueError: If there are not so many.
        """
        if check_count("length", length, least=0) > self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length
        if length == 0:
            # Another batch may come.
            self._key = self._value = None

    def _check(self, key: Tensor, value: Tensor) -> None:
        for name, old, new in (("key", self._key, key), ("value", self._value, value)):
            assert old is not None
            expected, got = _without_tokens(old), _without_tokens(new)
            if expected != got or old.dtype != new.dtype:
                raise ValueError(
                    f"cache: expected a {name} of batch, heads and width {expected} in "
                    f"{old.dtype}, got {got} in {new.dtype}; each layer needs a cache of its own"
                )


def _without_tokens(part: Tensor) -> tuple[int, ...]:
    return (*part.shape[:-2], part.shape[-1])


def _grown(room: Tensor | None, new: Tensor, length: int) -> Tensor:
    needed = length + new.shape[-2]
    if torch.is_grad_enabled() and (new.requires_grad or (room is not None and room.requires_grad)):
        return new if room is None else torch.cat([room[..., :length, :], new], -2)
    # What was made in inference mode cannot be written to outside of it.
    is_locked = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
    if room is None or room.shape[-2] < needed or room.requires_grad or is_locked:
        shape = (*new.shape[:-2], max(needed, 2 * length), new.shape[-1])
        larger = new.new_empty(shape)
        if room is not None:
            larger[..., :length, :] = room[..., :length, :]
        room = larger
    room[..., length:needed, :] = new
    return room
