"""What this machine can run, and how to get the rest."""

import os
import platform
import shutil
from importlib import metadata, util
from typing import Any

from quantkit.conflicts import REMEDY, RIVAL, rival_version
from quantkit.home import quantkit_home

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub", "pyarrow")
LITTLE_DISK_BYTES = 20 * 1000**3


def diagnose() -> dict[str, Any]:
    """Versions, device, memory, disk, what every format needs, and problems with their remedies.

    Returns:
        {"quantkit", "python", "system", "packages", "device", "cuda", "formats": {name: {"builds_on", "readers"}},
        "home", "disk_free_bytes", "problems", "notes"}; problems stop a build, notes do not; `formats` is empty where
        a package is missing. A reader is {"engine", "installed", "why_not"}: its version, None if it is not installed,
        and why it cannot run here, with what mends it, None if it can.
    """
    packages = {name: _version(name) for name in PACKAGES}
    problems = [
        f"{name} is not installed; fix: pip install quantkit -c constraints.txt"
        for name, version in packages.items()
        if version is None
    ]
    if rival := rival_version():
        problems.append(f"{RIVAL} {rival} installs the same command and package; fix: {REMEDY}")
    whole = None not in packages.values()
    home = quantkit_home()
    free = shutil.disk_usage(next(path for path in (home, *home.parents) if path.exists())).free
    notes = []
    cuda = _cuda() if packages["torch"] else None
    if cuda is None:
        notes.append("no CUDA device: builds run on the CPU; a 7B model takes hours there")
    if free < LITTLE_DISK_BYTES:
        notes.append(f"{free / 1e9:.1f} GB of disk are free under {home}; a 7B model needs about 20")
    if util.find_spec("lm_eval") is None:
        notes.append(
            "lm-evaluation-harness is not installed: `pip install 'quantkit[harness]'` to compare perplexities"
        )
    return {
        "quantkit": metadata.version("quantkit"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": packages,
        "device": "cuda" if cuda else "cpu",
        "cuda": cuda,
        "formats": _formats(["cpu", "cuda"] if cuda else ["cpu"]) if whole else {},
        "home": str(home),
        "disk_free_bytes": free,
        "problems": problems,
        "notes": notes,
    }


def diagnosis_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [
        f"quantkit          {found['quantkit']}, Python {found['python']}, {found['system']}",
        *(f"{name:<18}{version or 'not installed'}" for name, version in found["packages"].items()),
        f"device            {found['cuda'] or 'cpu'}",
        *(_format_line(name, facts) for name, facts in found["formats"].items()),
        f"home              {found['home']}, {found['disk_free_bytes'] / 1e9:.1f} GB free",
    ]
    lines += [f"problem: {problem}" for problem in found["problems"]]
    lines += [f"note: {note}" for note in found["notes"]]
    return lines


def _format_line(name: str, facts: dict[str, Any]) -> str:
    readers = [
        f"{reader['engine']} {reader['installed']}" if reader["why_not"] is None else str(reader["why_not"])
        for reader in facts["readers"]
    ]
    return f"{name:<16}  builds on {' and '.join(facts['builds_on'])}; its own readers: {'; '.join(readers)}"


def _formats(devices: list[str]) -> dict[str, dict[str, Any]]:
    """What this machine can do with each format: all of them are built without an engine."""
    # it needs packages that may not be there
    from quantkit.engines.env import engine_rows

    rows = engine_rows()
    return {
        name: {
            "builds_on": devices,
            "readers": [
                {"engine": row["name"], "installed": row["installed"], "why_not": row["why_not"]}
                for row in rows
                if name in row["reads"]
            ],
        }
        for name in sorted({read for row in rows for read in row["reads"]})
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
