r"""Heads of any network as interacting particles, while it is trained.

.. math:: \tilde g_i = -\left( \mathrm{drive}_i + \alpha\, \mathrm{repulsion}_i \right),
    \qquad \alpha = T / N

takes the place of the heads' gradients, once for each step of the optimizer.

Source:
    An et al. (2020), Repulsive attention, arXiv:2009.09364. Differs from the paper's code: the sum
    over M heads is over M and not times a step size of its own, which optimizers have; and α is
    T / N by default, where published ones are of hot posteriors (T = α N).
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bayesattn.argument_checks import check_positive
from bayesattn.inference.diffusion_state import DiffusionState, Phase
from bayesattn.inference.head_checks import (
    check_method,
    check_partitions,
    check_resolution,
    is_trained,
    posterior_scale,
)
from bayesattn.inference.head_diffusion import (
    SteinDiffusion,
    check_diffusion,
)
from bayesattn.inference.head_forces import CircuitForce, HeadForce, SteinForce
from bayesattn.inference.head_motion import HeadMotion, Move, RepulsionInfo, forced
from bayesattn.inference.head_priors import HeadPrior
from bayesattn.inference.learning_rates import LearningRates
from bayesattn.inference.schedules import Number
from bayesattn.inference.step_noise import StepNoise
from bayesattn.networks import (
    HeadBatch,
    HeadPartition,
    head_batches,
    head_circuits,
    head_partitions,
)

__all__ = ["Repulsion"]

# A scaler skips some steps at its beginning.
_MOST_UNAPPLIED = 20


class Repulsion:
    """Let the heads of a network interact while an optimizer trains it.

    Once for each step of the optimizer, when gradients are accumulated, all-reduced and unscaled
    (``scaler.unscale_(optimizer)``), and before they are clipped::

        repulsion = Repulsion(model, optimizer, num_data=len(train))
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            repulsion.step()
            optimizer.step()

    The loss is a mean over examples. Nothing waits for the device. Under
    :class:`torch.nn.parallel.DistributedDataParallel` all processes compute the same; noise has the
    seed of the first. Layers without gradients and frozen ones are left alone; a layer that was not
    called has none if they are set to None, as ``zero_grad()`` does.

    Args:
        model: Any module with attention layers; compiled and wrapped ones as well.
        optimizer: Trains the heads, and what else there is.
        method: :class:`SteinForce` (SVGD, as the paper has it; the default),
            :class:`WassersteinForce` (repulsive ensembles), :class:`CircuitForce`, or
            :class:`SteinDiffusion` (SPOS and SGLD).
        heads: Partitions that interact, each within itself. By default those of
            :func:`bayesattn.networks.head_partitions`: the queries, the keys and the values of each
            layer, apart.
        num_data: N, how many there are of what the loss is a mean of: sentences of a classifier,
            tokens of a language model.
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
        self.method = SteinForce() if method is None else method
        check_method(self.method)
        self.partitions = tuple(head_partitions(_unwrapped(model)) if heads is None else heads)
        self.alpha = posterior_scale(num_data, temperature, alpha)
        self._prior = None if prior is None else HeadPrior(prior, num_data)
        self.decoupled = decoupled
        self.num_steps = 0
        self._rates = LearningRates(optimizer)
        check_partitions(self.partitions, self._rates)
        if decoupled or isinstance(self.method, SteinDiffusion):
            check_resolution(self.partitions)
        self._diffusion: DiffusionState | None = None
        if isinstance(self.method, SteinDiffusion):
            check_diffusion(
                self.method, optimizer, is_decoupled=decoupled, has_prior=prior is not None
            )
            self._diffusion = DiffusionState(self.method)
            self._force: HeadForce = self.method.force
        else:
            self._force = self.method
        for batch in head_batches(self.partitions):
            # What does not fit is told here, not at the first step.
            if isinstance(self.method, CircuitForce):
                head_circuits(batch, batch.particles())
            if self._prior is not None:
                self._prior.check(batch.particles())
        device = self.partitions[0].parameters[0].device
        self._noise = StepNoise(seed, device)
        self._pending: list[tuple[HeadBatch, Move]] = []
        self._num_unapplied = 0
        # Gradients that were turned, or that the optimizer went by: new ones are awaited.
        self._used: list[tuple[weakref.ref[Tensor], int]] = []
        self._is_waiting = self._is_removed = False
        self._figures: list[tuple[HeadBatch, RepulsionInfo]] = []
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def step(self) -> None:
        """Turn the heads' gradients into what the method makes of them.

        Raises:
            RuntimeError: If the gradients are not new since the last step, its own or the
                optimizer's, or after :meth:`remove`.
            ValueError: If a partition is frozen in part, or its parameters have several learning
                rates where that matters.
        """
        active = [part for part in self.partitions if part.has_gradient and is_trained(part)]
        self._refuse_used_gradients(active)
        self._forget_moves()
        if not active:
            warnings.warn(
                "Repulsion.step(): no head has a gradient; call it between backward() and the "
                "optimizer's step",
                stacklevel=2,
            )
            return
        # Heads that began to be trained later have a warm-up of their own. All are grouped before
        # any of them goes on in its own.
        phases: dict[Phase, list[HeadPartition]] = {}
        for part in active:
            phases.setdefault(self._phase(part), []).append(part)
        for heads in (heads for group in phases.values() for heads in head_batches(group)):
            particles = heads.particles()
            motion = self._motion(heads, particles, self._drive(heads, particles))
            heads.write_gradients(motion.gradient)
            if motion.move is not None:
                self._pending.append((heads, motion.move))
            self._figures.append((heads, motion.info))
        self._used = _gradients(active)
        self._is_waiting = True
        self.num_steps += 1

    @property
    def info(self) -> dict[str, RepulsionInfo]:
        """Figures of the last step by the partitions' names, in their order."""
        found = {
            name: RepulsionInfo(*(figure[index] for figure in figures))
            for heads, figures in self._figures
            for index, name in enumerate(heads.names)
        }
        return {part.name: found[part.name] for part in self.partitions if part.name in found}

    @property
    def alpha(self) -> Number:
        """Weight of the repulsion."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: Number) -> None:
        if alpha != 0:
            check_positive("alpha", alpha)
        self._alpha = alpha

    def remove(self) -> None:
        """Take the hook off the optimizer; after that there are no steps."""
        self._hook.remove()
        self._is_removed = True

    def state_dict(self) -> dict[str, Any]:
        """Steps so far, α, the noise's seed, and what was measured in a transient."""
        return {
            "partitions": [part.name for part in self.partitions],
            "num_steps": self.num_steps,
            "alpha": self.alpha,
            "seed": self._noise.seed,
            "method": repr(self.method),
            "diffusion": None if self._diffusion is None else self._diffusion.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, after the model's and the optimizer's were loaded.

        Raises:
            ValueError: If it is of other partitions, or of a diffusion with other settings.
        """
        names = [part.name for part in self.partitions]
        if state["partitions"] != names:
            raise ValueError(
                f"state: expected partitions {', '.join(names)}, "
                f"got {', '.join(state['partitions'])}"
            )
        is_diffusion = self._diffusion is not None or state["diffusion"] is not None
        if is_diffusion and state["method"] != repr(self.method):
            raise ValueError(
                f"state: expected one of {self.method!r}, got one of another method: "
                f"{state['method']}"
            )
        self.num_steps, self.alpha = state["num_steps"], state["alpha"]
        self._noise.seed = state["seed"]
        self._pending, self._used, self._num_unapplied = [], [], 0
        self._is_waiting = False
        if self._diffusion is not None and state["diffusion"] is not None:
            particles = {part.name: part.particles() for part in self.partitions}
            self._diffusion.load_state_dict(state["diffusion"], particles)

    @property
    def is_sampling(self) -> bool:
        """Whether the heads are samples: a diffusion after all its partitions' warm-up."""
        sampling = [self._phase(part) is Phase.SAMPLING for part in self.partitions]
        return all(sampling)

    def _phase(self, part: HeadPartition) -> Phase:
        return Phase.TRANSIENT if self._diffusion is None else self._diffusion.phase(part.name)

    def _drive(self, heads: HeadBatch, particles: Tensor) -> Tensor:
        # In place: a copy of the gradients, and as large as the heads.
        drive = heads.gradients().neg_()
        return drive if self._prior is None else drive + self._prior.drive(particles)

    def _motion(self, heads: HeadBatch, particles: Tensor, drive: Tensor) -> HeadMotion:
        diffusion, alpha = self._diffusion, self.alpha
        if diffusion is not None and diffusion.phase(heads.names[0]) is not Phase.TRANSIENT:
            normal = self._normal(heads, particles)
            if diffusion.method.faithful:
                rate = self._rates.of(heads)
                return diffusion.method.through_optimizer(particles, drive, normal, alpha, rate)
            return diffusion.moved(heads.names, particles, drive, normal, alpha)
        if diffusion is not None:
            diffusion.measure(heads.names, drive)
        return forced(self._force, heads, particles, drive, alpha, is_decoupled=self.decoupled)

    def _normal(self, heads: HeadBatch, particles: Tensor) -> Tensor:
        place = self.partitions.index(heads.partitions[0])
        return self._noise.normal(particles, self.num_steps, place)

    def _forget_moves(self) -> None:
        """Begin a step; moves of the last one are lost if the optimizer made none."""
        self._num_unapplied = self._num_unapplied + 1 if self._pending else 0
        if self._num_unapplied == _MOST_UNAPPLIED:
            warnings.warn(
                f"Repulsion: in the last {_MOST_UNAPPLIED} steps heads were not moved, since the "
                "optimizer that it was made with has made no step",
                stacklevel=3,
            )
        self._pending, self._figures = [], []

    def _after_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """Move heads by what is not the optimizer's business, unless it skipped its step."""
        pending, self._pending = self._pending, []
        self._used, self._is_waiting = _gradients(self.partitions), False
        overflow = getattr(optimizer, "found_inf", None)
        with torch.no_grad():
            for heads, move in pending:
                moved = move(self._rates.of(heads))
                if overflow is not None:
                    moved = torch.where(overflow.to(moved.device) > 0, heads.particles(), moved)
                heads.write(moved)

    def _refuse_used_gradients(self, active: Sequence[HeadPartition]) -> None:
        if self._is_removed:
            raise RuntimeError("Repulsion.step() was called after remove()")
        versions = {id(grad): version for grad, version in _alive(self._used)}
        present = [(id(grad), version) for grad, version in _alive(_gradients(active))]
        if any(versions.get(grad) == version for grad, version in present):
            when = "twice on the same gradients" if self._is_waiting else "after the optimizer's"
            raise RuntimeError(
                f"Repulsion.step() was called {when}: call it once for each step of the "
                "optimizer, between backward() and that step"
            )
        if self._is_waiting and any(grad in versions for grad, _ in present):
            warnings.warn(
                "Repulsion.step(): gradients were added to some that it had turned before; call "
                "it once for each step of the optimizer, when they are complete",
                stacklevel=3,
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    """A model without what wraps it as a whole, so that names are its own."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _gradients(partitions: Iterable[HeadPartition]) -> list[tuple["weakref.ref[Tensor]", int]]:
    """The gradients that there are, not kept alive, and how often each was written to."""
    return [
        (weakref.ref(parameter.grad), parameter.grad._version)
        for part in partitions
        for parameter in part.parameters
        if parameter.grad is not None
    ]


def _alive(
    gradients: Iterable[tuple["weakref.ref[Tensor]", int]],
) -> Iterator[tuple[Tensor, int]]:
    for reference, version in gradients:
        gradient = reference()
        if gradient is not None:
            yield gradient, version
