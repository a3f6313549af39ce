"""A fresh interpreter that is free to compile: TRITON_INTERPRET is decided at import."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with these arguments and without the variable; line numbers, a fifth of a compilation, are left out."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
