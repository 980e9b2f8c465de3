"""A small shop, for the tasks of the tests to work on."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    number = models.CharField(max_length=40)
    paid = models.BooleanField(default=False)

    def __str__(self) -> str:
        return self.number
