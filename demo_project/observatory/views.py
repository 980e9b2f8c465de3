"""The published reports over HTTP."""

from __future__ import annotations

from django.http import FileResponse, Http404, HttpRequest

from .reports import reports_folder


def report(request: HttpRequest, name: str) -> FileResponse:
    """Serve one report; the URL's pattern lets through plain file names only."""
    try:
        file = (reports_folder() / name).open("rb")
    except OSError:
        raise Http404(f"There is no report {name}.") from None
    response = FileResponse(file, content_type="text/html; charset=utf-8")
    # A report is a page to look at: no scripts, nothing from elsewhere.
    response["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
    return response
