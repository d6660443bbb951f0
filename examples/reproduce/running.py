"""Runs of a study, in processes side by side; each is kept as it ends, and none is done twice."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from examples.reproduce.protocol import Study, count_parameters, equal_start

__all__ = ["Run", "RunSettings", "finished", "planned", "run_all", "write_atomically"]

Record = dict[str, Any]


class RunSettings(NamedTuple):
    """What is the same in all runs of a study.

    Attributes:
        data: Folder of the data, None where only packaged data are read.
        out: Folder of the results.
        quick: Whether tasks have their quick budgets.
        threads: Threads of each process.
    """

    data: Path | None
    out: Path
    quick: bool = False
    threads: int = 1


class Run(NamedTuple):
    """One training: a task, a rival and a seed."""

    task: str
    rival: str
    seed: int

    def file(self, out: Path) -> Path:
        """Where its result is kept."""
        return out / "runs" / self.task / self.rival / f"seed_{self.seed}.json"


def planned(tasks: Sequence[str], rivals: Sequence[str], num_seeds: int) -> list[Run]:
    """List all runs, every rival's with one seed before those with the next."""
    return [Run(task, rival, s) for s in range(num_seeds) for task in tasks for rival in rivals]


def run_all(
    study: Study,
    runs: Sequence[Run],
    settings: RunSettings,
    *,
    jobs: int = 1,
    progress: bool = True,
) -> None:
    """Do the runs that are not done.

    Args:
        study: What is compared.
        runs: What is to be done.
        settings: What is the same in all of them.
        jobs: Number of processes; a single one is this one.
        progress: Whether to show a bar.

    Raises:
        ValueError: If the folder holds a result of another study or budget.
        KeyboardInterrupt: As it came; what has ended is kept.
    """
    done = {run for run, _ in finished(study, runs, settings)}
    missing = [run for run in runs if run not in done]
    bar = tqdm(total=len(runs), initial=len(done), disable=not progress, unit="run")
    with bar:
        ended = _one_by_one if jobs == 1 else _side_by_side
        for run in ended(study, missing, settings, jobs):
            bar.set_postfix_str(f"{run.task}, {run.rival}, seed {run.seed}", refresh=False)
            bar.update()


def finished(study: Study, runs: Sequence[Run], settings: RunSettings) -> list[tuple[Run, Record]]:
    """Read the results that are there.

    Raises:
        ValueError: If one is of another study or budget.
    """
    found = []
    for run in runs:
        path = run.file(settings.out)
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        expected = _terms(study, run, settings)
        if record["terms"] != expected:
            raise ValueError(
                f"out: expected results of {expected}, got {record['terms']} in {path}; "
                "choose another folder"
            )
        found.append((run, record))
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or, whatever happens, as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _one_by_one(
    study: Study, runs: Sequence[Run], settings: RunSettings, jobs: int
) -> Iterator[Run]:
    assert jobs == 1
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for run in runs:
            _do(study, run, settings)
            yield run
    finally:
        torch.set_num_threads(before)


def _side_by_side(
    study: Study, runs: Sequence[Run], settings: RunSettings, jobs: int
) -> Iterator[Run]:
    others = multiprocessing.active_children()
    # A forked process would inherit torch's threads, which hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker, (settings.threads,)) as pool:
        waiting = {pool.submit(_do, study, run, settings): run for run in runs}
        try:
            for future in as_completed(waiting):
                future.result()
                yield waiting[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def _start_worker(threads: int) -> None:
    # Ctrl-C reaches the whole group of processes; the first of them ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _do(study: Study, run: Run, settings: RunSettings) -> None:
    """Do one run and keep its result."""
    task = study.tasks[run.task]
    splits = _splits(task.load, settings.data, run.seed)
    build = equal_start(study, run.rival, splits, run.seed)
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            budget = task.quick if settings.quick else task.budget
            outcome = study.measured(run.rival, build, splits, budget, run.seed)
    except Exception as error:
        error.add_note(f"in the run of {run.rival} on {run.task} with seed {run.seed}")
        raise
    if set(outcome.metrics) != set(study.metrics):
        raise ValueError(
            f"measure: expected metrics {sorted(study.metrics)}, got {sorted(outcome.metrics)}"
        )
    record = {
        **run._asdict(),
        "terms": _terms(study, run, settings),
        "parameters": count_parameters(build()),
        "sizes": splits.sizes(),
        "seconds": time.perf_counter() - start,
        **dataclasses.asdict(outcome),
    }
    write_atomically(run.file(settings.out), json.dumps(record, indent=1))


@cache
def _splits(load: Any, folder: Path | None, seed: int) -> Any:
    return load(folder, seed)


def _terms(study: Study, run: Run, settings: RunSettings) -> Record:
    """What a result may not differ in from the others, as JSON gives it back."""
    task = study.tasks[run.task]
    budget = task.quick if settings.quick else task.budget
    return json.loads(json.dumps({"study": study.name, "budget": dataclasses.asdict(budget)}))
