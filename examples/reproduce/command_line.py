"""One command line for all studies: run what is missing, then tell what was found."""

import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from examples.reproduce.protocol import Study, check_parameters
from examples.reproduce.report import difference_figure, findings, markdown, summary, tables
from examples.reproduce.running import (
    Run,
    RunSettings,
    finished,
    planned,
    run_all,
    write_atomically,
)

__all__ = ["command"]

_QUICK_SEEDS = 2
_INTERRUPTED = 130


def command(study: Study) -> typer.Typer:
    """Make the command line of a study; calling it runs it."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.command(name=study.name)
    def run(
        data: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="Folder of data sets; packaged ones only if not given."
            ),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Where results go; out/<study> if not given."),
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="A smoke run of seconds.")] = False,
        seeds: Annotated[
            int | None,
            typer.Option(min=1, help=f"Number of seeds; 5, or {_QUICK_SEEDS} if quick."),
        ] = None,
        tasks: Annotated[
            str, typer.Option(metavar="A,B,...", help="Which tasks; all that are there if empty.")
        ] = "",
        rivals: Annotated[
            str, typer.Option(metavar="A,B,...", help="Which rivals; all if empty.")
        ] = "",
        jobs: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
        threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
        progress: Annotated[bool, typer.Option(help="Show a bar.")] = True,
    ) -> None:
        """Run what is missing of a study, and tell what was found."""
        try:
            settings = RunSettings(data, out or Path("out", study.name), quick, threads)
            chosen_tasks = _present(study, data, _chosen("tasks", tasks, study.tasks))
            chosen_rivals = _chosen("rivals", rivals, study.rivals)
            seeds = seeds or (_QUICK_SEEDS if quick else 5)
            runs = planned(chosen_tasks, chosen_rivals, seeds)
            try:
                run_all(study, runs, settings, jobs=jobs, progress=progress)
            except KeyboardInterrupt:
                _tell(study, runs, settings)
                typer.echo("interrupted: the same command goes on from here", err=True)
                raise typer.Exit(_INTERRUPTED) from None
            _tell(study, runs, settings)
        except (ValueError, OSError) as error:
            if hasattr(error, "__notes__"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return app


def _chosen(name: str, text: str, known: Any) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()] or list(known)
    for part in chosen:
        if part not in known:
            raise ValueError(f"--{name}: expected some of {', '.join(known)}, got {part}")
    return chosen


def _present(study: Study, data: Path | None, tasks: list[str]) -> list[str]:
    """Keep the tasks whose data are there, and show the rivals' parameters on each."""
    counts, sizes, absent = {}, {}, []
    for name in tasks:
        splits = study.tasks[name].load(data, 0)
        if splits is None:
            absent.append(name)
            continue
        counts[name] = check_parameters(study, splits)
        sizes[name] = splits.sizes()
    if absent:
        place = "here without --data" if data is None else f"in {data}"
        typer.echo(f"Not {place}: {', '.join(absent)}")
    if not counts:
        raise ValueError(f"data: expected a folder with some of {', '.join(tasks)}, got {data}")
    typer.echo("Sizes (seed 0)\n" + pd.DataFrame(sizes).T.to_string())
    typer.echo("\nParameters (seed 0)\n" + pd.DataFrame(counts).T.to_string())
    return list(counts)


def _tell(study: Study, runs: list[Run], settings: RunSettings) -> None:
    """Show what there is as tables, and write tables, JSON and figures."""
    records = [record for _, record in finished(study, runs, settings)]
    if not records:
        return
    found = findings(study, records)
    seconds = sum(record["seconds"] for record in records)
    head = f"{len(records)} of {len(runs)} runs, {seconds / 60:.1f} minutes of processes' time"
    typer.echo(f"\n{head}; ± one standard error over seeds, Δ is paired with {study.baseline}")
    pages = [head]
    for task, table in tables(study, found).items():
        typer.echo(f"\n{task}\n{table.to_string()}")
        pages.append(f"**{task}**\n\n{markdown(table)}")
    out = settings.out
    write_atomically(out / "tables.md", "\n\n".join(pages) + "\n")
    write_atomically(out / "summary.json", json.dumps(summary(study, found, records), indent=1))
    difference_figure(study, found).savefig(out / "differences.png", dpi=150)
    if study.draw is not None:
        study.draw(records, out)
    typer.echo(f"\nWritten to {out}/: {', '.join(sorted(p.name for p in out.glob('*.*')))}")
