"""A network namespace with a link to this one, and what can happen to the link."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SPACE = f"ebbs{os.getpid()}"
_NET = f"10.{200 + os.getpid() // 256 % 50}.{os.getpid() % 256}"
HERE, THERE = f"{_NET}.1", f"{_NET}.2"
"""The addresses of the two ends of the link; another run has others."""
_CLONE_NEWNET = 0x40000000


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_be_made() -> bool:
    """Return whether this process may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        _ip("netns", "add", f"{SPACE}t")
        _ip("netns", "del", f"{SPACE}t")
    except subprocess.CalledProcessError:
        return False
    return True


@contextmanager
def link() -> Iterator[None]:
    """A namespace with a link to this one."""
    _ip("netns", "add", SPACE)
    try:
        _ip("link", "add", f"{SPACE}a", "type", "veth", "peer", "name", "eth0", "netns", SPACE)
        _ip("addr", "add", f"{HERE}/30", "dev", f"{SPACE}a")
        _ip("link", "set", f"{SPACE}a", "up")
        _ip("-n", SPACE, "addr", "add", f"{THERE}/30", "dev", "eth0")
        _ip("-n", SPACE, "link", "set", "eth0", "up")
        yield
    finally:
        _ip("netns", "del", SPACE)


def cut() -> None:
    """Drop what is sent in both directions."""
    drop_to_server()
    drop_to_worker()


def drop_to_server() -> None:
    """Drop what the worker sends."""
    _ip("-n", SPACE, "route", "add", "blackhole", f"{HERE}/32")


def drop_to_worker() -> None:
    """Drop what the server answers."""
    _ip("route", "add", "blackhole", f"{THERE}/32")


def repair() -> None:
    """Let everything through again."""
    with suppress(subprocess.CalledProcessError):
        _ip("-n", SPACE, "route", "del", "blackhole", f"{HERE}/32")
    with suppress(subprocess.CalledProcessError):
        _ip("route", "del", "blackhole", f"{THERE}/32")


def enter() -> None:
    """Move this process to the other end of the link."""
    with Path("/run/netns", SPACE).open() as space:
        if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "The namespace cannot be entered.")
