"""`mxref new-kernel`: a file to start a kernel of one's own from, and its test.

Write the layer in plain PyTorch, with every rounding point in place, and a test beside it.

example:
  mxref new-kernel my_kernel.py && mxref gate --kernel my_kernel.py:layer
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from mxref.verification.candidates import starting_point
from mxref.verification.cli import UsageError

_TEST = '''\
"""{name}'s layer by the gate's checks: `pytest` runs one small problem, `mxref gate` the whole domain.

One test a judgement, of everything that any candidate is asked: pytest --mxref-kernel {file}:layer
"""

from pathlib import Path

from mxref.verification.cli import main

KERNEL = Path(__file__).with_name("{file}")


def test_a_small_problem(tmp_path: Path) -> None:
    problem = ["--shape", "4,64,96,9,2,4", "--out", str(tmp_path)]
    assert main(["gate", "--kernel", f"{{KERNEL}}:layer", *problem]) == 0
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("file", metavar="FILE", type=Path, help="to write, for instance my_kernel.py")


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code.

    Raises:
        UsageError: the file is no Python file, is there already, or cannot be written.
    """
    file: Path = arguments.file
    test = file.with_name(f"test_{file.name}")
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise UsageError(f"{file} is no name of a Python module; expected something like my_kernel.py")
    for path in (file, test):
        if path.exists():
            raise UsageError(f"{path} is there already: choose another name, or remove it")
    try:
        file.write_text(inspect.getsource(starting_point).replace("my_kernel", file.stem), encoding="utf-8")
        test.write_text(_TEST.format(name=file.stem, file=file.name), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from None
    print(f"wrote {file} and {test}\njudge it: mxref gate --kernel {file}:layer")
    return 0
