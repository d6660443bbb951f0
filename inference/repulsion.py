r"""Heads of any network as interacting particles, while it is trained.

.. math:: \tilde g_i = -\left( \mathrm{drive}_i + \alpha\, \mathrm{repulsion}_i \right),
    \qquad \alpha = T / N

takes the place of the heads' gradients, once for each step of the optimizer.

Source:
    An et al. (2020), Repulsive attention, arXiv:2009.09364. Differs from the paper's code: the sum
    over M heads is over M and not times a step size of its own, which optimizers have; and α is
    T / N by default, where published ones are of hot posteriors (T = α N).
"""

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesattn.inference.head_diffusion import DiffusionState, SteinDiffusion, check_diffusion
from bayesattn.inference.head_forces import HeadForce, SteinForce
from bayesattn.inference.head_motion import HeadMotion, Move, RepulsionInfo, forced
from bayesattn.inference.learning_rates import LearningRates
from bayesattn.inference.noise_generators import NoiseGenerators
from bayesattn.inference.routine import check_count, check_positive
from bayesattn.inference.schedules import Number
from bayesattn.kernels import Kernel
from bayesattn.networks import HeadBatch, HeadPartition, head_batches, head_partitions

__all__ = ["Repulsion"]


class Repulsion:
    """Let the heads of a network interact while an optimizer trains it.

    Once for each step of the optimizer, when gradients are accumulated, all-reduced and unscaled,
    and before they are clipped::

        repulsion = Repulsion(model, optimizer, num_data=len(train))
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            repulsion.step()
            optimizer.step()

    The loss is a mean over examples. Nothing waits for the device. Under
    :class:`torch.nn.parallel.DistributedDataParallel` all processes compute the same; noise has the
    seed of the first. Layers that were not called (no gradients) and frozen ones are left alone.

    Args:
        model: Any module with attention layers; compiled and wrapped ones as well.
        optimizer: Trains the heads, and what else there is.
        method: :class:`SteinForce` (SVGD, as the paper has it; the default),
            :class:`WassersteinForce` (repulsive ensembles), :class:`CircuitForce`, or
            :class:`SteinDiffusion` (SPOS and SGLD).
        heads: Partitions that interact, each within itself. By default those of
            :func:`bayesattn.networks.head_partitions`: the queries, the keys and the values of each
            layer, apart.
        num_data: N, the number of examples that the loss's mean stands for.
        temperature: T of the posterior p^(1/T).
        alpha: Weight of the repulsion, T / N by default. May be set at any time:
            ``repulsion.alpha = 0.01``.
        prior: Law of the heads' weights, such as ``Normal(0., 0.1)``; flat by default.
        decoupled: Whether the repulsion moves heads after the optimizer's step, times the learning
            rate, as AdamW decouples weight decay, and not as a part of the gradient, of which Adam
            divides out the scale.
        seed: Of the noise; fresh if None.

    Attributes:
        alpha: As above.
        num_steps: Steps so far.

    Raises:
        ValueError: If the model has no heads that the optimizer trains, settings do not go
            together, or neither ``num_data`` nor ``alpha`` is given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        method: HeadForce | SteinDiffusion | None = None,
        heads: Iterable[HeadPartition] | None = None,
        num_data: int | None = None,
        temperature: Number = 1.0,
        alpha: Number | None = None,
        prior: Distribution | None = None,
        decoupled: bool = False,
        seed: int | None = None,
    ):
        if isinstance(method, Kernel):
            raise ValueError(
                f"method: expected a force, such as SteinForce({method!r}), got a kernel"
            )
        self.method = SteinForce() if method is None else method
        self.partitions = tuple(head_partitions(model) if heads is None else heads)
        self.alpha, self.num_data = _scale(num_data, temperature, alpha, prior)
        self.prior, self.decoupled = _unvalidated(prior), decoupled
        self.num_steps = 0
        self._rates = LearningRates(optimizer)
        self._check_partitions()
        self._diffusion: DiffusionState | None = None
        if isinstance(self.method, SteinDiffusion):
            check_diffusion(self.method, self.partitions, optimizer, is_decoupled=decoupled)
            self._diffusion = DiffusionState(self.method)
        device = self.partitions[0].parameters[0].device
        self._noise = NoiseGenerators(seed, device)
        self._pending: list[tuple[HeadBatch, Move]] = []
        self._written: list[tuple[weakref.ref[Tensor], int]] = []
        self._figures: list[tuple[HeadBatch, RepulsionInfo]] = []
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def step(self) -> None:
        """Turn the heads' gradients into what the method makes of them.

        Raises:
            RuntimeError: If it was called on these gradients before.
            ValueError: If a partition is frozen in part, or its parameters have several learning
                rates where that matters.
        """
        self._refuse_repetition()
        self._pending, self._figures = [], []
        active = [part for part in self.partitions if part.has_gradient and _is_trained(part)]
        for heads in head_batches(active):
            particles = heads.particles()
            motion = self._motion(heads, particles, self._drive(heads, particles))
            if motion.gradient is not None:
                heads.write_gradients(motion.gradient)
            if motion.move is not None:
                self._pending.append((heads, motion.move))
            self._figures.append((heads, motion.info))
        self._written = [
            (weakref.ref(parameter.grad), parameter.grad._version)
            for part in active
            for parameter in part.parameters
            if parameter.grad is not None
        ]
        self.num_steps += 1

    @property
    def info(self) -> dict[str, RepulsionInfo]:
        """Figures of the last step by the partitions' names."""
        return {
            name: RepulsionInfo(*(figure[index] for figure in figures))
            for heads, figures in self._figures
            for index, name in enumerate(heads.names)
        }

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Steps so far, α, the noise's generators, and what was measured in a transient."""
        return {
            "partitions": [part.name for part in self.partitions],
            "num_steps": self.num_steps,
            "alpha": self.alpha,
            "noise": self._noise.state_dict(),
            "diffusion": None if self._diffusion is None else self._diffusion.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, after the model's and the optimizer's were loaded.

        Raises:
            ValueError: If it is of other partitions or of another kind of method.
        """
        names = [part.name for part in self.partitions]
        if state["partitions"] != names:
            raise ValueError(
                f"state: expected partitions {', '.join(names)}, "
                f"got {', '.join(state['partitions'])}"
            )
        if (state["diffusion"] is None) != (self._diffusion is None):
            raise ValueError(f"state: expected one of {self.method!r}, got one of another method")
        self.num_steps, self.alpha = state["num_steps"], state["alpha"]
        self._noise.load_state_dict(state["noise"])
        if self._diffusion is not None:
            particles = {part.name: part.particles() for part in self.partitions}
            self._diffusion.load_state_dict(state["diffusion"], particles)

    @property
    def is_sampling(self) -> bool:
        """Whether heads take steps of their own: a diffusion after its transient."""
        method = self.method
        if not isinstance(method, SteinDiffusion) or method.faithful:
            return False
        return self.num_steps >= method.warmup_steps

    def _drive(self, heads: HeadBatch, particles: Tensor) -> Tensor:
        # In place: a copy of the gradients, and as large as the heads.
        drive = heads.gradients().neg_()
        if self.prior is None or self.num_data is None:
            return drive
        with torch.enable_grad():
            moved = particles.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.prior.log_prob(moved).sum(), moved)
        return drive + score / self.num_data

    def _motion(self, heads: HeadBatch, particles: Tensor, drive: Tensor) -> HeadMotion:
        method, diffusion, alpha = self.method, self._diffusion, self.alpha
        if not isinstance(method, SteinDiffusion):
            return forced(method, heads, particles, drive, alpha, is_decoupled=self.decoupled)
        if method.faithful:
            normal, rate = self._noise.normal(particles), self._rates.of(heads)
            return method.through_optimizer(particles, drive, normal, alpha, rate)
        assert diffusion is not None
        if self.is_sampling:
            return diffusion.moved(
                heads.names, particles, drive, self._noise.normal(particles), alpha
            )
        diffusion.measure(heads.names, drive)
        return forced(method.force, heads, particles, drive, alpha, is_decoupled=self.decoupled)

    def _after_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """Move heads by what is not the optimizer's business, unless it skipped its step."""
        pending, self._pending, self._written = self._pending, [], []
        overflow = getattr(optimizer, "found_inf", None)
        with torch.no_grad():
            for heads, move in pending:
                moved = move(self._rates.of(heads))
                if overflow is not None:
                    moved = torch.where(overflow.to(moved.device) > 0, heads.particles(), moved)
                heads.write(moved)

    def _refuse_repetition(self) -> None:
        seen = [(gradient(), version) for gradient, version in self._written]
        if seen and all(g is not None and g._version == version for g, version in seen):
            raise RuntimeError(
                "Repulsion.step() was called twice on the same gradients: call it once for each "
                "step of the optimizer"
            )

    def _check_partitions(self) -> None:
        if not self.partitions:
            raise ValueError(
                "model: expected attention layers that bayesattn.networks knows, found none; "
                "register_attention_layer makes others known"
            )
        names = [part.name for part in self.partitions]
        if len(set(names)) < len(names):
            raise ValueError(f"heads: expected partitions of different names, got {names}")
        trained = [part for part in self.partitions if part.requires_grad]
        if not trained:
            raise ValueError("model: expected heads that are trained, but all are frozen")
        for part in trained:
            self._rates.check(part)


def _scale(
    num_data: int | None, temperature: Number, alpha: Number | None, prior: Distribution | None
) -> tuple[Number, int | None]:
    """α and N."""
    check_positive("temperature", temperature)
    if num_data is not None:
        num_data = check_count("num_data", num_data)
    elif prior is not None:
        raise ValueError("prior: its share of the gradient is 1 / num_data, but num_data is None")
    if alpha is None:
        if num_data is None:
            raise ValueError("give num_data, for alpha = temperature / num_data, or alpha itself")
        return temperature / num_data, num_data
    if temperature != 1.0:
        raise ValueError(
            f"give alpha or temperature, since alpha = temperature / num_data: "
            f"got {alpha} and {temperature}"
        )
    if alpha != 0:
        check_positive("alpha", alpha)
    return alpha, num_data


def _is_trained(part: HeadPartition) -> bool:
    trained = [parameter.requires_grad for parameter in part.parameters]
    if any(trained) and not all(trained):
        raise ValueError(
            f"{part.name}: expected heads that are trained or frozen as a whole, got some of both"
        )
    return all(trained)


def _unvalidated(prior: Distribution | None) -> Distribution | None:
    """The same law without looks at its values, each of which would wait for the device."""
    prior = copy.copy(prior)
    if prior is not None:
        prior._validate_args = False
        for name, part in vars(prior).items():
            if isinstance(part, Distribution):
                setattr(prior, name, _unvalidated(part))
    return prior
