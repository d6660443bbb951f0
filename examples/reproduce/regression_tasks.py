"""Regression on real data: points in standard units, split at random, or by the years of a series.

Under the folder that the command line names with ``--data`` may lie, of the UCI repository:

===============================  ===================================================================
``uci/concrete.csv``             Strength of concrete, from its ingredients and age; 1030 rows
``uci/energy.csv``               Heating load of a building (Y1), from its shape; 768 rows
``uci/yacht.csv``                Resistance of a yacht, from its hull and speed; 308 rows
``uci/airfoil/data.csv.gz``      Sound of an airfoil; 1503 rows, without a header, and
``uci/airfoil/test_mask.csv.gz`` which of them ten folds test on, as in treforevans/uci_datasets
===============================  ===================================================================

Two monthly series, whose input is the time alone, come with packages of ``pip install -e
'.[bench]'``: carbon dioxide at Mauna Loa, 1958 to 2001 (statsmodels), and airline passengers, 1949
to 1960 (pmdarima). Of series whole years are tested, which no neighbor tells; elsewhere rows of
equal inputs stay together. What is not there is left out.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["TABLES", "Points", "RegressionSplits", "Table", "read_regression", "split_table"]

_TEST, _VALIDATION = 0.2, 0.15
# More training points would teach networks more than the time of exact Gaussian processes allows.
_MOST = {"train": 600, "validation": 200, "test": 300}


class Points(NamedTuple):
    """Some points of one part.

    Attributes:
        x: Inputs; of the training part each has mean zero and variance one.
        y: Target, likewise.
        group: Points of one number are split, and hidden from each other, together.
    """

    x: Float[Tensor, "point feature"]
    y: Float[Tensor, " point"]
    group: Int[Tensor, " point"]

    def choose(self, rows: Int[Tensor, " chosen"] | slice) -> "Points":
        """Take some of the points."""
        return Points(self.x[rows], self.y[rows], self.group[rows])


class RegressionSplits(NamedTuple):
    """Three parts that share no group.

    Attributes:
        train: What is learned from, and what predictions of the other parts may look at.
        validation: What decides.
        test: On what models are measured.
        scale: Standard deviation of the training part's target, in its own unit.
    """

    train: Points
    validation: Points
    test: Points
    scale: float

    def sizes(self) -> dict[str, int]:
        """How many points each part has, and how many features."""
        parts = {name: len(getattr(self, name).y) for name in _MOST}
        return parts | {"features": self.train.x.shape[1]}


class Table(NamedTuple):
    """A data set as it is published.

    Attributes:
        x: Inputs.
        y: Target.
        group: What is split together.
        folds: Whether a fold tests on a point, or None where nothing says so.
    """

    x: Float[Tensor, "point feature"]
    y: Float[Tensor, " point"]
    group: Int[Tensor, " point"]
    folds: Bool[Tensor, "point fold"] | None = None


def read_regression(name: str, folder: Path | None, seed: int) -> RegressionSplits | None:
    """Read and split a data set by the name it has in ``TABLES``; None where it is not there."""
    table = TABLES[name](folder)
    return None if table is None else split_table(table, seed)


def split_table(table: Table, seed: int) -> RegressionSplits:
    """Split a table, and bring it to the standard units of its training part.

    A fifth of the groups, chosen by the seed, or the fold of this number is tested, and .15 of all
    groups decide. Of large parts only so many points are taken as an exact Gaussian process learns
    in seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = table.group.unique()
    groups = groups[torch.randperm(len(groups), generator=generator)]
    if table.folds is None:
        tested = groups[: round(_TEST * len(groups))]
    else:
        tested = table.group[table.folds[:, seed % table.folds.shape[1]]]
    others = groups[~torch.isin(groups, tested)]
    num_validation = round(_VALIDATION * len(groups))
    chosen = {"train": others[num_validation:], "validation": others[:num_validation]}
    chosen["test"] = tested
    rows = {}
    for part, members in chosen.items():
        inside = torch.isin(table.group, members).nonzero()[:, 0]
        order = torch.randperm(len(inside), generator=generator)
        rows[part] = inside[order[: _MOST[part]]]
    x, y = table.x, table.y
    x_mean, x_scale = x[rows["train"]].mean(0), x[rows["train"]].std(0)
    # A feature may be constant.
    x = (x - x_mean) / torch.where(x_scale > 0, x_scale, 1.0)
    scale = y[rows["train"]].std()
    y = (y - y[rows["train"]].mean()) / scale
    dtype = torch.get_default_dtype()
    points = Points(x.to(dtype), y.to(dtype), table.group)
    return RegressionSplits(**{p: points.choose(r) for p, r in rows.items()}, scale=float(scale))


@cache
def _read_csv(name: str, num_targets: int, folder: Path | None) -> Table | None:
    """Read a table whose last columns are targets, the first of which counts."""
    path = None if folder is None else folder / "uci" / f"{name}.csv"
    if path is None or not path.exists():
        return None
    values = pd.read_csv(path).to_numpy(dtype=float)
    return _with_equal_inputs_together(values[:, :-num_targets], values[:, -num_targets])


@cache
def _read_airfoil(folder: Path | None) -> Table | None:
    if folder is None or not (folder / "uci" / "airfoil" / "data.csv.gz").exists():
        return None
    values, folds = (
        pd.read_csv(folder / "uci" / "airfoil" / f"{name}.csv.gz", header=None).to_numpy()
        for name in ("data", "test_mask")
    )
    table = _with_equal_inputs_together(values[:, :-1].astype(float), values[:, -1].astype(float))
    return table._replace(folds=torch.tensor(folds.astype(bool)))


@cache
def _read_co2(folder: Path | None) -> Table | None:
    del folder
    if not find_spec("statsmodels"):
        return None
    from statsmodels.datasets import co2

    published: Any = co2.load_pandas().data
    weekly = published["co2"]
    monthly = weekly.groupby([weekly.index.year, weekly.index.month]).mean().dropna()
    years, months = np.array(monthly.index.to_list()).T
    return _series(years, months, monthly.to_numpy())


@cache
def _read_airline(folder: Path | None) -> Table | None:
    del folder
    if not find_spec("pmdarima"):
        return None
    from pmdarima.datasets import load_airpassengers

    passengers = np.asarray(load_airpassengers())
    months = np.arange(len(passengers))
    return _series(1949 + months // 12, 1 + months % 12, passengers)


def _with_equal_inputs_together(x: np.ndarray, y: np.ndarray) -> Table:
    inputs = torch.tensor(x)
    return Table(inputs, torch.tensor(y), inputs.unique(dim=0, return_inverse=True)[1])


def _series(years: np.ndarray, months: np.ndarray, values: np.ndarray) -> Table:
    time = torch.tensor(years + (months - 0.5) / 12)
    return Table(time[:, None], torch.tensor(values, dtype=time.dtype), torch.tensor(years))


def _uci(name: str, num_targets: int = 1) -> Callable[[Path | None], Table | None]:
    return lambda folder: _read_csv(name, num_targets, folder)


TABLES: Mapping[str, Callable[[Path | None], Table | None]] = {
    "concrete": _uci("concrete"),
    "energy": _uci("energy", 2),
    "yacht": _uci("yacht"),
    "airfoil": _read_airfoil,
    "co2": _read_co2,
    "airline": _read_airline,
}
