"""The life of Repulsion beside an optimizer: what it does to gradients and weights, and when."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Independent, Laplace, Normal, Uniform

from bayesattn import StructuredSelfAttention
from bayesattn.inference import (
    CircuitForce,
    Repulsion,
    SteinDiffusion,
    SteinForce,
    WassersteinForce,
)
from bayesattn.kernels import RBF, Separate
from bayesattn.networks import head_batches, head_partitions
from tests.compilation import undone_compilation
from tests.heads import Classifier, loss_of, paper_gradient

pytestmark = pytest.mark.filterwarnings("ignore:SteinDiffusion with a flat prior")

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAM = functools.partial(torch.optim.Adam, lr=0.01)
METHODS = {
    "stein": SteinForce(),
    "wasserstein": WassersteinForce(),
    "spos": SteinDiffusion(warmup_steps=2),
    "sgld": SteinDiffusion(warmup_steps=2, kernel=Separate(), langevin=0),
    "published noise": SteinDiffusion(warmup_steps=2, noise="paper"),
}


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(embed_dim=6, num_heads=3)


def heads_of(model):
    return {part.name: part.particles().clone() for part in head_partitions(model)}


def gradients_of(model):
    return {part.name: part.gradients().clone() for part in head_partitions(model)}


def others_of(model):
    """Gradients of what belongs to no head."""
    names = [name for name, _ in model.named_parameters() if "in_proj_weight" not in name]
    return {name: model.get_parameter(name).grad.clone() for name in names}


def test_heads_get_the_paper_s_gradient_and_others_keep_theirs(model):
    """Each layer and role is a system of its own. Mutants: h, sign, α, which heads are which."""
    repulsion = Repulsion(model, SGD(model.parameters()), alpha=0.2)
    loss_of(model).backward()
    before, others = gradients_of(model), others_of(model)
    repulsion.step()
    after = gradients_of(model)
    assert list(after) == [
        f"layers.{i}.{role}" for i in (0, 1) for role in ("query", "key", "value")
    ]
    for name, rows in heads_of(model).items():
        expected = paper_gradient(rows.tolist(), before[name].tolist(), alpha=0.2)
        torch.testing.assert_close(after[name], torch.tensor(expected))
    for name, gradient in others_of(model).items():
        assert torch.equal(gradient, others[name])


def test_alpha_is_the_temperature_over_the_number_of_examples(model):
    make = functools.partial(Repulsion, model, SGD(model.parameters()))
    assert make(num_data=50).alpha == 1 / 50
    assert make(num_data=50, temperature=2.0).alpha == 2 / 50
    assert make(num_data=50, alpha=0.3).alpha == 0.3
    repulsion = make(num_data=50)
    repulsion.alpha = 0.0
    loss_of(model).backward()
    repulsion.step()
    assert all(info.repulsion == 0 for info in repulsion.info.values())


@pytest.mark.parametrize("prior", [Normal(0.1, 0.2), Laplace(0.0, 1.0)])
def test_a_prior_joins_the_loss_at_its_share(model, prior):
    twin = copy.deepcopy(model)
    wasserstein = functools.partial(Repulsion, method=WassersteinForce(), num_data=40)
    repulsion = wasserstein(model, SGD(model.parameters()), prior=prior, temperature=3.0)
    loss_of(model).backward()
    repulsion.step()
    loss = loss_of(twin)
    for layer in twin.layers:
        loss = loss - prior.log_prob(layer.in_proj_weight).sum() / 40
    loss.backward()
    wasserstein(twin, SGD(twin.parameters()), temperature=3.0).step()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, gradients_of(twin)[name])


@pytest.mark.parametrize("make", [SGD, ADAM])
def test_decoupled_repulsion_moves_heads_at_the_step_s_learning_rate(model, make):
    """Under SGD it is the same; under Adam the drive alone is divided. Schedules are followed."""
    alike, coupled = copy.deepcopy(model), copy.deepcopy(model)
    for decoupled, net in ((True, model), (False, coupled)):
        optimizer = make(net.parameters())
        repulsion = Repulsion(net, optimizer, alpha=0.2, decoupled=decoupled)
        loss_of(net).backward()
        repulsion.step()
        optimizer.param_groups[0]["lr"] = 0.03
        optimizer.step()
    by_hand = make(alike.parameters())
    by_hand.param_groups[0]["lr"] = 0.03
    loss_of(alike).backward()
    (heads,) = head_batches(head_partitions(alike))
    particles = heads.particles()
    along, away, _ = SteinForce()(heads, particles, -heads.gradients())
    heads.write_gradients(-along)
    by_hand.step()
    heads.write(heads.particles() + 0.03 * 0.2 * away)
    for name, rows in heads_of(model).items():
        torch.testing.assert_close(rows, heads_of(alike)[name])
        assert torch.allclose(rows, heads_of(coupled)[name]) == (make is SGD)


def test_learning_rates_may_differ_by_layer(model):
    twin = copy.deepcopy(model)
    groups = [
        {"params": [*layer.parameters()], "lr": rate}
        for layer, rate in zip(model.layers, (0.1, 0.001), strict=True)
    ]
    optimizer = ADAM(groups)
    repulsion = Repulsion(model, optimizer, alpha=0.2, decoupled=True)
    loss_of(model).backward()
    repulsion.step()
    before = heads_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad.zero_()
    optimizer.step()
    moved = {name: (rows - before[name]).norm() for name, rows in heads_of(model).items()}
    for role in ("query", "key", "value"):
        info = [repulsion.info[f"layers.{i}.{role}"].repulsion * 3**0.5 for i in (0, 1)]
        torch.testing.assert_close(moved[f"layers.0.{role}"], 0.1 * info[0])
        torch.testing.assert_close(moved[f"layers.1.{role}"], 0.001 * info[1])
    groups = [{"params": [p], "lr": 10.0**-i} for i, p in enumerate(twin.parameters())]
    heads = head_partitions(twin, biases=True)
    for decoupled in (False, True):
        optimizer = ADAM(groups)
        repulsion = Repulsion(twin, optimizer, heads=heads, alpha=0.2, decoupled=decoupled)
        optimizer.zero_grad()
        loss_of(twin).backward()
        repulsion.step()
        if not decoupled:
            optimizer.step()
            continue
        with pytest.raises(ValueError, match="expected one learning rate"):
            optimizer.step()


def test_a_learning_rate_on_the_device_is_followed(model):
    twin = copy.deepcopy(model)
    for net, rate in ((model, torch.tensor(0.05)), (twin, 0.05)):
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        repulsion = Repulsion(net, optimizer, alpha=0.2, decoupled=True)
        loss_of(net).backward()
        repulsion.step()
        optimizer.step()
    for name, rows in heads_of(model).items():
        torch.testing.assert_close(rows, heads_of(twin)[name])


class CalledTwice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens):
        once = self.layer(tokens, tokens, tokens)[0]
        return self.layer(once, once, once)[0]


def test_a_layer_called_twice_is_repelled_once(generator):
    with torch.random.fork_rng(devices=[]):
        model = CalledTwice(nn.MultiheadAttention(6, 3, batch_first=True))
    model(torch.randn(2, 5, 6, generator=generator)).square().mean().backward()
    before = gradients_of(model)
    Repulsion(model, SGD(model.parameters()), alpha=0.2).step()
    for name, rows in heads_of(model).items():
        expected = paper_gradient(rows.tolist(), before[name].tolist(), alpha=0.2)
        torch.testing.assert_close(gradients_of(model)[name], torch.tensor(expected))


def test_accumulated_gradients_are_those_of_the_large_batch(model, generator):
    twin = copy.deepcopy(model)
    tokens = torch.randn(8, 5, 6, generator=generator)
    repulsion = Repulsion(model, SGD(model.parameters()), alpha=0.2)
    for half in tokens.split(4):
        (model(half).square().mean() / 2).backward()
    repulsion.step()
    twin(tokens).square().mean().backward()
    Repulsion(twin, SGD(twin.parameters()), alpha=0.2).step()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, gradients_of(twin)[name])


def test_stepping_twice_on_the_same_gradients_is_refused(model):
    optimizer = SGD(model.parameters())
    repulsion = Repulsion(model, optimizer, alpha=0.2)
    loss_of(model).backward()
    repulsion.step()
    with pytest.raises(RuntimeError, match="twice on the same gradients"):
        repulsion.step()
    model.layers[1].in_proj_weight.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match="twice on the same gradients"):
        repulsion.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="after the optimizer's"):
        repulsion.step()
    optimizer.zero_grad()
    loss_of(model).backward()
    repulsion.step()
    loss_of(model).backward()
    with pytest.warns(UserWarning, match="gradients were added"):
        repulsion.step()
    assert repulsion.num_steps == 3


def test_the_wrong_place_is_refused(model):
    optimizer = SGD(model.parameters())
    repulsion = Repulsion(model, optimizer, alpha=0.2)
    loss_of(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="after the optimizer's"):
        repulsion.step()
    assert repulsion.num_steps == 0


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_that_the_scaler_skips_moves_nothing(model, method):
    """Neither where the optimizer is not called, nor where it is told of the overflow."""
    for optimizer in (ADAM(model.parameters()), ADAM(model.parameters(), fused=True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        repulsion = Repulsion(model, optimizer, method=method, alpha=0.2, decoupled=True, seed=0)
        for overflow in (False, False, False, True, False):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            if overflow:
                model.readout.bias.grad[0] = torch.inf
            scaler.unscale_(optimizer)
            repulsion.step()
            before = heads_of(model)
            scaler.step(optimizer)
            scaler.update()
            for name, rows in heads_of(model).items():
                assert torch.equal(rows, before[name]) == overflow
                assert rows.isfinite().all()


def test_layers_without_gradients_and_frozen_ones_are_left_alone(model, generator):
    model.layers[1].requires_grad_(False)
    repulsion = Repulsion(model, ADAM(model.parameters()), alpha=0.2, decoupled=True)
    loss_of(model).backward()
    repulsion.step()
    assert list(repulsion.info) == ["layers.0.query", "layers.0.key", "layers.0.value"]
    assert model.layers[1].in_proj_weight.grad is None
    model.layers[1].requires_grad_(True)
    optimizer = ADAM(model.parameters())
    repulsion = Repulsion(model, optimizer, alpha=0.2)
    optimizer.zero_grad()
    tokens = torch.randn(2, 5, 6, generator=generator)
    model.layers[1](tokens, tokens, tokens)[0].square().mean().backward()
    repulsion.step()
    assert list(repulsion.info) == ["layers.1.query", "layers.1.key", "layers.1.value"]
    assert model.layers[0].in_proj_weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_of_half_precision_weights_are_those_of_float32(model, dtype):
    model.to(dtype)
    twin = copy.deepcopy(model).float()
    tokens = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    for net in (model, twin):
        net(tokens.to(net.readout.weight.dtype)).float().square().mean().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = mine.grad.float()
    for net in (model, twin):
        Repulsion(net, SGD(net.parameters()), alpha=0.2).step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad.to(dtype))


def test_autocast_around_the_step_changes_nothing(model):
    twin = copy.deepcopy(model)
    for net, enabled in ((model.float(), True), (twin.float(), False)):
        loss_of(net).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Repulsion(net, SGD(net.parameters()), alpha=0.2).step()
    for name, gradient in gradients_of(model).items():
        assert torch.equal(gradient, gradients_of(twin)[name])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_goes_on_from_saved_states_as_if_it_had_not_stopped(model, method, tmp_path):
    def begin(net, **changes):
        optimizer = ADAM(net.parameters())
        options = {"method": method, "num_data": 50, "decoupled": True, "seed": 3} | changes
        return net, optimizer, Repulsion(net, optimizer, **options)

    def train(net, optimizer, repulsion, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(net, torch.Generator().manual_seed(step)).backward()
            repulsion.step()
            optimizer.step()

    whole, first = (begin(copy.deepcopy(model)) for _ in range(2))
    # What it begins with is that of the state.
    second = begin(copy.deepcopy(model), seed=4, num_data=7)
    train(*whole, range(8))
    for stop in (1, 5):
        train(*first, range(first[2].num_steps, stop))
        torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
        states = torch.load(tmp_path / "state.pt", weights_only=True)
        for part, state in zip(second, states, strict=True):
            part.load_state_dict(state)
        train(*second, range(stop, 8))
        for name, rows in heads_of(second[0]).items():
            assert torch.equal(rows, heads_of(whole[0])[name])


def test_what_the_optimizer_did_not_do_is_forgotten(model):
    """Moves are made once, and those of a step that was skipped never."""
    optimizer, twin = SGD(model.parameters()), copy.deepcopy(model)
    repulsion = Repulsion(model, optimizer, alpha=0.2, decoupled=True)
    loss_of(model).backward()
    repulsion.step()
    # The optimizer is not called, as by a scaler.
    optimizer.zero_grad()
    loss_of(model).backward()
    repulsion.step()
    optimizer.step()
    alone = SGD(twin.parameters())
    once = Repulsion(twin, alone, alpha=0.2, decoupled=True)
    loss_of(twin).backward()
    once.step()
    alone.step()
    for name, rows in heads_of(model).items():
        assert torch.equal(rows, heads_of(twin)[name])
    before = heads_of(model)
    optimizer.zero_grad()
    optimizer.step()
    repulsion.load_state_dict(repulsion.state_dict())
    for name, rows in heads_of(model).items():
        assert torch.equal(rows, before[name])
    loss_of(model).backward()
    repulsion.step()
    with torch.no_grad():
        model.layers[0].in_proj_weight.fill_(7.0)
    repulsion.load_state_dict(repulsion.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert (model.layers[0].in_proj_weight == 7.0).all()


def test_an_optimizer_that_never_steps_is_warned_of(model):
    repulsion = Repulsion(model, SGD(model.parameters()), alpha=0.2, decoupled=True)

    def step():
        model.zero_grad()
        loss_of(model).backward()
        repulsion.step()

    for _ in range(20):
        step()
    with pytest.warns(UserWarning, match="has made no step"):
        step()
    step()


def test_a_step_without_gradients_is_warned_of_and_does_not_count(model):
    repulsion = Repulsion(model, SGD(model.parameters()), alpha=0.2)
    with pytest.warns(UserWarning, match="no head has a gradient"):
        repulsion.step()
    assert repulsion.num_steps == 0


def test_partitions_of_other_types_are_other_batches(model):
    model.layers[1].double()
    model.layers[0].float()
    heads = [part for layer in model.layers for part in head_partitions(layer)]
    for index, part in enumerate(heads):
        part.name = str(index)
    gradients = [torch.ones_like(part.parameters[0]) for part in heads]
    for part, gradient in zip(heads, gradients, strict=True):
        part.parameters[0].grad = gradient
    repulsion = Repulsion(model, SGD(model.parameters()), heads=heads, alpha=0.2)
    repulsion.step()
    dtypes = [info.drive.dtype for info in repulsion.info.values()]
    assert dtypes == [torch.float32] * 3 + [torch.float64] * 3


@pytest.mark.compile
def test_names_are_those_of_the_model_itself(model):
    """So that states of wrapped models fit plain ones."""
    with undone_compilation():
        compiled = torch.compile(model, backend="eager")
    parallel = nn.DataParallel(model)
    for wrapped in (compiled, parallel):
        state = Repulsion(wrapped, SGD(model.parameters()), num_data=5).state_dict()
        Repulsion(model, SGD(model.parameters()), num_data=5).load_state_dict(state)


def test_seeds_say_all_and_global_randomness_nothing(model):
    runs = []
    for seed in (1, 1, 2):
        net = copy.deepcopy(model)
        optimizer = ADAM(net.parameters())
        method = SteinDiffusion(0, preconditioner="none")
        repulsion = Repulsion(net, optimizer, method=method, num_data=50, seed=seed)
        loss_of(net).backward()
        repulsion.step()
        optimizer.step()
        runs.append(heads_of(net)["layers.0.query"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_rows_of_structured_pooling_are_particles(generator):
    with torch.random.fork_rng(devices=[]):
        pooling = StructuredSelfAttention(7, 5, 4)
    pooling(torch.randn(2, 3, 7, generator=generator))[0].square().mean().backward()
    before, shared = gradients_of(pooling), pooling.key_weight.grad.clone()
    Repulsion(pooling, SGD(pooling.parameters()), alpha=1.0).step()
    expected = paper_gradient(pooling.query_weight.tolist(), before["query"].tolist(), alpha=1.0)
    torch.testing.assert_close(pooling.query_weight.grad, torch.tensor(expected))
    assert torch.equal(pooling.key_weight.grad, shared)


def test_figures_are_those_of_the_step(model):
    repulsion = Repulsion(
        model, SGD(model.parameters()), method=WassersteinForce(RBF(2.0)), alpha=0.2
    )
    assert repulsion.info == {}
    loss_of(model).backward()
    before = gradients_of(model)
    repulsion.step()
    for name, info in repulsion.info.items():
        drive = before[name].square().sum(-1).mean().sqrt()
        torch.testing.assert_close(info.drive, drive)
        away = before[name] - gradients_of(model)[name]
        torch.testing.assert_close(info.repulsion, away.square().sum(-1).mean().sqrt())
        torch.testing.assert_close(info.ratio, info.repulsion / info.drive)
        assert info.bandwidth == pytest.approx(2.0)


def test_remove_takes_the_hook_away(model):
    optimizer = SGD(model.parameters())
    repulsion = Repulsion(model, optimizer, alpha=1.0, decoupled=True)
    twin = copy.deepcopy(model)
    alone = SGD(twin.parameters())
    loss_of(model).backward()
    loss_of(twin).backward()
    repulsion.step()
    Repulsion(twin, alone, alpha=1.0, decoupled=True).remove()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = mine.grad.clone()
    repulsion.remove()
    optimizer.step()
    alone.step()
    for name, rows in heads_of(model).items():
        assert torch.equal(rows, heads_of(twin)[name])
    with pytest.raises(RuntimeError, match="after remove"):
        repulsion.step()


@pytest.mark.parametrize("method", [*METHODS.values(), CircuitForce()], ids=[*METHODS, "circuits"])
def test_nothing_waits_for_the_device(method):
    """Tensors without data refuse to tell a number. Mutant: a prior that looks at its values."""
    with FakeTensorMode():
        model = Classifier(embed_dim=6, num_heads=3)
        roles = ("query", "key")
        heads = head_partitions(model, roles, joint=True) if method == CircuitForce() else None
        optimizer = SGD(model.parameters())
        inner = Normal(torch.zeros(1), torch.ones(1), validate_args=False)
        prior = Independent(inner, 1, validate_args=False)
        prior._validate_args = inner._validate_args = True
        settings = {"num_data": 5, "prior": prior, "decoupled": True, "seed": 0}
        repulsion = Repulsion(model, optimizer, method=method, heads=heads, **settings)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 5, 6)).square().mean().backward()
            repulsion.step()
            optimizer.step()
        assert repulsion.info["layers.0." + ("query+key" if heads else "query")].ratio.ndim == 0


def test_bad_settings_are_refused(model, unchecked_types):
    make = functools.partial(Repulsion, model, ADAM(model.parameters()))
    for settings, message in [
        ({}, "give num_data"),
        ({"num_data": 0}, "num_data"),
        ({"num_data": 2.5}, "num_data"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"num_data": 5, "temperature": 0.0}, "temperature"),
        ({"alpha": 0.1, "temperature": 2.0}, "give alpha or temperature"),
        ({"alpha": 0.1, "prior": Normal(0.0, 1.0)}, "prior: its share"),
        ({"num_data": 5, "heads": []}, "found none"),
        ({"num_data": 5, "heads": head_partitions(model)[:1] * 2}, "different names"),
        ({"num_data": 5, "method": RBF(1.0)}, "expected a force"),
        ({"num_data": 5, "method": SteinForce}, "expected a force"),
        ({"num_data": 5, "method": "stein"}, "expected a force"),
        ({"num_data": 5, "method": CircuitForce()}, "circuits need heads of two projections"),
        ({"num_data": 5, "heads": ["layers.0"]}, "what head_partitions gives"),
        ({"num_data": 5, "prior": 0.1}, "expected a distribution"),
        ({"num_data": 5, "prior": Normal(torch.zeros(5), 1.0)}, "prior: expected a law"),
        ({"num_data": 5, "prior": Uniform(-1.0, 1.0)}, "prior: expected a law"),
        (
            {
                "num_data": 5,
                "heads": [
                    *head_partitions(model, ("query",)),
                    *head_partitions(model, ("query", "key"), joint=True),
                ],
            },
            r"layers.0.query\+key shares weights with layers.0.query$",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**settings)
    with pytest.raises(ValueError, match="maximize=True"):
        Repulsion(model, SGD(model.parameters(), maximize=True), num_data=5)
    repulsion = make(num_data=5)
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        repulsion.alpha = -1.0
    with pytest.raises(ValueError, match="found none"):
        Repulsion(model.readout, ADAM(model.parameters()), num_data=5)
    with pytest.raises(
        ValueError, match=r"layers.0.query: expected heads that the optimizer trains"
    ):
        Repulsion(model, ADAM(model.readout.parameters()), num_data=5)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        make(num_data=5)


def test_states_of_others_are_refused(model):
    repulsion = Repulsion(model, ADAM(model.parameters()), num_data=5)
    state = repulsion.state_dict()
    with pytest.raises(ValueError, match="another method"):
        Repulsion(
            model, ADAM(model.parameters()), num_data=5, method=SteinDiffusion(3)
        ).load_state_dict(state)
    heads = head_partitions(model, ("query",))
    with pytest.raises(ValueError, match="expected partitions"):
        Repulsion(model, ADAM(model.parameters()), num_data=5, heads=heads).load_state_dict(state)


def test_heads_trained_in_part_are_refused(model):
    heads = head_partitions(model, biases=True)
    repulsion = Repulsion(model, ADAM(model.parameters()), heads=heads, num_data=5)
    model.layers[0].in_proj_bias.requires_grad_(False)
    loss_of(model).backward()
    with pytest.raises(
        ValueError, match=r"layers.0.query: expected heads that are trained or frozen"
    ):
        repulsion.step()


@pytest.mark.compile
def test_compiled_models_train_as_eager_ones_do(model):
    with undone_compilation():
        nets = [copy.deepcopy(model), torch.compile(model, backend="aot_eager")]
        for net in nets:
            optimizer = ADAM(net.parameters())
            repulsion = Repulsion(net, optimizer, num_data=50, decoupled=True)
            for _ in range(3):
                optimizer.zero_grad()
                tokens = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
                net(tokens).square().mean().backward()
                repulsion.step()
                optimizer.step()
    for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other)
