"""Inline SVG: line charts and interval plots. Colours are CSS variables, so that the page's light and dark themes
apply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from silkie.report.schema import Curve, System

__all__ = ["interval_plot", "line_chart", "nice_ticks"]

WIDTH, HEIGHT = 330, 180  # about the pixels that a panel has, so that text is as large as the style sheet says
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30


def line_chart(curve: Curve) -> str:
    """The SVG of a panel. Every point is in the data attributes; the page's script shows the nearest one under the
    pointer."""
    points = [p for series in curve.series.values() for p in series if math.isfinite(p[1])]
    if not points:
        return ""
    x_ticks, y_ticks = (
        nice_ticks(min(p[0] for p in points), max(p[0] for p in points), 5),
        nice_ticks(min(p[1] for p in points), max(p[1] for p in points), 4),
    )
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(y_ticks[0], *(p[1] for p in points)), max(y_ticks[-1], *(p[1] for p in points))

    def px(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / ((y_high - y_low) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_spoken(curve))}">']
    for tick in y_ticks:
        strong = ' class="zero"' if tick == 0 and y_low < 0 < y_high else ""
        parts.append(f'<line{strong} x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py(tick) + 3.5:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in (t for t in x_ticks if x_low <= t <= x_high):
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{_label(tick)}</text>')
    for number, (name, series) in enumerate(curve.series.items()):
        shown = [(px(x), py(y), x, y) for x, y in series if math.isfinite(y)]
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y, _, _) in enumerate(shown))
        raw = " ".join(f"{x:.1f},{y:.1f},{a:g},{b:.4g}" for x, y, a, b in shown)
        parts.append(f'<path class="s{number}" d="{path}" data-name="{escape(name)}" data-points="{raw}"/>')
        if len(shown) <= 30:
            parts += [f'<circle class="s{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y, _, _ in shown]
    return "".join([*parts, "</svg>"])


def shown_interval(system: System, base: float | None) -> tuple[float, float] | None:
    """The interval of a system's bar: its own, or that of its change set at the base's value; None where neither is
    known."""
    if system.low is not None and system.high is not None:
        return system.low, system.high
    if base is None or system.difference_low is None or system.difference_high is None:
        return None
    return base + system.difference_low, base + system.difference_high


def interval_plot(systems: Sequence[System]) -> list[str]:
    """Per system an SVG strip: its interval as a bar, its value as a dot, on one scale for all."""
    base = systems[0].value if systems else None
    intervals = [shown_interval(system, base) for system in systems]
    edges = [
        v for s, interval in zip(systems, intervals, strict=True) for v in (s.value, *(interval or ())) if v is not None
    ]
    low, high = (min(edges), max(edges)) if edges else (0.0, 1.0)

    def px(value: float) -> float:
        return 4 + (value - low) / ((high - low) or 1) * 152

    strips = []
    for number, (system, interval) in enumerate(zip(systems, intervals, strict=True)):
        parts = ['<svg class="strip" viewBox="0 0 160 16" aria-hidden="true"><line x1="4" x2="156" y1="8" y2="8"/>']
        if base is not None and number:
            parts.append(f'<line class="base" x1="{px(base):.1f}" x2="{px(base):.1f}" y1="1" y2="15"/>')
        if system.value is not None:
            if interval is not None:
                width = max(px(interval[1]) - px(interval[0]), 1)
                parts.append(
                    f'<rect class="c{min(number, 4)}" x="{px(interval[0]):.1f}" y="5.5" width="{width:.1f}" height="5"'
                    ' rx="2.5"/>'
                )
            parts.append(f'<circle class="c{min(number, 4)}" cx="{px(system.value):.1f}" cy="8" r="4"/>')
        strips.append("".join([*parts, "</svg>"]))
    return strips


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover low..high (steps of 1, 2 or 5 times a power of ten)."""
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / max(count, 1)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _label(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def _spoken(curve: Curve) -> str:
    ends = ", ".join(f"{name} from {series[0][1]:.3g} to {series[-1][1]:.3g}" for name, series in curve.series.items())
    return f"{curve.title}: {ends}"
