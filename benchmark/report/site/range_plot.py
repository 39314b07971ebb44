"""What every site's quantizer represents, as inline SVG: a bar a site, in the order of the forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

_LEFT, _TOP, _WIDTH, _HEIGHT = 46, 8, 720, 220
_BOTTOM = 34
_LINEAR = 1.0
"""Between minus this and this the axis is linear, beyond it logarithmic."""


def _place(value: float) -> float:
    size = abs(value)
    return math.copysign(size if size <= _LINEAR else 1 + math.log10(size), value)


def range_plot(sites: Sequence[dict[str, Any]], label: str) -> Markup:
    """The ranges of a cell's activation sites; empty where it has none.

    Args:
        sites: Rows of a record.
        label: What the picture is of.
    """
    shown = [
        site
        for site in sites
        if site["kind"] != "weight" and site["low"] is not None and site["high"] is not None
    ]
    if not shown:
        return Markup()
    reach = max(_place(max(abs(site["low"]), abs(site["high"]))) for site in shown)
    top = math.ceil(max(reach, 1.0))

    def y(value: float) -> float:
        return _TOP + _HEIGHT / 2 * (1 - _place(value) / top)

    step = _WIDTH / len(shown)
    parts = [
        f'<svg class="plot" role="img" viewBox="0 0 {_LEFT + _WIDTH + 8} {_TOP + _HEIGHT + _BOTTOM}" '
        f'aria-label="{escape(label)}">'
    ]
    for power in range(1, top + 1):
        for sign in (1, -1):
            value = sign * 10.0 ** (power - 1)
            parts.append(_grid(y(value), f"{value:g}"))
    parts.append(_grid(y(0), "0"))
    for index, site in enumerate(shown):
        x = _LEFT + (index + 0.5) * step
        high, low = y(site["high"]), y(site["low"])
        title = escape(f"{site['id']}: {site['low']:.4g} to {site['high']:.4g}")
        parts.append(
            f'<rect class="bar" x="{x - 0.35 * step:.1f}" y="{high:.1f}" width="{0.7 * step:.1f}" '
            f'height="{max(low - high, 1):.1f}"><title>{title}</title></rect>'
        )
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + _BOTTOM - 10}" text-anchor="middle">'
        f"{len(shown)} activation sites, in the order of the forward pass</text></svg>"
    )
    # every text in it was escaped above
    return Markup("".join(parts))  # noqa: S704


def _grid(height: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{height:.1f}" y2="{height:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{text}</text>'
    )
