"""The files of the `vega-datasets` package; see DATA.md for where each comes from."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


class SourceMissing(FileNotFoundError):
    """A file of the source package is not there."""


def source_file(name: str) -> Path:
    """Return the path of a file that the package ships; raises `SourceMissing`.

    The package is located but not imported, because importing it needs pandas.
    """
    spec = find_spec("vega_datasets")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "_data" / name
        if path.is_file():
            return path
    raise SourceMissing(
        f"{name} is not installed: it is part of the package vega-datasets, which"
        f" 'pip install vega-datasets' installs."
    )


def read_records(name: str) -> Iterator[dict[str, str]]:
    """Yield the records of a CSV file of the package."""
    with source_file(name).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
