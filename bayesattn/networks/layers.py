"""Attention layers of any model, found by a walk, and their heads as particles."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from bayesattn.networks.head_slices import ROLES, HeadLayout, HeadSlice, Region
from bayesattn.networks.partition import HeadPartition
from bayesattn.networks.recognition import LayerKind, describe_layer, layer_kind

__all__ = ["AttentionLayer", "attention_layers", "head_partitions"]

_INPUT_ROLES = ("query", "key", "value")


class AttentionLayer(NamedTuple):
    """An attention layer of a model.

    Attributes:
        name: Dotted name in the model; empty for the model itself.
        module: The layer.
        layout: Where its heads stand.
        kind: What is known of its class.
    """

    name: str
    module: nn.Module
    layout: HeadLayout
    kind: LayerKind

    @property
    def num_heads(self) -> int:
        """Number of heads of queries."""
        return self.layout["query"].weight.num_heads

    @property
    def query_dim(self) -> int:
        """Width of a head's queries and keys."""
        weight = self.layout["query"].weight
        if "key" in self.layout:
            return weight.width
        # Where there is no other projection, the queries are parameters themselves.
        return self.module.get_parameter(weight.parameter).shape[1 - weight.axis]

    def partitions(
        self,
        roles: Sequence[str] = _INPUT_ROLES,
        *,
        joint: bool = False,
        biases: bool = False,
    ) -> list[HeadPartition]:
        """Heads of the layer as particles.

        Args:
            roles: Which projections, of "query", "key", "value" and "output"; those that the layer
                has not are left out.
            joint: One partition, in which a particle holds a head's parts of all the roles; query
                heads that share a key and value are one particle. Else one partition for each role.
            biases: With the biases' parts, where there are any. The output's belongs to no head.

        Raises:
            ValueError: If a role is unknown or given twice, the layer has none of them, or a joint
                particle would hold one thing twice.
        """
        if isinstance(roles, str):
            raise ValueError(f"roles: expected a sequence, such as ('query',), got {roles!r}")
        wrong = [role for role in roles if role not in ROLES]
        if wrong or len(set(roles)) < len(roles):
            raise ValueError(f"roles: expected some of {', '.join(ROLES)}, got {', '.join(roles)}")
        slices = {role: self._slices(role, biases) for role in roles if role in self.layout}
        if not slices:
            raise ValueError(
                f"roles: layer '{self.name}' has {', '.join(self.layout)}, "
                f"got {', '.join(roles) or 'none'}"
            )
        if not joint:
            return [
                HeadPartition(self._join(role), self.module, parts)
                for role, parts in slices.items()
            ]
        parts = [part for role in slices for part in slices[role]]
        fewest = min(part.num_heads for part in parts)
        grouped = [part.grouped(fewest) for part in parts]
        return [HeadPartition(self._join("+".join(slices)), self.module, grouped)]

    def _slices(self, role: str, biases: bool) -> list[HeadSlice]:
        weight, bias = self.layout[role]
        return [weight, bias] if biases and bias is not None else [weight]

    def _join(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """Find the attention layers of a model, by their names in it and in its own order.

    Known are those of :class:`torch.nn.MultiheadAttention`, of this package, of Hugging Face's
    BERT, RoBERTa, ViT, DistilBERT, GPT-2 and Llama (transformers 5), and those of
    :func:`register_attention_layer`. A layer that stands in several places is found once, at the
    first; layers within a layer are parts of it and not found.
    """
    return {layer.name: layer for layer in _walk(model, "", set())}


def head_partitions(
    model: nn.Module,
    roles: Sequence[str] = _INPUT_ROLES,
    *,
    joint: bool = False,
    biases: bool = False,
) -> list[HeadPartition]:
    """Heads of all attention layers of a model; weights that several share are there once.

    Args:
        model: Any module.
        roles: As for :meth:`AttentionLayer.partitions`; layers that have none of them are left out.
        joint: Likewise.
        biases: Likewise.

    Raises:
        ValueError: If partitions share some of their weights but not all, or as for
            :meth:`AttentionLayer.partitions`.
    """
    found: list[HeadPartition] = []
    owners: dict[Region, str] = {}
    for layer in attention_layers(model).values():
        if set(roles) <= set(ROLES) and not set(roles) & set(layer.layout):
            continue
        for partition in layer.partitions(roles, joint=joint, biases=biases):
            regions = set(partition.regions())
            shared = regions & set(owners)
            if shared and shared != regions:
                raise ValueError(
                    f"{partition.name} shares some of its weights, but not all, "
                    f"with {owners[shared.pop()]}"
                )
            if not shared:
                found.append(partition)
                owners |= dict.fromkeys(regions, partition.name)
    return found


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[AttentionLayer]:
    if module in seen:
        return
    seen.add(module)
    kind = layer_kind(module)
    layout = None if kind is None else describe_layer(kind, module)
    if kind is not None and layout is not None:
        yield AttentionLayer(name, module, layout, kind)
        return
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)
