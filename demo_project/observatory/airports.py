"""Airports of the islands: reads `airports.csv`, checks positions, measures distances."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from math import asin, cos, radians, sin, sqrt

from .models import Airport, Correction
from .sources import read_records

SOURCE = "airports.csv"
EARTH_RADIUS_KM = 6371.0
HONOLULU = (Decimal("21.31869"), Decimal("-157.92241"))


@dataclass(frozen=True, slots=True)
class Territory:
    """A group of islands and the rectangle, in degrees, that its airports lie in."""

    code: str
    name: str
    south: Decimal
    north: Decimal
    west: Decimal
    east: Decimal

    def bounds(self, field: str) -> tuple[Decimal, Decimal]:
        """Return the least and the greatest value of a latitude or longitude."""
        if field == Correction.Field.LATITUDE:
            return self.south, self.north
        return self.west, self.east


def _territory(code: str, name: str, south: str, north: str, west: str, east: str) -> Territory:
    return Territory(code, name, Decimal(south), Decimal(north), Decimal(west), Decimal(east))


TERRITORIES = {
    territory.code: territory
    for territory in (
        _territory("HI", "Hawaii", "18.8", "22.4", "-160.6", "-154.7"),
        _territory("PR", "Puerto Rico", "17.8", "18.6", "-68.0", "-65.2"),
        _territory("VI", "the Virgin Islands", "17.6", "18.5", "-65.2", "-64.5"),
        _territory("GU", "Guam", "13.2", "13.7", "144.6", "145.0"),
        _territory("CQ", "the Northern Mariana Islands", "14.0", "20.6", "144.8", "146.1"),
        _territory("AS", "American Samoa", "-14.6", "-11.0", "-171.2", "-168.1"),
    )
}


def read_airports(territory: Territory) -> list[Airport]:
    """Return the airports of a territory from the file, unsaved and unchecked."""
    return [
        Airport(
            code=record["iata"],
            name=record["name"],
            city=record["city"],
            territory=territory.code,
            latitude=Decimal(record["latitude"]),
            longitude=Decimal(record["longitude"]),
        )
        for record in read_records(SOURCE)
        if record["state"] == territory.code
    ]


def correct(airports: list[Airport]) -> tuple[str, ...]:
    """Apply the corrections that people have entered; return one line for each.

    The airports are changed in memory only.
    """
    by_code = {airport.code: airport for airport in airports}
    applied = []
    for correction in Correction.objects.filter(airport_code__in=by_code).order_by("pk"):
        airport = by_code[correction.airport_code]
        before = _shown(getattr(airport, correction.field))
        after = _shown(correction.value)
        setattr(airport, correction.field, correction.value)
        applied.append(f"{airport.code} {correction.field}: {before} became {after}")
    return tuple(applied)


def find_problems(territory: Territory, airports: list[Airport]) -> list[str]:
    """Return, for each coordinate outside of the territory, its record, field and value."""
    problems = []
    for airport in airports:
        for field in Correction.Field.values:
            value, (least, greatest) = getattr(airport, field), territory.bounds(field)
            if not least <= value <= greatest:
                problems.append(
                    f"{SOURCE}, record {airport.code} ({airport.name}), field {field}:"
                    f" {_shown(value)} is not between {least} and {greatest}, where"
                    f" {territory.name} lies"
                )
    return problems


def kilometres_to_honolulu(airport: Airport) -> Decimal:
    """Return the distance over the globe by the haversine formula."""
    latitude, longitude = radians(airport.latitude), radians(airport.longitude)
    there_latitude, there_longitude = map(radians, HONOLULU)
    half_chord = (
        sin((there_latitude - latitude) / 2) ** 2
        + cos(latitude) * cos(there_latitude) * sin((there_longitude - longitude) / 2) ** 2
    )
    return Decimal(2 * EARTH_RADIUS_KM * asin(sqrt(half_chord))).quantize(Decimal("0.1"))


def _shown(degrees: Decimal) -> str:
    return f"{degrees.normalize():f}"
