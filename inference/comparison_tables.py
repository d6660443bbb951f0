"""Tables of a comparison: as data, and as a reader wants them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bayesattn.inference.distances import DISTANCES
from bayesattn.inference.held_out_scores import HeldOut, standard_error
from bayesattn.inference.yardstick import REFERENCE

if TYPE_CHECKING:
    from bayesattn.inference.comparison import Comparison

__all__ = ["as_html", "as_text", "by_posterior", "by_site", "held_out"]

_SITE_COLUMNS = (
    "entries",
    "mean_error",
    "mean_error_95",
    "sd_ratio_low",
    "sd_ratio_high",
    "sd_ratio_low_95",
    "sd_ratio_high_95",
)
_JOINT_COLUMNS = (
    "method",
    "draws_are",
    "draws",
    "dims",
    "scale",
    *(f"{name}{part}" for name in DISTANCES for part in ("", "_null", "_95")),
    "ksd",
    "ksd_squared",
    "seconds",
    "gradient_evaluations",
)
_KINDS = {"markov": "Markov", "iid_guide": "of a guide"}
_TITLES = {"sliced_w1": "sliced W1", "energy": "energy", "mmd2": "MMD²"}


def by_site(parts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> pd.DataFrame:
    """One row for each (posterior, site)."""
    rows = {(name, site): row for name, sites in parts.items() for site, row in sites.items()}
    index = pd.MultiIndex.from_tuples(list(rows), names=["posterior", "site"]) if rows else None
    empty = pd.MultiIndex.from_arrays([[], []], names=["posterior", "site"])
    table = pd.DataFrame(
        list(rows.values()), index=empty if index is None else index, columns=list(_SITE_COLUMNS)
    )
    return table.astype(float).astype({"entries": int})


def by_posterior(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each posterior, blank where a figure cannot be had."""
    index = pd.Index(list(rows), name="posterior")
    return pd.DataFrame(list(rows.values()), index=index, columns=list(_JOINT_COLUMNS))


def held_out(predictions: Mapping[str, Mapping[str, HeldOut]]) -> pd.DataFrame:
    """Scores of predictions, and the paired difference of log scores to the reference's."""
    rows = {}
    for site, parts in predictions.items():
        reference = parts.get(REFERENCE)
        for name, part in parts.items():
            row = rows[name, site] = part.figures()
            if name == REFERENCE or reference is None:
                continue
            if len(part.density) == len(reference.density):
                difference = part.density - reference.density
                row["difference"] = float(difference.mean())
                row["difference_se"] = standard_error(difference)
    columns = ["log_score", "log_score_se", "difference", "difference_se"]
    columns += ["accuracy", "accuracy_se", "calibration_error"]
    index = pd.MultiIndex.from_tuples(list(rows), names=["posterior", "site"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns).astype(float)


def as_text(comparison: "Comparison") -> str:
    """All tables with a line above each that says how to read it, and the notes."""
    parts = [
        f"{caption}\n{table.to_string(justify='right')}" for caption, table in _shown(comparison)
    ]
    notes = "\n".join(f"- {note}" for note in comparison.notes)
    return "\n\n".join([*parts, f"Notes\n{notes}"] if notes else parts)


def as_html(comparison: "Comparison") -> str:
    """The same for notebooks."""
    parts = [f"<p>{_escaped(text)}</p>{table.to_html()}" for text, table in _shown(comparison)]
    notes = "".join(f"<li>{_escaped(note)}</li>" for note in comparison.notes)
    return "".join(parts) + (f"<ul>{notes}</ul>" if notes else "")


def _shown(comparison: "Comparison") -> list[tuple[str, pd.DataFrame]]:
    """Captions and tables of texts, without columns that are all blank."""
    shown = []
    if len(comparison.sites):
        caption = (
            "Sites: worst error of a mean in the reference's sd, range of ratios of sd\n"
            "(in brackets: 95 % of exact samplers with as many draws; * beyond that)"
        )
        shown.append((caption, _site_texts(comparison.sites)))
    shown.append((_joint_caption(comparison.joint), _joint_texts(comparison.joint)))
    if comparison.elpd is not None:
        caption = (
            "Training data: expected log predictive density, in nats\n"
            "(loo: leave-one-out; lppd: in-sample, too high, not to be held against loo)"
        )
        shown.append((caption, _elpd_texts(comparison.elpd)))
    if comparison.held_out is not None:
        caption = "Held-out data: mean log score in nats, ± standard error; difference is paired"
        shown.append((caption, _held_out_texts(comparison.held_out)))
    return shown


def _joint_caption(table: pd.DataFrame) -> str:
    places = _places(table)
    if not places:
        return "Runs"
    where = f" ({places[0]})" if len(places) == 1 else ""
    return (
        f"Joint draws{where}: distances\n"
        "(in brackets: mean and 95 % point of as many exact draws; * beyond that)"
    )


def _places(table: pd.DataFrame) -> list[str]:
    """Where distances were taken, each place once."""
    pairs = zip(table["dims"], table["scale"], strict=True)
    places = (f"{int(d)} dims, {scale} scale" for d, scale in pairs if isinstance(scale, str))
    return list(dict.fromkeys(places))


def _site_texts(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for row in table.to_dict("records"):
        low, high = row["sd_ratio_low"], row["sd_ratio_high"]
        floor, ceiling = row["sd_ratio_low_95"], row["sd_ratio_high_95"]
        ratios = f"{low:.2f}–{high:.2f} ({floor:.2f}–{ceiling:.2f})"
        error, bound = row["mean_error"], row["mean_error_95"]
        means = f"{error:.2f} ({bound:.2f}){_star(error > bound)}"
        rows.append(
            {
                "entries": str(row["entries"]),
                "mean error": means if np.isfinite(error) else "",
                "sd ratio": ratios + _star(low < floor or high > ceiling) if low == low else "",
            }
        )
    return pd.DataFrame(rows, index=table.index)


def _joint_texts(table: pd.DataFrame) -> pd.DataFrame:
    texts: dict[str, list[str]] = {
        "method": list(table["method"]),
        "draws": [
            f"{count} {_KINDS.get(kind, kind)}"
            for count, kind in zip(table["draws"], table["draws_are"], strict=True)
        ],
    }
    if len(_places(table)) > 1:
        texts["dims"] = [_whole(value) for value in table["dims"]]
        texts["scale"] = [scale if isinstance(scale, str) else "" for scale in table["scale"]]
    for name in DISTANCES:
        columns = zip(table[name], table[f"{name}_null"], table[f"{name}_95"], strict=True)
        texts[_TITLES[name]] = [
            f"{value:.2g} ({mean:.2g}, {bound:.2g}){_star(value > bound)}"
            if np.isfinite(value)
            else ""
            for value, mean, bound in ((float(a), float(b), float(c)) for a, b, c in columns)
        ]
    for name, title in (("ksd", "KSD"), ("ksd_squared", "unbiased KSD²")):
        texts[title] = ["" if pd.isna(value) else f"{value:.2g}" for value in table[name]]
    texts["seconds"] = ["" if pd.isna(value) else f"{value:.1f}" for value in table["seconds"]]
    texts["gradients"] = [_whole(value) for value in table["gradient_evaluations"]]
    return _without_blank(pd.DataFrame(texts, index=table.index))


def _elpd_texts(table: pd.DataFrame) -> pd.DataFrame:
    texts = {
        "kind": table["kind"],
        "elpd": _with_error(table["elpd"], table["se"], 1),
        "lppd": [f"{value:.1f}" for value in table["lppd"]],
        "parameters": [f"{v:.1f}" if np.isfinite(v) else "" for v in table["effective_parameters"]],
        "Pareto k > 0.7": [_whole(value) for value in table["pareto_k_above_0.7"]],
    }
    if "elpd_diff" in table:
        # Of the best, so that the error of the best is none.
        texts["below the best"] = _with_error(table["elpd_diff"], table["dse"], 1)
    return _without_blank(pd.DataFrame(texts, index=table.index))


def _held_out_texts(table: pd.DataFrame) -> pd.DataFrame:
    texts = {
        "log score": _with_error(table["log_score"], table["log_score_se"], 3),
        "less reference's": _with_error(table["difference"], table["difference_se"], 3),
        "accuracy": _with_error(table["accuracy"], table["accuracy_se"], 3),
        "calibration error": [
            f"{value:.3f}" if np.isfinite(value) else "" for value in table["calibration_error"]
        ],
    }
    return _without_blank(pd.DataFrame(texts, index=table.index))


def _with_error(values: Any, errors: Any, digits: int) -> list[str]:
    return [
        ""
        if not np.isfinite(value)
        else f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if np.isfinite(error) else "")
        for value, error in zip(values, errors, strict=True)
    ]


def _without_blank(texts: pd.DataFrame) -> pd.DataFrame:
    return texts.loc[:, (texts != "").any(axis=0)]


def _whole(value: Any) -> str:
    return "" if pd.isna(value) else f"{int(value)}"


def _star(is_beyond: bool) -> str:
    """Mark what exact draws would hardly have; blanks keep columns in line."""
    return " *" if is_beyond else "  "


def _escaped(text: str) -> str:
    import html

    return html.escape(text).replace("\n", "<br>")
