"""What gets installed: one import name, `mxref`, typed, beside Hugging Face's `kernels` and never over it.

The folder `kernels/` shares its name with a package that transformers imports for gpt-oss. A wheel with a top-level
`kernels` would overwrite that package; with an `__init__.py` in the folder, the repository root on sys.path would hide
it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from gpt_oss_checkpoint import make_gpt_oss_checkpoint

from mxref.verification import cli

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "import mxref, mxref.kernels, mxref.verification, mxref.checkpoints.gpt_oss, mxref.blocks"

EACH_LINE = """
import contextlib, io
from mxref.verification.cli import main
for words in {lines}:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(words)
    print(code, " ".join(said.getvalue().split()))
"""
"""A line for each command line: its exit code, and what it said."""

LEFT_OUT = (
    "/own/", "/elsewhere/", "/verification/bench/", "/verification/distributed/", "/verification/models/",
    "/verification/records/", "/verification/studies/",
)  # fmt: skip
"""What only a clone has."""

pytest.importorskip("build")
pytest.importorskip("setuptools")


def clean() -> dict[str, str]:
    """The environment of a process that finds this project only where it is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}


def run(*command: str | Path, cwd: Path, expect: int = 0) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean(), capture_output=True, text=True, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A clean copy of the tree, symlinks kept, so that builds leave nothing behind and find nothing stale."""
    copy = tmp_path_factory.mktemp("sources") / "mxref"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "notebooks")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> Path:
    """The folder of what a release holds: the sdist, and the wheel built from it, not from the tree."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, sources, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel_names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def modules() -> set[str]:
    """Every module of the tree, as the wheel and the sdist name it."""
    found = set()
    for folder in ("mxref", "kernels", "verification"):
        prefix = "mxref" if folder == "mxref" else f"mxref/{folder}"
        found |= {f"{prefix}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
    return found


def new_environment(directory: Path) -> Path:
    """A virtual environment that sees this one's packages, but not this one's mxref; returns its interpreter."""
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory).strip()
    # Directories named in a .pth file are searched, but the .pth files inside them (editable installs) are not read.
    host = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (Path(site) / "host.pth").write_text("\n".join(host) + "\n")
    return python


def install(python: Path, *arguments: str | Path) -> None:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *arguments, cwd=python.parent)


@pytest.fixture(scope="module")
def wheel_python(wheel, tmp_path_factory) -> Path:
    python = new_environment(tmp_path_factory.mktemp("from-wheel"))
    install(python, wheel)
    return python


class TestWheel:
    def test_nothing_at_top_level_but_mxref(self, wheel_names):
        version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        assert {PurePosixPath(name).parts[0] for name in wheel_names} == {"mxref", f"mxref-{version}.dist-info"}

    def test_holds_every_module_but_those_of_a_clone(self, wheel_names):
        found = modules()
        left_out = {name for name in found if any(part in f"{name}/" for part in LEFT_OUT)}
        assert all(any(part in name for name in left_out) for part in LEFT_OUT)
        assert {name for name in wheel_names if name.endswith(".py")} == found - left_out

    def test_holds_the_data_files(self, wheel_names):
        assert "mxref/py.typed" in wheel_names
        templates = {path.name for path in (ROOT / "verification" / "report" / "templates").glob("*")}
        assert templates
        assert {f"mxref/verification/report/templates/{name}" for name in templates} <= wheel_names

    def test_is_small(self, wheel):
        assert wheel.stat().st_size < 420_000, "exclude in pyproject.toml what users of the library do not need"

    def test_holds_the_licence(self, wheel_names):
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)

    def test_holds_no_tests(self, wheel_names):
        assert not [name for name in wheel_names if "/test_" in name or "conftest" in name]


class TestSdist:
    def test_is_whole(self, built):
        """What the wheel leaves out as well, and the accepted errors."""
        (archive,) = built.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            names = {name.partition("/")[2] for name in opened.getnames()}
        assert modules() <= names, modules() - names
        baselines = (ROOT / "verification" / "evidence").glob("*/ulp_baseline.json")
        assert {f"mxref/{path.relative_to(ROOT)}" for path in baselines} == {
            n for n in names if n.endswith("line.json")
        }


class TestInstalled:
    def test_the_wheel_imports_from_anywhere(self, wheel_python, tmp_path):
        where = run(wheel_python, "-c", f"{IMPORTS}; print(mxref.kernels.__file__)", cwd=tmp_path).strip()
        assert Path(where).is_relative_to(wheel_python.parent.parent)

    def test_the_command_starts(self, wheel_python, tmp_path):
        assert "usage" in run(wheel_python.parent / "mxref", "--help", cwd=tmp_path).lower()

    def test_what_is_left_out_is_listed_and_says_where_it_is(self, wheel_python, tmp_path):
        told = " ".join(run(wheel_python.parent / "mxref", "--help", cwd=tmp_path).split())
        assert told.count("[in a clone only]") == len(cli.OF_A_CLONE)
        options = (("--distributed",), ("--record",), ("--accept-baseline",), ("--kernel", "peft"))
        lines = [[command] for command in sorted(cli.OF_A_CLONE)] + [["gate", *words] for words in options]
        told = run(wheel_python, "-c", f"{IMPORTS}\n{EACH_LINE.format(lines=lines)}", cwd=tmp_path).splitlines()
        assert len(told) == len(lines)
        for words, line in zip(lines, told, strict=True):
            what = "the implementation peft" if "peft" in words else " ".join(("mxref", *words))
            assert line.startswith("2 ")
            assert f"{what} is left out of the wheel" in line
            assert "pip install --editable ." in line

    def test_a_kernel_is_started_and_judged_by_the_command_and_by_pytest(self, wheel_python, tmp_path):
        mxref, mine = wheel_python.parent / "mxref", tmp_path / "my_kernel.py"
        run(mxref, "new-kernel", mine.name, cwd=tmp_path)
        small = ("--shape", "4,64,96,9,2,4", "--case", "integer, plain", "--device", "cpu")
        assert "PASS" in run(mxref, "gate", "--kernel", "my_kernel.py:layer", *small, cwd=tmp_path)
        right, wrong = "(x, A.T), dtype, dtype, float(scaling)", "(x, A.T), dtype, dtype, 2 * scaling"
        assert right in mine.read_text()
        mine.write_text(mine.read_text().replace(right, wrong))
        plugin = ("--mxref-kernel", "my_kernel.py:layer", "--mxref-device", "cpu", "--mxref-case", "integer, k 8")
        told = run(
            wheel_python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "--ignore=test_my_kernel.py",
            *plugin,
            cwd=tmp_path,
            expect=1,
        )
        assert "FAILED ::mxref::integer[integer, k 8]" in told

    def test_the_shipped_kernels_are_judged_by_what_any_candidate_is_asked(self, wheel_python, tmp_path):
        few = ("--device", "cpu", "--case", "decoder")
        said = run(wheel_python.parent / "mxref", "gate", *few, cwd=tmp_path)
        assert "without the checks that only a clone has" in said
        assert "PASS" in said

    def test_an_editable_install_imports_from_anywhere(self, sources, tmp_path):
        python = new_environment(tmp_path / "environment")
        install(python, "--editable", sources)
        where = run(python, "-c", f"{IMPORTS}; print(mxref.kernels.__file__)", cwd=tmp_path).strip()
        assert Path(where).is_relative_to(sources)
        assert "usage: mxref mutants" in run(python.parent / "mxref", "mutants", "--help", cwd=tmp_path)
        # The editable finder must not offer the root's rooms as packages of their own.
        probe = "from importlib.util import find_spec; print(find_spec('kernels'), find_spec('verification'))"
        assert str(sources) not in run(python, "-c", probe, cwd=tmp_path)

    def test_type_checkers_see_the_types(self, wheel_python, tmp_path):
        """py.typed at work: a right use passes --strict and a wrong one is caught."""
        pytest.importorskip("mypy")
        (tmp_path / "mypy.ini").write_text(
            "[mypy]\nstrict = true\n"
            "[mypy-torch.*,triton.*,numpy.*,transformers.*,matplotlib.*]\nfollow_imports = skip\n"
        )
        right = "import mxref.kernels, mxref.verification\nfrom mxref import MX_BLOCK_SIZE\nsize: int = MX_BLOCK_SIZE\n"
        (tmp_path / "right.py").write_text(right)
        (tmp_path / "wrong.py").write_text(right.replace("size: int", "size: str"))
        check = (sys.executable, "-m", "mypy", "--python-executable", wheel_python, "--cache-dir", tmp_path / "cache")
        run(*check, "right.py", cwd=tmp_path)
        assert 'variable has type "str"' in run(*check, "wrong.py", cwd=tmp_path, expect=1)


def hugging_face_kernels() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's `kernels` is not installed")


class TestBesideHuggingFaceKernels:
    def test_no_file_belongs_to_both(self, wheel_names):
        """Disjoint files: whichever is installed or removed first, the other stays whole."""
        theirs = {str(path) for path in hugging_face_kernels().files or ()}
        assert "kernels/__init__.py" in theirs
        assert not theirs & wheel_names

    def test_both_import_in_one_process(self, wheel_python, tmp_path):
        expected = hugging_face_kernels().locate_file("kernels/__init__.py")
        where = run(wheel_python, "-c", f"{IMPORTS}; import kernels; print(kernels.__file__)", cwd=tmp_path).strip()
        assert Path(where) == Path(str(expected))

    def test_pytest_leaves_their_name_alone(self):
        """Under pytest, `kernels` is theirs, with the names that transformers takes from it for gpt-oss."""
        expected = hugging_face_kernels().locate_file("kernels/__init__.py")
        import kernels
        from kernels import CUDAProperties, LayerRepository, use_kernel_forward_from_hub  # noqa: F401

        assert Path(kernels.__file__) == Path(str(expected))
        from transformers import GptOssForCausalLM
        from transformers.utils import import_utils

        assert GptOssForCausalLM.__module__.startswith("transformers.")
        if not import_utils.is_kernels_available():
            pytest.skip(
                f"transformers {importlib.metadata.version('transformers')} does not use "
                f"kernels {importlib.metadata.version('kernels')}, so its import proves nothing here"
            )

    def test_python_m_pytest_from_the_root_leaves_it_alone_too(self):
        """`python -m pytest` puts the root, and so the folder `kernels/`, first on sys.path."""
        hugging_face_kernels()
        test = f"{Path(__file__).relative_to(ROOT)}::{type(self).__name__}::test_pytest_leaves_their_name_alone"
        run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test, cwd=ROOT)

    def test_python_c_from_the_root_does_so_as_well(self):
        expected = hugging_face_kernels().locate_file("kernels/__init__.py")
        probe = "import peft, kernels; from transformers import GptOssForCausalLM; print(kernels.__file__)"
        assert Path(run(sys.executable, "-c", probe, cwd=ROOT).strip()) == Path(str(expected))


class TestReadme:
    """The README's Python, pasted into a fresh process in the repository's root."""

    BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)

    def test_the_package_s_own_page_shows_the_same(self):
        page = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
        assert re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) == self.BLOCKS[:1]

    def test_the_layer_runs(self):
        (block,) = (block for block in self.BLOCKS if "parallel_linear_lora" in block)
        run(sys.executable, "-c", block + "\nassert x.grad is not None and A.grad is not None", cwd=ROOT)

    def test_a_model_is_adapted(self, tmp_path):
        (block,) = (block for block in self.BLOCKS if "load_packed_model" in block)
        make_gpt_oss_checkpoint(tmp_path)
        here = block.replace('"openai/gpt-oss-20b"', repr(str(tmp_path))).replace('"cuda"', '"cpu"')
        trained = "print([name for name, p in model.named_parameters() if p.requires_grad])"
        said = run(sys.executable, "-c", f"{here}\n{trained}", cwd=ROOT)
        for target in ("q_proj", "v_proj", "experts.lora_A", "experts.base_layer.lora_A"):
            assert f"{target}." in said

    @pytest.mark.parametrize("block", BLOCKS)
    def test_what_it_imports_is_there(self, block):
        imports = [ast.unparse(node) for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports
        run(sys.executable, "-c", "\n".join(imports), cwd=ROOT)
