"""The benchmarks run, and their contestants do the same work."""

import subprocess
import sys
import time

import pytest
import torch

from tests.benchmarks.problems import PROBLEMS
from tests.test_layout import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def float32(float64):
    """What the benchmarks run in; the guard over global state still puts the suite's back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", PROBLEMS)
def test_arithmetic_by_hand_takes_our_steps(name):
    """Mutant: another density, kernel, median or optimizer in either."""
    from tests.benchmarks.torch_contestants import ByHand, ours_step

    problem = PROBLEMS[name]
    ours, by_hand = ours_step(problem, 7, "record"), torch.no_grad()(ByHand(problem, 7))
    for _ in range(5):
        torch.testing.assert_close(ours().detach()[0], by_hand(), rtol=0.0, atol=1e-5)


def test_quick_run_prints_ratios():
    command = [sys.executable, "-m", "tests.benchmarks.svgd_speed", "--quick", "--problem", "a"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("bayesattn, inductor", "bayesattn, record", "Pyro (univariate)"):
        assert name in done.stdout


def test_memory_stays_within_its_bound():
    """Mutant: a (M, M, D) tensor in the kernel."""
    from tests.benchmarks.svgd_memory import bound, whole_step

    assert whole_step(300, 1500, "record") <= bound(300, 1500)


def test_attention_is_timed_over_lengths():
    command = [sys.executable, "-m", "tests.benchmarks.attention_speed", "--lengths", "16,32"]
    command += ["--rounds", "1", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("doubly, fused") == 2


def test_repulsion_is_timed_beside_a_training_step():
    command = [sys.executable, "-m", "tests.benchmarks.repulsion_speed", "--width", "16"]
    command += ["--layers", "2", "--batch", "2", "--tokens", "3", "--rounds", "1"]
    done = subprocess.run([*command, "--seconds", "0.01"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("training step", "SVGD", "WGD", "circuits", "SPOS", "copy"):
        assert name in done.stdout


def test_fused_attention_needs_no_more_memory_than_pytorchs():
    """Mutant: a (S, S) tensor anywhere on the fused route."""
    from tests.benchmarks import attention_speed

    settings = {"rounds": 1, "seconds": 0.01, "clock": time.process_time}
    _, memory = attention_speed.measure(2048, **settings, match="doubly, fused")
    assert memory["doubly, fused"] <= 1.3 * memory["SDPA"]


def test_errors_of_features_fall_with_their_number(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.feature_error", "--dim", "8"]
    command += ["--seeds", "3", "--sizes", "4,64", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("cosines"):
            few, many = (float(cell.split()[-1]) for cell in line.split("±")[:2])
            assert many < few / 1.5, line
    assert len(list(tmp_path.glob("feature_error_*.png"))) == 2


def test_edges_are_timed_beside_gathering_all_at_once():
    command = [sys.executable, "-m", "tests.benchmarks.edge_speed", "--nodes", "5", "--edges", "9"]
    command += ["--heads", "2", "--dim", "3", "--rounds", "1", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("products, at once", "sums, at once", "SpectralLogits"):
        assert name in done.stdout


def test_alignment_is_timed_beside_attention_and_a_training_step():
    command = [sys.executable, "-m", "tests.benchmarks.alignment_speed", "--lengths", "16,32"]
    command += ["--width", "16", "--layers", "1", "--batch", "2", "--tokens", "6"]
    command += ["--rounds", "1", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("transport, fused") == 2
    for name in ("training step", "MMD", "adversary"):
        assert name in done.stdout
