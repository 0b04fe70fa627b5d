"""Pages of one file: templates, inline pictures, numbers as a reader wants them. No script and no network."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from pissa.checkpoint.output import write_text
from pissa.errors import OutputError, require
from pissa.untyped import Figure

TEMPLATES = Path(__file__).parent / "templates"
SALT = "pissa"
"""Of the names inside an SVG: without it matplotlib draws new ones each time."""


def render(template: str, **values: Any) -> str:
    """Fill in a template of `templates/`; what is put in is escaped, a name that is missing is an
    error.

    Filters: `number` (0.1235), `percent` (12.3 %), `duration` (1 min 33 s), `size` (1.5 GB),
    `plain` (true, null).

    Args:
        template: its file name. A page starts with `{% extends "base.html" %}` and fills the blocks
            title and content.
        values: what it speaks of.

    Example:
        html = render("report.html", name="run", picture=svg(figure))
    """
    return str(_environment().get_template(template).render(**values))


def svg(figure: Figure, alt: str = "") -> Figure:
    """A matplotlib figure as inline SVG, the same text at every call; letters are paths, so it
    needs no font.

    What is black takes the colour of the page's text, so that the picture stays readable in dark
    mode.

    Args:
        figure: a `matplotlib.figure.Figure`.
        alt: what it shows, in words. Default: the titles, or the labels, of its axes.

    Returns:
        A `markupsafe.Markup`, to be put into a template as it is.
    """
    matplotlib, markupsafe = require("matplotlib", "train"), require("markupsafe", "train")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "path"}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL
    )
    # Names count for the whole page, so they carry the picture's own; and href needs no other
    # namespace today.
    own = hashlib.sha256(body.encode()).hexdigest()[:8]
    body = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{own}-", body).replace("xlink:href", "href")
    body = body.replace("#000000", "currentColor")
    label, most = markupsafe.escape(alt or _words(figure)), f"{1.6 * float(width):g}px"
    return markupsafe.Markup(
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" style="max-width: {most}"'
        f' fill="currentColor" stroke-linejoin="round" stroke-linecap="butt">{body.strip()}'
    )


def write_page(path: str | Path, html: str) -> Path:
    """Write a page in one step: a reader sees the old one or the new one, never half of it.

    Raises:
        OutputError: the place cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, html)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error}): choose another file") from error
    return path


def number(value: float | None) -> str:
    """Four digits that count: 0.1235, 2e-5, 12,346; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return re.sub(
        r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", f"{value:.4g}"
    )


def percent(value: float | None) -> str:
    """A share in three digits that count: 12.3 %, 0.0123 %."""
    return "–" if value is None else f"{number(float(f'{100 * value:.3g}'))} %"


def duration(seconds: float | None) -> str:
    """The two largest units: 2 h 5 min, 1 min 33 s, 4.2 s."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (
        ("d", whole // 86400),
        ("h", whole // 3600 % 24),
        ("min", whole // 60 % 60),
        ("s", whole % 60),
    )
    first = next(index for index, (_, count) in enumerate(units) if count)
    return " ".join(f"{count} {unit}" for unit, count in units[first : first + 2] if count)


def size(count: float | None) -> str:
    """Bytes in decimal units: 512 B, 1.5 GB."""
    if count is None:
        return "–"
    power = min(max(int(math.log10(count)) // 3, 0), 4) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def plain(value: object) -> str:
    """A setting as a YAML file has it: text as it is, the rest as JSON (true, null, [1, 2])."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cell(text: object) -> str:
    """Text inside a Markdown table: on one line, and a bar in it is no edge."""
    return " ".join(str(text).split()).replace("|", "\\|")


@cache
def _environment() -> Any:
    jinja2 = require("jinja2", "train")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        filter_.__name__: filter_ for filter_ in (number, percent, duration, size, plain, cell)
    }
    return environment


def _words(figure: Figure) -> str:
    parts = [
        axes.get_title() or f"{axes.get_ylabel()} over {axes.get_xlabel()}" for axes in figure.axes
    ]
    return "; ".join(part for part in parts if part.strip() != "over") or "picture"
