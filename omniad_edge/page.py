"""The parts that every HTML page of ours is made of: its head with the styles, and tables.

A page needs nothing but itself: no script, no network.
"""

from collections.abc import Iterable, Mapping
from html import escape

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f4f6f8; --text: #1a1d20; --muted: #59616a;
  --line: #ccd2d8; --good: #0b5fa5; --bad: #b34f00; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1e2327; --text: #e8eaed;
  --muted: #a9b1ba; --line: #434b53; --good: #6cb6ff; --bad: #ffa24d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; print-color-adjust: exact; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; } a { color: var(--good); }
.scroll { overflow-x: auto; } .muted, .path { color: var(--muted); } table { border-collapse: collapse; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, .facts td { text-align: left; } .facts td { overflow-wrap: anywhere; }
th:last-child, td:last-child { padding-right: 0; } tbody th { font-weight: 400; } tr { vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tfoot th, tfoot td { font-weight: 700; }
.charts { display: flex; flex-wrap: wrap; gap: .8rem; } .charts figure { max-width: 100%; }
.cases { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; padding: .6rem; background: var(--card); border-radius: .4rem; break-inside: avoid; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 12px; } svg .good { fill: var(--good); } svg .bad { fill: var(--bad); }
svg .axis { stroke: var(--muted); stroke-width: .75; fill: none; }
svg .curve { stroke: var(--good); stroke-width: 2; fill: none; }
svg .cut { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 5 3; } svg .now { fill: var(--text); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.pair img { display: block; width: 100%; height: auto; border-radius: .2rem; }
.case { border: 2px solid transparent; } figcaption { font-size: .85rem; margin-top: .4rem; }
.case .path { display: block; overflow-wrap: anywhere; }
.scale { display: inline-block; width: 9rem; text-align: center; color: #000; border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, #28bceb, #a4fc3c, #fb8122, #7a0403); }
.mark { font-weight: 700; padding: 0 .4rem; border: 1px solid var(--line); border-radius: .2rem; }
.miss { border: 2px solid var(--bad); } .false-reject { border: 2px dashed var(--good); }
.miss .mark { background: var(--bad); border-color: var(--bad); color: var(--back); }
.false-reject .mark { background: var(--good); border-color: var(--good); color: var(--back); }
"""
# The policy makes the browser itself refuse anything that is not in the file.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""


def head(title: str) -> str:
    """The page down to its first heading; `</body></html>` is left to write after the rest."""
    return (
        f"{HEAD}<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
    )


def row(cells: Iterable[str]) -> str:
    """A table row from cells that are HTML already; the first one is its heading."""
    first, *rest = cells
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'


def table(headings: Iterable[str], rows: Iterable[str], foot: str = "") -> str:
    """headings: HTML; rows, foot: of `row`. Wider than the screen it scrolls by itself."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = f"<thead><tr>{head}</tr></thead><tbody>\n{''.join(rows)}</tbody><tfoot>{foot}</tfoot>"
    return f'<div class="scroll"><table>{body}</table></div>\n'


def pairs(entries: Mapping[str, str]) -> str:
    """A table of names and values, both plain text; nothing for none."""
    rows = "".join(row((escape(str(key)), escape(str(value)))) for key, value in entries.items())
    return f'<table class="facts"><tbody>\n{rows}</tbody></table>\n' if rows else ""
