r"""Second moments of what attention layers are given, padding left out.

.. math:: C_Q = \frac{1}{n} \sum_i x_i x_i^\top, \qquad C_K = \frac{1}{m} \sum_j y_j y_j^\top

An error of the products :math:`W_Q^\top W_K` weighs as much as it moves logits of such tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from bayesattn.head_layout import batched
from bayesattn.networks.attention_call import AttentionCall
from bayesattn.networks.layers import AttentionLayer
from bayesattn.networks.taps import watch_attention

__all__ = ["InputMoments", "input_moments"]


class InputMoments:
    """Second moments of one layer's inputs, as they come.

    Attributes:
        query_count: Number of tokens that asked.
        key_count: Number of tokens that were asked.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.query_count = 0
        self.key_count = 0

    @property
    def query(self) -> Float[Tensor, "query_feature query_feature"] | None:
        """Second moment of what asks; None before the first call."""
        return self._mean("query", self.query_count)

    @property
    def key(self) -> Float[Tensor, "key_feature key_feature"] | None:
        """Second moment of what is asked; None before the first call."""
        return self._mean("key", self.key_count)

    def add(
        self,
        query: Float[Tensor, "batch query query_feature"],
        key: Float[Tensor, "batch key key_feature"] | None,
        query_mask: Bool[Tensor, "batch query"],
        key_mask: Bool[Tensor, "batch key"],
    ) -> None:
        """Add the tokens of one call; no keys where a cache has all."""
        self.query_count += self._add("query", query, query_mask)
        if key is not None:
            self.key_count += self._add("key", key, key_mask)

    def _add(self, role: str, tokens: Tensor, mask: Tensor) -> int:
        rows = tokens.detach()[mask].double()
        product = rows.mT @ rows
        self._sums[role] = self._sums[role] + product if role in self._sums else product
        return len(rows)

    def _mean(self, role: str, count: int) -> Tensor | None:
        return self._sums[role] / max(count, 1) if role in self._sums else None


@contextmanager
def input_moments(model: nn.Module) -> Iterator[dict[str, InputMoments]]:
    """Collect the second moments of the inputs of a model's attention layers.

    Batches are run within the context, and what comes is for :class:`bayesattn.CollaborativeFit`::

        with input_moments(model) as moments, torch.no_grad():
            for batch in batches:
                model(**batch)

    Args:
        model: Any module whose layers' projections can be exchanged; others are left out.

    Yields:
        By the layers' names, what came so far. Of padding nothing comes, nor of tokens that another
        token's cache holds.
    """
    pending: dict[str, list[Any]] = {}
    found: dict[str, InputMoments] = {}

    def keep(name: str, call: AttentionCall) -> None:
        given = pending.pop(name, None)
        if given is None or name not in found:
            return
        query, key = given
        query_mask, key_mask = (mask.any(1) for mask in call.cloud_masks())
        if key is not None:
            # Of cached keys the last are those of this call; what a layer appends comes after them.
            earlier = key_mask.shape[1] - key.shape[1] - _num_appended(layers[name].module)
            key_mask = key_mask.narrow(1, earlier, key.shape[1])
        found[name].add(query, key, query_mask, key_mask)

    with ExitStack() as stack:
        layers = stack.enter_context(watch_attention(model, keep))
        for name, layer in layers.items():
            if isinstance(layer.kind.exchange, str) or "key" not in layer.layout:
                continue
            found[name] = InputMoments()
            stack.enter_context(_inputs(layer, pending, name))
        yield found


@contextmanager
def _inputs(layer: AttentionLayer, pending: dict[str, list[Any]], name: str) -> Iterator[None]:
    """Note what a layer's projections of queries and keys are given."""
    handles = []
    if isinstance(layer.module, nn.MultiheadAttention):
        batch_first = layer.module.batch_first

        def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(("query", "key"), args, strict=False)) | kwargs
            pending[name] = [
                batched(named[role], batch_first=batch_first) for role in ("query", "key")
            ]

        handles.append(layer.module.register_forward_pre_hook(hear, with_kwargs=True))
    else:
        parts = [layer.layout[role].weight.parameter for role in ("query", "key")]
        owners = [layer.module.get_submodule(part.rpartition(".")[0]) for part in parts]
        is_one = owners[1] is owners[0]

        def hear_query(_: nn.Module, args: tuple[Any, ...]) -> None:
            # A map of its own for keys is not asked where a cache has them.
            pending[name] = [args[0], args[0] if is_one else None]

        def hear_key(_: nn.Module, args: tuple[Any, ...]) -> None:
            pending[name][1] = args[0]

        handles.append(owners[0].register_forward_pre_hook(hear_query))
        if not is_one:
            handles.append(owners[1].register_forward_pre_hook(hear_key))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _num_appended(module: Any) -> int:
    if not isinstance(module, nn.MultiheadAttention):
        return 0
    return int(module.bias_k is not None) + int(module.add_zero_attn)
