r"""How many components do heads share? A canonical polyadic decomposition with an inferred width.

.. math:: a_r \sim N(0, s_r^2 I), \quad b_r \sim N(0, s_r^2 I), \quad m_r \sim N(0, s_r^2 I), \qquad
    W_{Q,h}^\top W_{K,h} \sim N\Bigl(\sum_r m_{rh}\, a_r b_r^\top,\; \sigma^2\Bigr)

The products of a trained layer's heads are known without noise, so :math:`\sigma` is no noise but a
tolerance, and fixed: were it learned, it would fall to zero, and all components would be needed.
Products are taken in units of their root mean square, so that a tolerance of .1 is a tenth of it.
A mode of the density may leave many more components than a law that has a width of its own, so that
MAP is no sure way to a width.

Source:
    The decomposition: Cordonnier, Loukas and Jaggi (2020), arXiv:2006.16362; the model is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayesattn.argument_checks import check_type
from bayesattn.factorization import factorize
from bayesattn.models.checks import check_settings
from bayesattn.models.component_laws import SIDES, MeanFieldComponents
from bayesattn.models.component_scales import AutomaticRelevance, ComponentScales
from bayesattn.models.component_summaries import COMPONENT_DIMS, note_components, note_logits
from bayesattn.models.head_products import scaled_products

__all__ = ["SharedComponents"]

# Parameters of laws by name.
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class SharedComponents:
    """A Pyro program: heads' products from components that they share, each with a scale.

    Sites: in plate ``component`` those of the scales, ``query_component``, ``key_component`` and
    ``mixing``, one row a component; the factor ``products``. Components come in no order and no
    signs, so look at what does not hang on these, the deterministic sites: ``energy`` of each
    component, sorted; ``width``, how many have more than ``share`` of the largest energy;
    ``relative_error``; and ``logits`` of tokens, if given.

    With ``AutomaticRelevance`` the program has the closed forms of
    :class:`bayesattn.inference.CoordinateAscent`.

    Attributes:
        num_components: Most components; a fifth more than are thought to be needed. Where the
            width comes out as large, more are needed, or more steps.
        scales: Prior of the scales.
        tolerance: Standard deviation of each entry, in units of the products' root mean square.
        share: Of the largest energy, above which a component counts.
    """

    num_components: int
    scales: ComponentScales = field(default_factory=AutomaticRelevance)
    tolerance: int | float = 0.1
    share: int | float = 0.01

    def __post_init__(self) -> None:
        check_type("scales", self.scales, ComponentScales)
        check_settings(self)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the last axes of each site and argument, for ArviZ."""
        return {
            **COMPONENT_DIMS,
            "query_component": ["component", "query_feature"],
            "key_component": ["component", "key_feature"],
            "mixing": ["component", "head"],
        }

    def __call__(
        self,
        query_weight: Float[Tensor, "head dim query_feature"],
        key_weight: Float[Tensor, "head dim key_feature"],
        query_tokens: Float[Tensor, "query query_feature"] | None = None,
        key_tokens: Float[Tensor, "key key_feature"] | None = None,
    ) -> None:
        """Run the program.

        Args:
            query_weight: Of a layer's queries.
            key_weight: Of its keys, as wide.
            query_tokens: What asks, for ``logits``; with ``key_tokens`` or not at all.
            key_tokens: What is asked.

        Raises:
            ValueError: If the weights are not of the same heads and widths.
        """
        products = scaled_products(query_weight, key_weight)
        plate = pyro.plate("component", self.num_components)
        scale = self.scales.sample(plate)
        sizes = (query_weight.shape[-1], key_weight.shape[-1], query_weight.shape[0])
        with plate:
            query, key, mixing = (
                pyro.sample(name, _rows(scale, size))
                for name, size in zip(SIDES, sizes, strict=True)
            )
        gram = (query @ query.mT) * (key @ key.mT) * (mixing @ mixing.mT)
        explained = 2 * (mixing * products.inner_products(query, key)).sum() - gram.sum()
        pyro.factor("products", products.log_likelihood(explained, self.tolerance))
        energy = query.norm(dim=-1) * key.norm(dim=-1) * mixing.norm(dim=-1)
        note_components(products, energy, explained, self.share)
        note_logits(products, (query, key, mixing), query_tokens, key_tokens)

    def initial_state(self, query_weight: Tensor, key_weight: Tensor, *_: Tensor) -> dict:
        """Values of all sites from each head's singular vectors, under precisions of one.

        For ``init`` of any routine. The sides of a component are equally long.

        Raises:
            ValueError: If scales have no precisions.
        """
        self._check_scales()
        products = scaled_products(query_weight, key_weight)
        found = factorize(
            products.query, products.key, self.num_components, start="heads", num_iterations=0
        )
        rows = (found.query_weight, found.key_weight, found.mixing.mT)
        norms = [row.norm(dim=-1) for row in rows]
        length = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
        sides = {
            name: row * (length / torch.where(norm > 0, norm, 1.0))[:, None]
            for name, row, norm in zip(SIDES, rows, norms, strict=True)
        }
        return {"precision": torch.ones_like(length), **sides}

    def law_around(self, values: State, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """State of narrow laws around given values of all sites."""
        return self._mean_field(*args, **kwargs).around(values)

    def laws(
        self, state: State, *args: Tensor, **kwargs: Tensor
    ) -> dict[str, TorchDistributionMixin]:
        """Law of each site, the others being independent."""
        return self._mean_field(*args, **kwargs).laws(state)

    def elbo(self, state: State, *args: Tensor, **kwargs: Tensor) -> Float[Tensor, ""]:
        """Evidence lower bound of the laws of a state, in nats."""
        return self._mean_field(*args, **kwargs).elbo(state)

    def coordinate_step(self, state: State, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Renew all laws, each given the others."""
        return self._mean_field(*args, **kwargs).renewed(state)

    def _mean_field(
        self, query_weight: Tensor, key_weight: Tensor, *_: Tensor, **_tokens: Tensor
    ) -> MeanFieldComponents:
        # In double precision: norms of all products are taken from one another.
        products = scaled_products(query_weight.double(), key_weight.double())
        return MeanFieldComponents(products, self._check_scales(), self.tolerance)

    def _check_scales(self) -> AutomaticRelevance:
        if not isinstance(self.scales, AutomaticRelevance):
            raise ValueError(
                "closed forms need scales=AutomaticRelevance(), whose precisions have them, got "
                f"{self.scales}; SVI, SVGD and NUTS take any"
            )
        return self.scales


def _rows(scale: Float[Tensor, " component"], size: int) -> TorchDistributionMixin:
    scales = scale[..., None].expand(*scale.shape, size)
    return dist.Normal(torch.zeros_like(scales), scales).to_event(1)
