r"""Mixtures of Gaussian kernels of several widths, which reduce to fused attention.

.. math:: \kappa(\delta) = \sum_m \pi_m \exp\Big(-\tfrac12 \sum_d \lambda_{md} \delta_d^2\Big)

By Schoenberg's theorem mixtures of isotropic Gaussians are all the continuous radial kernels that
are positive definite in every dimension; here each coordinate may have rates of its own. Such a
kernel is positive too, and a softmax of its logits is one over M copies of each key.

Source:
    Schoenberg (1938), Metric spaces and completely monotone functions, Annals of Mathematics 39.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.argument_checks import check_count, check_not_negative
from bayesattn.kernels.distances import widened
from bayesattn.logits.kernel_logits import KernelLogits, start_rate
from bayesattn.logits.magnitudes import Magnitude
from bayesattn.logits.protocol import ReducedLogits

__all__ = ["SchoenbergMixture"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class SchoenbergMixture(KernelLogits):
    r"""A mixture of Gaussian kernels, the widths and shares of which each head learns.

    Softmax attention takes the fused route: of queries and their squares, in M copies of the keys.

    Args:
        num_heads: Each head has a kernel of its own.
        dim: Width of queries and keys.
        num_components: M.
        spread: At the start rates are the softmax's times evenly spaced powers of e, between
            :math:`e^{-s}` and :math:`e^{s}`; at zero all are the softmax's. Components part even
            then, for each learns at a pace of its own.
        magnitude: As for :class:`bayesattn.logits.KernelLogits`.

    Attributes:
        raw_rate: :math:`\log \lambda` less its start and over the component's pace, for each head,
            component and coordinate.
        log_share: Shares before their softmax, for each head and component.

    Raises:
        ValueError: If a size is not positive, or the spread is negative.
    """

    is_factored = True
    pace: Tensor
    start: Tensor

    def __init__(
        self,
        num_heads: int,
        dim: int,
        num_components: int = 4,
        *,
        spread: Number = 0.0,
        magnitude: Magnitude | bool = True,
    ):
        super().__init__(num_heads, dim, magnitude)
        self.num_components = check_count("num_components", num_components)
        check_not_negative("spread", spread)
        self.raw_rate = nn.Parameter(torch.empty(num_heads, num_components, dim))
        self.log_share = nn.Parameter(torch.empty(num_heads, num_components))
        steps = (torch.arange(num_components) + 0.5) / num_components
        self.register_buffer("pace", 0.5 + steps)
        self.register_buffer("start", spread * (2 * steps - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the scaled dot product, or about it."""
        nn.init.zeros_(self.raw_rate)
        nn.init.zeros_(self.log_share)

    @property
    def rate(self) -> Float[Tensor, "head component dim"]:
        r""":math:`\lambda`."""
        change = self.start[:, None] + self.pace[:, None] * self.raw_rate
        return start_rate(self.dim) * change.exp()

    @property
    def share(self) -> Float[Tensor, "head component"]:
        r""":math:`\pi`."""
        return self.log_share.softmax(-1)

    def reduce(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits:
        """Queries beside their squares, and a copy of the keys for each component."""
        reduced = self.reduce_over_keys(query, key)
        if self.magnitude is None:
            return reduced
        return reduced._replace(query_bias=self.magnitude(query).to(query.dtype))

    def reduce_over_keys(
        self, query: Float[Tensor, "*_batch query _dim"], key: Float[Tensor, "*_batch key _dim"]
    ) -> ReducedLogits:
        """Likewise, without the magnitudes of queries."""
        self.check_parts(query, key)
        reduced = self._reduced_kernel(query, key)
        if self.magnitude is None:
            return reduced
        assert reduced.key_bias is not None
        magnitudes = self.magnitude(key).repeat(*(1,) * (key.ndim - 2), self.num_components)
        return reduced._replace(key_bias=reduced.key_bias + magnitudes)

    def log_kernel(
        self, query: Float[Tensor, "*_batch query dim"], key: Float[Tensor, "*_batch key dim"]
    ) -> Float[Tensor, "*_batch query key"]:
        """Logarithm of the kernel of all pairs."""
        return self._reduced_kernel(query, key).values()

    def log_kernel_of_ends(
        self, query: Float[Tensor, "head edge dim"], key: Float[Tensor, "head edge dim"]
    ) -> Float[Tensor, "head edge"]:
        """Logarithm of the kernel of each edge's query and key."""
        parts = (query - key).square() @ self.rate.to(query.dtype).mT
        return (self.log_share.to(query.dtype).log_softmax(-1)[:, None] - parts / 2).logsumexp(-1)

    def _reduced_kernel(self, query: Tensor, key: Tensor) -> ReducedLogits:
        """Without magnitudes."""
        asking, asked = widened(query), widened(key)[..., None, :, :]
        rate = self.rate.to(asked.dtype)[..., None, :]
        linear = rate * asked
        bias = self.log_share.to(asked.dtype).log_softmax(-1)[..., None]
        bias = bias - (linear * asked).sum(-1) / 2
        copies = torch.cat([linear, (-rate / 2).expand_as(linear)], -1)
        return ReducedLogits(
            torch.cat([asking, asking.square()], -1).to(query.dtype),
            copies.flatten(-3, -2).to(key.dtype),
            key_bias=bias.flatten(-2),
            copies=self.num_components,
        )

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{super().extra_repr()}, num_components={self.num_components}"
