"""Line charts as inline SVG: they take the page's colours, and tell curves apart by dash and mark as well."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 244
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 20, 42  # between the picture's edge and the axes
COLOURS = 8  # --c0 ... --c7 of the style
DASHES = ("", "7 5", "2 5", "11 4 2 4")


@dataclass(frozen=True)
class Series:
    """One curve: a name, its points (x, y), and its place among the colours, the same wherever the name appears.

    last: a point that is marked but not joined to the curve, such as a measurement made in another way; None for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    place: int
    last: tuple[float, float] | None = None


@dataclass(frozen=True)
class Rule:
    """A dotted line across, at y, with a label."""

    name: str
    y: float


@dataclass(frozen=True)
class Axis:
    """A range of numbers, linear or logarithmic, laid on `start` to `end` of the picture."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within the range."""
        if not self.logarithmic:
            return _round_numbers(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
            found = [digit * 10.0**decade for decade in decades for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                return found
        return _round_numbers(self.low, self.high)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    rules: Sequence[Rule] = (),
    logarithmic: bool = False,
    x_logarithmic: bool = False,
) -> str:
    """A figure with heading, curves and legend.

    Args:
        series: at least one point among them, all numbers finite.
        rules: lines across.
        logarithmic: the vertical axis, where all values are positive; linear where one is not.
        x_logarithmic: the horizontal axis, likewise; otherwise it begins at 0.
    Raises:
        ValueError: there is no point.
    """
    points = [point for s in series for point in (*s.points, *([s.last] if s.last else []))]
    if not points:
        raise ValueError(f"the chart {title!r} has no point; leave it out")
    heights = [y for _, y in points] + [rule.y for rule in rules]
    logarithmic = logarithmic and min(heights) > 0
    places = [x for x, _ in points]
    if x_logarithmic and min(places) > 0:
        across = Axis(*_padded(min(places), max(places), True), LEFT, WIDTH - RIGHT, True)
    else:
        across = Axis(0.0, max(max(places), 1e-9), LEFT, WIDTH - RIGHT)
    up = Axis(*_padded(min(heights), max(heights), logarithmic), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [*_frame(across, up, x_label, y_label), *(_rule(rule, up) for rule in rules)]
    parts += [part for one in series for part in _curve(one, across, up)]
    said = f"{title}: {y_label} against {x_label}, " + "; ".join(_in_words(s) for s in series)
    drawn = "\n".join(parts)
    legend = "".join(f"<li>{_swatch(s.place)}{escape(s.name)}</li>" for s in series)
    return (
        f'<figure>\n<h3>{escape(title)}</h3>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(said)}">\n'
        f'{drawn}\n</svg>\n<ul class="legend">{legend}</ul>\n</figure>'
    )


def number(value: float, *, padded: bool = False) -> str:
    """A number at three digits, without an exponent where it is short without; padded: with zeros to three digits."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if padded and value else f"{value:.3g}"


def _in_words(series: Series) -> str:
    (_, first), (_, end) = (series.points or [series.last])[0], (series.last or series.points[-1])
    return f"{series.name} from {number(first)} to {number(end)}"


def _padded(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    """The range with a little air; a single value gets some as well."""
    if logarithmic:
        factor = max((high / low) ** 0.06, 1.08)
        return low / factor, high * factor
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - air, high + air


def _round_numbers(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _frame(across: Axis, up: Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in across.ticks():
        x = across(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v5"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 5}">{escape(y_label)}</text>')
    return parts


def _rule(rule: Rule, up: Axis) -> str:
    y = up(rule.y)
    return (
        f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(rule.name)}</text>'
    )


def _curve(series: Series, across: Axis, up: Axis) -> list[str]:
    colour, placed = f"var(--c{series.place % COLOURS})", [(across(x), up(y)) for x, y in series.points]
    parts = []
    if placed:
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(
            f'<path class="curve" style="stroke:{colour}" stroke-dasharray="{_dash(series.place)}" d="{line}"/>'
        )
    marked = placed if len(placed) <= 12 else []
    if series.last:
        marked = [*marked, (across(series.last[0]), up(series.last[1]))]
    return parts + [_mark(series.place, x, y) for x, y in marked]


def _dash(place: int) -> str:
    return DASHES[place % len(DASHES)]


def _mark(place: int, x: float, y: float) -> str:
    """A circle, square, triangle or diamond."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" ',
        f'<rect x="{x - 3.7:.1f}" y="{y - 3.7:.1f}" width="7.4" height="7.4" ',
        f'<path d="M{x:.1f} {y - 5:.1f}l4.8 8.4h-9.6z" ',
        f'<path d="M{x:.1f} {y - 5.4:.1f}l5 5.4l-5 5.4l-5 -5.4z" ',
    )
    return f'{shapes[place % len(shapes)]}style="fill:var(--c{place % COLOURS});stroke:var(--card);stroke-width:1"/>'


def _swatch(place: int) -> str:
    line = (
        f'<path class="curve" style="stroke:var(--c{place % COLOURS})" stroke-dasharray="{_dash(place)}" d="M2 6H32"/>'
    )
    return f'<svg viewBox="0 0 34 12" aria-hidden="true">{line}{_mark(place, 17, 6)}</svg>'
