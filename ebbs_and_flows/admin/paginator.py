"""Counts as far as somebody pages, and not to a million."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.paginator import Paginator
from django.utils.functional import cached_property

if TYPE_CHECKING:
    _Paginator = Paginator[Any]
else:
    _Paginator = Paginator

MAX_COUNT = 10_000


class BoundedPaginator(_Paginator):
    """A paginator whose count, and so its last page, ends at `MAX_COUNT` rows."""

    @cached_property
    def count(self) -> int:
        """The number of rows, at most `MAX_COUNT`."""
        rows: Any = self.object_list
        return int(rows.order_by()[:MAX_COUNT].count())
