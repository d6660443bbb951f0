r"""What is evaluated of one particle, given a run of the program at its values.

.. math:: \log p(u), \quad \nabla_u \log p(u), \quad \nabla^2_u \log p(u), \quad x(u), \quad u(x)
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value, jacrev

from bayesattn.inference.program import Program
from bayesattn.inference.substitution import Substitution

__all__ = ["KINDS", "Joint", "constrain", "hessian", "unconstrain", "value_and_score"]

# Log joint of a run at unconstrained= or constrained= values, and what the run substituted.
Joint = Callable[..., tuple[Tensor, Substitution]]


def value_and_score(joint: Joint, _: Program, row: Tensor) -> tuple[Tensor, ...]:
    """Log density and score."""
    score, value = grad_and_value(lambda particle: joint(unconstrained=particle)[0])(row)
    return value, score


def hessian(joint: Joint, _: Program, row: Tensor) -> tuple[Tensor, ...]:
    """Log density, score and Hessian."""

    def score(particle: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first, value = grad_and_value(lambda particle: joint(unconstrained=particle)[0])(particle)
        return first, (value, first)

    second, (value, first) = jacrev(score, has_aux=True)(row)
    return value, first, second


def constrain(joint: Joint, program: Program, row: Tensor) -> tuple[Tensor, ...]:
    """Log determinant, and the constrained value of each latent site."""
    _, run = joint(unconstrained=row)
    determinant = sum(run.log_determinants, row.new_zeros(()))
    # A value may be a view of the row, which the caller may go on to move.
    return determinant, *(run.values[site.name].clone() for site in program.latents)


def unconstrain(joint: Joint, program: Program, row: Tensor) -> tuple[Tensor, ...]:
    """Unconstrained vector of a row of constrained values, one site after the other, flattened."""
    parts = row.split([site.shape.numel() for site in program.latents])
    values = {
        site.name: part.reshape(site.shape).to(site.dtype)
        for site, part in zip(program.latents, parts, strict=True)
    }
    _, run = joint(constrained=values)
    images = [run.images[site.name].flatten().to(program.dtype) for site in program.latents]
    return (torch.cat(images),)


KINDS: dict[str, Callable[[Joint, Program, Tensor], tuple[Tensor, ...]]] = {
    "value_and_score": value_and_score,
    # The same outside of loops.
    "once": value_and_score,
    "hessian": hessian,
    "constrain": constrain,
    "unconstrain": unconstrain,
}
