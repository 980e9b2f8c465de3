"""The observatory's tables in the admin; corrections are entered here."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest
from django.utils.html import format_html

from .models import Airport, Bulletin, Correction, DailyWeather, Letter, WeatherReport
from .reports import URL


class ReadOnlyAdmin(admin.ModelAdmin):
    """Tables that the flows fill: to look at."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Return False: flows add these."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: object = None) -> bool:
        """Return False: flows change these."""
        return False


@admin.register(DailyWeather)
class DailyWeatherAdmin(ReadOnlyAdmin):
    """The imported days."""

    list_display = ("date", "kind", "precipitation", "lowest", "highest", "wind")
    list_filter = ("kind",)
    date_hierarchy = "date"


@admin.register(WeatherReport)
class WeatherReportAdmin(ReadOnlyAdmin):
    """The published reports, with a link to each."""

    list_display = ("__str__", "open_report", "precipitation", "published_at")

    @admin.display(description="report")
    def open_report(self, report: WeatherReport) -> str:
        """Return a link to the published page."""
        return format_html('<a href="{}{}">{}</a>', URL, report.file_name, report.file_name)


@admin.register(Bulletin)
class BulletinAdmin(ReadOnlyAdmin):
    """The bulletins that the office has received."""

    list_display = ("__str__", "text", "receipt")


@admin.register(Letter)
class LetterAdmin(ReadOnlyAdmin):
    """The office's book."""

    list_display = ("idempotency_key", "calls", "receipt")


@admin.register(Airport)
class AirportAdmin(ReadOnlyAdmin):
    """The airports."""

    list_display = (
        "code",
        "name",
        "city",
        "territory",
        "latitude",
        "longitude",
        "kilometres_to_honolulu",
    )
    list_filter = ("territory",)
    search_fields = ("code", "name", "city")


@admin.register(Correction)
class CorrectionAdmin(admin.ModelAdmin):
    """What people know better than the file."""

    list_display = ("airport_code", "field", "value", "reason")
