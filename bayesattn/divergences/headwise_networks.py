r"""Small networks that see each head's points through weights of that head.

.. math:: \mathrm{hw}(x) = \tau \odot \mathrm{ReLU}(\Phi_h x) + (1 - \tau) \odot x, \qquad
    \tau = \sigma(\Phi_\tau x)

A network that all heads share can only tell the mixture of all heads' queries from the mixture of
their keys: heads may exchange roles unseen. Here each head has its own.

Source:
    Srivastava et al. (2015), Highway networks, arXiv:1505.00387; with attention: Zhang et al.
    (2021), Alignment attention, arXiv:2110.12567, who share it among heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

__all__ = ["HeadwiseLinear", "HeadwiseMLP", "Highway", "call_reversed"]


class HeadwiseLinear(nn.Module):
    """An affine map for each head, initialized as :class:`torch.nn.Linear` is.

    Args:
        num_heads: Number of heads.
        in_features: Width of the points.
        out_features: Width of what they become.
    """

    def __init__(self, num_heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5
        shape = (num_heads, in_features, out_features)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_heads, 1, out_features).uniform_(-bound, bound))

    def forward(
        self, points: Float[Tensor, "*batch head point in_features"]
    ) -> Float[Tensor, "*batch head point out_features"]:
        """Map each head's points."""
        num_heads, width, _ = self.weight.shape
        if points.ndim < 3 or points.shape[-1] != width or points.shape[-3] not in (1, num_heads):
            raise ValueError(
                f"points: expected '*batch {num_heads} point {width}', got {tuple(points.shape)}"
            )
        batch = points.shape[:-3]
        # Each head's points in one run: what a map gives is so already for the next.
        rows = points.expand(*batch, num_heads, -1, -1).movedim(-3, 0)
        weight, bias = self.weight.to(points), self.bias.to(points)
        mapped = torch.baddbmm(bias, rows.reshape(num_heads, -1, width), weight)
        return mapped.unflatten(1, rows.shape[1:-1]).movedim(0, -3)


class HeadwiseMLP(nn.Sequential):
    """Two layers with a leaky ReLU between them.

    Args:
        num_heads: Number of heads.
        in_features: Width of the points.
        hidden_features: Width between the layers.
        out_features: Width of what comes out.
    """

    def __init__(
        self, num_heads: int, in_features: int, hidden_features: int, out_features: int
    ) -> None:
        super().__init__(
            HeadwiseLinear(num_heads, in_features, hidden_features),
            nn.LeakyReLU(0.2),
            HeadwiseLinear(num_heads, hidden_features, out_features),
        )


class Highway(nn.Module):
    """A layer that lets part of its input pass, as much as it finds right.

    Args:
        num_heads: Number of heads.
        dim: Width of the points.
    """

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        self.change = HeadwiseLinear(num_heads, dim, dim)
        self.gate = HeadwiseLinear(num_heads, dim, dim)

    def forward(
        self, points: Float[Tensor, "*batch head point dim"]
    ) -> Float[Tensor, "*batch head point dim"]:
        """Mix points with what they become."""
        gate = torch.sigmoid(self.gate(points))
        return torch.lerp(points, F.relu(self.change(points)), gate)


def call_reversed(module: nn.Module, points: Tensor) -> Tensor:
    """Call a module so that its parameters ascend where everything else descends.

    Gradients change sign at the parameters, not at the points: an adversary maximizes what the
    network that makes the points minimizes, both by one backward pass.
    """
    # The value itself, without rounding, and minus its gradient.
    turned = {name: 2 * value.detach() - value for name, value in module.named_parameters()}
    return functional_call(module, turned, (points,))
