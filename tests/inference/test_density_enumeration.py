"""Discrete latent sites are summed out exactly: against sums written by hand."""

import itertools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import biject_to, constraints

from bayesattn.inference import LogDensity
from bayesattn.inference.log_space import log_sum_product

Y = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.1, -0.4], dtype=torch.float64)


def rows_of(density, count=3):
    return torch.randn(count, density.dim, generator=torch.Generator().manual_seed(3))


def normal(mean, y, scale=1.0):
    return dist.Normal(mean, scale).log_prob(y)


def standard(values):
    return dist.Normal(0.0, 1.0).log_prob(values).sum()


def test_global_discrete_site():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", dist.Bernoulli(0.3)).long()
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)

    density = LogDensity(model, Y)
    rows = rows_of(density)
    for row, value in zip(rows, density.value_and_score(rows)[0], strict=True):
        terms = [torch.tensor(p).log() + normal(row[k], Y).sum() for k, p in enumerate((0.7, 0.3))]
        torch.testing.assert_close(value, torch.stack(terms).logsumexp(0) + standard(row))


@pytest.mark.parametrize("subsample_size", [None, 2])
def test_local_discrete_sites_with_the_scale_outside_of_the_sum(subsample_size):
    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("n", len(y), subsample_size=subsample_size) as index:
            z = pyro.sample("z", dist.Categorical(share))
            pyro.sample("y", dist.Normal(mean[z], 0.5), obs=y[index])

    density = LogDensity(model, Y)
    chosen = torch.tensor([4, 1])
    subsample = None if subsample_size is None else {"n": chosen}
    used, scale = (Y, 1.0) if subsample_size is None else (Y[chosen], 3.0)
    rows = rows_of(density)
    for row, value in zip(rows, density.value_and_score(rows, subsample)[0], strict=True):
        simplex = biject_to(constraints.simplex)
        share = simplex(row[3:])
        mixture = normal(row[:3], used[:, None], 0.5) + share.log()
        expected = scale * mixture.logsumexp(-1).sum() + standard(row[:3])
        expected = expected + dist.Dirichlet(torch.ones(3)).log_prob(share)
        expected = expected + simplex.log_abs_det_jacobian(row[3:], share)
        torch.testing.assert_close(value, expected)


def test_two_dependent_discrete_sites_in_nested_plates():
    table = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    y = Y.reshape(2, 3)

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        outer, inner = pyro.plate("group", 2, dim=-2), pyro.plate("member", 3, dim=-1)
        with outer:
            a = pyro.sample("a", dist.Bernoulli(0.25)).long()
            with inner:
                b = pyro.sample("b", dist.Categorical(table[a]))
                pyro.sample("y", dist.Normal(mean[b] + a, 1.0), obs=y)

    density = LogDensity(model, y)
    rows = rows_of(density)
    for row, value in zip(rows, density.value_and_score(rows)[0], strict=True):
        expected = standard(row)
        for group in range(2):
            states = []
            for a, p in enumerate((0.75, 0.25)):
                total = torch.tensor(p).log()
                for member in range(3):
                    inside = [
                        table[a, b].log() + normal(row[b] + a, y[group, member]) for b in (0, 1)
                    ]
                    total = total + torch.stack(inside).logsumexp(0)
                states.append(total)
            expected = expected + torch.stack(states).logsumexp(0)
        torch.testing.assert_close(value, expected)


def forward_pass(transition, mean, y):
    alpha = transition[0].log() + normal(mean, y[0])
    for observation in y[1:]:
        alpha = (alpha[:, None] + transition.log()).logsumexp(0) + normal(mean, observation)
    return alpha.logsumexp(0)


@pytest.mark.parametrize("is_markov", [True, False])
def test_hidden_markov_model_against_a_forward_pass(is_markov):
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        state = 0
        steps = range(len(y))
        for t in pyro.markov(steps) if is_markov else steps:
            state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
            pyro.sample(f"y_{t}", dist.Normal(mean[state], 1.0), obs=y[t])

    density = LogDensity(model, Y)
    rows = rows_of(density)
    values, scores = density.value_and_score(rows)
    for row, value, score in zip(rows, values, scores, strict=True):
        row = row.clone().requires_grad_()
        expected = forward_pass(transition, row, Y) + standard(row)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(score, torch.autograd.grad(expected, row)[0])


def test_hidden_markov_models_in_a_plate_with_latent_transitions():
    y = torch.stack([Y, Y.flip(0)])

    def model(y):
        transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        with pyro.plate("sequence", 2):
            state = 0
            for t in pyro.markov(range(6)):
                state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
                pyro.sample(f"y_{t}", dist.Normal(1.0 * state, 1.0), obs=y[:, t])

    density = LogDensity(model, y)
    rows = rows_of(density)
    simplex = biject_to(constraints.simplex)
    for row, value in zip(rows, density.value_and_score(rows)[0], strict=True):
        transition = simplex(row[:, None])
        expected = sum(forward_pass(transition, torch.tensor([0.0, 1.0]), each) for each in y)
        expected = expected + dist.Dirichlet(torch.ones(2, 2)).log_prob(transition).sum()
        expected = expected + simplex.log_abs_det_jacobian(row[:, None], transition).sum()
        torch.testing.assert_close(value, expected)


def test_masks_act_inside_of_the_sum():
    seen = torch.tensor([True, False, True, True, False, True])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3)).long()
            with poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)

    density = LogDensity(model, Y)
    rows = rows_of(density)
    for row, value in zip(rows, density.value_and_score(rows)[0], strict=True):
        weights = torch.tensor([0.7, 0.3]).log()
        mixture = (weights + normal(row, Y[seen][:, None])).logsumexp(-1).sum()
        torch.testing.assert_close(value, mixture + standard(row))


def test_impossible_states_have_finite_scores():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([1.0, 0.0])))
            pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)

    density = LogDensity(model, Y)
    rows = rows_of(density)
    values, scores = density.value_and_score(rows)
    for row, value in zip(rows, values, strict=True):
        torch.testing.assert_close(
            value, normal(row[0], Y).sum() + standard(row), rtol=1e-5, atol=1e-5
        )
    assert scores.isfinite().all()


def test_sites_that_share_a_discrete_one_need_one_scale():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", dist.Bernoulli(0.3)).long()
        with pyro.plate("n", len(y)), poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)

    with pytest.raises(ValueError, match="different scales"):
        LogDensity(model, Y)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (lambda: pyro.sample("count", dist.Poisson(torch.tensor(3.0))), "'count'.*Poisson"),
        (
            lambda: pyro.sample("flip", dist.Bernoulli(0.5), infer={"enumerate": "sequential"}),
            "'flip'.*'sequential'",
        ),
    ],
)
def test_unsupported_discrete_sites_are_refused_by_name(site, reason):
    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(x + site(), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=reason):
        LogDensity(model)


def test_log_sum_product_against_loops(generator):
    a, b, c = (torch.randn(shape, generator=generator) for shape in [(2, 3), (3, 4), (4,)])
    result = log_sum_product("ij,jk,k->i", a, b, c)
    for i in range(2):
        terms = [a[i, j] + b[j, k] + c[k] for j, k in itertools.product(range(3), range(4))]
        torch.testing.assert_close(result[i], torch.stack(terms).logsumexp(0))
