"""Names for axes: the caller's, else the program's, else its plates', else numbers."""

from collections.abc import Mapping, Sequence

__all__ = ["AxisNames"]

Names = Mapping[str, Sequence[str | None]]


class AxisNames:
    """Names axes from several sources, the first that knows an axis decides.

    In each source, a list of names belongs to a variable's last axes.

    Args:
        given: The caller's names, which must all be used.
        others: Further sources, best first.
        dropped: Name of an axis that the draws have no more, as it became the draw axis.
    """

    def __init__(self, given: Names, others: Sequence[Names] = (), dropped: str | None = None):
        self.given, self.dropped, self._others = given, dropped, others
        self._used: set[str] = set()

    def of(
        self,
        name: str,
        shape: Sequence[int],
        plates: Sequence[str | None] = (),
        *,
        without_plate: bool = False,
    ) -> tuple[str, ...]:
        """Name every axis of a variable.

        Args:
            name: The variable's name.
            shape: Of the variable, sample axes left out.
            plates: Names from the program's plates, None where there is no plate.
            without_plate: Whether the dropped axis is missing in ``shape``, though not in names.

        Raises:
            ValueError: If there are more names than axes, or two alike.
        """
        self._used.add(name)
        result: list[str | None] = [None] * len(shape)
        for source in (self.given, *self._others, {name: plates}):
            names = list(source.get(name, ()))
            if without_plate and self.dropped in names:
                names.remove(self.dropped)
            repeated = {label for label in names if label is not None and names.count(label) > 1}
            if repeated:
                raise ValueError(f"{name!r} has two axes of the name {sorted(repeated)}: {names}")
            if len(names) > len(shape):
                raise ValueError(
                    f"{name!r} has {len(shape)} axes after chain and draw, {tuple(shape)}, but the "
                    f"names {names}"
                )
            for axis, label in enumerate(names, start=len(shape) - len(names)):
                if result[axis] is None and label not in result:
                    result[axis] = label
        # Groups are paths, so that no name of an axis may have a slash; Pyro's scopes make some.
        return tuple(
            placeholder(name, axis) if label is None else label.replace("/", ".")
            for axis, label in enumerate(result)
        )

    def check_all_used(self) -> None:
        """Refuse names given for variables that do not exist.

        Raises:
            ValueError: If there are any.
        """
        unknown = sorted(self.given.keys() - self._used)
        if unknown:
            raise ValueError(
                f"dims names axes of {unknown}, but there are only {sorted(self._used)}"
            )


def placeholder(name: str, axis: int) -> str:
    """Name of an axis that has no name."""
    return f"{name}_axis_{axis}".replace("/", ".")
