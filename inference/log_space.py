r"""Sums of products of tensors with named axes, in log space, that any transform can pass through.

.. math:: \log \sum_z \prod_f e^{\ell_f(z)}

Pyro's own have a logarithm without a rule for function transforms.
"""

from typing import Any

import opt_einsum
import torch
from pyro.ops.rings import LogRing
from torch import Tensor

__all__ = ["SafeLogRing", "log_sum_product"]


class SafeLogRing(LogRing):
    """Pyro's log ring with a sum of products that vmap, autograd and recording can pass through."""

    def sumproduct(self, terms: list[Any], dims: Any) -> Any:
        """Sum the product of terms over some of their named axes."""
        inputs = [term._pyro_dims for term in terms]
        output = "".join(sorted(set("".join(inputs)) - set(dims)))
        term: Any = log_sum_product(f"{','.join(inputs)}->{output}", *terms)
        term._pyro_dims = output
        return term


def log_sum_product(equation: str, *terms: Tensor) -> Tensor:
    """Sum of products in log space: ``logsumexp`` over the dropped axes of the sum of all terms.

    Args:
        equation: As of :func:`torch.einsum`, without ellipsis or repeated letters in a term.
        *terms: Log factors; minus infinity is allowed, and has zero gradient.
    """
    inputs, output = equation.split("->")
    names = inputs.split(",")
    path = [(0,)] if len(terms) == 1 else _path(equation, terms)
    operands = list(zip(names, terms, strict=True))
    for step, chosen in enumerate(path):
        picked = [operands.pop(index) for index in sorted(chosen, reverse=True)]
        needed = set(output).union(*(name for name, _ in operands))
        letters = sorted(set().union(*(name for name, _ in picked)))
        keep = [letter for letter in letters if letter in needed]
        last = step == len(path) - 1
        operands.append(_contract_pair(picked, letters, list(output) if last else keep))
    return operands[0][1]


def _path(equation: str, terms: tuple[Tensor, ...]) -> Any:
    shapes = [tuple(term.shape) for term in terms]
    return opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")[0]


def _contract_pair(
    picked: list[tuple[str, Tensor]], letters: list[str], keep: list[str]
) -> tuple[str, Tensor]:
    total: Any = 0.0
    for name, term in picked:
        present = [letter for letter in letters if letter in name]
        term = term.permute([name.index(letter) for letter in present])
        for axis, letter in enumerate(letters):
            if letter not in name:
                term = term.unsqueeze(axis)
        total = total + term
    dropped = [axis for axis, letter in enumerate(letters) if letter not in keep]
    if dropped:
        total = _logsumexp(total, dropped)
    left = [letter for letter in letters if letter in keep]
    return "".join(keep), total.permute([left.index(letter) for letter in keep])


def _logsumexp(values: Tensor, axes: list[int]) -> Tensor:
    """Log-sum-exp whose gradient is zero, not NaN, where all entries are minus infinity."""
    limits = torch.finfo(values.dtype)
    shift = values.detach().amax(axes, keepdim=True).clamp(limits.min, limits.max)
    total = (values - shift).exp().sum(axes)
    finite = total.clamp(min=limits.tiny).log() + shift.reshape(total.shape)
    return torch.where(total > 0, finite, -torch.inf)
