"""The status as a page for people: one file, which loads nothing and runs nothing."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from nnatomy.plots.look import css

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; } p { margin: 0 0 1rem; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem 1rem; margin: .75rem 0; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { grid-column: 1 / -1; } code { font: .85rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; } td.number, th.number { text-align: right; }
summary { cursor: pointer; }
"""


def page(status: dict[str, Any]) -> str:
    """The page, of what a status tells. All that is not ours in it is escaped."""
    versions = ", ".join(f"{_text(name)} {_text(one)}" for name, one in status["versions"].items())
    parts = [
        f"<h1>nnatomy server</h1><p>{versions}</p>",
        _facts({"Sessions": status["sessions"], "Frames that wait": status["waiting"]}),
        *map(_model, status["models"]),
    ]
    if status.get("open"):
        names = {
            "number": "Session",
            "model": "Model",
            "key": "Key",
            "age": "Age, s",
            "idle": "Idle, s",
            "computed": "Computed, s",
            "held_bytes": "Bytes held",
            "tokens": "Tokens",
        }
        rows = [[one[key] for key in names] for one in status["open"]]
        parts.append(f"<h3>Open sessions</h3>{_table([*names.values()], rows)}")
    if status["refused"]:
        parts.append(f"<h3>Refused so far</h3>{_table(['Kind', 'Times'], sorted(status['refused'].items()))}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>nnatomy server</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta http-equiv="refresh" content="30">'
        f"<style>{css()}{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _model(told: dict[str, Any]) -> str:
    rows = told["report"]["rows"]
    counts = Counter(row["status"] for row in rows)
    found = ", ".join(
        f'<span class="{"bad" if kind == "failed" else "good" if kind == "verified" else ""}">{count} {_text(kind)}</span>'
        for kind, count in counts.items()
    )
    facts = _facts(
        {
            "Sessions": told["sessions"],
            "Frames that wait": told["waiting"],
            "Frames done": told["frames"],
            "Seconds computed": told["seconds"],
            "Bytes held": told["held_bytes"],
            "Parameters": told["parameters"],
            "Dtype": told["dtype"],
            "Device": told["device"],
        },
        {"Revision": told["revision"] or "none is known", "SHA-256 of the weights": told["hash"]},
    )
    engine = f" on {_text(told['engine'])}" if "engine" in told else ""
    columns = ["name", "layer", "status", "error", "detail"]
    report = _table([one.capitalize() for one in columns], [[row.get(key) for key in columns] for row in rows])
    return (
        f"<section><h2>{_text(told['name'])}</h2><p>{_text(told['class'])}{engine}</p>{facts}"
        f"<details><summary>Names, by layer: {found}</summary>{report}</details></section>"
    )


def _facts(facts: dict[str, Any], codes: dict[str, Any] | None = None) -> str:
    items = [f"<div><dt>{_text(name)}</dt><dd>{_number(one)}</dd></div>" for name, one in facts.items()]
    for name, one in (codes or {}).items():
        items.append(f'<div class="wide"><dt>{_text(name)}</dt><dd><code>{_text(one)}</code></dd></div>')
    return f"<dl>{''.join(items)}</dl>"


def _table(heads: list[str], rows: list[Any]) -> str:
    numbers = [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(heads))]
    kinds = [' class="number"' if one else "" for one in numbers]
    head = "".join(f"<th{kind}>{_text(one)}</th>" for kind, one in zip(kinds, heads, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{_number(one)}</td>' for kind, one in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _text(value: Any) -> str:
    return escape(f"{value:.3g}" if isinstance(value, float) and 0 < abs(value) < 0.01 else str(value))
