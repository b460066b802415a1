"""Numbers and symbols of a page as they are printed: a minus sign in -1; low or high what is so in λ_max and i^2."""

from __future__ import annotations

import re

__all__ = ["typeset"]

_PIECE = re.compile(
    r"<(?P<tag>pre|code|script|style|textarea|title|desc)\b.*?</(?P=tag)>"
    r'|<(?P<math>span|div) class="math\b.*?</(?P=math)>'
    r"|(?P<drawing><svg\b.*?</svg>)|(?<=>)(?P<words>[^<>]+)(?=<)",
    re.DOTALL,
)
_MINUS = re.compile(r"(?<![\w.)/-])-(?=\d)")
_LOW = re.compile(r"(?<=[λK‖²])_(max|min|gen|tr|F)\b")
_HIGH = re.compile(r"(?<=\w)\^(−?(?:\d+\.?\d*|½))")


def typeset(page: str) -> str:
    """The HTML of a page with its text set; code, mathematics and attributes stay as they are.

    >>> typeset("<p>λ_max = -1, i^-2 <code>λ_max = -1</code></p>")
    '<p>λ<sub>max</sub> = −1, i<sup>−2</sup> <code>λ_max = -1</code></p>'
    """
    return _set(page, r"<sub>\1</sub>", r"<sup>\1</sup>")


def _set(page: str, low: str, high: str) -> str:
    def piece(found: re.Match[str]) -> str:
        if found["words"]:
            return _HIGH.sub(high, _LOW.sub(low, _MINUS.sub("−", found["words"])))
        if found["drawing"]:  # SVG has no <sub>: letters of another size, moved, and moved back at a space of no width
            return "<svg" + _set(found["drawing"][4:], _moved(0.3), _moved(-0.45))
        return found[0]

    return _PIECE.sub(piece, page)


def _moved(down: float) -> str:
    return rf'<tspan dy="{down}em" style="font-size: 75%">\1</tspan><tspan dy="{-0.75 * down:g}em">&#8203;</tspan>'
