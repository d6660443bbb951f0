"""Readers of regression data; splits that keep groups together; standard units."""

import gzip
import random
from importlib.util import find_spec

import pytest
import torch

from examples.reproduce.regression_tasks import TABLES, Table, read_regression, split_table

PARTS = ("train", "validation", "test")


def table(num_points, *, per_group=1, folds=None):
    """Make points whose first feature is their number, and whose target is that too."""
    number = torch.arange(num_points)
    x = torch.stack([number.double(), torch.full((num_points,), 3.0)], -1)
    return Table(x, 10.0 * number + 5.0, number // per_group, folds)


def groups(splits):
    return [set(getattr(splits, part).group.tolist()) for part in PARTS]


def test_groups_stay_together():
    """Mutant: points that are split one by one."""
    whole = table(120, per_group=6)
    train, validation, test = groups(split_table(whole, 0))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert train | validation | test == set(range(20))
    assert (len(test), len(validation)) == (4, 3)
    assert split_table(whole, 0).sizes() == {
        "train": 78,
        "validation": 18,
        "test": 24,
        "features": 2,
    }


def test_split_depends_on_the_seed_alone():
    first, again, other = (groups(split_table(table(60), seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_units_are_those_of_the_training_part():
    """Mutants: units of all points; a constant feature that becomes NaN."""
    splits = split_table(table(60), 0)
    assert splits.train.y.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert splits.train.y.std().item() == pytest.approx(1.0)
    assert splits.train.x[:, 0].std().item() == pytest.approx(1.0)
    assert splits.test.y.mean().item() != pytest.approx(0.0, abs=1e-6)
    assert not splits.train.x[:, 1].any()
    differences = splits.train.y.diff() * splits.scale / 10
    torch.testing.assert_close(differences, differences.round())


def test_folds_say_what_is_tested():
    """Mutant: the first fold for every seed."""
    folds = torch.arange(40)[:, None] % 5 == torch.arange(5)
    for seed in (1, 6):
        splits = split_table(table(40, folds=folds), seed)
        assert sorted(splits.test.group.tolist()) == list(range(1, 40, 5))
        assert not set(splits.test.group.tolist()) & set(splits.train.group.tolist())


def test_large_parts_are_cut():
    sizes = split_table(table(3000), 0).sizes()
    assert sizes == {"train": 600, "validation": 200, "test": 300, "features": 2}


def test_tables_are_read(tmp_path):
    """Mutants: another target of two; equal inputs in different groups."""
    (tmp_path / "uci").mkdir()
    rows = ["X1,X2,Y1,Y2", "1,2,3,30", "4,5,6,60", "1,2,7,70"]
    (tmp_path / "uci" / "energy.csv").write_text("\n".join(rows))
    x, y, group, folds = TABLES["energy"](tmp_path)
    assert x.tolist() == [[1, 2], [4, 5], [1, 2]]
    assert y.tolist() == [3, 6, 7]
    assert group[0] == group[2] != group[1]
    assert folds is None
    (tmp_path / "uci" / "yacht.csv").write_text("\n".join(rows))
    assert TABLES["yacht"](tmp_path).y.tolist() == [30, 60, 70]


def test_airfoil_comes_with_folds(tmp_path):
    (tmp_path / "uci" / "airfoil").mkdir(parents=True)
    for name, rows in (("data", "1.5,2,3\n4,5,6\n"), ("test_mask", "0,1\n1,0\n")):
        path = tmp_path / "uci" / "airfoil" / f"{name}.csv.gz"
        path.write_bytes(gzip.compress(rows.encode()))
    found = TABLES["airfoil"](tmp_path)
    assert found.x.tolist() == [[1.5, 2], [4, 5]]
    assert found.y.tolist() == [3, 6]
    assert found.folds.tolist() == [[False, True], [True, False]]


def test_what_is_not_there_is_left_out(tmp_path):
    for name in ("concrete", "energy", "yacht", "airfoil"):
        assert read_regression(name, None, 0) is None
        assert read_regression(name, tmp_path, 0) is None


@pytest.mark.parametrize(
    ("name", "package", "years", "first", "last"),
    [
        ("co2", "statsmodels", range(1958, 2002), 316.1, 371.02),
        ("airline", "pmdarima", range(1949, 1961), 112.0, 432.0),
    ],
)
def test_series_are_monthly_and_grouped_by_year(name, package, years, first, last):
    if not find_spec(package):
        pytest.skip(f"{package} is not installed")
    # Packages draw when they are imported.
    state = random.getstate()
    found = TABLES[name](None)
    random.setstate(state)
    assert found.group.unique().tolist() == list(years)
    assert found.y[0].item() == pytest.approx(first, abs=1e-6)
    assert found.y[-1].item() == pytest.approx(last)
    assert torch.equal(found.x[:, 0].floor().long(), found.group)
    steps = 12 * found.x[:, 0].diff()
    assert steps.min().item() == pytest.approx(1.0)
    assert steps.median().item() == pytest.approx(1.0)
