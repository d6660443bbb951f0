"""Whether autocast is in force on a tensor's device, and how to keep it off.

PyTorch's own question whether a device has autocast cannot be compiled before PyTorch 2.13, so it
is asked once.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_type", "full_precision"]

_DEVICES = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast gives to products on a tensor's device; None where it is off."""
    device = tensor.device.type
    if device in _DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Keep autocast off products of tensors like this one."""
    if autocast_type(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
