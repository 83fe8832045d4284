"""Where a result was made: versions and hardware, nothing that names a person or a host."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("stagepatch", "torch", "diffusers", "accelerate", "numpy")


def environment() -> dict[str, str]:
    """Versions, processor, device, threads, and the commit where the package lies in a checkout."""
    facts = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    facts["cores"] = str(os.cpu_count())
    facts["threads"] = str(torch.get_num_threads())
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    commit = _commit()
    return facts | ({"commit": commit} if commit else {})


def _commit() -> str:
    """The checkout's commit, marked where files differ from it; empty outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
