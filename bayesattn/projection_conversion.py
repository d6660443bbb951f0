r"""From projections of each head to projections that heads share, and back, layer by layer.

.. math:: W_{Q,h}^\top W_{K,h} \approx W_Q^\top \operatorname{diag}(m_h)\, W_K, \qquad
    v_h = W_{K,h}^\top b_{Q,h}

Source:
    Cordonnier, Loukas and Jaggi (2020), arXiv:2006.16362, section 4.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesattn.alternating_least_squares import Factors
from bayesattn.argument_checks import check_choice, check_count, check_not_negative, check_type
from bayesattn.conversion_report import LayerCost, LayerReport
from bayesattn.factor_starts import START_NAMES
from bayesattn.factorization import Factorization, factorize, product_errors
from bayesattn.heads_with_content import heads_apart
from bayesattn.networks import AttentionLayer, InputMoments
from bayesattn.networks.projection_exchange import Exchange, HeadProjections, read_projections
from bayesattn.shared_projections import Collaborative, SharedProjections
from bayesattn.width_choice import width_for_error

__all__ = ["CollaborativeFit", "Separate", "converted_projections"]

Number = float | int

# Errors are told to this part of themselves.
_TOLD = 0.01


@dataclass(frozen=True)
class CollaborativeFit:
    """How projections that heads share are found from those that each head has.

    Attributes:
        width: Number of shared components, of all layers or by their names.
        error: In place of a width: each layer gets the smallest found whose relative error is no
            larger.
        start: Where the factorization starts, see :func:`bayesattn.factorize`; or "fresh" for new
            parameters, to be trained or loaded.
        num_iterations: Sweeps of the factorization.
        seed: Of random starts.
        moments: Second moments of the layers' inputs, by their names, to weigh errors by; see
            :func:`bayesattn.networks.input_moments`.

    Raises:
        TypeError: If moments are no mapping.
        ValueError: If there is neither a width nor an error, or both, or a setting is none.
    """

    width: int | Mapping[str, int] | None = None
    error: Number | None = None
    start: str = "best"
    num_iterations: int = 100
    seed: int = 0
    moments: Mapping[str, InputMoments] | None = None

    def __post_init__(self) -> None:
        if (self.width is None) == (self.error is None):
            raise ValueError(
                f"expected a width or an error, got width={self.width}, error={self.error}"
            )
        if self.start == "fresh" and self.width is None:
            raise ValueError("start: 'fresh' needs a width, got none")
        widths = self.width if isinstance(self.width, Mapping) else {"": self.width}
        for name, width in widths.items():
            if width is not None:
                check_count(f"width of layer '{name}'" if name else "width", width)
        if self.error is not None:
            check_not_negative("error", self.error)
        check_choice("start", self.start, (*START_NAMES, "best", "fresh"))
        check_count("num_iterations", self.num_iterations, least=0)
        check_count("seed", self.seed, least=0)
        if self.moments is not None:
            check_type("moments", self.moments, Mapping)


@dataclass(frozen=True)
class Separate:
    """Each head has projections of its own again, as wide as before they were shared.

    This is exact or not as the heads' products, with their content vectors, have so low a rank; the
    report says at what error, content included.
    """


def converted_projections(
    layers: Mapping[str, AttentionLayer], choice: Collaborative | CollaborativeFit | Separate
) -> tuple[dict[str, nn.Module], dict[str, LayerReport]]:
    """Exchange the projections of layers, none if any is refused.

    Args:
        layers: By their names.
        choice: What they get.

    Returns:
        For each layer what stands in its place, itself or another module; and reports.

    Raises:
        TypeError: If the choice is none of these.
        ValueError: If a layer is refused (says which and why).
    """
    check_type("projections", choice, Collaborative, CollaborativeFit, Separate)
    sources = {name: _Source(layer) for name, layer in layers.items()}
    if isinstance(choice, Separate):
        made = {name: _separated(source) for name, source in sources.items()}
    else:
        fit = CollaborativeFit(choice.width) if isinstance(choice, Collaborative) else choice
        made = dict(_shared(sources, fit))
    modules, reports = {}, {}
    for name, (new, errors) in made.items():
        source = sources[name]
        before = source.cost()
        if isinstance(new, SharedProjections):
            modules[name] = source.exchange.share(source.module, new)
            after, width = _shared_cost(new, source.exchange), new.width
        else:
            modules[name] = source.exchange.separate(source.module, new)
            after, width = _cost(new, len(new.query_weight)), _width(new)
        reports[name] = LayerReport((source.width, width), *errors, before, after)
    return modules, reports


class _Source:
    """A layer whose projections are to be exchanged."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.name, self.module = layer.name, layer.module
        exchange = layer.kind.exchange
        obstacle = exchange if isinstance(exchange, str) else exchange.obstacle(layer.module)
        if isinstance(exchange, str) or obstacle:
            raise ValueError(
                f"layer '{layer.name}' ({type(layer.module).__name__}) cannot have its projections "
                f"exchanged: {obstacle}"
            )
        self.exchange: Exchange = exchange
        self.shared = exchange.shared(layer.module)
        self._layout = layer.layout
        self.heads = self._heads()

    @property
    def width(self) -> int:
        return _width(self.heads) if self.shared is None else self.shared.width

    @property
    def parameter(self) -> nn.Parameter:
        """One whose type, device and need of gradients the new ones take."""
        return self.module.get_parameter(self._layout["query"].weight.parameter)

    @property
    def num_packed(self) -> int:
        """How many projections PyTorch starts as one matrix."""
        return 3 if getattr(self.module, "_qkv_same_embed_dim", False) else 1

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        if self.shared is None:
            return self.exchange.scale(self.module)
        return float(self.shared.scale)

    def _heads(self) -> HeadProjections:
        if self.shared is None:
            return read_projections(self.module, self._layout)
        return HeadProjections(*(weight.detach() for weight in self.shared.head_weights()))

    def cost(self) -> LayerCost:
        if self.shared is not None:
            return _shared_cost(self.shared, self.exchange)
        return _cost(self.heads, self._layout["key"].weight.num_heads)

    def content(self, role: str) -> Tensor | None:
        """Content vectors of keys or queries, where they count."""
        if role == "query_content" and not self.exchange.mixes_queries(self.module):
            return None
        return getattr(self.heads if self.shared is None else self.shared, role)


def _shared(
    sources: Mapping[str, _Source], fit: CollaborativeFit
) -> Iterator[tuple[str, tuple[SharedProjections, tuple[float, float, Tensor]]]]:
    if isinstance(fit.width, Mapping):
        missing = [name for name in sources if name not in fit.width]
        if missing:
            raise ValueError(f"width: expected one for each layer, got none for {missing}")
        unknown = [name for name in fit.width if name not in sources]
        if unknown:
            raise ValueError(
                f"width: expected names among {', '.join(map(repr, sources))}, got {unknown}"
            )
    # Layers of one size are factorized as a batch.
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, source in sources.items():
        weights = source.heads[:2]
        width = fit.width[name] if isinstance(fit.width, Mapping) else fit.width
        key = (width, *(weight.shape for weight in weights), weights[0].device)
        groups.setdefault(key, []).append(name)
    for (width, *_), names in groups.items():
        for name, found in zip(
            names, _fitted([sources[n] for n in names], width, fit), strict=True
        ):
            yield name, _filled(sources[name], found, fit)


def _fitted(
    sources: list[_Source], width: int | None, fit: CollaborativeFit
) -> Sequence[Factorization | int]:
    """Of each layer its factorization, or its width if it is to start afresh."""
    if fit.start == "fresh" and width is not None:
        return [width] * len(sources)
    for source in sources:
        for role, weight in zip(("queries", "keys"), source.heads[:2], strict=True):
            if not bool(weight.isfinite().all()):
                raise ValueError(
                    f"layer '{source.name}': expected finite weights of {role}, got some that are "
                    "not"
                )
    query = torch.stack([source.heads.query_weight.double() for source in sources])
    key = torch.stack([source.heads.key_weight.double() for source in sources])
    settings: dict[str, Any] = {"start": fit.start, "num_iterations": fit.num_iterations}
    settings |= {"seed": fit.seed} | _moments(sources, fit, query.device)
    if width is not None:
        found = factorize(query, key, width, **settings)
        return [found.layer(i) for i in range(len(sources))]
    assert fit.error is not None
    return [
        width_for_error(query[i], key[i], fit.error, **_of_layer(settings, i))
        for i in range(len(sources))
    ]


def _moments(
    sources: list[_Source], fit: CollaborativeFit, device: torch.device
) -> dict[str, Tensor]:
    if fit.moments is None:
        return {}
    given: dict[str, list[Tensor]] = {"query": [], "key": []}
    for source in sources:
        for role, moments in given.items():
            moment = getattr(fit.moments.get(source.name), role, None)
            if moment is None:
                raise ValueError(
                    f"moments: expected those of layer '{source.name}', got none; was the model "
                    "called within input_moments?"
                )
            size = getattr(source.heads, f"{role}_weight").shape[-1]
            if moment.shape != (size, size):
                raise ValueError(
                    f"moments: expected {size} x {size} for the {role} of layer '{source.name}', "
                    f"got shape {tuple(moment.shape)}"
                )
            moments.append(moment.to(device))
    return {f"{role}_moment": torch.stack(moments) for role, moments in given.items()}


def _of_layer(settings: Mapping[str, Any], place: int) -> dict[str, Any]:
    return {
        name: value[place] if isinstance(value, Tensor) else value
        for name, value in settings.items()
    }


def _filled(
    source: _Source, found: Factorization | int, fit: CollaborativeFit
) -> tuple[SharedProjections, tuple[float, float, Tensor]]:
    query, key = source.heads[:2]
    width = found if isinstance(found, int) else found.query_weight.shape[-2]
    contents = {role: source.content(role) for role in ("key_content", "query_content")}
    like = source.parameter
    made = SharedProjections(
        len(query),
        width,
        query.shape[1] if source.shared is None else source.shared.head_dim,
        query.shape[2],
        key.shape[2],
        num_packed=source.num_packed,
        **{role: content is not None for role, content in contents.items()},
        device=like.device,
        dtype=like.dtype,
    )
    made.requires_grad_(like.requires_grad).train(source.module.training)
    with torch.no_grad():
        made.scale.fill_(source.scale)
        if isinstance(found, int):
            unknown = float("nan")
            return made, (unknown, unknown, query.new_full((len(query),), unknown))
        for role, content in contents.items():
            if content is not None:
                getattr(made, role).copy_(content)
        for role in ("query_weight", "key_weight", "mixing"):
            getattr(made, role).copy_(getattr(found, role))
        error, by_head = found.relative_error, found.head_errors
        if torch.finfo(like.dtype).eps > _TOLD * float(error):
            # Rounding to the layer's type is no small part of what is lost.
            stored = Factors(made.query_weight, made.mixing, made.key_weight)
            moments = _of_layer(_moments([source], fit, query.device), 0)
            error, by_head = product_errors(query, key, stored, **moments)
    return made, (float(error), float(found.lower_bound), by_head)


def _separated(source: _Source) -> tuple[HeadProjections, tuple[float, float, Tensor]]:
    shared = source.shared
    if shared is None:
        raise ValueError(f"layer '{source.name}': expected shared projections, found none")
    query, key = (weight.double() for weight in source.heads[:2])
    key_content, query_content = (
        None if content is None else content.detach().double()
        for content in (shared.key_content, shared.query_content)
    )
    apart = heads_apart(query, key, shared.head_dim, key_content, query_content)
    like = source.parameter
    of_query, of_key = (
        None if bias is None else bias.to(like.dtype) for bias in (apart.query_bias, apart.key_bias)
    )
    made = HeadProjections(
        apart.query_weight.to(like.dtype), apart.key_weight.to(like.dtype), of_query, of_key
    )
    error = float(apart.relative_error)
    return made, (error, error, apart.head_errors)


def _width(heads: HeadProjections) -> int:
    return heads.query_weight.shape[0] * heads.query_weight.shape[1]


def _cost(heads: HeadProjections, num_key_heads: int) -> LayerCost:
    (num_heads, dim, queries), keys = heads.query_weight.shape, heads.key_weight.shape[2]
    weights = dim * (num_heads * queries + num_key_heads * keys)
    biases = dim * (
        (num_heads if heads.query_bias is not None else 0)
        + (num_key_heads if heads.key_bias is not None else 0)
    )
    return LayerCost(weights + biases, 2 * weights, 2 * num_heads * dim, num_key_heads * dim)


def _shared_cost(shared: SharedProjections, exchange: Exchange) -> LayerCost:
    projected = shared.packed_query_weight().numel() + shared.packed_key_weight().numel()
    return LayerCost(
        sum(parameter.numel() for parameter in shared.parameters()),
        2 * (projected + shared.mixing.numel()),
        2 * shared.num_heads * shared.key_features,
        exchange.cached_features(shared),
    )
