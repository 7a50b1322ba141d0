"""An audit as text for the terminal, as JSON for programs, and as one HTML page with plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from alpaca.dataset.charts import STYLE, bars, histogram
from alpaca.dataset.findings import FIELDS, MEANINGS, Audit, Finding

EXAMPLES = 3  # shown for each check
TEXT_INDICES = 12
HTML_INDICES = 2000


def as_text(audit: Audit, items: Sequence[Any], name: str) -> str:
    """The report for a terminal."""
    lines = [f"{name}: {audit.count:,} records, {audit.with_input:,} with an input"]
    shares = list(audit.languages.items())[:5]
    if shares:
        counted = ", ".join(f"{language} {count:,}" for language, count in shares)
        lines.append(f"instructions long enough to tell a language by: {counted}")
    lines += audit.notices
    found = audit.by_check()
    if not found:
        return "\n".join([*lines, "no findings"])
    for check, findings in found.items():
        lines += ["", f"{check}: {len(findings):,}  ({MEANINGS[check].rstrip('.')})"]
        lines.append(f"  at {_indices(findings, TEXT_INDICES)}")
        for finding in findings[:EXAMPLES]:
            lines.append(f"  {finding.index}: {finding.detail}")
            lines += [f"      {line}" for line in _excerpt(items[finding.index])]
    return "\n".join(lines)


def as_json(audit: Audit, name: str) -> dict[str, Any]:
    """The report for programs: every finding with its index."""
    return {
        "data": name,
        "records": audit.count,
        "with_input": audit.with_input,
        "languages": audit.languages,
        "notices": audit.notices,
        "counts": {check: len(findings) for check, findings in audit.by_check().items()},
        "findings": [
            {key: value for key, value in asdict(finding).items() if value is not None}
            for finding in audit.findings
        ],
        "lengths": {what: _quantiles(values) for what, values in audit.lengths.items()},
    }


def as_html(audit: Audit, items: Sequence[Any], name: str) -> str:
    """The report as one self-contained HTML page."""
    found = audit.by_check()
    plots = [
        histogram(what, values, mark=audit.max_length if what == "tokens" else None)
        for what, values in audit.lengths.items()
    ]
    clean = audit.count - len({finding.index for finding in audit.findings})
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>Audit of {escape(name)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>Audit of {escape(name)}</h1>\n"
        f"<p>{audit.count:,} records, {audit.with_input:,} with an input; "
        f"{clean:,} without a finding.</p>\n"
        + "".join(f"<p>{escape(text)}</p>\n" for text in audit.notices)
        + f"<h2>Findings</h2>{bars([(check, len(rows)) for check, rows in found.items()])}\n"
        f'<h2>Lengths</h2><div class="charts">{"".join(plots)}</div>\n'
        f"<h2>Languages of the instructions</h2>{bars(list(audit.languages.items())[:12])}\n"
        + "".join(_section(check, rows, items) for check, rows in found.items())
        + "</body></html>\n"
    )


def _section(check: str, findings: list[Finding], items: Sequence[Any]) -> str:
    shown = "".join(
        f"<p>Record {finding.index}: {escape(finding.detail)}</p>"
        f"<blockquote>{escape(chr(10).join(_excerpt(items[finding.index])))}</blockquote>"
        for finding in findings[:EXAMPLES]
    )
    return (
        f'<h2 id="{check}">{check}: {len(findings):,}</h2><p>{escape(MEANINGS[check])}</p>{shown}'
        f'<details><summary>indices</summary><p class="indices">'
        f"{_indices(findings, HTML_INDICES)}</p></details>\n"
    )


def _indices(findings: list[Finding], most: int) -> str:
    shown = ", ".join(str(finding.index) for finding in findings[:most])
    more = len(findings) - most
    return f"{shown} and {more:,} more (all with --json)" if more > 0 else shown


def _excerpt(item: Any, width: int = 100) -> list[str]:
    """A record in at most three lines."""
    if not isinstance(item, dict):
        return [_short(json.dumps(item), width)]
    present = [(name, item[name]) for name in FIELDS if item.get(name)]
    texts = [value if isinstance(value, str) else json.dumps(value) for _, value in present]
    return [
        _short(f"{name}: {text}", width) for (name, _), text in zip(present, texts, strict=True)
    ]


def _short(text: str, width: int) -> str:
    # Lone surrogates cannot be encoded; they are escaped, like other unprintable characters.
    plain = "".join(c if c.isprintable() or c == "�" else repr(c)[1:-1] for c in text[: width * 2])
    return plain if len(plain) <= width and len(text) <= width * 2 else plain[: width - 3] + "..."


def _quantiles(values: list[int]) -> dict[str, float]:
    ordered = sorted(values) or [0]
    at = {"least": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in at.items()}
