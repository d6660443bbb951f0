"""Which modules are attention layers, and what is known of each kind of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from bayesattn.networks.graph_tap import graph_layout, watch_graph
from bayesattn.networks.head_slices import ROLES, HeadLayout
from bayesattn.networks.huggingface_exchange import EXCHANGES
from bayesattn.networks.huggingface_layouts import HUGGING_FACE
from bayesattn.networks.layer_taps import (
    Observe,
    Watch,
    hooked,
    watch_multihead,
    watch_own_multihead,
    watch_pooling,
)
from bayesattn.networks.projection_exchange import Exchange
from bayesattn.networks.torch_exchange import MultiheadExchange
from bayesattn.networks.torch_layouts import multihead_layout, pooling_layout

__all__ = ["LayerKind", "describe_layer", "layer_kind", "register_attention_layer"]


class LayerKind(NamedTuple):
    """What is known of a class of layers.

    Attributes:
        describe: Where a layer keeps its heads; None where a module turns out to be no layer.
        watch: Records its calls; None where it calls Hugging Face's registry of attention.
        exchange: How its projections are exchanged, or why they cannot be.
    """

    describe: Callable[[Any], HeadLayout | None]
    watch: Watch | None = None
    exchange: Exchange | str = "nobody said how its projections are exchanged"


# By name, for what is not ours need not be loaded.
_BUILT_IN = {
    "torch.nn.modules.activation.MultiheadAttention": LayerKind(
        multihead_layout, watch_multihead, MultiheadExchange()
    ),
    "bayesattn.multihead.MultiheadAttention": LayerKind(
        multihead_layout, watch_own_multihead, MultiheadExchange()
    ),
    "bayesattn.structured_pooling.StructuredSelfAttention": LayerKind(
        pooling_layout, watch_pooling
    ),
    "bayesattn.graph_layers.GraphAttention": LayerKind(graph_layout, watch_graph),
    **{
        name: LayerKind(describe, exchange=EXCHANGES[name])
        for name, describe in HUGGING_FACE.items()
    },
}
_registered: dict[type, LayerKind] = {}


def register_attention_layer(
    cls: type,
    describe: Callable[[Any], HeadLayout | None],
    observe: Observe | None = None,
    exchange: Exchange | str = LayerKind._field_defaults["exchange"],
) -> None:
    """Make a layer of one's own, and its subclasses, known.

    The nearest known class of a module counts, and among equals the registered one::

        class Pooling(nn.Module):
            def __init__(self):
                super().__init__()
                self.queries = nn.Parameter(torch.randn(4, 16))

        def describe(layer):
            queries = HeadSlice("queries", axis=0, start=0, width=1, num_heads=4)
            return HeadLayout(query=ProjectionSlices(queries))

        register_attention_layer(Pooling, describe)

    Args:
        cls: Class of the layer.
        describe: From a layer to where its heads stand; or None, if this one is not to be found.
        observe: From a layer, its arguments by place and by name, and its output to what it handed
            to attention. Layers that call Hugging Face's attention interface need none.
        exchange: How its projections are exchanged, for :func:`bayesattn.convert`, or why they
            cannot be.

    Raises:
        ValueError: If ``cls`` is not a class of modules.
    """
    if not issubclass(cls, nn.Module):
        raise ValueError(f"cls: expected a class of modules, got {cls!r}")
    watch = None if observe is None else hooked(observe)
    _registered[cls] = LayerKind(describe, watch, exchange)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return what is known of the nearest known class of a module."""
    for cls in type(module).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        found = _registered.get(cls) or _BUILT_IN.get(name)
        if found is not None:
            return found
    return None


def describe_layer(kind: LayerKind, module: nn.Module) -> HeadLayout | None:
    """Describe a module, and check what comes.

    Raises:
        ValueError: If the layout has other roles, or none.
    """
    layout = kind.describe(module)
    if layout is not None and (not layout or not set(layout) <= set(ROLES)):
        raise ValueError(
            f"describe: expected some of {', '.join(ROLES)} for {type(module).__name__}, "
            f"got {', '.join(layout) or 'none'}"
        )
    return layout
