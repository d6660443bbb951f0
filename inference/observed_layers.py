"""Which layers of a model count, how much each of their heads does, and in how many places."""

import math
from collections.abc import Mapping, Sequence

from torch import nn

from bayesattn.inference.schedules import Number
from bayesattn.networks import AttentionLayer, attention_layers

__all__ = [
    "check_factor",
    "chosen_layers",
    "head_factors",
    "place_counts",
]


def chosen_layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, AttentionLayer]:
    """Find a model's attention layers, or some of them by their names.

    Raises:
        ValueError: If there are none, or a name is unknown.
    """
    found = attention_layers(model)
    if not found:
        raise ValueError("model: expected attention layers, found none")
    if names is None:
        return found
    if isinstance(names, str) or not names:
        raise ValueError(f"layers: expected a sequence of names, got {names!r}")
    _check_names("layers", names, found)
    return {name: found[name] for name in names}


def head_factors(
    layers: Mapping[str, AttentionLayer], factors: Mapping[str, Number | Sequence[Number]]
) -> dict[str, list[float]]:
    """Give each head's factor; one where nothing is said.

    Raises:
        ValueError: If a name is unknown, there are not as many numbers as heads, one is negative or
            not finite, or all are zero.
    """
    _check_names("layer_weights", factors, layers)
    result = {}
    for name, layer in layers.items():
        given, heads = factors.get(name, 1.0), layer.num_heads
        row = [given] * heads if isinstance(given, float | int) else list(given)
        if len(row) != heads:
            raise ValueError(
                f"layer_weights: expected one number, or {heads}, for '{name}', got {len(row)}"
            )
        for factor in row:
            check_factor(f"layer_weights: '{name}'", factor)
        result[name] = [float(factor) for factor in row]
    if not any(any(row) for row in result.values()):
        raise ValueError("layer_weights: expected a positive number, got zeros only")
    return result


def place_counts(
    layers: Mapping[str, AttentionLayer], places: int | Mapping[str, int]
) -> dict[str, int]:
    """Give the number of places in which each layer stands.

    Raises:
        ValueError: If a name is unknown, or a number is not positive.
    """
    by_name = dict.fromkeys(layers, places) if isinstance(places, int) else places
    _check_names("places", by_name, layers)
    for name, count in by_name.items():
        if count < 1:
            raise ValueError(f"places: expected at least one, got {count} for '{name}'")
    return dict.fromkeys(layers, 1) | dict(by_name)


def check_factor(name: str, factor: Number) -> None:
    """Refuse what is no finite number, or negative.

    Raises:
        ValueError: In these cases.
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{name}: expected a finite number, not negative, got {factor}")


def _check_names(
    argument: str, names: Sequence[str] | Mapping, known: Mapping[str, AttentionLayer]
) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {name!r}")
