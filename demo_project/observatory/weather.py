"""Seattle's weather: reads days from `seattle-weather.csv` and summarises months."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from itertools import groupby

from ebbs_and_flows import context_type

from .models import DailyWeather
from .sources import read_records

SOURCE = "seattle-weather.csv"
TENTH = Decimal("0.1")


# The name is stored with each value; with a name of its own the class may move to another module.
@context_type(name="month-of-weather")
@dataclass(frozen=True, slots=True)
class MonthOfWeather:
    """One month in figures: millimetres and degrees Celsius."""

    month: date
    precipitation: Decimal
    mean_highest: Decimal
    mean_lowest: Decimal
    wet_days: int


def first_of_month(day: object) -> date | None:
    """Return the first day of the month that a date, or its ISO text, lies in; None for others."""
    if isinstance(day, str):
        try:
            day = date.fromisoformat(day)
        except ValueError:
            return None
    return day.replace(day=1) if type(day) is date else None


def read_days(year: int) -> list[DailyWeather]:
    """Return the days of a year from the file, unsaved."""
    return [
        DailyWeather(
            date=date.fromisoformat(record["date"].replace("/", "-")),
            precipitation=Decimal(record["precipitation"]),
            highest=Decimal(record["temp_max"]),
            lowest=Decimal(record["temp_min"]),
            wind=Decimal(record["wind"]),
            kind=record["weather"],
        )
        for record in read_records(SOURCE)
        if record["date"].startswith(f"{year:04d}/")
    ]


def find_problems(year: int, days: Iterable[DailyWeather]) -> list[str]:
    """Return a sentence for each day of the year that is missing or cannot be right."""
    found = {day.date: day for day in days}
    problems = []
    current = date(year, 1, 1)
    while current.year == year:
        day = found.get(current)
        if day is None:
            problems.append(f"{current} is missing.")
        elif day.lowest > day.highest:
            problems.append(f"{current}: the lowest, {day.lowest} °C, is over {day.highest} °C.")
        elif day.precipitation < 0:
            problems.append(f"{current}: the precipitation is {day.precipitation} mm.")
        current += timedelta(days=1)
    return problems


def summarize(days: Iterable[DailyWeather]) -> tuple[MonthOfWeather, ...]:
    """Return the months of some days, in order."""
    in_order = sorted(days, key=lambda day: day.date)
    months = groupby(in_order, key=lambda day: day.date.replace(day=1))
    return tuple(_summary(month, list(group)) for month, group in months)


def _summary(month: date, days: list[DailyWeather]) -> MonthOfWeather:
    return MonthOfWeather(
        month=month,
        precipitation=sum((day.precipitation for day in days), Decimal(0)),
        mean_highest=(sum(day.highest for day in days) / len(days)).quantize(TENTH),
        mean_lowest=(sum(day.lowest for day in days) / len(days)).quantize(TENTH),
        wet_days=sum(day.precipitation > 0 for day in days),
    )
