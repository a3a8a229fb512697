"""What validation found: for each standard name and layer verified, refused or failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from html import escape
from typing import Any, Literal

from nnatomy.errors import NoSuchRowError

Status = Literal["verified", "refused", "failed", "unverified"]
_REFUSED = "Refused: to ask for it is an error that says why, and never another value."
_REASONS = 3  # told in one line
#: A name and its layer, None for what belongs to no layer.
Place = tuple[str, int | None]


def at(place: Place) -> str:
    """The place as one writes it: `layers_output[2]`."""
    name, layer = place
    return name if layer is None else f"{name}[{layer}]"


class Findings:
    """What the checks find, as they go.

    Attributes:
        failures: by place, what does not hold, with numbers.
        errors: by place, the largest relative error that was measured and let pass.
        unverified: by place, why it could not be checked.
    """

    def __init__(self) -> None:
        self.unverified: dict[Place, str] = {}
        self.failures: dict[Place, list[str]] = {}
        self.errors: dict[Place, float] = {}

    def expect(self, holds: bool, name: str, layer: int | None, why: str, error: float | None = None) -> None:
        """Note a failure unless it holds; else how large the error was, where one was measured."""
        place = name, layer
        if not holds:
            self.failures.setdefault(place, []).append(why)
        elif error is not None:
            self.errors[place] = max(error, self.errors.get(place, 0.0))

    def texts(self) -> list[str]:
        """Every failure in a line."""
        return [f"{at(place)}: {why}" for place, reasons in self.failures.items() for why in reasons]


@dataclass(frozen=True)
class Row:
    """One name on one layer.

    Attributes:
        layer: None for what belongs to no layer.
        error: the largest relative error that was measured; None where equality, shape or effect are what is checked.
        detail: why it is refused, or what failed, with numbers.
    """

    name: str
    layer: int | None
    status: Status
    error: float | None
    detail: str


class Report(Sequence[Row]):
    """A table of what each standard name is on a model: `model.validation`.

    A sequence of rows; as text and in a notebook a table in which the layers that are alike share a line. The row of
    "config" is unverified where the config has fields that seem to change the computation (a multiplier, a cap, a
    window, ...) and that no model of Transformers is known to have.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> report = StandardizedTransformer("demo:llama").validation
        >>> report.counts["failed"], report["queries", 3].status
        (0, 'verified')
    """

    def __init__(self, model: str, rows: Sequence[Row]) -> None:
        self.model = model
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """The row of a number, or of a (name, layer); of a name alone, the row of what belongs to no layer.

        Raises KeyError for a place that is none, with those that there are.
        """
        if not isinstance(index, (tuple, str)):
            return self._rows[index]
        name, layer = (index, None) if isinstance(index, str) else index
        layers = [row.layer for row in self._rows if row.name == name]
        if layer in layers:
            return next(row for row in self._rows if (row.name, row.layer) == (name, layer))
        if not layers:
            near = get_close_matches(name, dict.fromkeys(row.name for row in self._rows), n=3)
            raise NoSuchRowError(f"the report has nothing of {name!r}; of {', '.join(near) or 'other names'} it has.")
        of_layers = [one for one in layers if one is not None]
        how = (
            f"validation[{name!r}, layer], layers {min(of_layers)} to {max(of_layers)}"
            if of_layers
            else f"validation[{name!r}]"
        )
        raise NoSuchRowError(f"{at((name, layer))}: there is a row for each place: {how}.")

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each status."""
        found = Counter(row.status for row in self)
        return {status: found[status] for status in ("verified", "refused", "failed", "unverified")}

    @property
    def summary(self) -> str:
        """In a line."""
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        return f"{self.model}: {counts}"

    @property
    def why_refused(self) -> str:
        """In a line what "refused" means and for what reasons; "" where nothing is.

        Example:
            >>> from nnatomy import StandardizedTransformer
            >>> StandardizedTransformer("demo:gpt2").validation.why_refused.partition("Here ")[2]
            '(36): no token mixer of it is recurrent; (18): it has no experts to choose from'
        """
        reasons = Counter(row.detail for row in self if row.status == "refused").most_common()
        told = "; ".join(f"({count}): {why}" for why, count in reasons[:_REASONS])
        more = f"; {len(reasons) - _REASONS} other reasons, in the rows" * (len(reasons) > _REASONS)
        return f"{_REFUSED} Here {told}{more}" * bool(reasons)

    @property
    def _title(self) -> str:
        return ". ".join(filter(None, (self.summary, self.why_refused)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [asdict(row) for row in self]
        return {"model": self.model, "counts": self.counts, "why_refused": self.why_refused, "rows": rows}

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """Name, layers, status, error and detail, one line for the layers that are alike."""
        groups: dict[tuple[str, Status, str], list[Row]] = {}
        for row in self:
            groups.setdefault((row.name, row.status, row.detail), []).append(row)
        lines: list[tuple[str, str, str, str, str]] = []
        for (name, status, detail), rows in groups.items():
            errors = [row.error for row in rows if row.error is not None]
            error = f"{max(errors):.1e}" if errors else ""
            lines.append((name, spans([row.layer for row in rows]), status, error, detail))
        return lines

    def __str__(self) -> str:
        lines = [("name", "layers", "status", "error", ""), *self.lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        texts = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]])
            for line in lines
        ]
        return "\n".join([self._title, *(text.rstrip() for text in texts)])

    def __repr__(self) -> str:
        return f"<Report of {self.summary}; print it for the table>"

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self._title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for column in ("name", "layers", "status", "error", "reason"):
            table.add_column(column, overflow="fold")
        for name, layers, status, error, detail in self.lines():
            table.add_row(name, layers, Text(status, style=_STYLES[status]), error, Text(detail))
        return table

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td><code>{name}</code></td><td>{layers}</td><td style="color:{_COLOURS[status]}">{status}</td>'
            f"<td>{error}</td><td style='text-align:left'>{escape(detail)}</td></tr>"
            for name, layers, status, error, detail in self.lines()
        )
        head = "".join(f"<th>{column}</th>" for column in ("name", "layers", "status", "error", "reason"))
        return f"<table><caption>{escape(self._title)}</caption><tr>{head}</tr>{rows}</table>"


_STYLES = {"verified": "green", "refused": "yellow", "failed": "red", "unverified": "dim"}
_COLOURS = {"verified": "#2e8b57", "refused": "#b8860b", "failed": "#cd3700", "unverified": "#808080"}


def spans(layers: Sequence[int | None]) -> str:
    """Layers, as `0-3, 5`."""
    found: list[list[int]] = []
    for layer in layers:
        if layer is None:
            return ""
        if found and found[-1][-1] == layer - 1:
            found[-1][1:] = [layer]
        else:
            found.append([layer])
    return ", ".join("-".join(map(str, span)) for span in found)
