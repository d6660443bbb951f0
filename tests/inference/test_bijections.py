"""Bijections onto matrices: there and back, with the determinant of their own Jacobian."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import jacobian
from torch.distributions import biject_to, constraints

from bayesattn.inference import LogDensity
from bayesattn.inference.bijections import bijection

MATRICES = {
    "triangular": constraints.lower_cholesky,
    "definite": constraints.positive_definite,
    "definite ones": constraints.independent(constraints.positive_definite, 1),
}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["triangular", "definite"])
def test_the_determinant_is_that_of_the_jacobian(name, size, generator):
    transform = bijection(MATRICES[name])
    rows, columns = torch.tril_indices(size, size)
    point = torch.randn(len(rows), generator=generator)
    matrix = jacobian(lambda u: transform(u)[..., rows, columns], point)
    determinant = transform.log_abs_det_jacobian(point, transform(point))
    torch.testing.assert_close(determinant, torch.linalg.slogdet(matrix).logabsdet)


@pytest.mark.parametrize("name", MATRICES)
def test_it_is_onto_its_support_and_back(name, generator):
    support = MATRICES[name]
    transform = bijection(support)
    points = torch.randn(7, 2, 6, generator=generator)
    values = transform(points)
    assert values.shape == (7, 2, 3, 3) == transform.forward_shape((7, 2, 6))
    assert transform.inverse_shape((7, 2, 3, 3)) == (7, 2, 6)
    assert support.check(values).all()
    torch.testing.assert_close(transform.inv(values), points)
    lead = 1 if name == "definite ones" else 2
    assert transform.log_abs_det_jacobian(points, values).shape == (7, 2)[:lead]
    assert torch.autograd.gradcheck(transform, points[0].requires_grad_())


def test_all_other_supports_have_pytorchs_bijection():
    assert isinstance(bijection(constraints.positive), type(biject_to(constraints.positive)))
    with pytest.raises(NotImplementedError):
        bijection(dist.constraints.sphere)


@pytest.mark.filterwarnings("ignore:Singular sample")
def test_a_wishart_prior_has_its_own_mean():
    """Importance sampling over the density: E[S] = df * scale."""
    scale = torch.tensor([[2.0, 0.5], [0.5, 1.0]])

    def model():
        pyro.sample("matrix", dist.Wishart(torch.tensor(9.0), scale))

    density = LogDensity(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = density.unconstrain({"matrix": (9.0 * scale)[None]})[0]
        proposal = dist.Normal(start, torch.tensor([0.5, 1.5, 0.5])).to_event(1)
        rows = proposal.sample((20_000,))
    weights = (density.value_and_score(rows)[0] - proposal.log_prob(rows)).softmax(0)
    draws = density.constrain(rows)["matrix"]
    mean = torch.einsum("d,dij->ij", weights, draws)
    variance = torch.einsum("d,dij->ij", weights, (draws - mean).square())
    size = 1 / weights.square().sum()
    assert size > 2_000
    assert ((mean - 9.0 * scale).abs() < 4.5 * (variance / size).sqrt()).all()
