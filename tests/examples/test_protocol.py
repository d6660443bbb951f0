"""Equal starts, equal budgets, runs that are kept and go on, and the command line."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from examples.reproduce.command_line import command
from examples.reproduce.protocol import Outcome, Study, check_parameters, equal_start
from examples.reproduce.running import Run, RunSettings, finished, planned, run_all
from tests.examples.linear_study import STUDY, Line, load, measure, plain

RUNS = planned(["short", "long"], ["plain", "offset"], 3)


def variant(**changes) -> Study:
    return dataclasses.replace(STUDY, **changes)


def invoke(study, *arguments):
    return CliRunner().invoke(command(study), list(map(str, arguments)))


def test_rivals_start_from_the_baselines_weights():
    """Mutant: each rival seeded alone, where an extra parameter shifts all draws after it."""
    splits = load(None, 0)
    starts = {name: equal_start(STUDY, name, splits, 5)().state_dict() for name in STUDY.rivals}
    assert torch.equal(starts["plain"]["slope.weight"], starts["offset"]["slope.weight"])
    again = equal_start(STUDY, "offset", splits, 5)().state_dict()
    assert torch.equal(again["offset"], starts["offset"]["offset"])
    other = equal_start(STUDY, "offset", splits, 6)().state_dict()
    assert not torch.equal(other["slope.weight"], again["slope.weight"])


def wide(splits):
    return Line(width=7)


def test_parameters_are_held_against_the_baselines():
    """Mutant: a tolerance of parameters rather than of their part."""
    assert check_parameters(STUDY, load(None, 0)) == {"plain": 1, "offset": 2}
    unequal = variant(rivals={"plain": plain, "wide": wide})
    with pytest.raises(
        ValueError, match=r"rival wide: expected 1 parameters within 100\.0%.*got 7"
    ):
        check_parameters(unequal, load(None, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rivals": {}}, "rivals: expected at least one"),
        ({"rivals": {"a/b": plain}}, "got 'a/b'"),
        ({"metrics": {"error": "less"}}, 'expected "higher", "lower" or "neither", got error'),
        ({"methods": {"plain": 1}}, "methods: expected one for each of plain, offset, got plain"),
    ],
)
def test_declarations_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        variant(**changes)


def test_runs_are_the_same_whatever_ran_before(tmp_path):
    """Mutant: a run without a random state of its own."""
    run_all(STUDY, RUNS, RunSettings(None, tmp_path / "all"), progress=False)
    run_all(STUDY, RUNS[-1:], RunSettings(None, tmp_path / "one"), progress=False)
    alone, record = (
        json.loads(RUNS[-1].file(tmp_path / name).read_text()) for name in ("one", "all")
    )
    assert alone["metrics"] == record["metrics"]
    assert alone["details"] == record["details"]
    assert (record["parameters"], record["sizes"]) == (2, {"train": 13})
    rivals = [json.loads(run.file(tmp_path / "all").read_text()) for run in RUNS[:2]]
    assert rivals[0]["choices"] == rivals[1]["choices"]


def test_interrupted_study_goes_on(tmp_path):
    """Mutants: results kept at the end only; finished runs done again."""
    done = []

    def interrupted(build, splits, budget, seed):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(seed)
        return measure(build, splits, budget, seed)

    study, settings = variant(measure=interrupted), RunSettings(None, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(study, RUNS, settings, progress=False)
    assert [run for run, _ in finished(study, RUNS, settings)] == RUNS[:5]
    done.clear()
    done.extend([-1] * 6)
    run_all(study, RUNS, settings, progress=False)
    assert len(done) == 6 + len(RUNS) - 5
    assert [run for run, _ in finished(study, RUNS, settings)] == RUNS
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(run.file(tmp_path) for run in RUNS)


def test_results_of_another_budget_are_refused(tmp_path):
    """Mutant: resuming by the file's name alone."""
    run_all(STUDY, RUNS[:1], RunSettings(None, tmp_path), progress=False)
    with pytest.raises(ValueError, match="choose another folder"):
        run_all(STUDY, RUNS[:1], RunSettings(None, tmp_path, quick=True), progress=False)


def test_a_failing_run_says_which_it_was(tmp_path):
    def failing(build, splits, budget, seed):
        raise ArithmeticError("lost")

    with pytest.raises(ArithmeticError, match="lost") as raised:
        run_all(variant(measure=failing), RUNS, RunSettings(None, tmp_path), progress=False)
    assert raised.value.__notes__ == ["in the run of plain on short with seed 0"]


def test_metrics_must_be_the_declared_ones(tmp_path):
    def other(build, splits, budget, seed):
        return Outcome({"loss": 1.0})

    with pytest.raises(ValueError, match=r"expected metrics \['error'\], got \['loss'\]"):
        run_all(variant(measure=other), RUNS, RunSettings(None, tmp_path), progress=False)


def test_rivals_may_differ_in_their_method_alone(tmp_path):
    """Mutant: the baseline's method for all."""

    def by_method(build, splits, budget, seed, *, method):
        return Outcome({"error": method + seed})

    study = variant(measure=by_method, methods={"plain": 10.0, "offset": 20.0})
    run_all(study, RUNS, RunSettings(None, tmp_path), progress=False)
    records = finished(study, RUNS, RunSettings(None, tmp_path))
    errors = {(run.rival, run.seed): record["metrics"]["error"] for run, record in records}
    assert errors == {
        (rival, seed): start + seed
        for rival, start in (("plain", 10.0), ("offset", 20.0))
        for seed in range(3)
    }


def test_metrics_that_a_task_does_not_have_are_left_out(tmp_path):
    """Mutants: a mean over tasks that is lost, or that counts nothing as zero."""

    def partial(build, splits, budget, seed):
        return Outcome({"error": None if budget.num_steps == 11 else 2.0 + seed})

    study = variant(measure=partial, metrics={"error": "neither"})
    result = invoke(study, "--out", tmp_path, "--no-progress", "--seeds", 3)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "summary.json").read_text())["findings"]
    assert found["short"]["plain"]["error"] == {}
    assert found["long"]["plain"]["error"]["mean"]["mean"] == 3.0
    assert found["all tasks"] == found["long"]


def test_command_line_writes_what_it_found(tmp_path):
    result = invoke(STUDY, "--out", tmp_path, "--no-progress")
    assert result.exit_code == 0, result.output
    assert "20 of 20 runs" in result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["runs"]) == 20
    found = summary["findings"]["long"]
    errors = {rival: found[rival]["error"]["mean"]["mean"] for rival in STUDY.rivals}
    shift = found["offset"]["error"]["difference"]
    assert shift["mean"] == pytest.approx(errors["offset"] - errors["plain"])
    assert shift["count"] == 5
    assert set(summary["findings"]) == {"short", "long", "all tasks"}
    assert (tmp_path / "drawn.txt").read_text() == "20"
    assert (tmp_path / "differences.png").stat().st_size > 5000
    assert (tmp_path / "tables.md").read_text().count("| offset |") == 3


def test_command_line_keeps_what_an_interrupted_study_has(tmp_path):
    def interrupted(build, splits, budget, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return measure(build, splits, budget, seed)

    result = invoke(variant(measure=interrupted), "--out", tmp_path, "--no-progress", "--quick")
    assert result.exit_code == 130
    assert "4 of 8 runs" in result.output
    assert "goes on from here" in result.output
    assert (tmp_path / "tables.md").exists()


def test_command_line_chooses_and_says_what_is_missing(tmp_path):
    arguments = ("--out", tmp_path / "out", "--no-progress", "--seeds", 3)
    result = invoke(STUDY, *arguments, "--tasks", "long", "--rivals", "offset")
    assert result.exit_code == 0, result.output
    assert "3 of 3 runs" in result.output
    result = invoke(STUDY, *arguments, "--tasks", "longer")
    assert result.exit_code == 1
    assert "error: --tasks: expected some of short, long, got longer" in result.output
    (tmp_path / "empty").mkdir()
    result = invoke(STUDY, *arguments, "--data", tmp_path / "empty")
    assert result.exit_code == 1
    assert "expected a folder with some of short, long" in result.output


@pytest.mark.slow
def test_processes_find_what_one_process_finds(tmp_path):
    """Mutant: a process that runs with another seed or start."""
    runs = [Run("short", rival, seed) for rival in STUDY.rivals for seed in range(2)]
    records = {}
    for jobs in (1, 2):
        settings = RunSettings(None, tmp_path / str(jobs))
        run_all(STUDY, runs, settings, jobs=jobs, progress=False)
        records[jobs] = [record["metrics"] for _, record in finished(STUDY, runs, settings)]
    assert len(records[1]) == 4
    assert records[1] == records[2]
