"""The explaining-away study runs as a reader runs it, and can be stopped and go on."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.test_layout import ROOT

COMMAND = (sys.executable, "-m", "examples.reproduce.explaining_away", "--tasks", "snips")
RIVALS = ("softmax", "doubly", "hybrid", "sinkhorn3")


@pytest.mark.slow
def test_quick_run_on_packaged_text(tmp_path):
    """Mutant: rivals that are all the softmax, or masses of another normalization."""
    command = [*COMMAND, "--quick", "--no-progress", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "8 of 8 runs" in done.stdout
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"column_mass.png", "differences.png"}
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    counts = {run["rival"]: run["parameters"] for run in runs}
    assert tuple(counts) == RIVALS
    # A share for each of four heads in each of two layers.
    assert [count - counts["softmax"] for count in counts.values()] == [0, 0, 8, 0]
    # Guessing is right in one of seven.
    assert min(run["metrics"]["accuracy"] for run in runs) > 0.3
    assert len({run["metrics"]["log score"] for run in runs}) == 8
    for rival in RIVALS:
        record = json.loads((tmp_path / "runs" / "snips" / rival / "seed_0.json").read_text())
        layers = record["details"]["initial"] + record["details"]["trained"]
        assert len(layers) == 4
        # The longest of these sentences has 22 words, so no word may have less than 1 / 22.
        assert rival != "doubly" or min(layer["lowest"] for layer in layers) > 1 / 22
        assert {sum(layer["histogram"]) for layer in layers} == {4 * 1938}
    rows = (tmp_path / "explained_away.md").read_text().splitlines()
    assert len(rows) == 2 + len(RIVALS) * 4


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_the_study_goes_on(tmp_path):
    """Mutant: workers that are left behind, which would keep the pipe open."""
    command = [*COMMAND, "--jobs", "2", "--rivals", "softmax", "--out", str(tmp_path)]
    running = subprocess.Popen(
        [*command, "--quick", "--seeds", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 100
    while not (kept := list(tmp_path.glob("runs/snips/softmax/*.json"))):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130, output
    assert "goes on from here" in output
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = [*command, "--quick", "--seeds", "2"]
    done = subprocess.run(again, capture_output=True, text=True, cwd=ROOT)
    assert "2 of 2 runs" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == before
