"""A process that dies at its n-th operation on files, or whose operations fail from then on."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("strike.c")
ENVIRONMENT = "LD_PRELOAD"


@cache
def library():
    """strike.c as a library to preload; None where it cannot be built."""
    if shutil.which("cc") is None or not Path("/proc/self/fd").exists():
        return None
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"stagepatch-strike-{os.getuid()}-{digest}.so"
    if not path.exists():
        built = path.with_suffix(f".{os.getpid()}")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(_SOURCE), "-ldl"]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        built.replace(path)
    return path


@dataclass(frozen=True)
class FileStrike:
    """What befalls a process in which the library is preloaded.

    Args:
        directory: operations on files under it count, those that only read left out.
        number: the operation that is struck; 0 for none.
        error: errno that it and all later ones fail with; 0 kills the process, a write being half done.
        names: file that the operations are listed in.
    """

    directory: Path
    number: int = 0
    error: int = 0
    names: Path | None = None

    def arm(self):
        """Let it befall this process."""
        names = -1 if self.names is None else os.open(self.names, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        directory = os.fsencode(self.directory.resolve())
        ctypes.CDLL(str(library())).strike_arm(directory, ctypes.c_long(self.number), self.error, names)
