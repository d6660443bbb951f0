r"""A kernel for GPyTorch whose spectral density is a mixture of normal distributions.

.. math:: k(x, y) = \sum_m w_m \, e^{-\lVert s_m \odot (x - y) \rVert^2 / 2}
    \cos\bigl(2 \pi \, f_m \cdot (x - y)\bigr)

Source:
    Wilson and Adams (2013), arXiv:1302.4245. GPyTorch's own takes the product of cosines over
    features, and minutes for hundreds of points with several of them.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from examples.reproduce.regression_tasks import Points

__all__ = ["import_gpytorch", "spectral_mixture", "strongest_frequencies"]

_NUM_CANDIDATES = 2000


def spectral_mixture(training: Points, num_components: int) -> nn.Module:
    """Build a kernel that starts with an RBF kernel and the strongest frequencies of the data.

    Args:
        training: Where frequencies are looked for.
        num_components: Of the mixture, the first of which starts at frequency zero.
    """
    gpytorch = import_gpytorch()

    class SpectralMixture(gpytorch.kernels.Kernel):
        def __init__(self) -> None:
            super().__init__()
            num_features = training.x.shape[1]
            found = strongest_frequencies(training, num_components - 1).double()
            start = F.pad(found, (0, 0, 1, 0))
            self.frequency = nn.Parameter(start)
            self.log_weight = nn.Parameter(start.new_full((num_components,), -math.log(4)))
            self.log_pace = nn.Parameter(start.new_zeros(num_components, num_features))

        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **options: Any) -> Tensor:
            del options
            weight = self.log_weight.exp()
            if diag:
                return weight.sum().expand(x1.shape[:-1])
            pace = self.log_pace.exp()[:, None]
            squared = _squared_distances(x1 * pace, x2 * pace)
            angles = [2 * math.pi * x @ self.frequency.mT for x in (x1, x2)]
            first, second = (angle.mT[..., None] for angle in angles)
            waves = first.cos() * second.mT.cos() + first.sin() * second.mT.sin()
            return (weight[:, None, None] * (-squared / 2).exp() * waves).sum(-3)

    return SpectralMixture()


def strongest_frequencies(training: Points, number: int) -> Float[Tensor, "frequency feature"]:
    """Choose, of random frequencies, one after the other, whose waves the targets follow most.

    A line and the waves that are chosen are taken out of the targets before the next choice.
    Candidates reach, in each feature, from a thousandth of what its grid can tell apart to all.
    """
    x, design = training.x, F.pad(training.x, (0, 1), value=1.0)
    gaps = torch.stack([column.unique().diff().median() for column in x.T])
    reach = 10 ** (-3 * torch.rand(_NUM_CANDIDATES, 1))
    candidates = reach * (2 * torch.rand(_NUM_CANDIDATES, x.shape[1]) - 1) / (2 * gaps)
    angles = 2 * math.pi * candidates @ x.T
    chosen: list[int] = []
    for _ in range(number):
        solved = torch.linalg.lstsq(design, training.y[:, None]).solution
        rest = training.y - (design @ solved)[:, 0]
        power = (angles.cos() @ rest).square() + (angles.sin() @ rest).square()
        chosen.append(int(power.argmax()))
        waves = torch.stack([angles[chosen[-1]].cos(), angles[chosen[-1]].sin()], -1)
        design = torch.cat([design, waves], -1)
    return candidates[chosen]


def import_gpytorch() -> Any:
    """Import GPyTorch, which takes long, when it is used."""
    # What it is built on calls torch.jit, which PyTorch deprecates, when it is imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import gpytorch

    return gpytorch


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
    return (squares - 2 * x @ y.mT).clamp(min=0.0)
