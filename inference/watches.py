"""Watching the tensor operations of a run for what makes its log density no function."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OperationWatch", "WriteRefusedError"]

_aten = torch.ops.aten

# These write running statistics, their arguments 3 and 4, without declaring it.
_BATCH_NORMS = (
    _aten.native_batch_norm.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
)


class WriteRefusedError(ValueError):
    """A program is about to write a tensor that is not its own."""


class OperationWatch(TorchDispatchMode):
    """Refuses writes into given tensors before they happen, and notes draws of random numbers.

    Args:
        protected: What to call each tensor, as in "the argument 'y'", to the tensor.

    Attributes:
        random_operations: Names of the operations that drew random numbers, each once.
    """

    def __init__(self, protected: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.random_operations: list[str] = []
        # Tensors are kept, so that no other storage takes the place of theirs.
        self._protected = {_storage(tensor): (name, tensor) for name, tensor in protected.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, unless it writes a protected tensor."""
        kwargs = kwargs or {}
        operation = str(func).rsplit(".", 1)[0]
        for tensor in _written(func, args, kwargs):
            if _storage(tensor) in self._protected:
                raise WriteRefusedError(
                    f"the model writes {self._protected[_storage(tensor)][0]} in place "
                    f"({operation}), so its log density would change from call to call; work on "
                    "a copy, or call .eval() on a module that keeps running statistics"
                )
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        if seeded and operation not in self.random_operations:
            self.random_operations.append(operation)
        return func(*args, **kwargs)


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    if func in _BATCH_NORMS and args[5]:
        yield from (tensor for tensor in args[3:5] if tensor is not None)
    if not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int | None:
    if tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage()._cdata
