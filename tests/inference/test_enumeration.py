"""Discrete sites beyond the plain cases: coupled chains, zeros, partial plates, pointwise terms."""

import itertools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from bayesattn.inference import LogDensity
from bayesattn.inference.enumeration import enumerated, pointwise_log_likelihood
from bayesattn.inference.log_space import log_sum_product

Y = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)


def normal(mean, y, scale=1.0):
    return dist.Normal(mean, scale).log_prob(torch.as_tensor(y))


def standard(values):
    return normal(0.0, values).sum()


def rows_of(density, count=3):
    return torch.randn(count, density.dim, generator=torch.Generator().manual_seed(3))


def summed(terms):
    return torch.stack([torch.as_tensor(term) for term in terms]).logsumexp(0)


def assert_is(density, by_hand, subsample=None):
    """Values and scores equal those of a sum by hand over all states."""
    rows = rows_of(density)
    values, scores = density.value_and_score(rows, subsample)
    for row, value, score in zip(rows, values, scores, strict=True):
        row = row.clone().requires_grad_()
        wanted = by_hand(row)
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(score, torch.autograd.grad(wanted, row)[0], rtol=1e-9, atol=1e-9)


def test_sites_of_every_countable_kind():
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        count = pyro.sample("count", dist.Binomial(3, 0.3))
        kind = pyro.sample("kind", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
        flip = pyro.sample("flip", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(x * count + kind[..., 0] - flip, 1.0), obs=y)

    def by_hand(row):
        terms = []
        for count, kind, flip in itertools.product(range(4), range(2), range(2)):
            prior = dist.Binomial(3, 0.3).log_prob(torch.tensor(float(count)))
            prior = prior + torch.tensor([0.2, 0.8][kind] * [0.6, 0.4][flip]).log()
            terms.append(prior + normal(row[0] * count + (kind == 0) - flip, Y[0]))
        return summed(terms) + standard(row)

    assert_is(LogDensity(model, Y[0]), by_hand)


def test_chains_that_meet_in_each_observation():
    """Two chains with their own transitions, observed by their sum."""
    first, second = torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([[0.5, 0.5], [0.2, 0.8]])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        a = b = 0
        for t in pyro.markov(range(3)):
            a = pyro.sample(f"a_{t}", dist.Categorical(first[a]))
            b = pyro.sample(f"b_{t}", dist.Categorical(second[b]))
            pyro.sample(f"y_{t}", dist.Normal(mean[0] * a + mean[1] * b, 1.0), obs=y[t])

    def by_hand(row):
        terms = []
        for a in itertools.product((0, 1), repeat=3):
            for b in itertools.product((0, 1), repeat=3):
                steps = zip((0, *a), a, (0, *b), b, Y, strict=False)
                term = torch.zeros(())
                for before_a, now_a, before_b, now_b, y in steps:
                    prior = first[before_a, now_a].log() + second[before_b, now_b].log()
                    term = term + prior + normal(row[0] * now_a + row[1] * now_b, y)
                terms.append(term)
        return summed(terms) + standard(row)

    assert_is(LogDensity(model, Y), by_hand)


def test_a_chain_that_remembers_two_steps():
    table = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.5, 0.5]]])

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        before = now = torch.tensor(0)
        for t in pyro.markov(range(4), history=2):
            before, now = now, pyro.sample(f"z_{t}", dist.Categorical(table[before, now]))
            pyro.sample(f"y_{t}", dist.Normal(mean[now], 1.0), obs=y[t])

    def by_hand(row):
        terms = []
        for path in itertools.product((0, 1), repeat=4):
            states = (0, 0, *path)
            prior = sum(table[states[t : t + 3]].log() for t in range(4))
            terms.append(prior + normal(row[list(path)], Y).sum())
        return summed(terms) + standard(row)

    assert_is(LogDensity(model, Y), by_hand)


def test_sequences_of_their_own_lengths_in_a_subsampled_plate():
    y = torch.stack([Y, Y.flip(0), 2 * Y])
    lengths, chosen = torch.tensor([4, 1, 3]), torch.tensor([2, 1])
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]])

    def model(y, lengths):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("sequence", 3, subsample_size=2) as index:
            state = 0
            for t in pyro.markov(range(4)):
                with poutine.mask(mask=t < lengths[index]):
                    state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
                    pyro.sample(f"y_{t}", dist.Normal(mean[state], 1.0), obs=y[index, t])

    def by_hand(row):
        total = standard(row)
        for sequence in chosen.tolist():
            length = int(lengths[sequence])
            paths = itertools.product((0, 1), repeat=length)
            terms = []
            for path in paths:
                moves = zip((0, *path), path, strict=False)
                prior = sum(transition[a, b].log() for a, b in moves)
                terms.append(prior + normal(row[list(path)], y[sequence, :length]).sum())
            total = total + 3 / 2 * summed(terms)
        return total

    assert_is(LogDensity(model, y, lengths), by_hand, {"sequence": chosen})


def test_a_discrete_site_may_choose_among_latents_of_a_plate():
    def model(y):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("component", 2):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            kind = pyro.sample("kind", dist.Bernoulli(share)).long()
            pyro.sample("y", dist.Normal(mean[kind], 1.0), obs=y)

    def by_hand(row):
        share = row[0].sigmoid()
        prior = dist.Beta(2.0, 2.0).log_prob(share) + (share * (1 - share)).log()
        sides = torch.stack([1 - share, share]).log() + normal(row[1:], Y[:, None])
        return prior + standard(row[1:]) + sides.logsumexp(1).sum()

    assert_is(LogDensity(model, Y), by_hand)


@pytest.mark.parametrize("impossible", [[False, True], [True, True]])
def test_zeros_are_exact_and_leave_finite_scores(impossible):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.factor("possible", torch.where(torch.tensor(impossible), -torch.inf, 0.0)[z] + x * z)

    value, score = LogDensity(model).value_and_score(torch.tensor([[0.3]]))
    assert score.isfinite().all()
    if all(impossible):
        assert value == -torch.inf
    else:
        torch.testing.assert_close(value[0], normal(0.0, 0.3) + torch.tensor(0.5).log())
        torch.testing.assert_close(score[0, 0], torch.tensor(-0.3))


def test_log_sum_product_keeps_zeros_and_infinities():
    low, high = -torch.inf, torch.inf
    terms = torch.tensor([[low, low], [0.0, low], [high, 0.0], [1e308, -1e308]], requires_grad=True)
    result = log_sum_product("ij->i", terms)
    assert result.tolist() == [low, 0.0, high, 1e308]
    (gradient,) = torch.autograd.grad(result[[0, 1, 3]].sum(), terms)
    assert gradient[[0, 1, 3]].tolist() == [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("equation", ["ab,bc,cd->", "ab,bc->ca", "ab,ab->b", "a,b->ba", "abc->b"])
def test_log_sum_product_is_einsum_of_exponentials(equation, generator):
    sizes = dict(zip("abcd", (2, 3, 4, 5), strict=True))
    names = equation.split("->")[0].split(",")
    terms = [
        torch.randn([sizes[letter] for letter in name], generator=generator, requires_grad=True)
        for name in names
    ]
    result = log_sum_product(equation, *terms)
    wanted = torch.einsum(equation, *(term.exp() for term in terms)).log()
    torch.testing.assert_close(result, wanted)
    one, other = (torch.autograd.grad(total.sum(), terms) for total in (result, wanted))
    for got, gradient in zip(one, other, strict=True):
        torch.testing.assert_close(got, gradient)


def traced(model, nesting):
    return poutine.trace(enumerated(model, -1 - nesting)).get_trace()


def test_pointwise_terms_are_laid_out_as_the_site_and_unscaled():
    y = torch.stack([Y[:3], 2 * Y[:3]])

    def model():
        with pyro.plate("group", 2, dim=-2), poutine.scale(scale=5.0):
            a = pyro.sample("a", dist.Bernoulli(0.25))
            pyro.sample("whole", dist.Normal(a, 1.0), obs=Y[:2, None])
        with pyro.plate("group_", 2, dim=-2), pyro.plate("member", 3, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            with poutine.mask(mask=torch.tensor([True, False, True])):
                pyro.sample("y", dist.Normal(b, 1.0), obs=y)
        pyro.sample("plain", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=Y[:3])

    terms = pointwise_log_likelihood(traced(model, 2), ("whole", "y", "plain"))
    sides = torch.stack([normal(0.0, Y[:2]), normal(1.0, Y[:2])], -1)
    sides = sides + torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(terms["whole"], sides.logsumexp(-1))
    weights = torch.tensor([0.6, 0.4]).log()
    mixture = torch.stack([normal(0.0, y), normal(1.0, y)], -1) + weights
    seen = torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(terms["y"], mixture.logsumexp(-1) * seen)
    torch.testing.assert_close(terms["plain"], standard(Y[:3]))


def test_observations_coupled_by_a_discrete_site_have_no_pointwise_terms():
    def across_sites():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("one", dist.Normal(z, 1.0), obs=Y[0])
        pyro.sample("other", dist.Normal(z, 1.0), obs=Y[1])

    def within_a_site():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("row", 4):
            pyro.sample("one", dist.Normal(z, 1.0), obs=Y)

    with pytest.raises(ValueError, match=r"'one' is coupled to \['other'\]"):
        pointwise_log_likelihood(traced(across_sites, 0), ("one", "other"))
    with pytest.raises(ValueError, match="'one' is coupled to its own other elements"):
        pointwise_log_likelihood(traced(within_a_site, 1), ("one",))
