"""Compiled graphs: the same numbers as recorded ones, and nothing left behind in the process."""

import logging
import logging.handlers

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Distribution

from bayesattn.inference import NUTS, SPOS, SVGD, SVI, DensitySettings, LogDensity, compilation
from bayesattn.inference.compilation import compiled, resolved_mode
from bayesattn.inference.recording import record

CPU = torch.device("cpu")
QUIET = {"seed": 0, "progress": False}


def regression(design, target):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(())))
    with pyro.plate("row", len(design), subsample_size=len(design)):
        pyro.sample("target", dist.Normal(design @ weight, noise), obs=target)


def heads(design, target):
    with pyro.plate("head", 3):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("row", len(design)):
        pyro.sample("target", dist.Normal(design @ weight + level, 1.0), obs=target)


@pytest.fixture
def data(generator):
    design = torch.randn(23, 3, generator=generator)
    noise = torch.randn(23, generator=generator)
    return design, design @ torch.tensor([1.0, -2.0, 0.5]) + noise


RUNS = {
    "svgd": (SVGD, regression, {"num_particles": 20}, {"num_steps": 60}),
    "heads": (SVGD, heads, {"particle_plate": "head"}, {"num_steps": 20, "num_runs": 2}),
    "spos": (
        SPOS,
        regression,
        {"num_particles": 5, "step_size": 1e-3},
        {"warmup_steps": 10, "num_samples": 2},
    ),
    "svi": (SVI, regression, {}, {"num_steps": 10, "num_samples": 5}),
    "nuts": (NUTS, regression, {"max_tree_depth": 3}, {"warmup_steps": 3, "num_samples": 2}),
}

SLOW = ("heads", "spos", "svi")


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::bayesattn.inference.ConvergenceWarning")
@pytest.mark.parametrize(
    ("kind", "model", "settings", "length"),
    [
        pytest.param(*run, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, run in RUNS.items()
    ],
)
def test_compiled_runs_are_the_recorded_ones(kind, model, settings, length, data):
    """Up to rounding, which is why runs are short. The guard of global state stands around."""
    recorded, machine = (kind(model, compile=c, **settings) for c in ("record", "inductor"))
    expected = recorded.run(*data, **length, **QUIET)
    found = machine.run(*data, **length, **QUIET)
    torch.testing.assert_close(found.unconstrained, expected.unconstrained, rtol=1e-6, atol=1e-8)
    for name, curve in expected.optimization.items():
        torch.testing.assert_close(found.optimization[name], curve, rtol=1e-6, atol=1e-8)
    # A second run compiles nothing.
    graphs = machine.density_settings.graphs
    count = graphs.num_recordings
    again = machine.run(*data, **length, **QUIET)
    assert graphs.num_recordings == count
    assert torch.equal(again.unconstrained, found.unconstrained)


@pytest.mark.compile
def test_data_of_a_compiled_graph_are_inputs(data, generator):
    settings = DensitySettings(compile="inductor")
    rows = torch.randn(7, 4, generator=generator)
    first = LogDensity(regression, *data, settings=settings)
    first.value_and_score(rows)
    other = (data[0].flip(0) + 1.0, data[1])
    found = LogDensity(regression, *other, settings=settings).value_and_score(rows)
    assert settings.graphs.num_recordings == 1
    plain = LogDensity(regression, *other, settings=DensitySettings(compile="none"))
    torch.testing.assert_close(found, plain.value_and_score(rows))


@pytest.mark.compile
def test_what_is_outside_of_loops_is_not_compiled(data, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "bayesattn.inference.recording.compiled",
        lambda module, inputs: calls.append(len(inputs)) or compiled(module, inputs),
    )
    svgd = SVGD(regression, num_particles=4, compile="inductor")
    svgd.run(*data, num_steps=3, **QUIET)
    assert len(calls) == 1


@pytest.mark.compile
def test_compiling_leaves_no_trace(generator):
    """The compiler turns the validation of distributions off for the whole process."""
    module = torch.fx.symbolic_trace(lambda x: (x.sin() + 1.0,))
    x = torch.randn(7, generator=generator)
    validates = Distribution._validate_args
    (found,) = compiled(module, [x])(x)
    torch.testing.assert_close(found, x.sin() + 1)
    assert Distribution._validate_args == validates


@pytest.mark.compile
def test_random_numbers_of_a_compiled_graph_are_those_of_the_recorded_one(generator):
    x = torch.randn(7, generator=generator)
    graph = record(lambda x: (x + torch.rand(5, 1, dtype=torch.float32), x), (x,))
    machine = compiled(graph.module, [x])
    with torch.random.fork_rng(devices=[]):
        found, expected = (torch.manual_seed(3) and call(x) for call in (machine, graph))
    torch.testing.assert_close(found, expected)


@pytest.mark.compile
def test_a_compiled_graph_fails_as_the_recorded_one():
    graph = record(lambda x: (torch.linalg.cholesky(x),), (torch.eye(3),))
    machine = compiled(graph.module, [torch.eye(3)])
    for call in (graph, machine):
        with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
            call(-torch.eye(3))


@pytest.mark.compile
def test_the_compiler_does_not_tell_of_what_it_calls_by_way_of_python(generator):
    x = torch.randn(7, 3, generator=generator)
    told = logging.handlers.BufferingHandler(capacity=100)
    logger = logging.getLogger("torch._inductor.ir")
    logger.addHandler(told)
    try:
        graph = record(lambda x: (x.median(0).values.sin(),), (x,)).compile([x])
    finally:
        logger.removeHandler(told)
    torch.testing.assert_close(graph(x)[0], x.median(0).values.sin())
    assert told.buffer == []
    assert not logger.disabled


@pytest.mark.parametrize(
    ("choice", "num_steps", "expected"),
    [
        ("auto", None, "record"),
        ("auto", 4999, "record"),
        ("auto", 5000, "inductor"),
        ("record", 10**6, "record"),
        ("inductor", 1, "inductor"),
        ("none", 10**6, "none"),
    ],
)
def test_auto_hangs_on_the_number_of_steps_alone(choice, num_steps, expected):
    assert resolved_mode(choice, CPU, num_steps) == expected


def test_without_a_compiler_auto_records_and_says_so_once(monkeypatch):
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "no compiler")
    compilation._tell_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"recorded, not compiled.*no compiler"):
        assert resolved_mode("auto", CPU, 10**4) == "record"
    assert resolved_mode("auto", CPU, 10**4) == "record"
    compilation._tell_once.cache_clear()
    with pytest.raises(ValueError, match="compile='inductor' needs a compiler: no compiler"):
        resolved_mode("inductor", CPU)


def test_a_missing_compiler_is_found_out(monkeypatch):
    compilation._missing_cpp_compiler.cache_clear()
    from torch._inductor import cpp_builder

    def missing():
        raise RuntimeError("none")

    assert compilation.missing_compiler(CPU) == ""
    compilation._missing_cpp_compiler.cache_clear()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert "no C++ compiler was found" in compilation.missing_compiler(CPU)
    compilation._missing_cpp_compiler.cache_clear()


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"compile must be one of 'auto', 'none', .* got 'fast'"):
        SVGD(regression, compile="fast")


def test_a_chunk_at_a_time_is_the_whole(data):
    """Where particles go in chunks, or nothing is recorded, a step is no single graph."""
    length = {"num_steps": 5, **QUIET}
    expected = SVGD(regression, num_particles=7).run(*data, **length)
    for options in ({"chunk_size": 3}, {"compile": "none"}):
        found = SVGD(regression, num_particles=7, **options).run(*data, **length)
        torch.testing.assert_close(found.unconstrained, expected.unconstrained)
