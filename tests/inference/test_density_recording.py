"""What a recorded graph may depend on: data and parameters are inputs, all else records again."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bayesattn.inference import DensitySettings, GraphCache, LogDensity, RecordingError
from bayesattn.inference.running import private_param_store, seeded


def regression(x, y, power=1, *, flag=False):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    mean = (x @ w) ** power * (2.0 if flag else 1.0)
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def by_hand(row, x, y, power=1, factor=1.0):
    likelihood = dist.Normal((x @ row) ** power * factor, 1.0).log_prob(y).sum()
    return likelihood + dist.Normal(0.0, 1.0).log_prob(row).sum()


@pytest.fixture
def data(generator):
    return torch.randn(7, 2, generator=generator), torch.randn(7, generator=generator)


def test_data_are_inputs_and_all_else_is_part_of_the_key(data, generator):
    graphs = GraphCache()
    settings = DensitySettings(graphs=graphs)
    rows = torch.randn(3, 2, generator=generator)
    x, y = data

    def check(expected, rows, *args, **kwargs):
        density = LogDensity(regression, *args, settings=settings, **kwargs)
        value = density.value_and_score(rows)[0]
        torch.testing.assert_close(value, torch.stack([expected(row) for row in rows]))
        return graphs.num_recordings

    assert check(lambda r: by_hand(r, x, y), rows, x, y) == 1
    assert check(lambda r: by_hand(r, 2 * x, y + 1), rows, 2 * x, y + 1) == 1
    assert check(lambda r: by_hand(r, x[:5], y[:5]), rows, x[:5], y[:5]) == 2
    assert check(lambda r: by_hand(r, x, y), rows[:2], x, y) == 3
    assert check(lambda r: by_hand(r, x, y, 2), rows, x, y, 2) == 4
    assert check(lambda r: by_hand(r, x, y, 2), rows, x, y, 2.0) == 5
    assert check(lambda r: by_hand(r, x, y, 1, 2.0), rows, x, y, flag=True) == 6
    strided = torch.stack([x, x], -1)[..., 0]
    assert check(lambda r: by_hand(r, strided, y), rows, strided, y) == 7
    assert check(lambda r: by_hand(r, x, y), rows, x, y) == 7


def module_regression(net, x):
    def model():
        pyro.module("net", net)
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] * scale, 1.0), obs=torch.ones(len(x)))

    return model


@pytest.mark.parametrize("change", ["in place", "assigned", "replaced"])
def test_changed_parameters_are_seen_without_recording_again(change, data):
    with seeded(0):
        net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    density = LogDensity(module_regression(net, data[0]))
    row = torch.zeros(1, 1)
    first = density.value_and_score(row)[0]
    if change == "in place":
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), other.parameters(), strict=True):
                parameter.copy_(value)
    elif change == "assigned":
        net.load_state_dict(other.state_dict(), assign=True)
    else:
        net.weight, net.bias = other.weight, other.bias
    second = density.value_and_score(row)[0]
    expected = LogDensity(module_regression(other, data[0])).value_and_score(row)[0]
    assert (first - second).abs() > 1e-3
    torch.testing.assert_close(second, expected)
    assert density.settings.graphs.num_recordings == 1


def test_tied_parameters_stay_tied(data):
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight

    density = LogDensity(module_regression(net, data[0]))
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    expected = LogDensity(module_regression(net, data[0])).value_and_score(torch.zeros(1, 1))
    torch.testing.assert_close(density.value_and_score(torch.zeros(1, 1)), expected)


def test_parameters_in_the_store_are_read_at_each_call(data):
    def model(y):
        shift = pyro.param("shift", lambda: torch.tensor(0.5))
        x = pyro.sample("x", dist.Normal(shift, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = data[1]
    with private_param_store():
        density = LogDensity(model, y)
        assert "shift" not in pyro.get_param_store()
        row = torch.zeros(1, 1)
        first = density.value_and_score(row)[0]
        pyro.get_param_store()["shift"] = torch.tensor(2.0)
        second = density.value_and_score(row)[0]
    torch.testing.assert_close(first - second, torch.tensor([(4.0 - 0.25) / 2]))


def test_training_flags_are_part_of_the_key_and_dropout_is_refused_by_name(data):
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    density = LogDensity(module_regression(net.eval(), data[0]))
    density.value_and_score(torch.zeros(1, 1))
    net.train()
    with pytest.raises(RecordingError, match="random"):
        density.value_and_score(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"dropout|bernoulli"):
        LogDensity(module_regression(net, data[0]))


def test_stochastic_models_draw_anew_and_share_between_particles(data):
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    settings = DensitySettings(stochastic=True)
    rows = torch.zeros(3, 1)
    density = LogDensity(module_regression(net, data[0]), settings=settings)
    first, second = (density.value_and_score(rows)[0] for _ in range(2))
    assert first.unique().numel() == 1
    assert (first - second).abs().min() > 1e-6
    again = LogDensity(module_regression(net, data[0]), settings=settings)
    torch.testing.assert_close(again.value_and_score(rows)[0], first)


def test_written_buffers_are_refused_by_name_and_put_back(data):
    with seeded(0):
        net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    before = net[0].running_mean.clone()
    with pytest.raises(ValueError, match=r"net\.0\..*\.eval\(\)"):
        LogDensity(module_regression(net, data[0]))
    torch.testing.assert_close(net[0].running_mean, before)
    LogDensity(module_regression(net.eval(), data[0])).value_and_score(torch.zeros(1, 1))


def choosing_by_latent(y):
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    mean = x if x > 0 else 2 * x
    pyro.sample("y", dist.Normal(mean, 1.0).expand(y.shape).to_event(1), obs=y)


def choosing_by_data(y):
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    mean = x if y.sum() > 0 else 2 * x
    pyro.sample("y", dist.Normal(mean, 1.0).expand(y.shape).to_event(1), obs=y)


def selecting_by_data(y):
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    chosen = y[y > 0]
    pyro.sample("y", dist.Normal(x, 1.0).expand(chosen.shape).to_event(1), obs=chosen)


@pytest.mark.parametrize("model", [choosing_by_latent, choosing_by_data])
def test_decisions_on_values_are_refused_with_the_site_or_run_unrecorded(model, data):
    y = data[1]
    with pytest.raises(RecordingError, match=r"site 'x'.*compile='none'"):
        LogDensity(model, y).value_and_score(torch.tensor([[0.5], [-0.5]]))
    rows = torch.tensor([[0.5], [-0.5]])
    values, scores = LogDensity(model, y, settings=DensitySettings(compile="none")).value_and_score(
        rows
    )
    for row, value, score in zip(rows, values, scores, strict=True):
        x = row[0].clone().requires_grad_()
        doubled = (x <= 0) if model is choosing_by_latent else (y.sum() <= 0)
        expected = dist.Normal((2.0 if doubled else 1.0) * x, 1.0).log_prob(y).sum()
        expected = expected + dist.Normal(0.0, 1.0).log_prob(x)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(score, torch.autograd.grad(expected, x)[0][None])


def test_selection_by_data_stays_right_for_data_that_select_otherwise(generator):
    graphs = GraphCache()
    row = torch.full((1, 1), 0.5)
    for _ in range(3):
        y = torch.randn(7, generator=generator)
        density = LogDensity(selecting_by_data, y, settings=DensitySettings(graphs=graphs))
        expected = dist.Normal(0.5, 1.0).log_prob(y[y > 0]).sum()
        expected = expected + dist.Normal(0.0, 1.0).log_prob(row[0, 0])
        torch.testing.assert_close(density.value_and_score(row)[0][0], expected)
    assert graphs.num_recordings == 1


def test_selection_by_constants_is_recorded(data):
    mask = torch.tensor([True, False, True, False, True, False, True])

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand([4]).to_event(1), obs=y[mask])

    value, _ = LogDensity(model, data[1]).value_and_score(torch.zeros(1, 1))
    expected = dist.Normal(0.0, 1.0).log_prob(data[1][mask]).sum()
    torch.testing.assert_close(
        value[0], expected + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    )


def subsampled_by_index(y):
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])


def subsampled_by_name(y):
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(y), subsample_size=2):
        pyro.sample("y", dist.Normal(x, 1.0), obs=pyro.subsample(y, event_dim=0))


@pytest.mark.parametrize("model", [subsampled_by_index, subsampled_by_name])
def test_subsample_indices_are_inputs_and_average_to_the_full_density(model, data):
    y = data[1][:6]
    density = LogDensity(model, y)
    row = torch.full((1, 1), 0.3)
    pairs = [torch.tensor([2 * k, 2 * k + 1]) for k in range(3)]
    values = torch.stack([density.value_and_score(row, {"n": pair})[0][0] for pair in pairs])
    expected = dist.Normal(0.3, 1.0).log_prob(y).sum() + dist.Normal(0.0, 1.0).log_prob(row[0, 0])
    assert values.std() > 0.1
    torch.testing.assert_close(values.mean(), expected)
    assert density.settings.graphs.num_recordings == 1
    drawn = density.draw_subsample(torch.Generator().manual_seed(0))["n"]
    assert len(drawn.unique()) == 2
    with pytest.raises(ValueError, match="'n' is subsampled"):
        density.value_and_score(row)
    with pytest.raises(ValueError, match="must have 2 indices, got"):
        density.value_and_score(row, {"n": torch.arange(3)})


def test_latent_in_a_subsampled_plate_is_refused(data):
    def model(y):
        with pyro.plate("n", 7, subsample_size=2) as index:
            x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="'x' is inside the subsampled plate 'n'"):
        LogDensity(model, data[1])


@pytest.mark.parametrize("kind", ["partial", "bound method", "nested arguments"])
def test_programs_of_every_callable_kind(kind, data):
    x, y = data
    expected = by_hand(torch.tensor([0.2, -0.1]), x, y)
    row = torch.tensor([[0.2, -0.1]])

    class Holder:
        def program(self, y):
            regression(x, y)

    def nested(batch, sizes):
        regression(batch["x"], batch["y"][0], sizes[0])

    if kind == "partial":
        density = LogDensity(functools.partial(regression, x), y)
    elif kind == "bound method":
        density = LogDensity(Holder().program, y)
    else:
        density = LogDensity(nested, {"x": x, "y": [y]}, (1, 2))
    torch.testing.assert_close(density.value_and_score(row)[0][0], expected)


BAD = {
    "no latents": (lambda y: pyro.sample("y", dist.Normal(0.0, 1.0), obs=y), "nothing to infer"),
    "wrong shapes": (lambda y: regression(y, y[:3]), r"site .*float64\(7, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_refused(name, data):
    model, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        LogDensity(model, data[0])


def test_bad_data_and_particles_are_refused(data):
    x, y = data
    with pytest.raises(ValueError, match=r"'y' is NaN in 1 of 7.*argument 'y'"):
        LogDensity(regression, x, torch.cat([y[:6], torch.tensor([torch.nan])]))
    with pytest.raises(ValueError, match=r"argument 'x'.* is empty.*\(0, 2\)"):
        LogDensity(regression, x[:0], y[:0])
    density = LogDensity(regression, x, y)
    with pytest.raises(ValueError, match="at least one particle"):
        density.value_and_score(torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"\(particle, 2\), got \(3, 5\)"):
        density.value_and_score(torch.zeros(3, 5))


def test_graph_does_not_grow_with_the_particles(data):
    density = LogDensity(regression, *data)
    for count in (2, 50):
        density.value_and_score(torch.zeros(count, 2))
    graphs = density.settings.graphs.graphs.values()
    sizes = {len(graph.module.graph.nodes) for graph in graphs}
    assert len(sizes) == 1
