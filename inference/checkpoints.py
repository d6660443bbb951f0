"""Checkpoints: all that a run needs to go on, bit for bit, where it was stopped.

A checkpoint is one safetensors file, written whole or not at all; never pickle. It holds the state
of the routine, the random generators, the curves so far, and what the run is: a checkpoint of
another model, another length or other settings is refused, and one of another machine or version
is gone on with, but bits may differ there.
"""

import functools
import hashlib
import json
import platform
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bayesattn.inference.atomic_files import check_place, replaced
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.schedules import Number

__all__ = [
    "Checkpoint",
    "CheckpointFile",
    "described",
    "load_random_state",
    "random_state",
    "resumed_seed",
    "run_identity",
]

FORMAT = 1
_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_PAIRS = "__pairs__"


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is saved; a path alone means once a minute.

    Where the file is there already, the run goes on from it. It is written at the end too, and when
    a run is interrupted.

    Attributes:
        path: Of the file; several chains or runs that go one by one have one each, with their
            number in its name.
        every_steps: Steps between two savings.
        every_seconds: Seconds between two savings.
    """

    path: str | Path
    every_steps: int | None = None
    every_seconds: Number | None = None

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    @classmethod
    def of(cls, given: "Checkpoint | str | Path | None") -> "Checkpoint | None":
        """A checkpoint of a path, if it is none yet."""
        return cls(given) if isinstance(given, str | Path) else given

    @classmethod
    def each(cls, given: "Checkpoint | str | Path | None", count: int) -> "list[Checkpoint | None]":
        """One for each of several runs or chains; the given one where there is but one."""
        checkpoint = cls.of(given)
        if checkpoint is None or count == 1:
            return [checkpoint] * count
        return [checkpoint._numbered(1 + number) for number in range(count)]

    def _numbered(self, number: int) -> "Checkpoint":
        path = Path(self.path)
        return Checkpoint(
            path.with_name(f"{path.stem}-{number}{path.suffix}"),
            self.every_steps,
            self.every_seconds,
        )


class CheckpointFile:
    """One run's checkpoint.

    Args:
        checkpoint: Where and how often.
        identity: What the run is, as plain values: equal in the run that goes on.

    Raises:
        OSError: If nothing can be written there.
    """

    def __init__(self, checkpoint: Checkpoint, identity: Mapping[str, Any]):
        self.path = Path(checkpoint.path)
        check_place(self.path)
        self._identity = json.loads(json.dumps(identity))
        self._every_steps = checkpoint.every_steps
        self._every_seconds = checkpoint.every_seconds
        if self._every_steps is None and self._every_seconds is None:
            self._every_seconds = 60.0
        self._last = time.monotonic()

    def is_due(self, done: int) -> bool:
        """Whether it is time to save after so many steps."""
        if self._every_steps is not None and done % self._every_steps == 0:
            return True
        elapsed = time.monotonic() - self._last
        return self._every_seconds is not None and elapsed >= self._every_seconds

    def save(self, state: Any) -> None:
        """Write a tree of mappings, sequences, tensors and plain values."""
        tensors: list[Tensor] = []
        tree = _packed(state, tensors)
        about = {
            "format": FORMAT,
            "identity": self._identity,
            "place": _place(),
            "state": tree,
        }
        named = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(tensors)}
        with replaced(self.path) as partial:
            safetensors.torch.save_file(named, partial, {"checkpoint": json.dumps(about)})
        self._last = time.monotonic()

    def load(self) -> Any:
        """Read what was saved; None if there is no file yet.

        Raises:
            ValueError: If the file is no checkpoint, or that of another run.
        """
        if not self.path.exists():
            return None
        about = _about(self.path)
        with safetensors.safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._check(about)
        return _unpacked(about["state"], tensors)

    def _check(self, about: Mapping[str, Any]) -> None:
        saved, present = about["identity"], self._identity
        for name in dict.fromkeys([*present, *saved]):
            if saved.get(name) != present.get(name):
                raise ValueError(
                    f"{self.path} is the checkpoint of another run: its {name} is "
                    f"{saved.get(name)}, but that of this run is {present.get(name)}; give another "
                    "path, or remove the file"
                )
        place = _place()
        other = {k: (v, place.get(k)) for k, v in about["place"].items() if v != place.get(k)}
        if other:
            changes = ", ".join(
                f"{name} {old} then, {new} now" for name, (old, new) in other.items()
            )
            warnings.warn(
                f"the run goes on where bits may differ from the place it began at: {changes}",
                RuntimeWarning,
                stacklevel=3,
            )


def resumed_seed(seed: Any, checkpoint: Checkpoint | None) -> Any:
    """The given seed, or where there is none, that of the run that a checkpoint goes on with."""
    if seed is not None or checkpoint is None or not Path(checkpoint.path).is_file():
        return seed
    return _about(Path(checkpoint.path))["identity"]["seed"]


def run_identity(density: LogDensity, method: str, seed: int, **settings: Any) -> dict[str, Any]:
    """What a run is: its program's sites and arguments, how it is evaluated, further settings."""
    return {
        "method": method,
        "seed": seed,
        "sites": [[s.name, list(s.shape), described(s.support)] for s in density.sites],
        "arguments": described([list(density.args), density.kwargs]),
        "dtype": str(density.dtype),
        "device": density.device.type,
        "evaluation": [density.mode, density.settings.chunk_size],
        **{name: described(value) for name, value in settings.items()},
    }


def described(value: Any, depth: int = 4) -> Any:
    """Plain values that are the same in every process, and other ones for another value.

    Functions are told apart by their names, defaults and what they close over; objects that say
    nothing of themselves, by their class.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return _fingerprint(value)
    within = functools.partial(described, depth=depth - 1)
    if depth and isinstance(value, functools.partial):
        return ["partial", within(value.func), within(value.args), within(value.keywords)]
    if depth and isinstance(value, list | tuple):
        return [within(part) for part in value]
    if depth and isinstance(value, Mapping):
        return [[within(key), within(part)] for key, part in value.items()]
    if depth and isinstance(value, FunctionType):
        cells = [within(cell.cell_contents) for cell in value.__closure__ or ()]
        return [f"{value.__module__}.{value.__qualname__}", within(value.__defaults__), cells]
    if depth and is_dataclass(value) and not isinstance(value, type):
        parts = [within(getattr(value, field.name)) for field in fields(value) if field.compare]
        return [type(value).__name__, *parts]
    text = repr(value)
    if " at 0x" in text:
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{type(value).__module__}.{name}"
    return text


def _fingerprint(array: Tensor | np.ndarray) -> str:
    kind, shape = array.dtype, tuple(array.shape)
    if isinstance(array, Tensor):
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{kind} {shape} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def random_state(generators: Mapping[str, torch.Generator], device: torch.device) -> dict[str, Any]:
    """States of given generators, and of the global ones of torch, numpy and Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    states: dict[str, Any] = {f"own {n}": g.get_state() for n, g in generators.items()}
    states["torch"] = torch.get_rng_state()
    states["numpy"] = [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss]  # type: ignore[union-attr]
    states["python"] = [version, torch.tensor(internal), next_gauss]
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def load_random_state(
    states: Mapping[str, Any], generators: Mapping[str, torch.Generator], device: torch.device
) -> None:
    """Put generators to where :func:`random_state` found them."""
    for name, generator in generators.items():
        generator.set_state(states[f"own {name}"])
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), next_gauss))
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)


def _about(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["checkpoint"])
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no checkpoint of bayesattn: {error!r}") from error
    if about["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {about['format']}, but this version reads up to {FORMAT}; install "
            "a newer bayesattn"
        )
    return about


def _place() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("bayesattn", "torch", "pyro-ppl")}
    return {**versions, "machine": f"{platform.system()} {platform.machine()}"}


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """The same as JSON has a form for, with numbers of tensors in their places."""
    pack: Callable[[Any], Any] = lambda part: _packed(part, tensors)  # noqa: E731
    if isinstance(value, Tensor):
        tensors.append(value)
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, Mapping):
        return {_PAIRS: [[pack(key), pack(part)] for key, part in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [pack(part) for part in value]}
    if isinstance(value, list):
        return [pack(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[str(value[_TENSOR])]
    if _TUPLE in value:
        return tuple(_unpacked(part, tensors) for part in value[_TUPLE])
    return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in value[_PAIRS]}
