"""The observatory's own tables; what the flows need is in the tables of `ebbs_and_flows`."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class DailyWeather(models.Model):
    """One day of weather in Seattle, as imported."""

    date = models.DateField(unique=True)
    precipitation = models.DecimalField("precipitation (mm)", max_digits=5, decimal_places=1)
    highest = models.DecimalField("highest (°C)", max_digits=4, decimal_places=1)
    lowest = models.DecimalField("lowest (°C)", max_digits=4, decimal_places=1)
    wind = models.DecimalField("wind (m/s)", max_digits=4, decimal_places=1)
    kind = models.CharField(max_length=20)

    class Meta:
        verbose_name_plural = "daily weather"
        ordering: ClassVar = ["date"]

    def __str__(self) -> str:
        return f"{self.date:%Y-%m-%d}: {self.kind}"


class WeatherReport(models.Model):
    """A year's report that is published."""

    year = models.PositiveSmallIntegerField(unique=True)
    file_name = models.CharField(max_length=100)
    wettest_month = models.DateField()
    precipitation = models.DecimalField("precipitation (mm)", max_digits=6, decimal_places=1)
    published_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering: ClassVar = ["-year"]

    def __str__(self) -> str:
        return f"Seattle's weather in {self.year}"


class Bulletin(models.Model):
    """A month's summary that the office has received."""

    month = models.DateField(unique=True)
    text = models.TextField()
    receipt = models.CharField(max_length=40)

    class Meta:
        ordering: ClassVar = ["-month"]

    def __str__(self) -> str:
        return f"Bulletin for {self.month:%B %Y}"


class Letter(models.Model):
    """The office's own book: one line for each idempotency key that it was called with."""

    idempotency_key = models.CharField(max_length=250, unique=True)
    calls = models.PositiveIntegerField(default=0)
    text = models.TextField(blank=True, default="")
    receipt = models.CharField(max_length=40, blank=True, default="")

    def __str__(self) -> str:
        return self.receipt or f"refused {self.calls} times"


class Airport(models.Model):
    """An airport; its position is the file's, with the corrections once it has been checked."""

    code = models.CharField(max_length=4, unique=True)
    name = models.CharField(max_length=100)
    city = models.CharField(max_length=100)
    territory = models.CharField(max_length=2, db_index=True)
    latitude = models.DecimalField(max_digits=11, decimal_places=8)
    longitude = models.DecimalField(max_digits=11, decimal_places=8)
    kilometres_to_honolulu = models.DecimalField(
        "to Honolulu (km)", max_digits=7, decimal_places=1, null=True, blank=True
    )

    class Meta:
        ordering: ClassVar = ["territory", "code"]

    def __str__(self) -> str:
        return f"{self.code} {self.name}"


class Correction(models.Model):
    """What a person knows better than the source file: one field of one airport."""

    class Field(models.TextChoices):
        """The fields that can be corrected."""

        LATITUDE = "latitude", "latitude"
        LONGITUDE = "longitude", "longitude"

    airport_code = models.CharField(max_length=4)
    field = models.CharField(max_length=9, choices=Field.choices)
    value = models.DecimalField(
        max_digits=11, decimal_places=8, help_text="Degrees; north and east are above zero."
    )
    reason = models.CharField(max_length=200, blank=True, default="")

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["airport_code", "field"], name="%(app_label)s_correction_once"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.airport_code} {self.field} {self.value.normalize():f}"
