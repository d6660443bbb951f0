"""The study of alignment runs as a reader runs it, and its parts are what they say."""

import json
import random
from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bayesattn.divergences import MMD, Adversarial, energy_distance
from bayesattn.kernels import RBF
from examples.reproduce.alignment import STUDY
from examples.reproduce.alignment_measures import attention_difference, head_figures
from examples.reproduce.alignment_methods import METHODS, Aligned, Restarts, Unaligned
from examples.reproduce.command_line import command
from examples.reproduce.sampled_points import SampledPoints
from examples.reproduce.shift_metrics import detection_rate
from examples.reproduce.step_time import relative_time
from examples.reproduce.text_shift import noisy, proportional
from examples.reproduce.training import Budget, cross_entropy, train
from tests.examples.test_training import labeled
from tests.heads import Classifier

pytestmark = pytest.mark.usefixtures("seeded_layers")

WIDTH, HEADS = 6, 2


class Words(nn.Module):
    """Words as vectors, read by attention."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.network = Classifier(WIDTH, HEADS)

    def forward(self, tokens, mask):
        return self.network(self.words(tokens))


@pytest.mark.slow
def test_quick_run_on_packaged_text(tmp_path):
    """Mutants: rivals that are all the baseline; a change of attention from another start."""
    arguments = ["--quick", "--no-progress", "--seeds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(command(STUDY), [*arguments, "--tasks", "snips_scratch"])
    assert done.exit_code == 0, done.output
    assert f"{len(METHODS)} of {len(METHODS)} runs" in done.output
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"alignment.png", "shift.png", "differences.png"}
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [run["rival"] for run in runs] == list(METHODS)
    assert len({run["metrics"]["log score"] for run in runs}) == len(METHODS)
    assert len({run["parameters"] for run in runs}) == 1
    metrics = {run["rival"]: run["metrics"] for run in runs}
    for run in runs:
        # Guessing is right in one of seven.
        assert run["metrics"]["accuracy"] > 0.3
        assert run["metrics"]["out-of-scope AUROC"] is None
        weights = (0.0, 1.0, 2.0) if run["rival"] == "baseline" else (1.0, 0.1, 0.01)
        assert run["choices"]["setting"] in weights
    assert metrics["mmd"]["step time"] > 1.05
    rows = (tmp_path / "heads.md").read_text().count("\n| snips_scratch")
    assert rows == 2 + len(METHODS) - 1


def trained(method, setting=0, budget=None):
    parts = [labeled(torch.Generator().manual_seed(size), size) for size in (61, 31)]
    run = method.settings()[setting].begin(0)

    def loss(model, batch):
        return run.loss(partial(cross_entropy, model, batch))

    budget = budget or Budget(2, (0.03,), batch_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = Words().state_dict()

    def build():
        model = Words()
        model.load_state_dict(start)
        return model

    return train(build, *parts, budget, 0, loss=loss, attach=run.attach)


def test_methods_are_the_baseline_at_weight_zero_alone():
    """Mutants: an alignment that is not added, or of a weight of its own."""
    plain = trained(Restarts())
    assert trained(Aligned(MMD(RBF(1.0)), weights=(0.0,))).curves == plain.curves
    assert trained(Aligned(MMD(RBF(1.0)), weights=(3.0,))).curves != plain.curves
    learned = Aligned(Adversarial, is_learned=True, weights=(0.0,))
    assert trained(learned).curves == plain.curves


def test_adversaries_take_steps_of_their_own():
    """Mutants: they are never updated; they stand in the model's optimizer."""
    method = Aligned(Adversarial, is_learned=True, weights=(1.0,))
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = method.settings()[0].begin(0)
    before_step = run.attach(model, optimizer, 1)
    first = next(run.alignment.parameters())
    before = first.detach().clone()
    tokens = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(0))
    run.loss(lambda: model(tokens, None).sum()).backward()
    before_step()
    assert not torch.equal(first, before)
    assert first.grad is None
    assert all(first is not p for group in optimizer.param_groups for p in group["params"])


def test_a_baseline_has_as_many_tries():
    settings = METHODS["baseline"].settings()
    assert {len(method.settings()) for method in METHODS.values()} == {len(settings)}
    assert [setting.restart for setting in settings] == [0, 1, 2]
    assert isinstance(settings[0].begin(0), Unaligned)
    assert {
        s.restart for name, m in METHODS.items() if name != "baseline" for s in m.settings()
    } == {0}


def test_points_of_large_clouds_are_sampled_alike(generator):
    """Mutants: other points of queries than of keys, the same at every call."""
    query = torch.randn(2, 30, 3, generator=generator)
    some = SampledPoints(energy_distance, 12, seed=0)
    assert some(query, query).abs().max() < 1e-12
    key = torch.randn(2, 30, 3, generator=generator)
    values = torch.stack([some(query, key) for _ in range(3)])
    assert (values.std(0) > 0).all()
    torch.testing.assert_close(
        some(query[:, :9], key[:, :8]), energy_distance(query[:, :9], key[:, :8])
    )
    with pytest.raises(ValueError, match="as many of one as of the other"):
        some(query, key[:, :8])


def test_figures_and_differences_are_of_heads(generator):
    model, other = Words(), Words()
    tokens = torch.randint(50, (4, 5), generator=generator)

    def look(network):
        network(tokens, None)

    figures = head_figures(model, look)
    assert [len(heads) for heads in figures["squared_mmd"]] == [HEADS, HEADS]
    assert attention_difference(model, model, look) == [[0.0] * HEADS] * 2
    assert min(min(heads) for heads in attention_difference(model, other, look)) > 0


def test_detection_rate_is_that_of_pairs(generator):
    """Mutants: ties count whole, or not at all; the other way round."""
    positive = torch.randint(5, (13,), generator=generator).double()
    negative = torch.randint(4, (9,), generator=generator).double()
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert detection_rate(positive, negative) == pytest.approx(float(sum(pairs)) / len(pairs))


def test_noise_changes_some_words_and_leaves_some():
    words = ("what", "is", "the", "weather", "like", "in", "berlin", "tomorrow")
    assert noisy(words, 0.0, random.Random(0)) == words
    changed = [noisy(words, 0.2, random.Random(seed)) for seed in range(300)]
    kept = sum(len(set(words) & set(sentence)) for sentence in changed) / (300 * len(words))
    # A fifth of the words are touched, of which those exchanged are still there.
    assert 0.82 < kept < 0.92
    assert all(noisy(("a",), 1.0, random.Random(seed)) for seed in range(50))


def test_a_part_of_examples_has_classes_in_proportion():
    examples = [((str(row),), "abc"[row % 3 if row < 60 else 0]) for row in range(90)]
    chosen = proportional(examples, 30, 0)
    labels = [label for _, label in chosen]
    # Of the ninety, fifty are of the first class.
    assert abs(labels.count("a") - 30 * 50 / 90) < 1
    assert proportional(examples, 30, 0) == chosen != proportional(examples, 30, 1)
    assert len(proportional(examples, 1000, 0)) == 90


def test_relative_time_is_that_of_work():
    def work(count):
        return lambda: sum(range(count))

    assert 1.5 < relative_time(work(600_000), work(200_000), 9) < 5
