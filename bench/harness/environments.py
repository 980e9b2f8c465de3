"""Makes a virtual environment for each peer, so that they cannot disturb each other."""

from __future__ import annotations

import subprocess
import sys

from .sampling import ENVIRONMENTS, ROOT


def make(name: str) -> bool:
    """Make or complete the environment of a peer; return whether it is complete."""
    requirements = ROOT / "bench" / "peers" / f"{name}.txt"
    folder = ENVIRONMENTS / name
    stamp = folder / "requirements.txt"
    if stamp.exists() and stamp.read_text() == requirements.read_text():
        return True
    print(f"  an environment for {name} …", flush=True)
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    installed = subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", str(requirements)],
        check=False,
        stderr=subprocess.DEVNULL,
    )
    if installed.returncode:
        print(f"  {name} cannot be installed; it will be named as not run", flush=True)
        return False
    stamp.write_text(requirements.read_text())
    return True


def make_all() -> None:
    """Make the environment of every peer."""
    for requirements in sorted((ROOT / "bench" / "peers").glob("*.txt")):
        make(requirements.stem)


if __name__ == "__main__":
    make_all()
