"""A Transformer encoder: PyTorch's, with a choice of attention weights in every layer.

Source:
    Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762, section 3.1; normalization
    first: Xiong et al. (2020), arXiv:2002.04745.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from bayesattn.attention_choices import LogitsFunction, NormalizationFunction
from bayesattn.layer_masks import is_causal_mask
from bayesattn.multihead import MultiheadAttention, Number
from bayesattn.shared_projections import Collaborative

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """A drop-in for ``torch.nn.TransformerEncoderLayer`` around :class:`MultiheadAttention`.

    Constructor, call, ``state_dict``, initialization and, under the softmax, results are PyTorch's.
    Attention weights are never formed where the normalization does without, and no shortcut passes
    ``self_attn`` by, so hooks on it see every call.

    Args:
        d_model: Width of the sequence's features.
        nhead: Number of heads.
        dim_feedforward: Width of the feed-forward block.
        dropout: Probability of dropping a weight or a feature in training.
        activation: "relu", "gelu", or a function.
        layer_norm_eps: Added to the variances of the layer normalizations.
        batch_first: Tensors are "batch sequence feature" rather than "sequence batch feature".
        norm_first: Normalize before attention and feed-forward rather than after.
        bias: Whether linear maps and layer normalizations have biases.
        device: Where the parameters are.
        dtype: Type of the parameters.
        normalization: As for :class:`MultiheadAttention`: a module is copied, so that no two layers
            share its parameters.
        logits: Likewise.
        projections: As for :class:`MultiheadAttention`.

    Raises:
        ValueError: If the sizes do not fit, or a choice cannot be called.
    """

    self_attn: MultiheadAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: Number = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalization: NormalizationFunction | None = None,
        logits: LogitsFunction | None = None,
        projections: Collaborative | None = None,
    ) -> None:
        if d_model <= 0 or nhead <= 0 or d_model % nhead:
            raise ValueError(
                f"d_model: expected a positive multiple of nhead, got {d_model} for {nhead} heads"
            )
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        choices: dict[str, Any] = {"normalization": normalization, "logits": logits}
        if projections is None:
            # Around PyTorch's own parameters, so that a seed gives the same ones.
            self.self_attn = MultiheadAttention.from_torch(self.self_attn, **choices)
        else:
            self.self_attn = MultiheadAttention(
                d_model,
                nhead,
                dropout,
                bias=bias,
                batch_first=batch_first,
                device=device,
                dtype=dtype,
                projections=projections,
                **choices,
            )

    def forward(
        self,
        src: Float[Tensor, "..."],
        src_mask: Shaped[Tensor, "..."] | None = None,
        src_key_padding_mask: Shaped[Tensor, "..."] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "..."]:
        """Pass sequences through the layer.

        Args:
            src: "sequence batch feature", "batch sequence feature" if ``batch_first``, or
                "sequence feature".
            src_mask: "sequence sequence" or "batch·head sequence sequence"; True is left out, a
                float is added to the logits.
            src_key_padding_mask: "batch sequence"; True, or minus infinity, is padding.
            is_causal: Position i sees positions 0 to i only; ``src_mask`` may be left out.

        Raises:
            ValueError: If the shapes or masks do not fit.
        """
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        return self.norm2(src + self._ff_block(src))


class TransformerEncoder(nn.TransformerEncoder):
    """A drop-in for ``torch.nn.TransformerEncoder``: copies of a layer, one after another.

    Every copy has parameters of its own, those of normalization and logits included; they start
    equal. Nested tensors are never made, so padding stays in place; what comes out there has no
    meaning, where PyTorch's shortcut has zeros.

    To see what the attention of each layer got, and its weights, hook ``layers[i].self_attn``:
    :meth:`MultiheadAttention.attention_inputs` takes the arguments of the call.

    Args:
        encoder_layer: What is copied.
        num_layers: How many copies.
        norm: What the last layer's output passes through.
        enable_nested_tensor: Taken for compatibility; changes nothing.
        mask_check: Likewise.

    Raises:
        ValueError: Without layers.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = False,
        mask_check: bool = True,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)

    def forward(
        self,
        src: Float[Tensor, "..."],
        mask: Shaped[Tensor, "..."] | None = None,
        src_key_padding_mask: Shaped[Tensor, "..."] | None = None,
        is_causal: bool | None = None,
    ) -> Float[Tensor, "..."]:
        """Pass sequences through all layers; the arguments are those of a layer.

        Args:
            src: The sequences.
            mask: For every layer's attention.
            src_key_padding_mask: Likewise.
            is_causal: Likewise; if None, the mask is looked at, but not in a compiled graph.

        Raises:
            ValueError: If the shapes or masks do not fit.
        """
        looks = is_causal is not False and not torch.compiler.is_compiling()
        if looks and is_causal_mask(mask, self._length(src)):
            # Without a tensor to read, attention takes its fastest way.
            mask, is_causal = None, True
        for layer in self.layers:
            src = layer(
                src,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=bool(is_causal),
            )
        return src if self.norm is None else self.norm(src)

    def _length(self, src: Tensor) -> int:
        first: Any = self.layers[0]
        return src.shape[1 if first.self_attn.batch_first and src.ndim == 3 else 0]
