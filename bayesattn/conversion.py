"""Another choice of projections, logits or normalization for the attention layers of any model.

Each axis of attention has its own way in; what a layer has of the other axes stays.
"""

import copy as copying
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from bayesattn.argument_checks import check_type
from bayesattn.attention_choices import LogitsFunction, NormalizationFunction
from bayesattn.conversion_report import ConversionReport
from bayesattn.multihead import MultiheadAttention
from bayesattn.networks import AttentionLayer, attention_layers
from bayesattn.networks.torch_exchange import carry_over
from bayesattn.projection_conversion import (
    CollaborativeFit,
    Separate,
    converted_projections,
)
from bayesattn.shared_projections import Collaborative

__all__ = ["Conversion", "convert"]


class Conversion(NamedTuple):
    """A converted model.

    Attributes:
        model: The model; the given one unless it was copied, or is an attention layer itself.
        report: What was exchanged; of projections, at what error and cost in each layer.
    """

    model: nn.Module
    report: ConversionReport


def convert(
    model: nn.Module,
    *,
    projections: Collaborative | CollaborativeFit | Separate | None = None,
    normalization: NormalizationFunction | None = None,
    logits: LogitsFunction | None = None,
    layers: Sequence[str] | None = None,
    copy: bool = False,
) -> Conversion:
    """Exchange projections, normalization or logits in the attention layers of a model.

    Training mode, dropout, dtype, device, masks and hooks stay. Parameters that an optimizer holds
    may not: make it after this. Nothing is changed if any layer is refused.

    Projections that heads share come from factorizing the trained ones; up to the reported error
    the model computes what it did. Layers of PyTorch become :class:`bayesattn.MultiheadAttention`;
    layers of Hugging Face stay what they are, and their ``save_pretrained`` keeps the weights, but
    not that they are shared: convert a model of the same configuration with
    ``CollaborativeFit(width, start="fresh")`` before loading them.

    Args:
        model: Any module with attention layers; see :func:`bayesattn.networks.attention_layers`.
        projections: ``Collaborative(width)`` or :class:`CollaborativeFit` to share them;
            :class:`Separate` to give each head its own again, where they are shared. As they are
            if None.
        normalization: For layers of PyTorch and ours. As it is if None.
        logits: Likewise. Each layer has a copy, of the same random frequencies where there are
            such; ``reset_parameters`` of the copies draws others. ``DotProduct()`` goes back.
        layers: Names of the layers to convert; all if None.
        copy: Leave the model as it is, and convert a copy.

    Raises:
        TypeError: If the model is no module, or a choice of projections none of these.
        ValueError: If nothing is asked for, the model has no such layer, or one cannot be converted
            (says which and why).
    """
    choices = {"projections": projections, "normalization": normalization, "logits": logits}
    check_type("model", model, nn.Module)
    if all(choice is None for choice in choices.values()):
        raise ValueError(f"convert: expected one of {', '.join(choices)}, got none")
    model = copying.deepcopy(model) if copy else model
    found = _chosen(model, layers)
    modules = {name: layer.module for name, layer in found.items()}
    exchanged = {name: choices[name] for name in ("normalization", "logits")}
    exchanged = {name: choice for name, choice in exchanged.items() if choice is not None}
    report = ConversionReport(choices=exchanged, layers=tuple(found) if exchanged else ())
    if exchanged:
        modules = {
            name: _with_choices(layer, normalization, logits) for name, layer in found.items()
        }
        model = _replaced(model, found, modules)
        found = _chosen(model, layers)
    if isinstance(projections, Separate) and layers is None:
        found = _sharing(found)
    if projections is not None:
        modules, reports = converted_projections(found, projections)
        report.update(reports)
        model = _replaced(model, found, modules)
    return Conversion(model, report)


def _chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, AttentionLayer]:
    found = attention_layers(model)
    if not found:
        raise ValueError(
            "model: expected attention layers of PyTorch, of ours, or of Hugging Face's BERT, "
            "RoBERTa, DistilBERT, ALBERT, ViT or GPT-2, found none; others can be registered, see "
            "bayesattn.networks.register_attention_layer"
        )
    if names is None:
        return found
    if isinstance(names, str):
        raise ValueError(f"layers: expected a sequence of names, got {names!r}")
    unknown = [name for name in names if name not in found]
    if unknown or not names:
        raise ValueError(
            f"layers: expected some of {', '.join(map(repr, found))}, "
            f"got {', '.join(map(repr, unknown)) or 'none'}"
        )
    return {name: found[name] for name in names}


def _sharing(layers: dict[str, AttentionLayer]) -> dict[str, AttentionLayer]:
    """Those whose projections are shared, or all where none are, which are then refused."""
    sharing = {
        name: layer
        for name, layer in layers.items()
        if not isinstance(layer.kind.exchange, str)
        and layer.kind.exchange.shared(layer.module) is not None
    }
    return sharing or layers


def _with_choices(
    layer: AttentionLayer,
    normalization: NormalizationFunction | None,
    logits: LogitsFunction | None,
) -> nn.Module:
    module: Any = layer.module
    if not isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            f"layer '{layer.name}': expected torch.nn.MultiheadAttention for normalization= and "
            f"logits=, got {type(module).__name__}"
        )
    given = {"normalization": normalization, "logits": logits}
    kept = {
        name: getattr(module, name, None) if choice is None else choice
        for name, choice in given.items()
    }
    made = MultiheadAttention.from_torch(module, **kept)
    carry_over(made, module)
    return made


def _replaced(
    model: nn.Module, layers: dict[str, AttentionLayer], modules: dict[str, nn.Module]
) -> nn.Module:
    """Put modules in all the places where the layers stand."""
    new = {id(layers[name].module): module for name, module in modules.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and new.get(id(child), child) is not child:
                setattr(parent, name, new[id(child)])
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder) and any(
            type(module) is MultiheadAttention for module in part.modules()
        ):
            # Its shortcut for padded sequences, which are nested tensors, is PyTorch's layers' own.
            part.use_nested_tensor = False
    return new.get(id(model), model)
