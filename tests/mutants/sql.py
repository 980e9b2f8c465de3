"""Changes to a text of SQL: each yields what is changed and the new text."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LOOKS_LIKE_SQL = re.compile(r"\b(SELECT|UPDATE|INSERT|WHERE|AND|ORDER BY|SET|NULL|LIMIT)\b|= %s")
_CONDITION = re.compile(r"\b(WHERE|AND|OR|ON|WHEN)\s+")
_ENDS = re.compile(
    r"\s+(AND|OR|ORDER BY|GROUP BY|HAVING|LIMIT|RETURNING|THEN|FOR UPDATE|UNION|LEFT JOIN)\b"
)
_ENDS_OF_SET = re.compile(r"\s+(WHERE|FROM|RETURNING)\b")
_ASSIGNMENT = re.compile(r"\s*([a-z_]+) = ")
_SWAPS = [
    (r" <= ", " < "),
    (r" >= ", " > "),
    (r" < ", " <= "),
    (r" > ", " >= "),
    (r" <> ", " = "),
    (r"\bIS NOT NULL\b", "IS NULL"),
    (r"\bIS NULL\b", "IS NOT NULL"),
    (r"\bNOT EXISTS\b", "EXISTS"),
    (r"\bNOT cancel_requested\b", "cancel_requested"),
    (r"'RUNNING'", "'FAILED'"),
    (r"'SUCCEEDED'", "'FAILED'"),
    (r"\bMAX\(", "MIN("),
    (r"\bMIN\(", "MAX("),
    (r" \+ 1\b", " + 2"),
    (r"\bCOALESCE\((f\.)?started_at, ", "COALESCE(NULL, "),
    (r" FOR UPDATE SKIP LOCKED", ""),
    (r" SKIP LOCKED", ""),
    (r" FOR KEY SHARE| LOCK IN SHARE MODE", ""),
]


def changes(text: str) -> Iterator[tuple[str, str]]:
    """Yield each change to a text, which may be a part of a statement, and the changed text."""
    if not _LOOKS_LIKE_SQL.search(text):
        return
    yield from _without_conditions(text)
    yield from _without_assignments(text)
    yield from _without_orders(text)
    for pattern, other in _SWAPS:
        for found in re.finditer(pattern, text):
            changed = text[: found.start()] + other + text[found.end() :]
            yield (
                f"{_around(text, found.start(), found.end())}: now {other.strip() or '-'}",
                changed,
            )


def _around(text: str, start: int, end: int) -> str:
    return " ".join(text[max(0, start - 20) : end + 12].split())


def _end(text: str, start: int, ends: re.Pattern[str], comma: bool = False) -> int:
    """Return where the part that starts there ends: a word of `ends`, or its parenthesis."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if depth < 0:
                return at
        elif depth == 0 and (ends.match(text, at) or (comma and text[at] == ",")):
            return at
    return len(text)


def _without_conditions(text: str) -> Iterator[tuple[str, str]]:
    # The parameters of a condition stay, so that the statement still fits its list of them.
    starts = [(found.end(), found[1]) for found in _CONDITION.finditer(text)]
    if " AND " in text and not re.match(r"\s*(SELECT|UPDATE|INSERT|WITH|AND)\b|\(?SELECT", text):
        starts.insert(0, (0, "WHERE"))
    for start, word in starts:
        end = _end(text, start, _ENDS)
        condition = text[start:end].strip()
        if not condition or condition.startswith(("CASE", "TRUE")):
            continue
        ignored = "AND 1 = 0" if word == "OR" else "OR 1 = 1"
        changed = f"{text[:start]}({condition} {ignored}){text[end:]}"
        yield f"without the condition {' '.join(condition.split())}", changed


def _without_assignments(text: str) -> Iterator[tuple[str, str]]:
    found = re.search(r"\bSET\s+", text)
    at = 0
    if found:
        at = found.end()
    elif not _ASSIGNMENT.match(text.lstrip(", ")) or " AND " in text:
        return
    while at < len(text):
        end = _end(text, at, _ENDS_OF_SET, comma=True)
        part = text[at:end]
        if (name := _ASSIGNMENT.match(part)) and part[name.end() :].strip():
            column, value = name[1], part[name.end() :]
            kept = f" {column} = CASE WHEN 1 = 1 THEN {column} ELSE {value} END"
            yield f"without setting {column}", text[:at] + kept + text[end:]
        if end >= len(text) or text[end] != ",":
            return
        at = end + 1


def _without_orders(text: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"\s?ORDER BY ", text):
        end = _end(text, found.end(), re.compile(r"\s+LIMIT\b"))
        if "⟦" not in text[found.end() : end]:
            changed = text[: found.start()] + text[end:]
            yield f"without {' '.join(text[found.start() : end].split())}", changed
