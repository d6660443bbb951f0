"""The command line: look at posteriors in files, and hold them against each other."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesattn.inference.posterior import Posterior

__all__ = ["app"]

app = typer.Typer(
    name="bayesattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look at posteriors that Posterior.save wrote (.nc or .safetensors).",
)

Plots = Annotated[
    Path | None,
    typer.Option("--plots", metavar="DIR", help="Write pictures to this folder, which is made."),
]


def _show_version(is_asked: bool) -> bool:
    if is_asked:
        import bayesattn

        typer.echo(f"bayesattn {bayesattn.__version__}")
        raise typer.Exit
    return is_asked


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Look at posteriors that Posterior.save wrote (.nc or .safetensors)."""


@app.command()
def summary(
    file: Annotated[Path, typer.Argument(help="A posterior.")],
    plots: Plots = None,
) -> None:
    """Summarize each entry of each site of a posterior."""
    with _one_line_errors():
        posterior = _load(file)
        typer.echo(_description(posterior))
        # One chain has no R-hat.
        table = posterior.summary().dropna(axis=1, how="all")
        typer.echo(table.to_string(float_format="{:.3f}".format))
        if plots is not None:
            _write_summary_plots(posterior, plots, file.stem)


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="The posterior that is taken for right.")],
    others: Annotated[list[Path], typer.Argument(help="The posteriors to hold against it.")],
    plots: Plots = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--names", metavar="A,B,...", help="Names of the others; those of the files by default."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For simulated draws and projections.")] = 0,
) -> None:
    """Hold posteriors against a reference.

    Each error stands beside what as many exact draws would show by chance.
    """
    with _one_line_errors():
        labels = _labels(others, names)
        exact = _load(reference)
        posteriors: dict[str, Any] = dict(zip(labels, map(_load, others), strict=True))
        from bayesattn.inference import comparison

        result = comparison.compare(exact, seed=seed, **posteriors)
        typer.echo(f"Reference {reference.name}: {_description(exact)}\n")
        typer.echo(str(result))
        if plots is not None:
            figures: dict[str, Figure] = {}
            for site in dict.fromkeys(result.sites.index.get_level_values("site")):
                figures[f"marginals_{site}"] = result.plot_marginals(site)
                figures[f"forest_{site}"] = result.plot_forest(site)
            _write(figures, plots)


def _load(path: Path) -> "Posterior":
    from bayesattn.inference.posterior import Posterior

    return Posterior.load(path)


def _labels(files: list[Path], names: str | None) -> list[str]:
    """Names of the other posteriors, each but once."""
    labels = [path.stem for path in files] if names is None else names.split(",")
    labels = [label.strip() for label in labels]
    if len(labels) != len(files):
        raise ValueError(
            f"--names must hold one name for each of {len(files)} posteriors, got {len(labels)}"
        )
    from bayesattn.inference.comparison import RESERVED

    for label in labels:
        if not label or labels.count(label) > 1 or label in RESERVED:
            raise ValueError(
                f"posteriors must have names of their own, but none of {sorted(RESERVED)}; got "
                f"{labels}: give others with --names"
            )
    return labels


def _description(posterior: "Posterior") -> str:
    draws = posterior.draws_are.replace("_", " ")
    size = f"{posterior.num_chains} x {posterior.num_draws} (chain x draw)"
    seconds = posterior.attrs.get("seconds")
    took = "" if seconds is None else f", {float(seconds):.1f} s"
    return f"{posterior.method}, {size} {draws}{took}"


def _write_summary_plots(posterior: "Posterior", folder: Path, name: str) -> None:
    from bayesattn import plots

    figures: dict[str, Figure] = {}
    for site in posterior.draws:
        given = {posterior.method: posterior}
        figures[f"{name}_marginals_{site}"] = plots.marginals(given, site=site)
        figures[f"{name}_forest_{site}"] = plots.forest(given, site=site)
    curves = {key: value for key, value in posterior.optimization.items() if value.numel()}
    if curves:
        figures[f"{name}_optimization"] = plots.optimization(curves)
    _write(figures, folder)


def _write(figures: "dict[str, Figure]", folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = folder / f"{name.replace('/', '.')}.png"
        figure.savefig(path, dpi=150)
        typer.echo(f"wrote {path}")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Say what is wrong with files and arguments in one line, and exit with 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    sys.exit(app())
