"""The suite over the supported Pythons and Djangos: `nox`, or one: `nox -s "suite-3.12(6.0)"`.

The interpreters are those on the PATH; one that is missing is skipped. The database is the one
that `EBBS_TEST_DATABASE` names, by default SQLite.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("django", ["5.2", "6.0", "6.1"], ids=["5.2", "6.0", "6.1"])
def suite(session: nox.Session, django: str) -> None:
    """Run the tests; Django 6 wants Python 3.12 or later."""
    if session.python == "3.11" and django != "5.2":
        session.skip("Django 6 wants Python 3.12 or later.")
    session.install("--editable", ".[test]", f"Django~={django}.0")
    session.run("pytest", "-q", "-n", "2", *session.posargs)


@nox.session(python=["3.11"])
def lowest(session: nox.Session) -> None:
    """Run the quick tests with the lowest versions that pyproject.toml admits."""
    constraints = Path(session.create_tmp()) / "lowest.txt"
    listed = session.run("python", "tests/lowest.py", silent=True)
    constraints.write_text(str(listed))
    session.install("--constraint", str(constraints), "--editable", ".[test]")
    quick = ("-m", "not processes", "--ignore=tests/browser", "--ignore=tests/test_bench.py")
    session.run("pytest", "-q", "-n", "2", *quick, *session.posargs)
