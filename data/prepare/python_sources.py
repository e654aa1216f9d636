"""A corpus that every machine with Python has: the standard library's own sources."""

import shutil
import sysconfig
from pathlib import Path

from fms_spec.files import whole_folder

# Installed packages are no part of the standard library, and tests are lists of cases rather than prose or programs.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def copy_python_sources(directory):
    """Copy the running interpreter's .py files to `directory`, whole or not at all; does nothing where it is there.

    Returns:
        the number of files there.
    """
    if not directory.is_dir():
        root = Path(sysconfig.get_paths()["stdlib"])
        with whole_folder(directory) as partial:
            for file in sorted(root.rglob("*.py")):
                relative = file.relative_to(root)
                if not LEFT_OUT & set(relative.parts):
                    (partial / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, partial / relative)
    return sum(1 for _ in directory.rglob("*.py"))
