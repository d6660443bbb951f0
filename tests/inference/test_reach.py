"""What a program can reach is found, is told apart when it changes, and can be replaced."""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

from bayesattn.inference.fingerprints import fingerprint
from bayesattn.inference.module_state import module_tensors, substituted_tensors
from bayesattn.inference.reach import Reach, modules_of

SHARED = nn.Linear(1, 1, device="meta")
NUMBER = 1.0


@pytest.fixture(autouse=True)
def forked_random_state():
    with torch.random.fork_rng():
        yield


def through_global():
    return SHARED(torch.zeros(1))


def through_helper():
    return through_global()


def through_default(net=SHARED):
    return net(torch.zeros(1))


def through_inner_function():
    return [entry() for entry in [lambda: SHARED]]


@functools.wraps(through_global)
def decorated():
    return None


def closing_over(value):
    return lambda: value


class Owner:
    def __init__(self):
        self.nets = {"first": [SHARED]}

    def program(self):
        return None

    def __call__(self):
        return None


class GlobalUser:
    @staticmethod
    def static():
        return SHARED

    @property
    def net(self):
        return SHARED

    def __call__(self):
        return self.net


class Wrapper(nn.Module):
    def forward(self):
        return SHARED


def plain():
    return None


PROGRAMS = {
    "the module itself": (SHARED, (), {}),
    "a global": (through_global, (), {}),
    "a helper's global": (through_helper, (), {}),
    "a default": (through_default, (), {}),
    "an inner function": (through_inner_function, (), {}),
    "what was decorated": (decorated, (), {}),
    "a closure": (closing_over(SHARED), (), {}),
    "a container in a closure": (closing_over({"a": (SHARED,)}), (), {}),
    "an argument": (plain, (SHARED,), {}),
    "an argument's container": (plain, (), {"nets": [{"a": SHARED}]}),
    "an argument's attribute": (plain, (SimpleNamespace(net=SHARED),), {}),
    "a partial argument": (functools.partial(plain, SHARED), (), {}),
    "a partial's function": (functools.partial(functools.partial(through_global)), (), {}),
    "a bound method's owner": (Owner().program, (), {}),
    "a callable's attribute": (Owner(), (), {}),
    "a callable's property": (GlobalUser(), (), {}),
    "another module's forward": (Wrapper(), (), {}),
    "below handlers": (poutine.scale(poutine.block(through_global), scale=2.0), (), {}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_modules_are_found_through(name):
    found = modules_of(*PROGRAMS[name])
    assert any(module is SHARED for module in found.values())


def test_modules_are_not_looked_for_in_foreign_code():
    assert modules_of(plain, (), {}) == {}
    assert modules_of(torch.nn.functional.multi_head_attention_forward, (), {}) == {}


def test_a_tensor_has_the_name_of_where_it_was_found():
    net = nn.Sequential(nn.BatchNorm1d(2))
    other = torch.zeros(2)
    names = Reach(lambda: (net, other), (), {}).named_tensors()
    assert names["net.0.running_mean"] is net[0].running_mean
    assert names["other"] is other
    assert set(module_tensors({"a": net})) == {
        f"a.0.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@dataclasses.dataclass
class Options:
    scale: float
    sizes: list[int]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.power = 2
        self.mask = torch.ones(1)

    def forward(self):
        return NUMBER


class Place(SimpleNamespace):
    """Everything that the cases below change."""


def cases():
    """Name to (model, arguments, what changes something)."""
    place = Place()
    place.net, place.options, place.array = Net(), Options(1.0, [1]), np.zeros(3)
    place.table, place.number, place.tensor = {"a": [1.0]}, 1, torch.zeros(1)
    net, options, array, table = place.net, place.options, place.array, place.table
    number, tensor, helper = 1, torch.zeros(1), plain

    def model():
        return net, array, table, number, tensor, helper

    def rebind_number():
        nonlocal number
        number = 2

    def rebind_tensor():
        nonlocal tensor
        tensor = torch.zeros(1)

    def rebind_helper():
        nonlocal helper
        helper = through_global

    def change_global():
        globals()["NUMBER"] += 1.0

    return (
        model,
        (options,),
        {
            "nothing": (lambda: None, False),
            "a module's flag": (lambda: net.eval(), True),
            "an inner module's flag": (lambda: net.inner.eval(), True),
            "a module's number": (lambda: setattr(net, "power", 3), True),
            "a module's tensor": (lambda: setattr(net, "mask", torch.ones(1)), True),
            "an inner module": (lambda: setattr(net, "inner", nn.Linear(1, 1)), True),
            "a new inner module": (lambda: setattr(net, "more", nn.Linear(1, 1)), True),
            "a parameter": (
                lambda: setattr(net.inner, "weight", nn.Parameter(torch.ones(1, 1))),
                False,
            ),
            "a parameter's values": (lambda: net.inner.weight.data.add_(1.0), False),
            "an argument's attribute": (lambda: setattr(options, "scale", 2.0), True),
            "an argument's list": (lambda: options.sizes.append(2), True),
            "an array's values": (lambda: array.__setitem__(0, 1.0), True),
            "an entry in a container": (lambda: table["a"].append(2.0), True),
            "a number in a closure": (rebind_number, True),
            "a tensor in a closure": (rebind_tensor, True),
            "a tensor's values": (lambda: tensor.add_(1.0), False),
            "a function in a closure": (rebind_helper, True),
            "a global that forward names": (change_global, True),
        },
    )


@pytest.mark.parametrize("name", cases()[2])
def test_observe_tells_a_change_of(name):
    model, args, changes = cases()
    change, is_seen = changes[name]
    reach = Reach(model, args, {})
    before = reach.observe()
    assert reach.observe() == before
    assert hash(reach.observe()) == hash(before)
    change()
    assert (reach.observe() != before) == is_seen


def test_what_the_program_itself_changes_is_not_watched():
    net = Net()

    def model():
        net.power += 1
        net.seen = torch.zeros(1)

    before = Reach(model, (), {})
    model()
    reach = Reach(model, (), {}, unwatched=Reach(model, (), {}).changed_since(before))
    seen = reach.observe()
    model()
    assert reach.observe() == seen
    net.mask = torch.zeros(1)
    assert reach.observe() != seen
    again = reach.renewed(model, (), {})
    seen = again.observe()
    model()
    assert again.observe() == seen


def test_tensors_are_substituted_in_their_order_and_put_back():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1), nn.Linear(1, 1, bias=False))
    net[2].weight = net[0].weight
    reach = Reach(net, (), {})
    tensors = reach.tensors()
    assert len(tensors) == 1 + 5 + 1
    assert tensors[0] is tensors[-1]
    stand_ins = [torch.full_like(tensor, 7) for tensor in tensors]
    with contextlib.suppress(ZeroDivisionError), reach.substituted(stand_ins):
        assert net[0].weight is stand_ins[0]
        assert net[2].weight is stand_ins[-1]
        assert net[1].running_var is stand_ins[4]
        1 / 0  # noqa: B018
    assert all(one is other for one, other in zip(reach.tensors(), tensors, strict=True))
    with substituted_tensors({"net": net}, {id(tensors[0]): stand_ins[0]}):
        assert net[0].weight is net[2].weight is stand_ins[0]
        assert net[1].weight is tensors[1]
    assert net[2].weight is tensors[0]


DIFFERENT = [
    (1, True),
    (1, 1.0),
    (0.0, -0.0),
    ("a", b"a"),
    ([1], (1,)),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    (np.float32(1), np.float64(1)),
    (np.zeros(2), np.zeros(3)),
    (np.zeros(2), np.ones(2)),
    (np.zeros(2), np.zeros(2, dtype=np.float32)),
    (torch.zeros(2), torch.zeros(2)),
    (torch.float32, torch.float64),
    (object(), object()),
    ({1, 2}, {1, 3}),
    (None, False),
]
EQUAL = [
    (1.5, 1.5),
    (float("nan"), float("nan")),
    ([1, {"a": (2.0,)}], [1, {"a": (2.0,)}]),
    (np.arange(4.0), np.arange(4.0)),
    ({2, 1}, {1, 2}),
    (np.float64(2), np.float64(2)),
    (torch.Size([2]), torch.Size([2])),
    (plain, plain),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=range(len(DIFFERENT)))
def test_fingerprints_tell_apart(pair):
    assert fingerprint(pair[0]) != fingerprint(pair[1])


@pytest.mark.parametrize("pair", EQUAL, ids=range(len(EQUAL)))
def test_fingerprints_find_equal(pair):
    assert fingerprint(pair[0]) == fingerprint(pair[1])
    assert hash(fingerprint(pair[0])) == hash(fingerprint(pair[1]))


def test_what_is_too_large_to_read_at_each_call_is_told_apart_by_identity():
    for large in (list(range(1000)), np.zeros(10**5)):
        assert fingerprint(large) == fingerprint(large)
        assert fingerprint(large) != fingerprint(large.copy())


def test_a_fingerprint_keeps_its_object_so_that_no_other_takes_its_place():
    kept = {fingerprint(torch.zeros(1)) for _ in range(50)}
    assert len(kept) == 50
