"""The observatory's flows; ebbs_and_flows finds this module by itself, as the admin its own.

Every task here may be cut off at any instant (a power cut, `kill -9`) and is then run again.
Three habits make that harmless, and each is shown once:

- work on the project's own database is `atomic`: it commits together with the record that the
  task succeeded, or not at all;
- a file is written beside its place and moved there in one step, so writing it again is the same;
- a service outside is called with `context.idempotency_key`, which stays the same for all
  attempts, so the service can tell a repeat from something new.

The data is real; DATA.md says where it comes from.
"""

from __future__ import annotations

from decimal import Decimal

from ebbs_and_flows import (
    ExecutionContext,
    FailFlow,
    FlowTemplate,
    Retry,
    Task,
    flow_runner,
    task,
)

from . import airports, office, weather
from .charts import map_panel, precipitation_panel, temperature_panel
from .models import Airport, Bulletin, DailyWeather, WeatherReport
from .reports import publish

# weather-report: from a file to a published page. Its parameter is the year.


class ImportYear(Task):
    """Load the year's days from the file, in place of those of an earlier import."""

    atomic = True

    def run(self, context: ExecutionContext) -> ExecutionContext:
        """Take `year`; add `days_imported`."""
        year = context["year"]
        days = weather.read_days(year) if isinstance(year, int) else []
        if not days:
            # No retry and no repair of the data will help, and the message says what does.
            raise FailFlow(
                f"{weather.SOURCE} has no day of {year!r}: schedule a year from 2012 to 2015."
            )
        DailyWeather.objects.filter(date__year=year).delete()
        DailyWeather.objects.bulk_create(days)
        return context.with_entries(days_imported=len(days))


@task
def check_year(context: ExecutionContext) -> ExecutionContext:
    """See that no day is missing and that the figures can be right."""
    year = context["year"]
    problems = weather.find_problems(year, DailyWeather.objects.filter(date__year=year))
    if problems:
        raise FailFlow(f"{weather.SOURCE}, {year}: {' '.join(problems)}")
    return context


@task
def summarize_months(context: ExecutionContext) -> ExecutionContext:
    """Add up the year by months.

    The months travel on as dataclasses of Decimals and dates, and arrive as such.
    """
    months = weather.summarize(DailyWeather.objects.filter(date__year=context["year"]))
    wettest = max(months, key=lambda month: month.precipitation)
    return context.with_entries(
        months=months,
        precipitation=sum((month.precipitation for month in months), Decimal(0)),
        wettest_month=wettest.month,
    )


@task
def publish_report(context: ExecutionContext) -> ExecutionContext:
    """Write the report with its charts as a page that any browser opens."""
    months = context["months"]
    file_name = f"seattle-weather-{context['year']}.html"
    url = publish(
        file_name,
        "observatory/weather_report.html",
        {
            "year": str(context["year"]),
            "months": months,
            "precipitation": context["precipitation"],
            "wettest_month": context["wettest_month"],
            "precipitation_panel": precipitation_panel(months),
            "temperature_panel": temperature_panel(months),
        },
    )
    return context.with_entries(report=file_name, report_url=url)


@task(atomic=True)
def list_report(context: ExecutionContext) -> ExecutionContext:
    """Enter the report in the list that the admin shows."""
    WeatherReport.objects.update_or_create(
        year=context["year"],
        defaults={
            "file_name": context["report"],
            "wettest_month": context["wettest_month"],
            "precipitation": context["precipitation"],
        },
    )
    return context


flow_runner.register_flow_template(
    FlowTemplate(
        "weather-report",
        description="A year of Seattle's weather, from the file to a published report",
        tasks=[ImportYear(), check_year, summarize_months, publish_report, list_report],
    )
)


# weather-bulletin: a service that is out of reach at first. Its parameter is a day of the month.


@task
def compose_bulletin(context: ExecutionContext) -> ExecutionContext:
    """Put the month into a sentence.

    The admin and the project's code schedule a date, the command `scheduleflow` a text.
    """
    first = weather.first_of_month(context["month"])
    if first is None:
        raise FailFlow(f"The month is {context['month']!r}: schedule a date such as 2015-12-01.")
    days = [day for day in weather.read_days(first.year) if day.date.month == first.month]
    if not days:
        raise FailFlow(
            f"{weather.SOURCE} has no day of {first:%B %Y}: schedule a month from 2012 to 2015."
        )
    (month,) = weather.summarize(days)
    return context.with_entries(
        summary=month,
        text=(
            f"Seattle, {first:%B %Y}: {month.precipitation} mm on {month.wet_days} days,"
            f" {month.mean_lowest} to {month.mean_highest} °C on average."
        ),
    )


class PostBulletin(Task):
    """Hand the bulletin in at the weather office.

    The office stands in for a service outside: it refuses the first two calls with each
    idempotency key. So two attempts fail, the flow waits a little, and the third succeeds. It
    also answers a repeated call by the same receipt, so a worker that is killed after the call
    and before its record does no harm: the next attempt hands nothing in twice.
    """

    # Short waits, so that the demo is soon over. In earnest: minutes.
    retry = Retry(attempts=5, delay=0.2, backoff=2, max_delay=2, on=(ConnectionError,))
    timeout = 10

    def run(self, context: ExecutionContext) -> ExecutionContext:
        """Take `text`; add `receipt`."""
        receipt = office.post(context["text"], idempotency_key=context.idempotency_key)
        return context.with_entries(receipt=receipt)


@task(atomic=True)
def file_receipt(context: ExecutionContext) -> ExecutionContext:
    """Keep the bulletin with its receipt."""
    Bulletin.objects.update_or_create(
        month=context["summary"].month,
        defaults={"text": context["text"], "receipt": context["receipt"]},
    )
    return context


flow_runner.register_flow_template(
    FlowTemplate(
        "weather-bulletin",
        description="A month's summary for the weather office, which is often out of reach",
        tasks=[compose_bulletin, PostBulletin(), file_receipt],
    )
)


# airport-directory: a record that a person has to mend. Its parameter is a territory's code.


class ImportAirports(Task):
    """Load the territory's airports from the file, in place of those of an earlier import."""

    atomic = True

    def run(self, context: ExecutionContext) -> ExecutionContext:
        """Take `territory`; add `airports_imported`."""
        code = context["territory"]
        if code not in airports.TERRITORIES:
            known = ", ".join(airports.TERRITORIES)
            raise FailFlow(f"There is no territory {code!r}: schedule one of {known}.")
        found = airports.read_airports(airports.TERRITORIES[code])
        Airport.objects.filter(territory=code).delete()
        Airport.objects.bulk_create(found)
        return context.with_entries(airports_imported=len(found))


@task(atomic=True)
def check_positions(context: ExecutionContext) -> ExecutionContext:
    """Apply what people have corrected, then see that every airport lies in its territory.

    Guam's only airport does not: the file has lost the sign of its longitude. The flow stops
    here and says so. A person enters a correction and reschedules the flow, which continues
    with this task; the import before it does not run again.
    """
    territory = airports.TERRITORIES[context["territory"]]
    found = list(Airport.objects.filter(territory=territory.code))
    corrections = airports.correct(found)
    problems = airports.find_problems(territory, found)
    if problems:
        raise FailFlow(f"{'; '.join(problems)}. Enter a correction, then reschedule this flow.")
    Airport.objects.bulk_update(found, ["latitude", "longitude"])
    return context.with_entries(corrections=corrections)


@task(atomic=True)
def measure_distances(context: ExecutionContext) -> ExecutionContext:
    """Measure how far each airport is from Honolulu."""
    found = list(Airport.objects.filter(territory=context["territory"]))
    for airport in found:
        airport.kilometres_to_honolulu = airports.kilometres_to_honolulu(airport)
    Airport.objects.bulk_update(found, ["kilometres_to_honolulu"])
    return context.with_entries(
        farthest_kilometres=max(airport.kilometres_to_honolulu for airport in found)
    )


@task
def publish_directory(context: ExecutionContext) -> ExecutionContext:
    """Write the directory with its map as a page that any browser opens."""
    territory = airports.TERRITORIES[context["territory"]]
    found = list(Airport.objects.filter(territory=territory.code))
    file_name = f"airports-{territory.code}.html"
    url = publish(
        file_name,
        "observatory/airport_directory.html",
        {
            "territory": territory,
            "airports": found,
            "corrections": context["corrections"],
            "map": map_panel(found, territory),
        },
    )
    return context.with_entries(report=file_name, report_url=url)


flow_runner.register_flow_template(
    FlowTemplate(
        "airport-directory",
        description="The airports of a group of islands, checked, on a published map",
        tasks=[ImportAirports(), check_positions, measure_distances, publish_directory],
    )
)
