"""The study of repulsive heads runs as a reader runs it, and its methods are what they say."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from bayesattn.inference import SteinForce
from bayesattn.kernels import Separate
from examples.reproduce.command_line import command
from examples.reproduce.head_methods import (
    METHODS,
    Diffusion,
    Force,
    Orthogonality,
    Plain,
    Start,
    fit,
)
from examples.reproduce.repulsive_heads import STUDY
from examples.reproduce.training import Budget, predict
from tests.examples.test_head_diversity import pooling
from tests.examples.test_training import labeled

TASKS = {"snips_pooling_1": 1, "snips_pooling_4": 4, "snips_transformer_2": 2}


@pytest.fixture
def start(generator):
    training, validation = labeled(generator, 97), labeled(generator, 41)
    return Start(lambda: pooling(3), training, validation, Budget(2, (0.03,), batch_size=16), 0)


@pytest.mark.slow
def test_quick_run_on_packaged_text(tmp_path):
    """Mutants: rivals that are all the baseline; a force that is felt by one head alone."""
    arguments = ["--quick", "--no-progress", "--seeds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(command(STUDY), [*arguments, "--tasks", ",".join(TASKS)])
    assert done.exit_code == 0, done.output
    assert f"{len(TASKS) * len(METHODS)} of {len(TASKS) * len(METHODS)} runs" in done.output
    assert {path.name for path in tmp_path.glob("*.png")} == {"heads.png", "differences.png"}
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    metrics = {(run["task"], run["rival"]): run["metrics"] for run in runs}
    for task, num_heads in TASKS.items():
        of_task = [run for run in runs if run["task"] == task]
        assert [run["rival"] for run in of_task] == list(METHODS)
        assert len({run["parameters"] for run in of_task}) == 1
        assert {run["sizes"]["heads"] for run in of_task} == {num_heads}
        distinct = {run["metrics"]["log score"] for run in of_task}
        # One head alone is repelled by nobody; the prior, the penalty and the noise are felt.
        assert len(distinct) == (4 if num_heads == 1 else len(METHODS))
        for run in of_task:
            # Guessing is right in one of seven.
            assert run["metrics"]["accuracy"] > 0.2
            assert 1 - 1e-6 <= run["metrics"]["effective heads"] <= num_heads
            assert (run["metrics"]["head cosine"] is None) == (num_heads == 1)
            assert run["choices"]["strength"] in METHODS[run["rival"]].strengths
    alone = metrics["snips_pooling_1", "baseline"]
    for rival in ("svgd", "svgd_hot", "svgd_decoupled", "wgd"):
        assert metrics["snips_pooling_1", rival] == alone
    rows = (tmp_path / "more_heads.md").read_text().count("\n| ")
    # A head and a rule for each network.
    assert rows == 2 * 2 + len(METHODS) * len(TASKS)


def test_methods_are_the_baseline_where_nothing_is_between_heads(start):
    """Mutants: a penalty or a prior that is always there; α that is not 1 / N."""
    plain = fit(Plain(), start)
    assert fit(Orthogonality((0.0,)), start).curves == plain.curves
    assert fit(Orthogonality((0.5,)), start).curves != plain.curves
    posterior = fit(Force(SteinForce()), start)
    by_hand = fit(Force(SteinForce(), (1 / 97,)), start)
    assert posterior.curves == by_hand.curves
    assert fit(Force(SteinForce(), (1.0,)), start).curves != posterior.curves
    assert fit(Force(SteinForce(Separate())), start).curves == plain.curves
    assert fit(Force(SteinForce(Separate()), has_prior=True), start).curves != plain.curves
    alone = start._replace(build=lambda: pooling(1))
    assert fit(Force(SteinForce()), alone).curves == fit(Plain(), alone).curves


def test_strength_is_chosen_by_validation(start):
    """Mutants: the last strength, or the one with the lowest score."""
    scores = {
        strength: fit(Orthogonality((strength,)), start).choices["validation_log_score"]
        for strength in (0.0, 3.0, 0.3)
    }
    assert len(set(scores.values())) == 3
    for strengths in ((0.0, 3.0, 0.3), (3.0, 0.3, 0.0)):
        chosen = fit(Orthogonality(strengths), start).choices
        assert chosen["strength"] == max(scores, key=scores.__getitem__)
        assert chosen["validation_log_score"] == max(scores.values())


def test_diffusion_is_stein_descent_first_and_a_sample_then(start):
    """Mutants: noise from the first step on; an epoch chosen before there is any."""
    longer = start._replace(budget=dataclasses.replace(start.budget, num_epochs=4))
    force = Force(SteinForce(), has_prior=True)
    sampled, descended = fit(Diffusion(), longer), fit(force, longer)
    (samples,), (descent,) = sampled.curves.values(), descended.curves.values()
    # Half of the steps are warm-up, and half of these the force's.
    assert samples[0] == descent[0]
    assert samples[1] != descent[1]
    assert sampled.choices["epoch"] >= 3
    assert fit(Diffusion(), longer).curves == sampled.curves
    other = fit(Diffusion(), longer._replace(seed=1))
    assert other.curves != sampled.curves


def test_padding_does_not_matter_to_pooling(generator):
    """Mutants: a reader that starts at the padding; heads that attend to it."""
    sentences, model = labeled(generator, 31), pooling(3)
    together = predict(model, sentences, batch_size=8)
    for row in range(31):
        alone = sentences.choose(torch.tensor([row]))
        torch.testing.assert_close(predict(model, alone)[0], together[row])
