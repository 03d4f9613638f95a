"""A digest of the sources of the compiled parts, which reveals a build that does not belong to the code.

setup.py compiles the digest into each part, and _library.py compares it at import. Only the standard library is
imported here, because setup.py runs this file by itself.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")


def digest(root: Path) -> str | None:
    """Return a digest of the C++ and CUDA files below csrc and of setup.py, which has the compiler flags.

    Args:
        root: Folder of the checkout.

    Returns:
        64 hexadecimal digits, or None if the folder is no checkout, as for an installed package.
    """
    csrc = os.path.join(root, "csrc")
    # A folder csrc beside an installed package may belong to another package, so look for a file of ours.
    if not os.path.isfile(os.path.join(csrc, "torch", "ops_cpu.cpp")):
        return None
    paths = [os.path.join(root, "setup.py")]
    for folder, _, names in os.walk(csrc):
        # Hidden files are skipped, because editors leave lock and swap files.
        paths += [os.path.join(folder, name) for name in names if name.endswith(_SUFFIXES) and name[0] != "."]
    result = hashlib.sha256()
    try:
        for path in sorted(paths):
            with open(path, "rb") as file:
                content = file.read()
            # The length comes first, so that no file's content can be taken for the beginning of the next file.
            result.update(f"{os.path.relpath(path, root)} {len(content)}\n".encode())
            result.update(content)
    except OSError:
        return None
    return result.hexdigest()
