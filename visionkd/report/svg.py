"""Turns a matplotlib figure into a small inline SVG whose colours follow the page.

Matplotlib draws with marker colours, hexadecimal values that nothing else uses; on the way out each becomes a CSS
variable of the page, so that one picture serves light and dark. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, LINE = "#0a0b01", "#0a0b02", "#0a0b03"
STUDENT, TEACHER, BASELINE, PAGE = "#0a0b04", "#0a0b05", "#0a0b06", "#0a0b07"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    STUDENT: "student",
    TEACHER: "teacher",
    BASELINE: "baseline",
    PAGE: "page",
}
POINTS = 72.0
"""One user unit of the SVG is a point, 1/72 inch of matplotlib's figure size."""

STYLE = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.parse_math": False,  # a class may be called "$5_note"
    "font.family": ["DejaVu Sans"],  # only measured with; wider than system fonts, so nothing is clipped
    "font.size": 9.0,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.unicode_minus": True,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "axes.labelsize": 9.0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.04,
}


@dataclass(frozen=True)
class LegendItem:
    """One entry of a legend, which the page sets in HTML so that it wraps on a phone.

    Attributes:
        role: ``student``, ``teacher`` or ``baseline``; decides the colour.
        text: What the line or mark is.
        mark: ``line``, ``dashed``, ``bar``, ``tick``, ``dot``, ``diamond`` or ``square``.
    """

    role: str
    text: str
    mark: str = "line"


@dataclass(frozen=True)
class Picture:
    """A finished figure.

    Attributes:
        svg: Inline SVG without size; it fills its container.
        title: Short heading above it.
        width: Natural width in CSS pixels, beyond which it is not enlarged.
        min_width: Width in CSS pixels below which it scrolls rather than shrinks.
        legend: What its marks mean.
        caption: A sentence below it.
    """

    svg: str
    title: str
    width: int
    min_width: int = 0
    legend: tuple[LegendItem, ...] = ()
    caption: str = ""


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of ``width`` x ``height`` points, drawn in the report's style, without global state."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the page
        matplotlib.rcParams.update(STYLE)
        yield Figure(figsize=(width / POINTS, height / POINTS), dpi=POINTS, layout="constrained")


def to_svg(figure: Figure, key: str, label: str) -> str:
    """Render ``figure``; call within :func:`canvas`.

    Args:
        figure: What :func:`canvas` yielded.
        key: Unique on the page; prefixes all ids and salts matplotlib's hashes.
        label: Read out in place of the picture.
    """
    FigureCanvasSVG(figure)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}), warnings.catch_warnings():
        # Class names in scripts that DejaVu lacks: the browser has the glyphs, here they are only measured.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), key, label)


def _inline(svg: str, key: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    # Matplotlib's <style> would apply to the whole page; the page's own sheet says the same for pictures alone.
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib always writes a viewBox"
    # Text first: everything that follows rewrites tags only, so a class called "#0a0b01" stays as it is.
    body = re.sub(r"<[^>]*>", lambda tag: _rewrite(tag.group(), key), body)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", body)
    body = re.sub(r"(?<=>)\s+(?=<)", "", body)
    while True:  # groups that only carried an id
        shorter = re.sub(r"<g>((?:(?!<g[ >]|</g>).)*)</g>", r"\1", body, flags=re.DOTALL)
        if shorter == body:
            break
        body = shorter
    return f'<svg {box.group()} role="img" aria-label="{_attribute(label)}">{body}'


def _rewrite(tag: str, key: str) -> str:
    """Prefix ids, replace marker colours by variables and matplotlib's font by the page's, in one tag."""
    if tag.startswith("<image"):
        return re.sub(r' id="[^"]*"', "", tag)
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', tag)
    tag = re.sub(r'href="#([^"]*)"', rf'href="#{key}-\1"', tag)
    tag = re.sub(r"url\(#([^)]*)\)", rf"url(#{key}-\1)", tag)
    tag = re.sub(r"#0a0b0[1-7]", lambda m: f"var(--{VARIABLES[m.group()]})", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r"font-family: [^;\"]*;?\s*", "", tag)
    return re.sub(r"(\d+\.\d{3})\d+", r"\1", tag)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
