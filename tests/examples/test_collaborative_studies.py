"""The studies of shared projections run as a reader runs them; their rivals are what they say."""

import json

import pytest
import torch
from typer.testing import CliRunner

from bayesattn.networks import attention_layers
from bayesattn.shared_projections import block_mixing
from examples.reproduce.collaborative import STUDY as COMPRESSION
from examples.reproduce.collaborative import build_encoder
from examples.reproduce.collaborative_training import STUDY as TRAINING
from examples.reproduce.collaborative_training import build_separate, build_shared
from examples.reproduce.command_line import command
from examples.reproduce.text_problem import load_pretrained, load_untrained
from examples.reproduce.text_shift import PartSizes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded_layers")]

SIZES = PartSizes(40, 20, 30, 0)


@pytest.fixture(autouse=True)
def float32(float64):
    """What studies run in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def test_quick_run_of_training(tmp_path):
    """Mutants: rivals that are all the baseline."""
    arguments = ["--quick", "--no-progress", "--seeds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(command(TRAINING), [*arguments, "--tasks", "snips"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.glob("*.png")} == {"differences.png", "widths.png"}
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [run["rival"] for run in runs] == list(TRAINING.rivals)
    assert len({run["metrics"]["log score"] for run in runs}) == len(runs)
    # Guessing is right in one of seven.
    assert min(run["metrics"]["accuracy"] for run in runs) > 0.3


def test_heads_apart_stay_apart_and_shared_ones_learn_to_mix():
    problem = load_untrained("snips", SIZES, None, 0)
    for build, is_learned in ((build_separate, False), (build_shared, True)):
        for layer in attention_layers(build(problem, width=8)).values():
            mixing = layer.module.projections.mixing
            assert mixing.requires_grad == is_learned
            assert torch.equal(mixing.detach(), block_mixing(4, 2)) == (not is_learned)
    full = attention_layers(build_separate(problem, width=64)).values()
    assert all(layer.module.projections is None for layer in full)


def test_encoders_are_converted_and_the_original_stays():
    problem = load_pretrained("snips", SIZES, None, 0)
    if problem is None:
        pytest.skip("the weights of all-MiniLM-L6-v2 are not installed")
    original = build_encoder(problem, width=None, is_weighed=False)
    names = {name for name, _ in original.named_parameters()}
    assert not any("shared_projections" in name for name in names)
    for is_weighed in (False, True):
        model = build_encoder(problem, width=32, is_weighed=is_weighed)
        mixing = [p for name, p in model.named_parameters() if name.endswith("mixing")]
        assert [part.shape for part in mixing] == [(12, 32)] * 6
    assert COMPRESSION.baseline == "original"
