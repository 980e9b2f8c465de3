"""Geometry of the charts: plain numbers as text, which the templates write as SVG.

Text, because a template would write a number by the language's rules, with a comma in some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor

from .airports import Territory
from .models import Airport
from .weather import MonthOfWeather

WIDTH = 760
PANEL_HEIGHT = 200
LEFT, TOP, BOTTOM, MARGIN = 48, 28, 28, 24


@dataclass(frozen=True, slots=True)
class Mark:
    """A bar or a dot with what is written beside it and shown on pointing at it."""

    x: str
    y: str
    width: str = "0"
    height: str = "0"
    middle: str = "0"
    label: str = ""
    title: str = ""
    label_x: str = "0"
    label_y: str = "0"


@dataclass(frozen=True, slots=True)
class Panel:
    """Marks over one scale."""

    width: str
    height: str
    marks: tuple[Mark, ...]
    grid: tuple[Mark, ...]
    baseline: str = "0"


def precipitation_panel(months: Sequence[MonthOfWeather]) -> Panel:
    """Return a bar for each month's precipitation."""
    return _bars(
        months,
        step=50,
        span=lambda month: (Decimal(0), month.precipitation),
        title=lambda month: f"{month.precipitation} mm on {month.wet_days} days",
    )


def temperature_panel(months: Sequence[MonthOfWeather]) -> Panel:
    """Return a bar for each month from the mean lowest to the mean highest temperature."""
    return _bars(
        months,
        step=10,
        span=lambda month: (month.mean_lowest, month.mean_highest),
        title=lambda month: f"{month.mean_lowest} to {month.mean_highest} °C",
    )


def _bars(
    months: Sequence[MonthOfWeather],
    *,
    step: int,
    span: Callable[[MonthOfWeather], tuple[Decimal, Decimal]],
    title: Callable[[MonthOfWeather], str],
) -> Panel:
    spans = [span(month) for month in months]
    least = min(0, *(floor(low / step) * step for low, _ in spans))
    greatest = max(step, *(ceil(high / step) * step for _, high in spans))
    room = PANEL_HEIGHT - TOP - BOTTOM

    def height_of(value: Decimal | int) -> float:
        return TOP + room * float(greatest - value) / (greatest - least)

    slot = (WIDTH - LEFT) / len(months)
    marks = []
    for index, (month, (low, high)) in enumerate(zip(months, spans, strict=True)):
        x = LEFT + slot * (index + 0.2)
        marks.append(
            Mark(
                x=f"{x:.1f}",
                y=f"{height_of(high):.1f}",
                width=f"{slot * 0.6:.1f}",
                height=f"{height_of(low) - height_of(high):.1f}",
                middle=f"{x + slot * 0.3:.1f}",
                label=f"{month.month:%b}",
                title=f"{month.month:%B}: {title(month)}",
            )
        )
    grid = tuple(
        Mark(x=str(LEFT), y=f"{height_of(value):.1f}", label=str(value))
        for value in range(least, greatest + 1, step)
    )
    return Panel(str(WIDTH), str(PANEL_HEIGHT), tuple(marks), grid, str(PANEL_HEIGHT - 8))


def map_panel(airports: Sequence[Airport], territory: Territory) -> Panel:
    """Return a dot for each airport in the territory's rectangle, north above.

    A degree is as long in both directions, which is nearly true so close to the equator.
    """
    height = 360
    across, along = territory.east - territory.west, territory.north - territory.south
    scale = min(Decimal(WIDTH - 2 * MARGIN) / across, Decimal(height - 2 * MARGIN) / along)
    left, top = (WIDTH - across * scale) / 2, (height - along * scale) / 2
    places = [
        (
            float(left + (airport.longitude - territory.west) * scale),
            float(top + (territory.north - airport.latitude) * scale),
        )
        for airport in airports
    ]
    frame = Mark(
        x=f"{left:.1f}",
        y=f"{top:.1f}",
        width=f"{across * scale:.1f}",
        height=f"{along * scale:.1f}",
    )
    dots = tuple(
        Mark(
            x=f"{x:.1f}",
            y=f"{y:.1f}",
            label=airport.code if label else "",
            label_x=f"{label[0] if label else x:.1f}",
            label_y=f"{label[1] + 4 if label else y:.1f}",
            title=f"{airport.code} {airport.name}",
        )
        for airport, (x, y), label in zip(airports, places, _label_places(places), strict=True)
    )
    return Panel(str(WIDTH), str(height), dots, (frame,))


def _label_places(dots: Sequence[tuple[float, float]]) -> list[tuple[float, float] | None]:
    """Return where each dot's label has room beside it; None where it has none."""
    width, height = 32, 13
    taken = list(dots)
    found: list[tuple[float, float] | None] = []
    for x, y in dots:
        others = [place for place in taken if place != (x, y)]
        place = None
        for middle in ((x, y - 11), (x, y + 12), (x + 22, y), (x - 22, y)):
            if all(abs(middle[0] - a) >= width or abs(middle[1] - b) >= height for a, b in others):
                place = middle
                taken.append(middle)
                break
        found.append(place)
    return found
