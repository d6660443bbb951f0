"""Tests of predictions and pointwise densities: bayesattn.inference.prediction and replay."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Predictive
from pyro.nn import PyroModule, PyroSample
from torch.distributions import Normal

from bayesattn.inference.posterior import Posterior


def posterior_of(model, draws, *args, draws_are="markov", **fields):
    return Posterior(draws, method="test", draws_are=draws_are, model=model, args=args, **fields)


def regression(features, response=None):
    """Two sites, a plate each, and a deterministic one."""
    dim = features.shape[-1]
    with pyro.plate("output", 2):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
    noise = pyro.sample("noise", dist.Gamma(2.0, 3.0))
    mean = pyro.deterministic("mean", features @ weight.T)
    with pyro.plate("row", len(features)):
        pyro.sample("response", dist.Normal(mean, noise).to_event(1), obs=response)


@pytest.fixture
def data(generator):
    return torch.randn(7, 3, generator=generator), torch.randn(7, 2, generator=generator)


@pytest.fixture
def draws(generator):
    weight = torch.randn(2, 5, 2, 3, generator=generator)
    return {"weight": weight, "noise": 0.5 + torch.rand(2, 5, generator=generator)}


@pytest.fixture
def fitted(draws, data):
    return posterior_of(regression, draws, *data)


def mean_of(draws, features):
    return torch.einsum("nd,cskd->csnk", features, draws["weight"])


def test_deterministic_sites_follow_the_draws(fitted, draws, data, generator):
    new = torch.randn(4, 3, generator=generator)
    predicted = fitted.predict(new)
    assert list(predicted) == ["mean", "response"]
    torch.testing.assert_close(predicted["mean"], mean_of(draws, new))
    assert list(fitted.predict()) == ["mean"]
    torch.testing.assert_close(fitted.predict()["mean"], mean_of(draws, data[0]))


def test_predicted_sites_are_drawn_from_their_conditional(fitted, draws, generator):
    new = torch.randn(5000, 3, generator=generator)
    sample = fitted.predict(new, sites=["response"], seed=0)["response"]
    standard = (sample - mean_of(draws, new)) / draws["noise"][..., None, None]
    error = 5 / math.sqrt(10_000)
    torch.testing.assert_close(standard.mean((2, 3)), torch.zeros(2, 5), atol=error, rtol=0)
    torch.testing.assert_close(standard.std((2, 3)), torch.ones(2, 5), atol=error, rtol=0)


def test_each_draw_has_noise_of_its_own(data):
    """With equal parameters in all draws, only the noise tells them apart."""
    same = {"weight": torch.zeros(2, 5, 2, 3), "noise": torch.ones(2, 5)}
    sample = posterior_of(regression, same, *data).predict(data[0], seed=0)["response"]
    assert len(sample.flatten(0, 1).flatten(1).unique(dim=0)) == 10


def test_matches_pyro_predictive(fitted, draws, data):
    with torch.random.fork_rng():
        theirs = Predictive(regression, fitted.get_samples(), return_sites=["mean"])(*data)["mean"]
    theirs = theirs.reshape(10, 7, 2)  # they leave an axis where another site has a plate
    torch.testing.assert_close(fitted.predict()["mean"].flatten(0, 1), theirs)


def test_any_site_can_be_named(fitted, draws, data):
    predicted = fitted.predict(sites=["noise", "response", "mean"])
    torch.testing.assert_close(predicted["noise"], draws["noise"])
    torch.testing.assert_close(predicted["response"], data[1].expand(2, 5, 7, 2))


def test_seed_decides_and_global_state_does_not(fitted, data):
    first = fitted.predict(data[0], seed=3)["response"]
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = fitted.predict(data[0], seed=3)["response"]
    assert torch.equal(first, again)
    assert not torch.equal(first, fitted.predict(data[0], seed=4)["response"])
    assert not torch.equal(fitted.predict(data[0])["response"], first)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 100])
def test_chunks_do_not_matter(fitted, chunk_size):
    torch.testing.assert_close(
        fitted.predict(chunk_size=chunk_size)["mean"], fitted.predict()["mean"]
    )
    torch.testing.assert_close(
        fitted.log_likelihood(chunk_size=chunk_size), fitted.log_likelihood()
    )


def test_num_draws_are_evenly_spaced(fitted, draws, data):
    predicted = fitted.predict(num_draws=3)["mean"]
    torch.testing.assert_close(predicted, mean_of(draws, data[0])[:, [0, 2, 4]])


def test_posterior_predictive_draws_the_observations_anew(fitted, draws, generator):
    wide = torch.randn(3000, 3, generator=generator)
    sample = fitted.posterior_predictive(wide, torch.zeros(3000, 2), seed=0)
    assert list(sample) == ["response"]
    standard = (sample["response"] - mean_of(draws, wide)) / draws["noise"][..., None, None]
    torch.testing.assert_close(standard.std(), torch.tensor(1.0), atol=0.02, rtol=0)
    assert fitted.posterior_predictive(num_draws=2)["response"].shape == (2, 2, 7, 2)


def test_log_likelihood_is_that_of_each_row(fitted, draws, data):
    features, response = data
    (name, ours), *rest = fitted.log_likelihood().items()
    assert (name, rest) == ("response", [])
    noise = draws["noise"][..., None, None]
    by_hand = Normal(mean_of(draws, features), noise).log_prob(response).sum(-1)
    torch.testing.assert_close(ours, by_hand)
    torch.testing.assert_close(
        fitted.log_likelihood(features[:2], response[:2])["response"], by_hand[..., :2]
    )


def test_conjugate_normal_log_predictive_density(generator):
    """E over the exact posterior of p(y_new | loc) is the known predictive density."""
    observed = torch.randn(6, generator=generator)

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    variance = 1 / (1 + len(observed))
    mean = variance * observed.sum()
    loc = mean + math.sqrt(variance) * torch.randn(4, 5000, generator=generator)
    new = torch.tensor([-1.0, 0.0, 2.0])
    pointwise = posterior_of(model, {"loc": loc}, observed).log_likelihood(new)["y"]
    estimate = pointwise.logsumexp((0, 1)) - math.log(loc.numel())
    exact = Normal(mean, math.sqrt(1 + variance)).log_prob(new)
    torch.testing.assert_close(estimate, exact, atol=0.02, rtol=0)


def test_masks_count_and_scales_do_not(generator):
    y = torch.randn(5, generator=generator)
    mask = torch.tensor([True, False, True, True, False])

    def model(y, mask):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=mask), poutine.scale(scale=3.0):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    loc = torch.randn(1, 4, generator=generator)
    ours = posterior_of(model, {"loc": loc}, y, mask).log_likelihood()["y"]
    torch.testing.assert_close(ours, Normal(loc[..., None], 1.0).log_prob(y) * mask)


def test_a_factor_counts_only_by_name(generator):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("alignment", -loc.square())
        with pyro.plate("row", len(y)):
            pyro.factor("fit", Normal(loc, 1.0).log_prob(y))

    y, loc = torch.randn(3, generator=generator), torch.randn(2, 4, generator=generator)
    posterior = posterior_of(model, {"loc": loc}, y)
    ours = posterior.log_likelihood(likelihood_sites=["fit"])
    assert list(ours) == ["fit"]
    torch.testing.assert_close(ours["fit"], Normal(loc[..., None], 1.0).log_prob(y))
    with pytest.raises(ValueError, match=r"no likelihood; name factors.*'alignment', 'fit'"):
        posterior.log_likelihood()
    with pytest.raises(ValueError, match="no sites \\['wrong'\\]"):
        posterior.log_likelihood(likelihood_sites=["wrong"])
    with pytest.raises(ValueError, match=r"must name pyro\.factor sites"):
        posterior.log_likelihood(likelihood_sites=["loc"])


def by_index(x, y=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x), subsample_size=size) as index:
        mean = pyro.deterministic("mean", loc + x[index], event_dim=0)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=None if y is None else y[index])


def by_subsample(x, y=None, size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x), subsample_size=size):
        batch = pyro.subsample(x, event_dim=0)
        mean = pyro.deterministic("mean", loc + batch, event_dim=0)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=None if y is None else pyro.subsample(y, 0))


@pytest.mark.parametrize("model", [by_index, by_subsample])
def test_subsampled_plates_are_run_in_full(model, generator):
    x, y = torch.randn(2, 11, generator=generator)
    loc = torch.randn(1, 3, generator=generator)
    posterior = posterior_of(model, {"loc": loc}, x, y, 4)
    mean = loc[..., None] + x
    torch.testing.assert_close(posterior.predict()["mean"], mean)
    torch.testing.assert_close(posterior.log_likelihood()["y"], Normal(mean, 1.0).log_prob(y))
    assert posterior.predict(x[:7], size=4)["y"].shape == (1, 3, 7)


def test_a_plate_left_to_pyro_still_subsamples_afterwards(generator):
    x = torch.randn(11, generator=generator)
    posterior_of(by_index, {"loc": torch.zeros(1, 2)}, x, x, 4).log_likelihood()
    with torch.random.fork_rng():
        trace = poutine.trace(by_index).get_trace(x, x, 4)
    assert trace.nodes["y"]["value"].shape == (4,)


def heads_network(tokens, label=None):
    with pyro.plate("layer", 2, dim=-2), pyro.plate("head", 3, dim=-1):
        query = pyro.sample("query_weight", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    readout = pyro.sample("readout", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
    mean = pyro.deterministic("mean", torch.einsum("nd,lhd->nlh", tokens, query).flatten(1))
    with pyro.plate("row", len(tokens)):
        pyro.sample("label", dist.Normal(mean @ readout, 1.0), obs=label)


def test_heads_are_put_together_again(generator):
    """Draws are heads: one network a chain, the plate's axis not the first of the site."""
    tokens, label = torch.randn(7, 5, generator=generator), torch.randn(7, generator=generator)
    whole = torch.randn(4, 2, 3, 5, generator=generator)
    readout = torch.randn(4, 6, generator=generator)
    posterior = posterior_of(
        heads_network,
        {"query_weight": whole.movedim(2, 1)},
        tokens,
        label,
        draws_are="heads",
        point_estimates={"readout": readout},
        attrs={"particle_plate": "head", "particle_plate_axes": {"query_weight": 1}},
    )
    assert (posterior.num_chains, posterior.num_draws) == (4, 3)
    torch.testing.assert_close(posterior.network_samples()["query_weight"], whole)
    mean = torch.einsum("nd,clhd->cnlh", tokens, whole).flatten(2)
    torch.testing.assert_close(posterior.predict()["mean"], mean[:, None])
    by_hand = Normal(torch.einsum("cnf,cf->cn", mean, readout), 1.0).log_prob(label)
    torch.testing.assert_close(posterior.log_likelihood()["label"], by_hand[:, None])
    with pytest.raises(ValueError, match="cannot be thinned"):
        posterior.predict(num_draws=1)


def test_control_flow_on_latents_runs_draw_by_draw(generator):
    x = torch.randn(3, generator=generator)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        sign = 1.0 if loc > 0 else -1.0
        pyro.deterministic("mean", sign * x)

    loc = torch.tensor([[0.3, -0.2, 1.0]])
    with pytest.warns(RuntimeWarning, match="draw by draw, .*data-dependent control flow"):
        mean = posterior_of(model, {"loc": loc}, x).predict()["mean"]
    torch.testing.assert_close(mean, loc.sign()[..., None] * x)


def test_a_distribution_that_vmap_cannot_sample_is_sampled_all_the_same():
    def model(y=None):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("row", 4000):
            pyro.sample("y", dist.Beta(rate, 1.0), obs=y)

    rate = torch.tensor([[1.0, 4.0]])
    sample = posterior_of(model, {"rate": rate}).predict(sites=["y"], seed=0)["y"]
    torch.testing.assert_close(sample.mean(-1), rate / (rate + 1), atol=0.03, rtol=0)


def test_pyro_modules_and_parameters(generator):
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.tensor(2.0))
            self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

        def forward(self, x, y=None):
            gain = pyro.param("gain", torch.tensor(1.0))
            mean = pyro.deterministic("mean", gain * (x @ self.weight) + self.shift)
            with pyro.plate("row", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x = torch.randn(5, 3, generator=generator)
    weight = torch.randn(2, 4, 3, generator=generator)
    gain = torch.tensor([2.0, 3.0])
    posterior = posterior_of(Net(), {"weight": weight}, x, point_estimates={"gain": gain})
    expected = gain[:, None, None] * (weight @ x.T) + 2.0
    torch.testing.assert_close(posterior.predict(sites=["mean"])["mean"], expected)


def test_a_module_of_torch_and_the_global_store(generator):
    with torch.random.fork_rng():
        net = torch.nn.Linear(3, 1)

    def model(x):
        pyro.module("net", net)
        gain = pyro.param("gain", torch.tensor(1.0))
        scale = pyro.sample("scale", dist.Gamma(1.0, 1.0))
        pyro.deterministic("mean", scale * gain * net(x))

    x = torch.randn(5, 3, generator=generator)
    posterior = posterior_of(model, {"scale": torch.tensor([[1.0, 2.0]])}, x)
    torch.testing.assert_close(posterior.predict()["mean"][0, 1], 2 * net(x).detach())
    try:
        pyro.param("gain", torch.tensor(5.0))
        torch.testing.assert_close(posterior.predict()["mean"][0, 0], 5 * net(x).detach())
    finally:
        pyro.clear_param_store()


def mixture(y=None, size=None):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y) if size is None else size):
        assignment = pyro.sample("assignment", dist.Categorical(weight))
        mean = pyro.deterministic("mean", loc[assignment], event_dim=0)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.fixture
def mixed(generator):
    y = torch.randn(6, generator=generator)
    first = torch.rand(2, 3, generator=generator)
    draws = {
        "weight": torch.stack([first, 1 - first], -1),
        "loc": 2 * torch.randn(2, 3, 2, generator=generator),
    }
    return posterior_of(mixture, draws, y), draws, y


def test_local_discrete_sites_are_summed_out(mixed):
    posterior, draws, y = mixed
    terms = (
        Normal(draws["loc"][:, :, None], 1.0).log_prob(y[:, None])
        + draws["weight"].log()[:, :, None]
    )
    torch.testing.assert_close(posterior.log_likelihood()["y"], terms.logsumexp(-1))


def test_local_discrete_sites_are_drawn_given_the_data(mixed):
    """Frequencies over many equal draws against Bayes' rule, row by row."""
    posterior, draws, y = mixed
    one = {name: value[:1, :1].expand(1, 4000, *value.shape[2:]) for name, value in draws.items()}
    drawn = posterior.replace(draws=one).predict(sites=["assignment", "mean"], seed=0)
    terms = Normal(draws["loc"][0, 0], 1.0).log_prob(y[:, None]) + draws["weight"][0, 0].log()
    exact = terms.softmax(-1)[:, 1]
    frequency = drawn["assignment"].double().mean((0, 1))
    torch.testing.assert_close(frequency, exact, atol=5 * 0.5 / math.sqrt(4000), rtol=0)
    torch.testing.assert_close(drawn["mean"], draws["loc"][0, 0][drawn["assignment"]])


@pytest.mark.parametrize("markov", [True, False])
def test_a_hidden_chain_is_drawn_jointly(markov, generator):
    """Frequencies of whole paths against the sum over all paths, written out."""
    stay = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    y = torch.randn(3, generator=generator)

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        state = 0
        for step in pyro.markov(range(3)) if markov else range(3):
            state = pyro.sample(f"state_{step}", dist.Categorical(stay[state]))
            pyro.sample(f"y_{step}", dist.Normal(loc * (2 * state - 1), 1.0), obs=y[step])

    loc = torch.tensor(0.8)
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    before = torch.cat([torch.zeros(8, 1, dtype=torch.long), paths[:, :-1]], 1)
    joint = stay[before, paths].log() + Normal(loc * (2 * paths - 1), 1.0).log_prob(y)
    exact = joint.sum(-1).softmax(0)
    names = [f"state_{step}" for step in range(3)]
    posterior = posterior_of(model, {"loc": loc.expand(1, 5000)}, y)
    drawn = posterior.predict(sites=names, seed=0)
    path = sum(4 // 2**step * drawn[name] for step, name in enumerate(names))
    frequency = path.flatten().bincount(minlength=8) / 5000
    torch.testing.assert_close(frequency, exact, atol=5 * 0.5 / math.sqrt(5000), rtol=0)


def test_discrete_sites_of_new_rows_are_drawn_from_their_prior(mixed):
    posterior, draws, _ = mixed
    drawn = posterior.predict(size=5000, sites=["assignment"], seed=0)["assignment"]
    frequency = drawn.double().mean(-1)
    torch.testing.assert_close(frequency, draws["weight"][..., 1], atol=0.04, rtol=0)


def test_a_discrete_site_that_all_rows_share_is_not_guessed(generator):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        sign = pyro.sample("sign", dist.Bernoulli(0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal((2 * sign - 1) * loc, 1.0), obs=y)

    y, loc = torch.randn(4, generator=generator), torch.tensor([[1.0]]).expand(1, 3000)
    posterior = posterior_of(model, {"loc": loc}, y)
    logits = torch.stack([Normal(s * torch.tensor(1.0), 1.0).log_prob(y).sum() for s in (-1, 1)])
    drawn = posterior.predict(sites=["sign"], seed=0)["sign"].mean()
    torch.testing.assert_close(drawn, logits.softmax(0)[1], atol=0.05, rtol=0)
    with pytest.raises(ValueError, match=r"'sign'.* lie in no plate of an observed site"):
        posterior.predict(y[:2], sites=["sign"])
    with pytest.raises(ValueError, match="no pointwise log likelihood"):
        posterior.log_likelihood()


def test_a_likelihood_that_hangs_on_an_unknown_site_is_refused(generator):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        other = pyro.sample("other", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(other, 1.0), obs=y)

    posterior = posterior_of(model, {"loc": torch.zeros(1, 2)}, torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"sites \['other'\] are neither observed nor in the draws"
    ):
        posterior.log_likelihood()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(draws, data, dtype):
    posterior = posterior_of(
        regression,
        {name: value.to(dtype) for name, value in draws.items()},
        *(value.to(dtype) for value in data),
    )
    for result in (
        posterior.predict(),
        posterior.log_likelihood(),
        posterior.posterior_predictive(),
    ):
        assert {value.dtype for value in result.values()} == {dtype}


def test_unknown_site_lists_the_known(fitted):
    with pytest.raises(ValueError, match=r"no sites \['men'\]; its sites are \['weight', 'noise'"):
        fitted.predict(sites=["men"])
    with pytest.raises(ValueError, match="must be a list of names, got the text 'mean'"):
        fitted.predict(sites="mean")


def test_shape_mismatch_names_the_site(fitted):
    message = r"latent site 'weight' has shape \(2, 3\) in the draws, but \(2, 11\) in the model"
    with pytest.raises(ValueError, match=message):
        fitted.predict(torch.zeros(4, 11), sites=["mean"])


def test_bad_arguments_are_refused(fitted, draws, data):
    with pytest.raises(ValueError, match=r"the model does not take the .*float64\(7, 3\)"):
        fitted.predict(data[0], colour="red")
    with pytest.raises(ValueError, match=r"argument 'features' is empty: its shape is \(0, 3\)"):
        fitted.predict(data[0][:0])
    with pytest.raises(ValueError, match=r"observed site 'response' has shape \(3, 2\) in"):
        fitted.predict(data[0], data[1][:3])
    with pytest.raises(ValueError, match=r"the model failed on the arguments \(None\): Attr"):
        fitted.predict(None)
    with pytest.raises(ValueError, match="chunk_size must be at least one draw, got 0"):
        fitted.predict(chunk_size=0)
    with pytest.raises(ValueError, match="num_draws must be between 1 and 5"):
        fitted.predict(num_draws=6)
    with pytest.raises(ValueError, match="no site is observed"):
        fitted.posterior_predictive(data[0])
    with pytest.raises(ValueError, match="this posterior has no model"):
        fitted.replace(model=None).predict(data[0])
    with pytest.raises(ValueError, match=r"no training arguments: .* posterior\.replace\(args="):
        fitted.replace(args=()).predict()


def test_draws_of_another_model_are_refused(fitted, draws):
    stray = posterior_of(regression, {**draws, "bias": torch.zeros(2, 5)}, *fitted.args)
    with pytest.raises(ValueError, match=r"values of \['bias'\], which the model does not visit"):
        stray.predict()


def test_nothing_to_predict_is_said(generator):
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    posterior = posterior_of(model, {"loc": torch.zeros(1, 2)}, torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"no deterministic or unobserved sites.*\['loc', 'y'\]"):
        posterior.predict()
