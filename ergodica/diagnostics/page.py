"""Pieces of a self-contained HTML page: no script, nothing fetched, everything escaped."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { --ink: #1b1f24; --faint: #57606a; --line: #d0d7de; --good: #1a7f37; --bad: #b42318; --open: #9a6700; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { margin-bottom: .2rem; } p.faint, figcaption, .faint { color: var(--faint); font-size: .9rem; }
.verdict { border-left: 6px solid; padding: .6rem 1rem; margin: 1rem 0; background: #f6f8fa; }
.verdict strong { display: block; font-size: 1.15rem; }
.verdict.yes { border-color: var(--good); } .verdict.no { border-color: var(--bad); } .verdict.open { border-color: var(--open); }
td.yes, td.passed { color: var(--good); font-weight: 600; } td.no, td.failed { color: var(--bad); font-weight: 600; }
td.open, td.undecided, td.not-run { color: var(--open); font-weight: 600; }
.scroll { overflow: auto; max-height: 34rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.words, th.words { text-align: left; } thead th { position: sticky; top: 0; background: white; }
figure { margin: 1rem 0; } img { max-width: 100%; } pre { background: #f6f8fa; padding: .8rem; overflow: auto; font-size: .82rem; }
nav a { margin-right: 1rem; }
"""


def document(title: str, body: str) -> str:
    """Make a page out of its body."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def escape(text: Any) -> str:
    """Escape text for HTML."""
    return html.escape(str(text))


def heading(level: int, text: str, anchor: str = "") -> str:
    """Make a heading, to which an anchor can point."""
    mark = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{mark}>{escape(text)}</h{level}>"


def paragraph(text: str, style: str = "") -> str:
    """Make a paragraph."""
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def verdict(style: str, headline: str, text: str) -> str:
    """Make a box with a verdict in words."""
    return f'<div class="verdict {style}"><strong>{escape(headline)}</strong>{escape(text)}</div>'


def preformatted(text: str) -> str:
    """Make a block of text as it is."""
    return f"<pre>{escape(text)}</pre>"


def table(columns: list[Any], rows: list[list[Any]]) -> str:
    """Make a table; a cell or the name of a column is a value, or a pair of a style and a value."""
    head = "".join(_cell(name, "th") for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(image: "Figure", caption: str, *, dpi: int = 100) -> str:
    """Embed a figure as PNG."""
    buffer = io.BytesIO()
    image.savefig(buffer, format="png", dpi=dpi)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _cell(cell: Any, tag: str = "td") -> str:
    style, value = cell if isinstance(cell, tuple) else ("", cell)
    mark = f' class="{escape(style)}"' if style else ""
    return f"<{tag}{mark}>{escape(_number(value) if isinstance(value, float) else value)}</{tag}>"


def _number(value: float) -> str:
    """Four digits, without exponents where a reader does not need them."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
