r"""Double normalization that does not see the future: columns over the queries so far.

.. math:: A_{ij} \propto e^{s_{ij}} \Big/ \sum_{j \le l \le i} e^{s_{lj}}, \quad j \le i

Its bias depends on both query and key, so there is only the dense formula. It leans towards recent
keys: a query gives itself at least one over the number of keys that it sees.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bayesattn.masking import masked_softmax
from bayesattn.normalizations.protocol import Normalization

__all__ = ["CausalDoublyNormalized"]

_LOWEST = -1e30


class CausalDoublyNormalized(Normalization):
    """Over the queries up to each one first, and over keys last; query i sees keys 0 to i only.

    It has first derivatives, backward and forward. Second ones by two backward passes come out as
    NaN, since PyTorch's cumulative logsumexp takes logarithms of gradients that are zero here;
    forward over backward (``torch.func.jacfwd`` of ``torch.func.grad``) has them.
    """

    is_causal = True

    def forward(
        self,
        logits: Float[Tensor, "*_batch query key"],
        mask: Bool[Tensor, "*_batch _query _key"] | None = None,
    ) -> Float[Tensor, "*_batch query key"]:
        """Weights, zero for later keys and where masked.

        Raises:
            ValueError: If there are not as many keys as queries.
        """
        num_queries, num_keys = logits.shape[-2:]
        if num_queries != num_keys:
            raise ValueError(
                "CausalDoublyNormalized is for self-attention: expected as many keys as queries, "
                f"got {num_queries} queries and {num_keys} keys"
            )
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=logits.device).tril()
        seen = seen if mask is None else seen & mask
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        so_far = torch.where(seen, values, _LOWEST).logcumsumexp(-2)
        excess = torch.where(seen, values - so_far, 0.0)
        return masked_softmax(excess, seen).to(logits.dtype)
