r"""Multi-head attention as a layer: ``torch.nn.MultiheadAttention`` with choices.

.. math:: \mathrm{MultiHead}(Q, K, V) = [o_1 | \dots | o_H] W^O, \qquad
    o_h = \mathrm{attention}(Q W_h^Q, K W_h^K, V W_h^V)

Source:
    Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762, section 3.2.2.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.argument_checks import check_type
from bayesattn.attention_choices import (
    LogitsFunction,
    NormalizationFunction,
    mixes_queries,
    own_choice,
    pools_tokens,
)
from bayesattn.contraction import weighted_sums
from bayesattn.decoding_cache import KeyValueCache
from bayesattn.functional import attention, attention_weights, logits_of_call
from bayesattn.head_layout import (
    append_positions,
    batched,
    merge_heads,
    project,
    sequence_sizes,
    split_heads,
)
from bayesattn.layer_adoption import (
    adopted_projections,
    check_adoptable,
    constructor_settings,
    dot_product_scale,
)
from bayesattn.layer_masks import LayerShape, attention_masks
from bayesattn.shared_projections import Collaborative, SharedProjections

__all__ = ["AttentionInputs", "MultiheadAttention"]

# A whole number is a number too, which run-time type checks do not take for a float.
Number = float | int


class AttentionInputs(NamedTuple):
    """What a layer hands to :func:`bayesattn.attention`.

    Attributes:
        query: Projected queries.
        key: Projected keys, those appended included.
        value: Projected values.
        settings: Masks, ``logits`` and ``normalization``, by the function's names.
    """

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch head key dim"]
    value: Float[Tensor, "batch head key dim"]
    settings: dict[str, Any]


class MultiheadAttention(nn.MultiheadAttention):
    """A drop-in for ``torch.nn.MultiheadAttention`` that takes other logits and normalizations.

    Constructor, call, ``state_dict``, initialization and, under the softmax, results are PyTorch's,
    masks included: here True is *left out*. It differs where

    * a query that sees no key gets the output projection's bias, where PyTorch returns NaN;
    * ``is_causal=True`` needs no ``attn_mask``, and is fastest without; with one, both hold, so
      that a wrong hint cannot change what the mask says;
    * nested tensors are refused, and PyTorch's encoder never takes its shortcut past this layer.

    A normalization over queries must know which of them are padding. In self-attention (query and
    key are one object) ``key_padding_mask`` says so; else pass ``query_padding_mask``. In float
    masks it takes all below -10⁴ for minus infinity; the softmax adds it, as PyTorch's does. And it
    tells earlier queries of later ones: not only under causal masks, which are refused, but also in
    a decoder's attention to an encoder, which no mask gives away.

    Heads may share their projections of queries and keys; see
    :class:`bayesattn.shared_projections.SharedProjections`, which then holds the parameters. Under
    logits other than the dot product such heads have no content vectors, so no bias of queries.

    Args:
        embed_dim: Width of queries and outputs.
        num_heads: Number of heads; ``embed_dim`` is split among them.
        dropout: Probability of dropping a weight in training.
        bias: Whether the projections have biases.
        add_bias_kv: Append one learned key and value.
        add_zero_attn: Append a key and value of zeros.
        kdim: Width of keys, ``embed_dim`` by default.
        vdim: Width of values, ``embed_dim`` by default.
        batch_first: Tensors are "batch sequence feature" rather than "sequence batch feature".
        device: Where the parameters are.
        dtype: Type of the parameters.
        normalization: From logits and mask to weights, such as one of
            :mod:`bayesattn.normalizations`; the softmax if None. A module is copied, so that layers
            made from one share no parameter.
        logits: From projected queries and keys to logits; the scaled dot product if None. A module
            is copied likewise. Shared queries and keys are so scaled that their scaled dot product
            is that of the heads.
        projections: ``Collaborative(width)``, or None for heads with projections of their own.

    Raises:
        ValueError: If the sizes do not fit, or a choice cannot be called, or ``add_bias_kv`` is
            asked for where heads share their keys.
    """

    normalization: NormalizationFunction | None
    logits: LogitsFunction | None
    projections: SharedProjections | None
    v_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: Number = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalization: NormalizationFunction | None = None,
        logits: LogitsFunction | None = None,
        projections: Collaborative | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim: expected a positive multiple of num_heads, got {embed_dim} "
                f"for {num_heads} heads"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability, got {dropout}")
        if projections is not None:
            check_type("projections", projections, Collaborative)
        if projections is not None and add_bias_kv:
            raise ValueError(
                "add_bias_kv: expected False with projections=, since a learned key is one head's"
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        width = embed_dim // num_heads if projections is None else projections.width
        sizes = (num_heads, width)
        self.normalization = own_choice("normalization", normalization, device, dtype, *sizes)
        self.logits = own_choice("logits", logits, device, dtype, *sizes)
        self.projections = None
        self.register_parameter("v_proj_bias", None)
        if projections is not None:
            self._share(projections.width, has_bias=bias, device=device, dtype=dtype)
        # PyTorch's encoder reads this for leave to compute softmax attention by itself, without
        # calling its self_attn; which weights there are, we ask of the weights.
        self._qkv_same_embed_dim = False

    @classmethod
    def from_torch(
        cls,
        module: nn.MultiheadAttention,
        *,
        normalization: NormalizationFunction | None = None,
        logits: LogitsFunction | None = None,
    ) -> "MultiheadAttention":
        """Turn a layer of PyTorch's into one of ours around the very same parameters.

        Nothing is copied but ``normalization`` and ``logits``, which move to the layer's device and
        type: optimizers and tied weights go on, and training either layer trains both. Take
        ``copy.deepcopy(module)`` for one that stands alone. Hooks stay with ``module``.

        Args:
            module: PyTorch's layer, or one of ours, whose choices are then replaced.
            normalization: As for the constructor.
            logits: As for the constructor.

        Raises:
            ValueError: If the module computes something else, or its weights are parametrized.
        """
        check_adoptable(module, cls)
        weight = module.out_proj.weight
        shared = getattr(module, "projections", None)
        shared, logits = adopted_projections(shared, normalization, logits)
        layer = cls.empty_like(module, None if shared is None else Collaborative(shared.width))
        layer.projections = shared
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(layer, name, parameter)
        layer.out_proj = module.out_proj
        width = layer.head_dim if shared is None else shared.width
        place = (weight.device, weight.dtype, layer.num_heads, width)
        layer.normalization = own_choice("normalization", normalization, *place)
        layer.logits = own_choice("logits", logits, *place)
        return layer.train(module.training)

    @classmethod
    def empty_like(
        cls, module: nn.MultiheadAttention, projections: Collaborative | None = None
    ) -> "MultiheadAttention":
        """Make a layer of the sizes and options of another, whose parameters have no data yet."""
        return cls(**constructor_settings(module), device="meta", projections=projections)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Shaped[Tensor, "..."] | None = None,
        need_weights: bool = True,
        attn_mask: Shaped[Tensor, "..."] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Shaped[Tensor, "..."] | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``torch.nn.MultiheadAttention`` does.

        Args:
            query: "query batch feature", "batch query feature" if ``batch_first``, or
                "query feature".
            key: Likewise, "key batch feature".
            value: Likewise, one for each key.
            key_padding_mask: "batch key"; True, or minus infinity, is padding.
            need_weights: Return the weights too, which forms them all.
            attn_mask: "query key" or "batch·head query key"; True is left out, a float is added.
            average_attn_weights: Return the mean of the heads' weights.
            is_causal: Query i sees keys 0 to i only.
            query_padding_mask: "batch query"; padding takes no part and gets the output's bias.
            cache: Keys and values of earlier tokens, to which those of this call are added; masks
                then are about all keys, and under ``is_causal`` the queries are the last tokens.

        Returns:
            Outputs, shaped as the queries; and "batch query key" or "batch head query key" weights,
            with keys appended last and after dropout, or None.

        Raises:
            ValueError: If the shapes or masks do not fit.
        """
        inputs = self.attention_inputs(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
            query_padding_mask=query_padding_mask,
            cache=cache,
        )
        dropout_p = self.dropout if self.training else 0.0
        if not need_weights:
            heads = attention(*inputs[:3], dropout_p=dropout_p, **inputs.settings)
            return self._output(heads, query.ndim == 3), None
        weights = attention_weights(*inputs[:2], **inputs.settings)
        weights = F.dropout(weights, dropout_p)
        heads = weighted_sums(weights.to(inputs.value.dtype), inputs.value)
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if query.ndim == 3 else weights[0]
        return self._output(heads, query.ndim == 3), weights

    def attention_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Shaped[Tensor, "..."] | None = None,
        need_weights: bool = True,
        attn_mask: Shaped[Tensor, "..."] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Shaped[Tensor, "..."] | None = None,
        cache: KeyValueCache | None = None,
    ) -> AttentionInputs:
        """What a call with these arguments hands to :func:`bayesattn.attention`.

        The arguments are those of the call, so that a hook on the layer can pass them on::

            layer.register_forward_hook(
                lambda layer, args, kwargs, _: seen.append(layer.attention_inputs(*args, **kwargs)),
                with_kwargs=True,
            )

        A cache grows by each call of this too.

        Raises:
            ValueError: If the shapes or masks do not fit.
        """
        widths = (self.embed_dim, self.kdim, self.vdim)
        sizes = sequence_sizes(query, key, value, widths, batch_first=self.batch_first)
        appended = int(self.bias_k is not None) + int(self.add_zero_attn)
        mixes = mixes_queries(self.normalization)
        needs_padding = mixes or pools_tokens(self.logits)
        if cache is not None:
            check_type("cache", cache, KeyValueCache)
        earlier = 0 if cache is None else cache.length
        if cache is not None and (needs_padding or appended):
            raise ValueError(
                "cache: expected a normalization over keys alone, logits that pool over no tokens, "
                "and no keys appended by add_bias_kv or add_zero_attn"
            )
        shape = LayerShape(
            sizes[0], self.num_heads, sizes[1], earlier + sizes[2], appended, earlier
        )
        if is_causal and mixes and appended:
            raise ValueError(
                "is_causal: expected no keys appended by add_bias_kv or add_zero_attn where the "
                f"normalization runs over queries, got {appended}"
            )
        # Only what looks at other queries asks: the softmax treats padding as PyTorch does.
        if needs_padding and query_padding_mask is None and key_padding_mask is not None:
            if query is key:
                query_padding_mask = key_padding_mask
            elif query.shape == key.shape:
                warnings.warn(
                    "query_padding_mask: normalization or logits look at all queries, and as query "
                    "and key are two tensors, no query is taken for padding; pass the mask to say "
                    "which are (all False if none)",
                    stacklevel=3,
                )
        masks = attention_masks(
            shape,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            is_causal=is_causal,
            device=query.device,
        )
        heads = self._heads(query, key, value, cache)
        # Once, so that whoever looks on sees what is drawn here.
        logits = logits_of_call(self.logits, *heads[:2], **masks._asdict())
        settings = masks._asdict() | {"logits": logits, "normalization": self.normalization}
        if self.projections is not None and self.logits is None:
            settings["scale"] = 1.0
        return AttentionInputs(*heads, settings)

    def extra_repr(self) -> str:
        """Sizes, and the choices that are functions; modules show themselves."""
        parts = [f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"]
        parts.append(f"batch_first={self.batch_first}")
        choices = {"normalization": self.normalization, "logits": self.logits}
        for name, choice in choices.items():
            if choice is not None and not isinstance(choice, nn.Module):
                parts.append(f"{name}={getattr(choice, '__name__', choice)}")
        return ", ".join(parts)

    def _share(self, width: int, *, has_bias: bool, **place: Any) -> None:
        """Put shared projections of queries and keys in the place of the heads' own."""
        is_packed = self.in_proj_weight is not None
        scale, self.logits = dot_product_scale(self.logits)
        has_content = has_bias and self.logits is None
        self.projections = SharedProjections(
            self.num_heads,
            width,
            self.head_dim,
            self.embed_dim,
            self.kdim,
            key_content=has_content,
            query_content=has_content and mixes_queries(self.normalization),
            num_packed=3 if is_packed else 1,
            **place,
        )
        if scale is not None:
            nn.init.constant_(self.projections.scale, scale)
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "in_proj_bias"):
            self.register_parameter(name, None)
        bound = math.sqrt(6.0 / ((3 if is_packed else 1) * self.embed_dim + self.vdim))
        weight = torch.empty(self.embed_dim, self.vdim, **place)
        self.v_proj_weight = nn.Parameter(nn.init.uniform_(weight, -bound, bound))
        if has_bias:
            self.v_proj_bias = nn.Parameter(torch.zeros(self.embed_dim, **place))

    def _reset_parameters(self) -> None:
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = {"num_heads": self.num_heads, "batch_first": self.batch_first}
        if self.projections is None:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if self.in_proj_weight is None else self.in_proj_weight
            projected = project(query, key, value, weights, self.in_proj_bias)
            query, key, value = (split_heads(part, **settings) for part in projected)
        else:
            shared = self.projections
            value = split_heads(F.linear(value, self.v_proj_weight, self.v_proj_bias), **settings)
            sequences = {"batch_first": self.batch_first}
            is_scaled = self.logits is None
            query = shared.queries(batched(query, **sequences), is_scaled=is_scaled)
            key = shared.keys(batched(key, **sequences))[:, None]
            if not is_scaled:
                query, key = shared.standardized(query, key)
        if cache is not None:
            key, value = cache.append(key, value)
        if self.projections is not None:
            key = key.expand(-1, self.num_heads, -1, -1)
        key, value = append_positions(
            key, value, self.bias_k, self.bias_v, add_zero_attn=self.add_zero_attn
        )
        return query, key, value

    def _output(self, heads: Tensor, is_batched: bool) -> Tensor:
        merged = merge_heads(heads, is_batched=is_batched, batch_first=self.batch_first)
        return self.out_proj(merged)
