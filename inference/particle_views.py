"""What a particle is: a copy of all latents, or one slice of a plate of one network.

A view assembles the unconstrained vectors that a log density takes from particles and what is
outside of them, splits scores alike, and lays the result out as a posterior.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.inference.log_density import LogDensity

__all__ = ["ParticleView", "PlateParticles", "WholeParticles"]


@runtime_checkable
class ParticleView(Protocol):
    """One reading of the word particle."""

    @property
    def key(self) -> Hashable:
        """What stands for the view of one program: equal keys, equal functions."""
        ...

    def assemble(
        self, particles: Float[Tensor, "run particle dim"], outside: Float[Tensor, "run outside"]
    ) -> Float[Tensor, "evaluation all"]:
        """Unconstrained vectors to evaluate."""
        ...

    def split(
        self, networks: Float[Tensor, "evaluation all"]
    ) -> tuple[Float[Tensor, "run particle dim"], Float[Tensor, "run outside"]]:
        """Particles (or their scores), and what is outside of them."""
        ...

    def lay_out(
        self, density: LogDensity, networks: Float[Tensor, "evaluation all"], values: Tensor
    ) -> dict[str, Any]:
        """Fields of a posterior: draws, what they are, ``lp``, and what is outside of them."""
        ...


class WholeParticles(NamedTuple):
    """The reading in which a particle is a copy of all latents.

    Attributes:
        num_runs: Clouds evaluated together.
    """

    num_runs: int

    @property
    def key(self) -> Hashable:
        """Number of runs."""
        return self.num_runs

    def assemble(
        self,
        particles: Float[Tensor, "run particle dim"],
        outside: Float[Tensor, "run outside"],
    ) -> Float[Tensor, "evaluation all"]:
        """Unconstrained vectors to evaluate, one a particle."""
        return particles.flatten(0, 1)

    def split(
        self, networks: Float[Tensor, "evaluation all"]
    ) -> tuple[Float[Tensor, "run particle dim"], Float[Tensor, "run outside"]]:
        """Particles (or their scores), and nothing outside of them."""
        particles = networks.unflatten(0, (self.num_runs, -1))
        return particles, particles.new_zeros(self.num_runs, 0)

    def lay_out(
        self, density: LogDensity, networks: Float[Tensor, "evaluation all"], values: Tensor
    ) -> dict[str, Any]:
        """Fields of a posterior whose draws are particles."""
        shape = (self.num_runs, -1)
        draws = density.constrain(networks).items()
        return {
            "draws": {name: value.unflatten(0, shape) for name, value in draws},
            "draws_are": "particles",
            "sample_stats": {"lp": values.unflatten(0, shape)},
        }


class PlateParticles(NamedTuple):
    """The reading in which a particle is one slice of a plate of one network.

    Attributes:
        plate: The plate's name.
        inside: Entries of the unconstrained vector that belong to each slice.
        outside: The other entries.
    """

    plate: str
    inside: Int[Tensor, "particle dim"]
    outside: Int[Tensor, " outside"]

    @property
    def key(self) -> Hashable:
        """The plate's name."""
        return self.plate

    @classmethod
    def of(cls, density: LogDensity, plate: str) -> "PlateParticles":
        """Find the slices.

        Raises:
            ValueError: If no latent site stands in such a plate.
        """
        return cls(plate, *density.particle_index(plate))

    def assemble(
        self, particles: Float[Tensor, "run particle dim"], outside: Float[Tensor, "run outside"]
    ) -> Float[Tensor, "evaluation all"]:
        """Unconstrained vectors to evaluate, one a run."""
        width = self.inside.numel() + self.outside.numel()
        networks = particles.new_empty(len(particles), width)
        networks[:, self.inside] = particles
        networks[:, self.outside] = outside
        return networks

    def split(
        self, networks: Float[Tensor, "evaluation all"]
    ) -> tuple[Float[Tensor, "run particle dim"], Float[Tensor, "run outside"]]:
        """Slices (or their scores), and what is outside of them."""
        return networks[:, self.inside], networks[:, self.outside]

    def lay_out(
        self, density: LogDensity, networks: Float[Tensor, "evaluation all"], values: Tensor
    ) -> dict[str, Any]:
        """Fields of a posterior whose draws are slices; they share the density of their network."""
        axes = {
            site.name: plate.axis
            for site in density.sites
            for plate in site.plates
            if plate.name == self.plate
        }
        values_of = density.constrain(networks)
        return {
            "draws": {name: values_of[name].movedim(axis + 1, 1) for name, axis in axes.items()},
            "draws_are": "heads",
            "sample_stats": {"lp": values[:, None].expand(-1, len(self.inside)).clone()},
            "point_estimates": {n: v for n, v in values_of.items() if n not in axes},
            "attrs": {"particle_plate": self.plate, "particle_plate_axes": axes},
        }
