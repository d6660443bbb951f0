"""The examples run as a reader runs them, and leave what they promise."""

import subprocess
import sys

import pytest

from tests.test_layout import ROOT


def run_quickly(example, folder):
    """Run an example by its name, and return what it prints."""
    script = ROOT / "examples" / f"{example}.py"
    command = [sys.executable, str(script), "--quick", "--out", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_quickstart_writes_its_pictures_and_posteriors(tmp_path):
    printed = run_quickly("quickstart", tmp_path)
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {
        "attention_bars",
        "attention_heatmap",
        "optimization",
        "reliability",
        "scores",
    }
    posteriors = {path.stem for path in tmp_path.glob("*.nc")}
    assert posteriors == {"nuts", "svgd_heads", "svgd_particles", "svi_normal"}
    scored = [line for line in printed.splitlines() if line.startswith(("NUTS", "SVGD", "SVI"))]
    accuracies = [float(line.split("±")[0].split()[-1]) for line in scored]
    # Guessing is right in one of seven.
    assert len(accuracies) == 4
    assert min(accuracies) > 0.8, printed


@pytest.mark.slow
def test_mixture_says_what_is_equal_and_what_is_not(tmp_path):
    printed = run_quickly("attention_as_mixture", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["attention_as_mixture.png"]
    lines = printed.splitlines()
    identities = [float(line.split()[-1]) for line in lines if " attention" in line and ":" in line]
    assert len(identities) >= 3
    assert max(identities[:3]) < 1e-12
    climbed, stuck = (line for line in lines if line.startswith(("EM climbs", "and from the eq")))
    ends = [float(end.rstrip(",")) for end in climbed.split("densities")[1].split()]
    assert min(ends) > float(stuck.split()[-1]) + 10
    # Chains that keep to an order of their own agree once there is but one order.
    as_they_are, in_one_order = (float(x.split()[-1]) for x in lines if "worst R-hat" in x)
    assert as_they_are > in_one_order + 0.1


@pytest.mark.slow
def test_heads_take_one_path_and_are_no_posterior_of_one_head(tmp_path):
    printed = run_quickly("heads_as_particles", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["heads_as_particles.png"]
    lines = printed.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("In 50 steps"))
    moved, differ = (float(line.split()[-1].rstrip(".")) for line in lines[first : first + 2])
    assert differ < 1e-10 < 0.01 < moved
    spread, scores = ({}, {})
    for name in ("NUTS, one head", "NUTS, joint", "SVGD", "SPOS"):
        found = [line.split(name)[1].split() for line in lines if line.startswith(f"  {name} ")]
        (spread[name],), scores[name] = (list(map(float, numbers)) for numbers in found)
    assert spread["SPOS"] == pytest.approx(spread["NUTS, joint"], rel=0.3)
    assert spread["NUTS, one head"] < 0.3 * spread["NUTS, joint"]
    networks = {name: together for name, (together, _, _) in scores.items()}
    assert networks["NUTS, one head"] < networks["SVGD"] - 1
    # A head of a network is no network.
    assert scores["NUTS, joint"][2] < networks["NUTS, joint"] - 1


@pytest.mark.slow
def test_alignment_lowers_the_distance_and_moves_attention(tmp_path):
    """Mutants: the same weight for all, attention held against itself."""
    printed = run_quickly("aligned_posterior", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["aligned_posterior.png"]
    lines = printed.splitlines()
    for name in ("NUTS", "SVI", "SVGD"):
        rows = [
            line.split() for line in lines if line.startswith((f"   0  {name}", f" 0.5  {name}"))
        ]
        plain, aligned = ([float(figure) for figure in row[2:]] for row in rows)
        assert aligned[0] < 0.8 * plain[0]
        assert plain[4] == 0.0 < aligned[4]
    target = next(line for line in lines if line.startswith("For a mean of D")).split()[6]
    runs = [line.split() for line in lines if ", which gives " in line]
    found = [(float(run[0].rstrip(",")), float(run[3])) for run in runs]
    assert found[0][0] == 0.0
    assert found[-1][1] == pytest.approx(float(target.rstrip(",")), rel=0.15)
    means = [mean for _, mean in sorted(found)]
    assert means == sorted(means, reverse=True)


@pytest.mark.slow
def test_the_width_of_a_layer_is_inferred(tmp_path):
    """By laws, particles that start there, and a chain; short runs of SVI are not asked."""
    printed = run_quickly("inferred_width", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["inferred_width.png"]
    lines = printed.splitlines()
    for name in ("laws, ARD", "SVGD from laws", "NUTS over scales"):
        row = next(line for line in lines if line.startswith(f"  {name}"))
        fifth, sixth, error, _, *widths = row.removeprefix(f"  {name}").split()
        assert widths == ["5", "(100%)"]
        assert float(sixth) < 0.01 * float(fifth)
        assert float(error) < 0.1
    refitted, bound = (
        [float(cell) for cell in line.removeprefix(start).split()]
        for start in ("  refitted", "  lower bound")
        for line in lines
        if line.startswith(start)
    )
    assert all(low <= high for low, high in zip(bound, refitted, strict=True))
    assert refitted[4] < 0.1 < 0.15 < refitted[3]


@pytest.mark.slow
def test_posteriors_of_kernels_beat_a_normal_guide(tmp_path):
    """Mutants: predictions at other points, errors of no mean, heads of the table mixed up."""
    printed = run_quickly("spectral_posterior", tmp_path)
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures == {"spectral_posterior.png", "spectral_kernels.png"}
    lines = printed.splitlines()
    errors = {}
    for name in ("MAP", "SVI normal", "SVGD, mixture", "NUTS"):
        row = next(line for line in lines if line.startswith(f"  {name} "))
        mean, _, _, one, _, _ = row.removeprefix(f"  {name}").split()
        errors[name] = float(mean), float(one)
    # The targets' own root mean square is one.
    assert errors["NUTS"][0] < errors["SVI normal"][0] < 0.8
    assert all(mean < one for mean, one in errors.values())
    assert "squared_kernel (chain, draw, head, lag)" in printed
