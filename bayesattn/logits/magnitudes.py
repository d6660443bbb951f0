r"""The part of a logit that a query or a key has by itself: half its squared norm.

.. math:: m(x) = \frac{c_p \lVert x \rVert_p^2}{2 \sqrt d}, \qquad c_p = d^{1 - 2 / p}, \qquad
    \frac{q \cdot k}{\sqrt d} = -\frac{\lVert q - k \rVert_2^2}{2 \sqrt d} + m(q) + m(k)
    \text{ at } p = 2

Source:
    Song et al. (2021), arXiv:2006.06147; its code divides magnitudes by a power of the width that
    is not the distances', and lets the temperature change with p.
"""

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_count, check_positive, check_type
from bayesattn.kernels.distances import widened

__all__ = ["Magnitude", "own_magnitude", "scaled_squared_norm"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class Magnitude(nn.Module):
    r"""Half the squared power norm of a query or a key, over :math:`\sqrt d`.

    The factor c keeps the magnitude of a vector whose entries are all as large the same at any p,
    and so the temperature. A softmax over keys does not see the query's.

    Args:
        p: Of the norm, at least one.
        num_heads: Each head learns a p of its own above one, from the given one on; none is learned
            if None.

    Attributes:
        log_excess: :math:`\log(p - 1)` of each head, or None.

    Raises:
        ValueError: If p is no finite number, below one, or one where it is learned.

    Source:
        Song et al. (2021), arXiv:2006.06147.
    """

    def __init__(self, p: Number = 2.0, *, num_heads: int | None = None):
        super().__init__()
        check_positive("p", p)
        if p < 1 or (p == 1 and num_heads is not None):
            least = "at least one" if num_heads is None else "above one where it is learned"
            raise ValueError(f"p must be {least}, got {p}")
        self.num_heads, self.start = num_heads, float(p)
        self.log_excess: nn.Parameter | None = None
        if num_heads is not None:
            self.log_excess = nn.Parameter(torch.empty(check_count("num_heads", num_heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the given p."""
        if self.log_excess is not None:
            nn.init.constant_(self.log_excess, math.log(self.start - 1))

    @property
    def p(self) -> Float[Tensor, " head"] | float:
        """Of each head, or of all."""
        return self.start if self.log_excess is None else 1 + self.log_excess.exp()

    @property
    def is_euclidean(self) -> bool:
        """Whether p is two, and stays so."""
        return self.log_excess is None and self.start == 2

    def forward(
        self, part: Float[Tensor, "*_batch position _dim"]
    ) -> Float[Tensor, "*_batch position"]:
        """Magnitudes, in nats and in float32 or wider."""
        # Narrow types lose what two large numbers differ by.
        wide = widened(part)
        if self.is_euclidean:
            squared = wide.square().sum(-1)
        else:
            p = self.p.to(wide)[:, None] if isinstance(self.p, Tensor) else self.p
            squared = scaled_squared_norm(wide, p)
        return squared / (2 * part.shape[-1] ** 0.5)

    def excess(
        self, part: Float[Tensor, "*_batch position _dim"]
    ) -> Float[Tensor, "*_batch position"]:
        """By how much magnitudes exceed those at p = 2."""
        wide = widened(part)
        return self(part) - wide.square().sum(-1) / (2 * part.shape[-1] ** 0.5)

    def extra_repr(self) -> str:
        """The start, and the number of heads where they learn."""
        learned = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        return f"p={self.start}{learned}"


def own_magnitude(magnitude: Magnitude | bool, num_heads: int) -> Magnitude | None:
    """Copy a magnitude for one layer's use; a Euclidean one if True, none if False.

    Raises:
        ValueError: If it is for other heads.
    """
    check_type("magnitude", magnitude, Magnitude, bool)
    if isinstance(magnitude, bool):
        return Magnitude() if magnitude else None
    if magnitude.num_heads not in (None, num_heads):
        raise ValueError(f"magnitude: expected num_heads={num_heads}, got {magnitude.num_heads}")
    return copy.deepcopy(magnitude)


def scaled_squared_norm(
    part: Float[Tensor, "*_batch position _dim"], p: Float[Tensor, "head 1"] | float
) -> Float[Tensor, "*_batch position"]:
    """Squared power norms, as large as the Euclidean ones of vectors of equal entries."""
    largest = part.detach().abs().amax(-1, keepdim=True)
    # A multiple of the norm is that of the norm: entries are at most one, and powers stay in range.
    ratios = part.abs() / torch.where(largest == 0, 1.0, largest)
    if isinstance(p, Tensor):
        # Powers of a tensor have costly gradients; nothing is below the least number but zeros.
        logarithms = ratios.clamp_min(torch.finfo(part.dtype).tiny).log()
        powers = (p[..., None] * logarithms).exp()
    else:
        powers = ratios.pow(p)
    mean = powers.mean(-1)
    # The mean is at least one over the width, but of zeros.
    mean = mean.clamp_min(0.5 / part.shape[-1])
    return part.shape[-1] * largest[..., 0].square() * (mean.log() * 2 / p).exp()
