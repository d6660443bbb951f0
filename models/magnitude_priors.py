r"""A prior of what a key weighs by itself: half a squared power norm over a temperature.

.. math:: m_h(x) = \frac{c_p \lVert x \rVert_{p_h}^2}{2 \tau_h \sqrt d}, \qquad
    \log(p_h - 1) \sim N(0, \sigma_p^2), \quad \log \tau_h \sim N(0, \sigma_\tau^2)

Source:
    Song et al. (2021), Implicit kernel attention, arXiv:2006.06147, for the magnitude; priors are
    ours.
"""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from jaxtyping import Float
from torch import Tensor

from bayesattn.logits.magnitudes import scaled_squared_norm
from bayesattn.models.checks import check_settings

__all__ = ["MagnitudePrior"]


@dataclass(frozen=True)
class MagnitudePrior:
    """Magnitudes of keys, whose medians are those of the scaled dot product.

    Sites, in plate ``head``: ``temperature`` and ``power_excess``. Deterministic: ``power``, p.

    Attributes:
        temperature_spread: Standard deviation of the temperature's logarithm.
        power_spread: Standard deviation of the logarithm of p - 1.
    """

    temperature_spread: int | float = 1.0
    power_spread: int | float = 0.5

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the axes of its sites, for ArviZ."""
        return {name: ["head"] for name in ("temperature", "power_excess", "power")}

    def sample(
        self, heads: pyro.plate, keys: Float[Tensor, "*batch key dim"]
    ) -> Float[Tensor, "*batch head key"]:
        """Sample magnitudes within a Pyro program.

        Those of queries would not matter to a softmax over keys.

        Args:
            heads: Plate of the heads.
            keys: The same for all heads.
        """
        zero = keys.new_zeros(())
        with heads:
            temperature = pyro.sample(
                "temperature", dist.LogNormal(zero, float(self.temperature_spread))
            )
            excess = pyro.sample("power_excess", dist.LogNormal(zero, float(self.power_spread)))
            pyro.deterministic("power", 1 + excess)
        squared = scaled_squared_norm(keys[..., None, :, :], 1 + excess[:, None])
        return squared / (2 * temperature[:, None] * keys.shape[-1] ** 0.5)
