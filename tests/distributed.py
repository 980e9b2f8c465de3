"""Compares what is distributed with the checkout; by `make package`.

The wheel has the package and nothing else, the source distribution all that is under version
control: who repackages it can run the tests and build the documentation.
"""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_DISTRIBUTED = {".gitignore", "MANIFEST.in"}
MADE = {"PKG-INFO", "setup.cfg", "MANIFEST.in"}


def compare(what: str, found: set[str], wanted: set[str]) -> None:
    """Refuse a distribution that lacks something or has something else."""
    assert wanted, what
    assert found == wanted, f"{what}: lacks {wanted - found}, has also {found - wanted}"


listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, check=True, capture_output=True, text=True,
).stdout.splitlines()  # fmt: skip
files = {name for name in listed if (ROOT / name).exists()} - NOT_DISTRIBUTED
(wheel,) = (ROOT / "dist").glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    compare(
        wheel.name,
        {name for name in archive.namelist() if ".dist-info/" not in name},
        {name for name in files if name.startswith("ebbs_and_flows/")},
    )
(source,) = (ROOT / "dist").glob("*.tar.gz")
with tarfile.open(source) as archive:
    names = {member.name.partition("/")[2] for member in archive if member.isfile()}
compare(source.name, {n for n in names - MADE if ".egg-info/" not in n}, files)
print(f"{wheel.name} and {source.name} hold what they should.")
