"""EM on attention's mixtures: one step is attention, many steps climb to a mode."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesattn as ba
from bayesattn.inference import EM, Checkpoint, ConvergenceWarning, NonFiniteError
from bayesattn.iterated_attention import em_attention
from bayesattn.models import (
    DirichletMixing,
    KeysFromQueries,
    QueriesFromKeys,
    UniformMixing,
    VariancePrior,
)
from bayesattn.normalizations import DoublyNormalized
from tests.inference.test_checkpoints import StopAt, assert_same
from tests.models.mixture_cases import make_masks, make_problem, step

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
LEARNED = KeysFromQueries(
    center_scale=1.5, mixing=DirichletMixing(2.0), variance=VariancePrior(3.0, 1.0)
)


def run(model, *data, **options):
    options = {"num_steps": 7, "seed": 0, "progress": False, "compile": "none", **options}
    return EM(model, compile=options.pop("compile")).run(*data, **options)


def clusters(generator, num_keys=60, spread=0.3):
    """Keys around three far centers, and rough guesses of these as queries."""
    centers = torch.tensor([[4.0, 0.0], [-4.0, 1.0], [0.0, -5.0]])
    chosen = torch.arange(num_keys) % 3
    keys = centers[chosen] + spread * torch.randn(num_keys, 2, generator=generator)
    return centers, centers + torch.tensor([1.0, -0.8]), keys


@pytest.mark.parametrize("kind", ["none", "padding and pairs"])
def test_one_step_from_the_queries_is_doubly_normalized_attention(kind, generator):
    data, masks = make_problem(generator), make_masks(kind, generator)
    query, key, _ = data
    posterior = run(KeysFromQueries(), *data, num_steps=1, **masks)
    expected = ba.attention(query, key, key, normalization=DoublyNormalized(), **masks)
    center = posterior.draws["center"]
    assert center.shape == (1, 1, *query.shape)
    seen = expected.abs().sum(-1) > 0
    close(center[0, 0][seen], expected[seen])
    assert torch.equal(center[0, 0][~seen], query[~seen])


@pytest.mark.parametrize("num_steps", [2, 5])
def test_more_steps_are_iterated_attention(num_steps, generator):
    query, key, value = make_problem(generator)
    for model, shares in ((KeysFromQueries(), None), (KeysFromQueries(mixing=UniformMixing()), 0)):
        log_mixing = None if shares is None else torch.zeros(query.shape[:-1])
        expected = em_attention(query, key, num_steps=num_steps, log_mixing=log_mixing)
        posterior = run(model, query, key, value, num_steps=num_steps)
        close(posterior.draws["center"][0, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("model", [LEARNED, QueriesFromKeys(cue_scale=0.8)], ids=["keys", "cues"])
def test_the_curve_is_the_log_joint_and_never_falls(model, generator):
    """Mutant: the density after the step."""
    data = make_problem(generator)
    curve = run(model, *data, num_steps=13).optimization["log_density"][0]
    state = model.initial_state(*data)
    for value in curve:
        close(value, model.log_density(state, *data).sum())
        state = step(model, state, data, {})
    rises = curve.diff()
    assert (rises[:5] > 0).all()
    assert (rises > -1e-9).all()


def test_a_mode_is_no_lower_than_gradients_find_it(generator):
    """A quasi-Newton method, from where EM starts and from where it ends."""
    _, query, key = clusters(generator, num_keys=11, spread=1.5)
    posterior = run(LEARNED, query, key, num_steps=3000, tolerance=1e-13)
    assert posterior.attrs["is_settled"] == 1
    ours = {site: value[0, 0] for site, value in posterior.draws.items()}
    reached = LEARNED.log_density(ours, query, key)

    def loss(center, log_variance, mixing_logits):
        shares = {"variance": log_variance.exp(), "mixing": mixing_logits.softmax(-1)}
        return -LEARNED.log_density({"center": center, **shares}, query, key)

    for start in (ours, LEARNED.initial_state(query, key)):
        leaves = [
            start["center"].clone().requires_grad_(),
            start["variance"].log().requires_grad_(),
            start["mixing"].log().requires_grad_(),
        ]
        optimizer = torch.optim.LBFGS(leaves, max_iter=300, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, leaves=leaves):
            optimizer.zero_grad()
            value = loss(*leaves)
            value.backward()
            return value

        optimizer.step(closure)
        found = -closure().detach()
        torch.testing.assert_close(found, reached, rtol=0, atol=1e-6)


def test_centers_are_found(generator):
    """Of twenty keys each, to five standard errors; the start is farther away than that."""
    centers, query, key = clusters(generator)
    posterior = run(KeysFromQueries(variance=0.09, mixing=UniformMixing()), query, key)
    close(posterior.draws["center"][0, 0], key.reshape(20, 3, 2).mean(0), rtol=1e-6, atol=1e-6)
    bound = 5 * 0.3 / 20**0.5
    assert (posterior.draws["center"][0, 0] - centers).abs().max() < bound
    assert (query - centers).abs().min() > bound


def test_shares_and_variance_are_found(generator):
    _, query, key = clusters(generator)
    key = torch.cat([key, key[::3] + 0.1 * torch.randn(20, 2, generator=generator)])
    draws = run(LEARNED, query, key, num_steps=50).draws
    counts = torch.tensor([40.0, 20.0, 20.0])
    close(draws["mixing"][0, 0], (counts + 1) / (counts + 1).sum(), rtol=1e-6, atol=1e-6)
    # Of the residuals' standard deviation: 160 entries, and a prior of few data.
    assert abs(draws["variance"][0, 0].sqrt() - 0.3) < 4 * 0.3 / 320**0.5 + 0.02


def test_a_center_that_accounts_for_little_is_no_trouble(generator):
    """Its share of any key is below the smallest number, yet it has a nearest key."""
    _, query, key = clusters(generator)
    query = torch.cat([query, torch.tensor([[1e4, 0.0]])])
    settings = {"variance": 0.1, "mixing": UniformMixing()}
    flat = run(KeysFromQueries(**settings), query, key, num_steps=1)
    assert all(value.isfinite().all() for value in flat.draws.values())
    rightmost = key[key[:, 0].argmax()]
    close(flat.draws["center"][0, 0, -1], rightmost, rtol=1e-6, atol=1e-6)
    prior = run(KeysFromQueries(center_scale=2.0, **settings), query, key, num_steps=3)
    close(prior.draws["center"][0, 0, -1], query[-1])
    learned = run(KeysFromQueries(center_scale=2.0, mixing=DirichletMixing()), query, key)
    assert learned.draws["mixing"][0, 0, -1] < 0.02


def test_problems_of_a_batch_are_solved_as_if_alone(generator):
    data = make_problem(generator)
    together = run(LEARNED, *data, num_steps=5).draws
    for batch, head in ((0, 2), (1, 0)):
        alone = run(LEARNED, *(part[batch, head] for part in data), num_steps=5).draws
        for site, value in alone.items():
            close(together[site][0, 0, batch, head].reshape(value.shape), value, rtol=1e-10)


def test_single_precision_data_give_single_precision_modes(generator):
    data = make_problem(generator)
    exact, ours = run(LEARNED, *data).draws, run(LEARNED, *(part.float() for part in data)).draws
    for site, value in ours.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[site], rtol=1e-3, atol=1e-4)


def test_restarts_are_drawn_from_the_prior(generator):
    """The first run starts at the queries, whatever the seed; others do not."""
    data = make_problem(generator)
    one = run(LEARNED, *data, num_steps=1)
    three, again, other = (run(LEARNED, *data, num_runs=3, num_steps=1, seed=s) for s in (4, 4, 5))
    assert torch.equal(three.unconstrained, again.unconstrained)
    assert torch.equal(three.unconstrained[0], one.unconstrained[0])
    assert not torch.equal(three.unconstrained[1], three.unconstrained[2])
    assert not torch.equal(three.unconstrained[1], other.unconstrained[1])
    curve = three.optimization["log_density"]
    assert curve.shape == (3, 1)
    state = LEARNED.initial_state(*data)
    close(curve[0, 0], LEARNED.log_density(state, *data).sum())


def test_restarts_have_the_spread_of_the_prior(generator):
    """Mutant: starts that are uniform on the real line."""
    data = make_problem(generator)
    em = EM(KeysFromQueries(center_scale=0.01), compile="none")
    first, *others = em.init(em.log_density(*data), 3, None, generator).runs
    assert torch.equal(first["center"], data[0])
    for state in others:
        shift = (state["center"] - data[0]) / 0.01
        # Of 330 entries; to five standard errors.
        assert abs(shift.mean()) < 5 / 330**0.5
        assert abs(shift.std() - 1) < 5 / 660**0.5


def test_a_start_of_ones_own(generator):
    data = make_problem(generator)
    state = step(LEARNED, LEARNED.initial_state(*data), data, {})
    ours = run(LEARNED, *data, num_steps=2, init=state)
    torch.testing.assert_close(
        ours.unconstrained, run(LEARNED, *data, num_steps=3).unconstrained, rtol=1e-9, atol=1e-9
    )


def test_it_stops_where_a_step_brings_no_more(generator):
    _, query, key = clusters(generator)
    posterior = run(LEARNED, query, key, num_steps=1000, tolerance=1e-9, check_every=5)
    assert posterior.attrs["is_settled"] == 1
    done = posterior.attrs["num_steps"]
    assert 5 <= done < 200
    assert done % 5 == 0
    rises = posterior.optimization["log_density"][0].diff()
    assert rises[-1] <= 1e-9 < rises[0]
    assert "is_settled" not in run(LEARNED, query, key, num_steps=5).attrs


@pytest.mark.parametrize("done", [1, 9])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(done, generator, tmp_path, monkeypatch):
    data = make_problem(generator)
    length = {"num_steps": 13, "num_runs": 2}
    whole = run(LEARNED, *data, **length)
    path = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patch:
        StopAt(patch, done)
        with pytest.warns(RuntimeWarning, match=f"interrupted after {done} of 13 steps"):
            stopped = run(LEARNED, *data, **length, checkpoint=Checkpoint(path, every_steps=4))
    assert stopped.attrs["interrupted"] == 1
    assert not torch.equal(stopped.unconstrained, whole.unconstrained)
    assert_same(whole, run(LEARNED, *data, **length, checkpoint=path))
    with pytest.raises(ValueError, match="tolerance"):
        run(LEARNED, *data, **length, checkpoint=path, tolerance=1e-3)


def test_assignments_are_drawn_given_the_mode(generator):
    """Also where a latent query hangs on its assignment, and so on what is enumerated."""
    centers, query, key = clusters(generator)
    nearest = torch.cdist(key, centers).argmin(-1)
    ours = run(KeysFromQueries(variance=0.09, mixing=UniformMixing()), query, key)
    drawn = ours.predict(sites=["assignment"], seed=0)["assignment"]
    assert torch.equal(drawn[0, 0], nearest)
    retrieval = QueriesFromKeys(variance=0.09, mixing=UniformMixing(), cue_scale=0.5)
    ours = run(retrieval, key, centers)
    drawn = ours.predict(sites=["assignment"], seed=0)["assignment"]
    assert torch.equal(drawn[0, 0], nearest)


def test_retrieval_ends_at_a_memory(generator):
    """Iterated softmax attention over far keys: a cue ends at the key it is next to."""
    centers, query, _ = clusters(generator)
    model = QueriesFromKeys(variance=0.5, mixing=UniformMixing(), cue_scale=math.inf)
    posterior = run(model, query, centers, num_steps=5)
    close(posterior.draws["retrieved_query"][0, 0], centers, rtol=1e-9, atol=1e-9)


class Altered(KeysFromQueries):
    """A mixture with an M-step that is none."""

    def m_step(self, state, log_responsibilities, *args, **kwargs):
        moved = super().m_step(state, log_responsibilities, *args, **kwargs)
        return moved | {"center": moved["center"] + self.shift(moved["center"])}

    @staticmethod
    def shift(center):
        return torch.full_like(center, 3.0)


class Diverging(Altered):
    @staticmethod
    def shift(center):
        return torch.full_like(center, torch.inf)


class Mistaken(KeysFromQueries):
    """A mixture whose density lacks a term."""

    def log_density(self, state, *args, **kwargs):
        return super().log_density(state, *args, **kwargs) + 1.0


def test_closed_forms_that_are_not_the_programs_are_noticed(generator):
    data = make_problem(generator)
    with pytest.warns(ConvergenceWarning, match="log joint density of run 0 fell at step"):
        posterior = run(Altered(), *data)
    assert posterior.attrs["problems"]
    with pytest.raises(NonFiniteError, match=r"EM: .* not finite at step 1, first in center"):
        run(Diverging(), *data)
    with pytest.raises(ValueError, match=r"log_density is .* at the start, but its sites have"):
        run(Mistaken(), *data)


def minibatches(features):
    level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("row", len(features), subsample_size=3) as rows:
        pyro.sample("feature", dist.Normal(level, 1.0), obs=features[rows])


def test_what_em_cannot_do_is_refused(generator):
    data = make_problem(generator)
    with pytest.raises(ValueError, match=r"lacks \['log_density', 'e_step', 'm_step'\]"):
        EM(minibatches)
    partly = functools.partial(minibatches)
    partly.log_density = partly.e_step = partly.m_step = lambda *args: None
    with pytest.raises(ValueError, match=r"full data, but the plates \['row'\] are subsampled"):
        run(partly, torch.randn(7, generator=generator))
    with pytest.raises(ValueError, match="tolerance must not be negative, got -1"):
        run(LEARNED, *data, tolerance=-1.0)
    with pytest.raises(ValueError, match="no continuous latent site"):
        run(QueriesFromKeys(), *data)
    with pytest.raises(ValueError, match="init must give values for the sites"):
        run(LEARNED, *data, init={"center": data[0]})
