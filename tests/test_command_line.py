"""Tests of bayesattn.__main__: what it shows of files, and how it fails."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import bayesattn
from bayesattn.__main__ import app
from bayesattn.inference.posterior import Posterior


@pytest.fixture
def files(tmp_path, generator):
    """Three posteriors of one site, and one of another."""
    for name, kind, count, site in (
        ("nuts.nc", "markov", 200, "weight"),
        ("svgd.safetensors", "particles", 30, "weight"),
        ("svi.nc", "iid_guide", 50, "weight"),
        ("alien.nc", "iid_guide", 50, "bias"),
    ):
        draws = torch.randn(2, count, 3, generator=generator)
        posterior = Posterior(
            {site: draws},
            method=name.split(".")[0].upper(),
            draws_are=kind,
            unconstrained=draws,
            optimization={"loss": torch.randn(2, 7, generator=generator)},
            attrs={"seconds": 12.5},
        )
        posterior.save(tmp_path / name)
    return tmp_path


def shown(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_version_and_help():
    assert shown("--version").strip() == f"bayesattn {bayesattn.__version__}"
    text = shown("--help")
    assert "summary" in text
    assert "compare" in text
    assert "REFERENCE" in shown("compare", "--help").upper()


def test_summary(files):
    text = shown("summary", files / "nuts.nc", "--plots", files / "pictures" / "new")
    assert text.startswith("NUTS, 2 x 200 (chain x draw) markov, 12.5 s\n")
    assert "weight[2]" in text
    assert "ess_bulk" in text
    names = {path.name for path in (files / "pictures" / "new").iterdir()}
    assert names == {
        "nuts_marginals_weight.png",
        "nuts_forest_weight.png",
        "nuts_optimization.png",
    }
    assert "ess_bulk" not in shown("summary", files / "svgd.safetensors")


def test_compare(files):
    given = ("compare", files / "nuts.nc", files / "svgd.safetensors", files / "svi.nc")
    text = shown(*given, "--plots", files, "--names", "particles, guide")
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["weight"]] == ["particles", "guide"]
    assert "Joint draws (3 dims, unconstrained scale)" in text
    assert (files / "marginals_weight.png").stat().st_size > 5000
    assert (files / "forest_weight.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "none.nc"], "there is no file"),
        (["summary", "strange.nc"], "is not a posterior that bayesattn saved"),
        (["summary", "strange.txt"], "path must end in one of"),
        (["compare", "nuts.nc", "none.nc"], "there is no file"),
        (["compare", "nuts.nc", "alien.nc"], "alien must share a site with the reference"),
        (["compare", "nuts.nc", "svi.nc", "svi.nc"], "names of their own"),
        (["compare", "nuts.nc", "svi.nc", "--names", "seed"], "none of ['chunk_size'"),
        (["compare", "nuts.nc", "svi.nc", "--names", "a,b"], "one name for each of 1 posteriors"),
    ],
)
def test_fails_in_one_line(files, arguments, message):
    (files / "strange.nc").write_text("not netCDF")
    (files / "strange.txt").write_text("a text")
    placed = [str(files / word) if "." in word else word for word in arguments]
    text = shown(*placed, code=1)
    assert text.startswith("error: ")
    assert message in text
    assert text.count("\n") == 1


def test_runs_as_a_module_and_helps_quickly(files):
    run = [sys.executable, "-m", "bayesattn"]
    done = subprocess.run([*run, "summary", files / "svi.nc"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "weight[0]" in done.stdout
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom bayesattn.__main__ import app\n"
        "assert CliRunner().invoke(app, ['compare', '--help']).exit_code == 0\n"
        "print({'torch', 'pyro', 'arviz', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
