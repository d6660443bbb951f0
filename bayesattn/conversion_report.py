"""What a conversion did to each layer; of shared projections also its error and its costs."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from bayesattn.attention_choices import name_of_choice

__all__ = ["ConversionReport", "LayerCost", "LayerReport"]


class LayerCost(NamedTuple):
    """What the queries and keys of one layer cost; values and outputs stay as they are.

    Attributes:
        parameters: Numbers held, biases or content vectors included.
        projection_flops: For each token that asks and is asked, two for each multiplication.
        logit_flops: For each pair of tokens, over all heads.
        cached_floats: What a cache of keys holds for each token.
    """

    parameters: int
    projection_flops: int
    logit_flops: int
    cached_floats: int


class LayerReport(NamedTuple):
    """What one layer became.

    Attributes:
        width: Components before and after; heads times their width where they are not shared.
        relative_error: Of all heads' products of query and key weights, or of the logits of given
            tokens; NaN where the layer started afresh.
        lower_bound: Below which no projections of this width come.
        head_errors: Of each head.
        before: Cost.
        after: Cost.
    """

    width: tuple[int, int]
    relative_error: float
    lower_bound: float
    head_errors: Float[Tensor, " head"]
    before: LayerCost
    after: LayerCost


class ConversionReport(dict[str, LayerReport]):
    """Reports on projections by the layers' names; as text, a table below the other choices.

    Attributes:
        choices: For the other axes of attention that were exchanged, what was given for them.
        layers: Names of the layers in which they were.
    """

    choices: Mapping[str, object]
    layers: Sequence[str]

    def __init__(
        self,
        reports: Mapping[str, LayerReport] | None = None,
        *,
        choices: Mapping[str, object] | None = None,
        layers: Sequence[str] = (),
    ):
        super().__init__(reports or {})
        self.choices, self.layers = dict(choices or {}), tuple(layers)

    def __str__(self) -> str:
        """The choices, and the table with totals."""
        names = ", ".join(name or "(model)" for name in self.layers)
        lines = [f"{axis} = {_named(choice)} in {names}" for axis, choice in self.choices.items()]
        return "\n".join([*lines, self._table()] if self else lines) or "nothing was exchanged"

    def _table(self) -> str:
        rows = [
            (
                name or "(model)",
                f"{layer.width[0]} -> {layer.width[1]}",
                *(_error(error) for error in (layer.relative_error, layer.lower_bound)),
                _change(layer.before.parameters, layer.after.parameters),
                _change(layer.before.logit_flops, layer.after.logit_flops),
                _change(layer.before.cached_floats, layer.after.cached_floats),
            )
            for name, layer in self.items()
        ]
        totals = [
            _change(
                sum(getattr(layer.before, field) for layer in self.values()),
                sum(getattr(layer.after, field) for layer in self.values()),
            )
            for field in ("parameters", "logit_flops", "cached_floats")
        ]
        head = ("layer", "width", "error", "bound", "parameters", "flops a pair", "cached floats")
        table = [head, *rows, ("all", "", "", "", *totals)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        )


def _named(choice: object) -> str:
    """A choice in one line."""
    name = name_of_choice(choice)
    return f"{name}({choice.extra_repr()})" if isinstance(choice, nn.Module) else name


def _error(error: float) -> str:
    return "new" if math.isnan(error) else f"{error:.2e}"


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before:.2f})" if before else f"{before} -> {after:,}"
