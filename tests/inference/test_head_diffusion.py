"""Heads as chains: whether their law is the one that is asked for."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from bayesattn.inference import Repulsion, SteinDiffusion
from bayesattn.inference.diffusion_state import DiffusionState
from bayesattn.inference.directions import stein_direction
from bayesattn.inference.head_forces import SteinForce
from bayesattn.inference.step_noise import StepNoise
from bayesattn.kernels import IMQ, RBF, Linear, Separate
from bayesattn.networks import HeadPartition, HeadSlice, head_batches, head_partitions
from tests.heads import Classifier, loss_of

pytestmark = pytest.mark.filterwarnings("ignore:SteinDiffusion with a flat prior")

# Mean and standard deviation of the logarithm of a Gamma(3, 1) variable: psi(3), psi'(3)^(1/2).
LOG_GAMMA_MEAN, LOG_GAMMA_SD = 0.92278, 0.62838
TARGETS = {
    "normal": (lambda x: -x, 0.0, 1.0),
    "log gamma": (lambda x: 3 - x.exp(), LOG_GAMMA_MEAN, LOG_GAMMA_SD),
}


def sampled(method, drive_of, num_heads, generator, *, alpha=1.0, dim=16, systems=64):
    """Heads of many systems at rest: snapshots a relaxation apart."""
    state, rate = DiffusionState(method), 0.01 if method.langevin > 0.5 else 0.03
    names = tuple(map(str, range(systems)))
    heads = torch.randn(systems, num_heads, dim, generator=generator)
    relaxation = round(1 / (rate * max(method.langevin, 0.1)))
    kept = []
    for step in range(9 * relaxation):
        normal = torch.randn(heads.shape, generator=generator)
        heads = state.moved(names, heads, drive_of(heads), normal, alpha).move(rate)
        if step >= 5 * relaxation and step % relaxation == 0:
            kept.append(heads)
    return torch.stack(kept)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("num_heads", "langevin"), [(1, 1.0), (2, 1.0), (8, 1.0), (2, 0.1)])
def test_exact_noise_has_the_posterior_as_its_law(target, num_heads, langevin, generator):
    """Mutants: noise of τ alone, K for K / M, the repulsion times M, η for 2 η."""
    drive_of, mean, deviation = TARGETS[target]
    method = SteinDiffusion(0, RBF(3.0), langevin, preconditioner="none")
    found = sampled(method, drive_of, num_heads, generator)
    assert found.mean().item() == pytest.approx(mean, abs=0.04 * deviation)
    assert found.std().item() == pytest.approx(deviation, rel=0.035)


@pytest.mark.slow
@pytest.mark.parametrize(("langevin", "expected"), [(1.0, 0.7071), (0.1, 0.3015)])
def test_published_noise_is_too_narrow_by_what_theory_says(langevin, expected, generator):
    method = SteinDiffusion(0, RBF(3.0), langevin, noise="paper", preconditioner="none")
    found = sampled(method, lambda x: -x, 1, generator)
    assert found.std().item() == pytest.approx(expected, rel=0.035)


@pytest.mark.parametrize("kernel", [IMQ(2.0), Separate(), Linear(2.0, location=torch.zeros(16))])
def test_other_kernels_have_it_too(kernel, generator):
    """The linear one's own slope is in the drift."""
    method = SteinDiffusion(0, kernel, preconditioner="none")
    found = sampled(method, lambda x: -x, 3, generator)
    assert found.std().item() == pytest.approx(1, rel=0.035)


def test_alpha_is_the_temperature_of_the_loss(generator):
    method = SteinDiffusion(0, RBF(1.0), preconditioner="none")
    found = sampled(method, lambda x: -x, 3, generator, alpha=0.25)
    assert found.std().item() == pytest.approx(0.5, rel=0.035)


def test_the_step_size_is_a_part_of_the_learning_rate(generator):
    """Noise goes with its root. Mutant: the drift's alone."""
    heads, drive, normal = torch.randn(3, 2, 4, 5, generator=generator)
    moved = []
    for size, rate in ((0.1, 0.5), (1.0, 0.05)):
        method = SteinDiffusion(0, RBF(1.0), preconditioner="none", step_size=size)
        motion = DiffusionState(method).moved(("a", "b"), heads, drive, normal, 0.3)
        moved.append(motion.move(rate))
    torch.testing.assert_close(moved[0], moved[1])


def test_without_langevin_and_noise_it_is_svgd(generator):
    method = SteinDiffusion(0, RBF(1.0), 0.0, preconditioner="none")
    heads, drive = torch.randn(2, 2, 4, 5, generator=generator)
    motion = DiffusionState(method).moved(("a", "b"), heads, drive, torch.zeros_like(heads), 0.3)
    along, away = stein_direction(RBF(1.0)(heads), drive)
    torch.testing.assert_close(motion.move(0.1), heads + 0.1 * (along + 0.3 * away))


class Rows(nn.Module):
    """Heads whose loss is given: rows of parameters, one for each of many networks."""

    def __init__(self, num_networks, num_heads, dim):
        super().__init__()
        start = 2.0 * torch.eye(num_heads, dim) - 1.0
        self.rows = nn.ParameterList([start.clone() for _ in range(num_networks)])

    def partitions(self):
        for index, rows in enumerate(self.rows):
            part = HeadSlice(f"rows.{index}", 0, 0, 1, len(rows))
            yield HeadPartition(str(index), self, [part])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [RBF("paper"), Separate()])
def test_beside_adam_heads_sample_the_joint_posterior(kernel):
    """Coupled heads on scales apart by ten; stated by N and the prior, found by whole training.

    Mutants: noise through Adam, P that goes on being measured, the prior at full weight.
    """
    num_heads, num_data = 3, 50
    scales = torch.tensor([0.3, 3.0])
    coupling = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 1.0]])
    model = Rows(50, num_heads, len(scales))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    repulsion = Repulsion(
        model,
        optimizer,
        heads=model.partitions(),
        method=SteinDiffusion(100, kernel, 0.0 if kernel == Separate() else 0.5),
        num_data=num_data,
        prior=torch.distributions.Normal(0.0, 2.0),
        seed=0,
    )
    kept = []
    for step in range(1600):
        optimizer.zero_grad()
        scaled = torch.stack([*model.rows]) / scales
        # The mean loss of N examples, of each network.
        loss = torch.einsum("nhd,hk,nkd->", scaled, coupling, scaled) / (2 * num_data)
        loss.backward()
        repulsion.step()
        optimizer.step()
        if repulsion.is_sampling:
            optimizer.param_groups[0]["lr"] = 0.02
        if step >= 600 and step % 25 == 0:
            kept.append(torch.stack([*model.rows]).detach())
    draws = torch.cat(kept)
    for column, scale in enumerate(scales):
        expected = torch.linalg.inv(coupling / scale**2 + torch.eye(3) / 4)
        found = torch.cov(draws[:, :, column].mT)
        bound = 0.15 * expected.diagonal().max().item()
        torch.testing.assert_close(found, expected, rtol=0.0, atol=bound)


def test_the_transient_is_svgd_and_measures_the_gradients():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier()
    twin = copy.deepcopy(model)
    pairs = []
    for net, method in ((model, SteinDiffusion(5)), (twin, SteinForce())):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        repulsion = Repulsion(net, optimizer, method=method, num_data=50, seed=0)
        pairs.append((net, optimizer, repulsion))
    drives = []
    for step in range(6):
        for net, optimizer, repulsion in pairs:
            optimizer.zero_grad()
            loss_of(net, torch.Generator().manual_seed(step)).backward()
            drives += [head_partitions(net)[0].gradients().clone()] if net is model else []
            repulsion.step()
            optimizer.step()
        alike = torch.equal(model.layers[0].in_proj_weight, twin.layers[0].in_proj_weight)
        assert alike == (step < 3)
        assert pairs[0][2].is_sampling == (step >= 4)
    expected = torch.stack(drives[:3]).square().mean((0, 1))
    state = pairs[0][2].state_dict()["diffusion"]
    torch.testing.assert_close(state["squares"]["layers.0.query"], expected)


def test_preconditioners_are_one_for_all_heads_and_floored():
    state = DiffusionState(SteinDiffusion(1))
    drive = torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])
    state.measure(["a"], drive)
    root = 5**0.5
    found = state.preconditioner(["a", "unseen"], torch.zeros(2, 2, 2))
    expected = torch.tensor([[[1 / root, 1 / (0.1 * root / 2)]], [[0.0, 0.0]]])
    torch.testing.assert_close(found, expected)


def test_published_noise_through_sgd_is_that_of_langevin_steps(generator):
    """The paper's update at one step size, in one step of SGD; Adam is warned of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier()
    method = SteinDiffusion(0, RBF(1.0), 0.5, noise="paper", faithful=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    repulsion = Repulsion(model, optimizer, method=method, alpha=0.2, seed=5)
    loss_of(model).backward()
    (heads,) = head_batches(head_partitions(model))
    before, gradients = heads.particles(), heads.gradients()
    repulsion.step()
    optimizer.step()
    normal = StepNoise(5, before.device).normal(before, 0, 0)
    along, away, _ = SteinForce(RBF(1.0))(heads, before, -gradients)
    drift = along + 0.2 * away - 0.5 * gradients
    expected = before + 0.1 * drift + (2 * 0.1 * 0.2 * 0.5) ** 0.5 * normal
    torch.testing.assert_close(heads.particles(), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    repulsion = Repulsion(model, optimizer, method=method, alpha=0.2, seed=5)
    repulsion.step()
    optimizer.step()
    torch.testing.assert_close(heads.particles(), expected)
    sgd = torch.optim.SGD
    momentum, decay = (functools.partial(sgd, **{k: 0.9}) for k in ("momentum", "weight_decay"))
    for make in (torch.optim.Adam, momentum, decay):
        with pytest.warns(UserWarning, match="not calibrated"):
            Repulsion(model, make(model.parameters(), lr=0.1), method=method, alpha=0.2)


def trained(model, method, num_steps, *, damage=None, **settings):
    """Repulsion after some steps of Adam; ``damage`` changes the gradients before it acts."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    repulsion = Repulsion(model, optimizer, method=method, num_data=50, seed=0, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(num_steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, torch.Generator().manual_seed(step))).backward()
        if damage is not None:
            damage(step)
        scaler.unscale_(optimizer)
        repulsion.step()
        scaler.step(optimizer)
        scaler.update()
    return repulsion


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(embed_dim=6, num_heads=3)


@pytest.mark.parametrize("step", [0, 1])
def test_an_overflow_in_the_transient_is_not_measured(model, step):
    """Scalers overflow in their first steps. Mutant: infinity in the means, for good."""

    def damage(now):
        if now == step:
            model.layers[0].in_proj_weight.grad[0, 0] = torch.inf

    trained(model, SteinDiffusion(4), 7, damage=damage)
    assert all(part.particles().isfinite().all() for part in head_partitions(model))


def test_heads_without_gradients_in_the_transient_stay(model):
    """As layers that are not called are, where gradients are set to zero."""
    before = model.layers[0].in_proj_weight.detach().clone()

    def damage(step):
        model.layers[0].in_proj_weight.grad.zero_()

    trained(model, SteinDiffusion(2, RBF(1.0)), 6, damage=damage, alpha=0.0)
    assert torch.equal(model.layers[0].in_proj_weight, before)


def test_the_kernel_is_frozen_when_the_burn_in_ends(model):
    """Each system has its own. Mutants: frozen at the end of the transient; one for all."""
    method = SteinDiffusion(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    repulsion = Repulsion(model, optimizer, method=method, num_data=50, seed=0)
    bandwidths, frozen = [], []
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model).backward()
        bandwidths.append({n: RBF("paper").squared_bandwidth(x) for n, x in heads_of(model)})
        repulsion.step()
        optimizer.step()
        frozen.append({name: info.bandwidth.square() for name, info in repulsion.info.items()})
    for step in range(8):
        for name, squared in frozen[step].items():
            torch.testing.assert_close(squared, bandwidths[min(step, 4)][name])
    assert len({float(squared) for squared in frozen[-1].values()}) == 6
    assert frozen[4] != bandwidths[2]


def heads_of(model):
    return [(part.name, part.particles().clone()) for part in head_partitions(model)]


def test_a_layer_that_thaws_has_a_warm_up_of_its_own(model):
    model.layers[1].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    method = SteinDiffusion(2)
    repulsion = Repulsion(model, optimizer, method=method, num_data=50, seed=0)
    for step in range(6):
        if step == 3:
            model.layers[1].requires_grad_(True)
        optimizer.zero_grad()
        loss_of(model).backward()
        repulsion.step()
        state = repulsion.state_dict()["diffusion"]
        assert len(state["squares"]) == (3 if step < 3 else 6)
        assert len(state["kernels"]) == {2: 3, 3: 3, 4: 3}.get(step, 0 if step < 2 else 6)
        optimizer.step()


def test_the_transient_is_decoupled_where_asked(model):
    twin = copy.deepcopy(model)
    trained(model, SteinDiffusion(2), 1, decoupled=True)
    trained(twin, SteinForce(), 1, decoupled=True)
    for (_, one), (_, other) in zip(heads_of(model), heads_of(twin), strict=True):
        assert torch.equal(one, other)


def test_noise_is_told_by_seed_step_and_place():
    like = torch.zeros(2, 3)
    noise = [StepNoise(5, like.device) for _ in range(2)]
    draws = [noise[0].normal(like, *at) for at in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(a, b) for a, b in zip(draws, draws[1:] + draws[:1], strict=True))
    # Whatever was drawn before.
    assert torch.equal(noise[1].normal(like, 1, 0), draws[2])
    assert not torch.equal(StepNoise(-5, like.device).normal(like, 1, 0), draws[2])


def test_a_flat_prior_is_warned_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="flat prior"):
        Repulsion(model, optimizer, method=SteinDiffusion(3), num_data=50)
    normal = torch.distributions.Normal(0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Repulsion(model, optimizer, method=SteinDiffusion(3), num_data=50, prior=normal)


def test_the_optimizer_sees_no_gradient_of_sampled_heads(model):
    """So that clipping does not count what does not move."""
    repulsion = trained(model, SteinDiffusion(1), 2)
    assert repulsion.is_sampling
    assert not model.layers[0].in_proj_weight.grad.any()
    assert model.readout.weight.grad.any()


def test_settings_that_do_not_go_together_are_refused(unchecked_types):
    for settings, message in [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 0}, "measured in the transient"),
        ({"warmup_steps": 3, "faithful": True}, "no transient"),
        ({"warmup_steps": 3, "noise": "none"}, "noise must be one of"),
        ({"warmup_steps": 3, "preconditioner": "adam"}, "preconditioner must be one of"),
        ({"warmup_steps": 3, "langevin": -1.0}, "langevin must be a positive number"),
        ({"warmup_steps": 3, "step_size": 0.0}, "step_size must be a positive number"),
        ({"warmup_steps": 3, "kernel": "rbf"}, "expected a kernel"),
    ]:
        with pytest.raises(ValueError, match=message):
            SteinDiffusion(**settings)
    with torch.random.fork_rng(devices=[]):
        model = Classifier(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for settings in ({"method": SteinDiffusion(3)}, {"decoupled": True}):
        with pytest.raises(ValueError, match=r"layers.0.query: .* float32 or wider"):
            Repulsion(model, optimizer, alpha=0.2, **settings)
    model.float()
    method = SteinDiffusion(0, faithful=True)
    with pytest.raises(ValueError, match="decoupled=False"):
        Repulsion(model, optimizer, method=method, alpha=0.2, decoupled=True)
