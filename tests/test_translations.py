"""The catalogues are whole, and the pages read in them."""

from __future__ import annotations

import gettext
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from django.test import Client
from django.utils import translation

from .operators import LIST, TEMPLATES, addresses, billing, failed, registered

PACKAGE = Path(__file__).parent.parent / "ebbs_and_flows"
LANGUAGES = ["de", "es", "fr"]
PLACEHOLDER = re.compile(r"%\(\w+\)[sd]|%[sd%]|\{\}|<[^>]+>")


def compiled(path: Path) -> dict[object, str]:
    with path.open("rb") as file:
        catalogue: dict[object, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    return {key: text for key, text in catalogue.items() if key}


@pytest.mark.skipif(not shutil.which("xgettext"), reason="the gettext tools are not installed")
def test_no_text_lacks_its_translation_and_what_is_compiled_is_up_to_date(tmp_path: Path) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "ebbs_and_flows")
    languages = [word for language in LANGUAGES for word in ("-l", language)]
    subprocess.run(
        [sys.executable, "-m", "django", "makemessages", *languages, "--no-location"],
        cwd=package,
        env={name: text for name, text in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"},
        check=True,
        capture_output=True,
    )
    for language in LANGUAGES:
        source = package / "locale" / language / "LC_MESSAGES/django.po"
        fresh = source.with_suffix(".fresh")
        said = subprocess.run(
            ["msgfmt", "--check-format", "--check-domain", "--statistics", "-o", fresh, source],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
        assert re.fullmatch(r"\d+ translated messages\.", said.strip()), (language, said)
        assert compiled(fresh) == compiled(source.with_suffix(".mo"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_put_into_a_text_is_in_its_translation(language: str) -> None:
    found = compiled(PACKAGE / "locale" / language / "LC_MESSAGES/django.mo")
    assert len(found) > 200
    for key, text in found.items():
        original = key[0] if isinstance(key, tuple) else key
        if isinstance(key, tuple) and key[1] == 0:
            # One may be said without its number.
            assert set(PLACEHOLDER.findall(text)) <= {
                *PLACEHOLDER.findall(str(original)),
                "%(count)d",
            }
        else:
            wanted = set(PLACEHOLDER.findall(str(original)))
            assert set(PLACEHOLDER.findall(text)) - {"%(count)d"} == wanted, text


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("de", ["Ablauf", "Fehlgeschlagen", "Neu einplanen", "Erneut ausführen ab", "Versuch"]),
        ("es", ["Ejecuciones de flujos", "Fallido", "Reprogramar", "Repetir desde", "intento"]),
        ("fr", ["Exécutions de flux", "En échec", "Replanifier", "Relancer", "tentative"]),
    ],
)
def test_the_admin_speaks_the_language(
    admin_client: Client, language: str, words: list[str]
) -> None:
    with registered(billing()), translation.override(language):
        flow = failed("x")
        pages = [LIST, TEMPLATES, *addresses(flow)]
        said = "".join(admin_client.get(page).content.decode() for page in pages)
    for word in words:
        assert word in said
    for word in ("Reschedule", "Rerun", "Attempt ", "What went wrong"):
        assert word not in said
