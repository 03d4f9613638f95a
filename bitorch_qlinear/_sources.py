"""Digest of the sources of the compiled parts, by which a build that does not belong to the code is known.

The build compiles it into each part (setup.py) and the import compares (_library.py). Only the standard library is
imported here, because setup.py runs this file by itself.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")


def digest(root: Path) -> str | None:
    """Digest of what the compiled parts are made of: the C++ and CUDA files below csrc, and setup.py with its flags.

    Args:
        root: A checkout's folder.

    Returns:
        64 hexadecimal digits, or None if this is no checkout, as beside an installed package.
    """
    csrc = os.path.join(root, "csrc")
    # Another package may have installed a folder csrc beside this one.
    if not os.path.isfile(os.path.join(csrc, "torch", "ops_cpu.cpp")):
        return None
    paths = [os.path.join(root, "setup.py")]
    for folder, _, names in os.walk(csrc):
        # An editor's lock or swap file is no source.
        paths += [os.path.join(folder, name) for name in names if name.endswith(_SUFFIXES) and name[0] != "."]
    result = hashlib.sha256()
    try:
        for path in sorted(paths):
            with open(path, "rb") as file:
                content = file.read()
            # With its length before it, no file can pass for the end of another.
            result.update(f"{os.path.relpath(path, root)} {len(content)}\n".encode())
            result.update(content)
    except OSError:
        return None
    return result.hexdigest()
