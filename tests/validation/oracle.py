"""The log density of a Pyro program on the unconstrained scale, by Pyro's own accounting."""

from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from tests.validation.references import ReferencePosterior, supports


def oracle(
    reference: ReferencePosterior, model: Callable[..., None] | None = None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return particles -> (values, scores): a loop over particles, a trace for each.

    Args:
        reference: Gives the data, the sites and their order.
        model: Another program over the same sites; default, the reference's own.
    """
    program = reference.model if model is None else model
    transforms = {site: biject_to(support) for site, support in supports(reference).items()}
    shapes = {site: value.shape[1:] for site, value in reference.draws.items()}

    def log_density(row: Tensor) -> Tensor:
        pieces = row.split([shape.numel() for shape in shapes.values()])
        values, log_determinant = {}, row.new_zeros(())
        for (site, shape), piece in zip(shapes.items(), pieces, strict=True):
            unconstrained = piece.reshape(shape)
            values[site] = transforms[site](unconstrained)
            jacobian = transforms[site].log_abs_det_jacobian(unconstrained, values[site])
            log_determinant = log_determinant + jacobian.sum()
        trace = poutine.trace(poutine.condition(program, data=values)).get_trace(*reference.data)
        return trace.log_prob_sum() + log_determinant

    def value_and_score(particles: Tensor) -> tuple[Tensor, Tensor]:
        rows = [row.detach().requires_grad_() for row in particles]
        values = [log_density(row) for row in rows]
        scores = [
            torch.autograd.grad(value, row)[0] for value, row in zip(values, rows, strict=True)
        ]
        return torch.stack(values).detach(), torch.stack(scores)

    return value_and_score


def with_extra_prior(
    model: Callable[..., None], site: str, prior: pyro.distributions.Distribution
) -> Callable[..., None]:
    """The program with one site's prior multiplied by another: a wrong prior."""

    def wrong(*data: Tensor) -> None:
        with poutine.trace() as tracer:
            model(*data)
        value = tracer.trace.nodes[site]["value"]
        pyro.factor("extra_prior", prior.log_prob(value).sum())

    return wrong
