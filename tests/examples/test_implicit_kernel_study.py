"""The studies of kernels run as a reader runs them."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from examples.reproduce.command_line import command
from examples.reproduce.gaussian_process import is_installed
from examples.reproduce.graph_tasks import CitationGraph
from examples.reproduce.implicit_kernel import STUDY as REGRESSION
from examples.reproduce.implicit_kernel_classification import STUDY as CLASSIFICATION
from examples.reproduce.implicit_kernel_classification import measure
from examples.reproduce.kernel_rivals import LOGITS
from examples.reproduce.node_problem import NodeProblem
from examples.reproduce.node_training import NodeBudget
from examples.reproduce.protocol import Task, count_parameters, equal_start
from examples.reproduce.regression_tasks import Table, split_table

pytestmark = pytest.mark.usefixtures("seeded_layers")


@pytest.fixture(autouse=True)
def float32(float64):
    """What studies run in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def folder(tmp_path, generator):
    """Data of a yacht that never was."""
    (tmp_path / "uci").mkdir()
    x = torch.randn(60, 3, generator=generator)
    y = x[:, 0].sin() + x[:, 1]
    rows = ["a,b,c,resistance", *(f"{a},{b},{c},{d}" for (a, b, c), d in zip(x, y, strict=True))]
    (tmp_path / "uci" / "yacht.csv").write_text("\n".join(rows))
    return tmp_path


def told(study, folder, *arguments):
    """Run a study, and give what it keeps."""
    arguments = ("--quick", "--no-progress", "--out", str(folder / "out"), *arguments)
    done = CliRunner().invoke(command(study), list(arguments))
    assert done.exit_code == 0, done.output
    return json.loads((folder / "out" / "summary.json").read_text())


@pytest.mark.slow
def test_quick_run_of_regression(folder):
    """Mutants: rivals that are all the baseline; a time that is not relative."""
    rivals = ("--rivals", ",".join(LOGITS))
    arguments = ("--data", str(folder), "--tasks", "yacht", "--seeds", "1", *rivals)
    runs = told(REGRESSION, folder, *arguments)["runs"]
    assert [run["rival"] for run in runs] == list(LOGITS)
    assert len({run["metrics"]["log score"] for run in runs}) == len(runs)
    assert all(1 <= run["metrics"]["attended"] <= 39 for run in runs)
    times = {run["rival"]: run["metrics"]["step time"] for run in runs}
    assert 0.4 < times["dot"] < 2.5
    assert {path.name for path in (folder / "out").glob("*.png")} == {
        "differences.png",
        "relative.png",
    }
    record = json.loads((folder / "out/runs/yacht/rbf_p/seed_0.json").read_text())
    (norms,) = record["details"]["norms"]
    assert len(norms) == 8
    assert norms != [2.0] * 8


def series(folder, seed):
    """A wave over eight years of twelve months."""
    months = torch.arange(96)
    time = (months / 12.0)[:, None]
    return split_table(Table(time, (time[:, 0] * 6.3).sin(), months // 12), seed)


@pytest.mark.parametrize("with_process", [False, True])
def test_series_are_drawn(tmp_path, with_process):
    if with_process and not is_installed():
        pytest.skip("gpytorch is not installed")
    quick = REGRESSION.tasks["co2"].quick
    study = dataclasses.replace(REGRESSION, tasks={"wave": Task(series, quick, quick)})
    rivals = "dot,gp_rbf" if with_process else "dot,rbf_p"
    runs = told(study, tmp_path, "--seeds", "1", "--rivals", rivals)["runs"]
    assert (tmp_path / "out" / "series.png").stat().st_size > 5000
    for run in runs:
        path = tmp_path / "out/runs/wave" / run["rival"] / "seed_0.json"
        found = json.loads(path.read_text())["details"]["forecast"]
        assert len(found["time"]) == 24
        assert found["time"] == sorted(found["time"])
    assert (runs[1]["metrics"]["attended"] is None) == with_process


def test_networks_differ_by_their_logits_alone():
    """Mutant: a rival without its logits, or wider than it says."""
    splits = series(None, 0)
    counts = {
        name: count_parameters(build(splits))
        for name, build in REGRESSION.rivals.items()
        if name in LOGITS
    }
    assert counts["rbf_p"] - counts["dot"] == 8
    assert all(1 <= count / counts["dot"] < 1.45 for count in counts.values())
    assert len({*counts.values()}) == 5


@pytest.mark.slow
def test_quick_run_of_classification(tmp_path):
    """Mutants: rivals that are all the baseline."""
    runs = told(CLASSIFICATION, tmp_path, "--tasks", "snips", "--seeds", "1")["runs"]
    assert [run["rival"] for run in runs] == list(LOGITS)
    assert len({run["metrics"]["log score"] for run in runs}) == len(runs)
    accuracies = {run["rival"]: run["metrics"]["accuracy"] for run in runs}
    # Guessing is right in one of seven.
    assert min(accuracies[name] for name in ("dot", "rbf_p", "spectral", "schoenberg")) > 0.3


def nodes(folder, seed):
    """Papers that cite the next two, with words that tell their class."""
    label = torch.arange(30) % 3
    words = torch.nn.functional.one_hot(label, 4).float().to_sparse()
    sources = torch.arange(30).repeat(3)
    targets = (sources + torch.arange(3).repeat_interleave(30)) % 30
    parts = torch.arange(30).split([12, 9, 9])
    graph = CitationGraph(words, torch.stack([sources, targets]), label, *parts, num_classes=3)
    return NodeProblem(graph, graph)


@pytest.mark.parametrize("rival", ["dot", "implicit_copula"])
def test_nodes_are_measured(rival):
    study = dataclasses.replace(
        CLASSIFICATION, tasks={"ring": Task(nodes, NodeBudget(20), NodeBudget(20))}
    )
    problem = nodes(None, 0)
    build = partial(equal_start, study, rival, problem, 0)()
    outcome = measure(build, problem, NodeBudget(20, (5e-2,)), 0)
    assert outcome.metrics.keys() == CLASSIFICATION.metrics.keys()
    assert outcome.choices["epoch"] <= 20
    assert outcome.metrics["step time"] < (3 if rival == "dot" else 30)
