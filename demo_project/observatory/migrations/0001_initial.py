from __future__ import annotations

from typing import ClassVar

from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies: ClassVar = []

    operations: ClassVar = [
        migrations.CreateModel(
            name="Airport",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("code", models.CharField(max_length=4, unique=True)),
                ("name", models.CharField(max_length=100)),
                ("city", models.CharField(max_length=100)),
                ("territory", models.CharField(db_index=True, max_length=2)),
                ("latitude", models.DecimalField(decimal_places=8, max_digits=11)),
                ("longitude", models.DecimalField(decimal_places=8, max_digits=11)),
                (
                    "kilometres_to_honolulu",
                    models.DecimalField(
                        blank=True,
                        decimal_places=1,
                        max_digits=7,
                        null=True,
                        verbose_name="to Honolulu (km)",
                    ),
                ),
            ],
            options={
                "ordering": ["territory", "code"],
            },
        ),
        migrations.CreateModel(
            name="Bulletin",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("month", models.DateField(unique=True)),
                ("text", models.TextField()),
                ("receipt", models.CharField(max_length=40)),
            ],
            options={
                "ordering": ["-month"],
            },
        ),
        migrations.CreateModel(
            name="DailyWeather",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("date", models.DateField(unique=True)),
                (
                    "precipitation",
                    models.DecimalField(
                        decimal_places=1, max_digits=5, verbose_name="precipitation (mm)"
                    ),
                ),
                (
                    "highest",
                    models.DecimalField(
                        decimal_places=1, max_digits=4, verbose_name="highest (°C)"
                    ),
                ),
                (
                    "lowest",
                    models.DecimalField(
                        decimal_places=1, max_digits=4, verbose_name="lowest (°C)"
                    ),
                ),
                (
                    "wind",
                    models.DecimalField(decimal_places=1, max_digits=4, verbose_name="wind (m/s)"),
                ),
                ("kind", models.CharField(max_length=20)),
            ],
            options={
                "verbose_name_plural": "daily weather",
                "ordering": ["date"],
            },
        ),
        migrations.CreateModel(
            name="Letter",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("idempotency_key", models.CharField(max_length=250, unique=True)),
                ("calls", models.PositiveIntegerField(default=0)),
                ("text", models.TextField(blank=True, default="")),
                ("receipt", models.CharField(blank=True, default="", max_length=40)),
            ],
        ),
        migrations.CreateModel(
            name="WeatherReport",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("year", models.PositiveSmallIntegerField(unique=True)),
                ("file_name", models.CharField(max_length=100)),
                ("wettest_month", models.DateField()),
                (
                    "precipitation",
                    models.DecimalField(
                        decimal_places=1, max_digits=6, verbose_name="precipitation (mm)"
                    ),
                ),
                ("published_at", models.DateTimeField(auto_now=True)),
            ],
            options={
                "ordering": ["-year"],
            },
        ),
        migrations.CreateModel(
            name="Correction",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("airport_code", models.CharField(max_length=4)),
                (
                    "field",
                    models.CharField(
                        choices=[("latitude", "latitude"), ("longitude", "longitude")],
                        max_length=9,
                    ),
                ),
                (
                    "value",
                    models.DecimalField(
                        decimal_places=8,
                        help_text="Degrees; north and east are above zero.",
                        max_digits=11,
                    ),
                ),
                ("reason", models.CharField(blank=True, default="", max_length=200)),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(
                        fields=("airport_code", "field"), name="observatory_correction_once"
                    )
                ],
            },
        ),
    ]
