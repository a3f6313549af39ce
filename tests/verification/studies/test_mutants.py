"""The catalogue of planted bugs: it fits the sources, covers them, and finds its places by syntax tree."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import cache
from textwrap import dedent

import pytest

from mxref.verification.studies.mutation.bug import Bug, plant
from mxref.verification.studies.mutation.catalogue import BUGS, EQUIVALENTS, arguments, catalogue, stratified
from mxref.verification.studies.mutation.locate import Edit, StaleMutantError, locate
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.sources import Place, Source, read_sources
from mxref.verification.studies.mutation.sweep import OPERATORS, sweep

SOURCES = read_sources()

CATEGORIES = {
    "decode", "scales", "scheduling", "masks", "tails", "LoRA scaling", "expert indexing", "accumulation", "rounding",
    "dA/dB", "gates", "biases", "sentinels",
}  # fmt: skip


@cache
def everything() -> list[Mutant]:
    return catalogue(SOURCES)


@pytest.mark.parametrize(("place", "bug"), BUGS, ids=[bug.name for _, bug in BUGS])
def test_a_bug_by_hand_fits_the_sources(place: Place, bug: Bug) -> None:
    mutant = plant(place, bug, SOURCES)
    assert mutant.place == place, f"its code is in {mutant.place} now: say so in the catalogue"
    text = SOURCES[mutant.place.file].text
    assert ast.dump(ast.parse(mutant.apply(text))) != ast.dump(ast.parse(text))
    assert bug.why


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in everything()]
    assert len(set(names)) == len(names)


def test_no_two_mutants_are_the_same_code() -> None:
    functions = [(mutant.place, ast.dump(_mutated_function(mutant))) for mutant in everything()]
    assert len(set(functions)) == len(functions)


def _mutated_function(mutant: Mutant) -> ast.AST:
    """Parsed alone where it can be: whole files would take a minute."""
    source = SOURCES[mutant.place.file]
    text, node = mutant.apply(source.text), source.function(mutant.place.function)
    if not isinstance(node, ast.FunctionDef):
        return ast.parse(text)
    start, end = source.span(node)
    return ast.parse(dedent(" " * node.col_offset + text[start : end + len(text) - len(source.text)]))


def test_the_catalogue_is_large_enough() -> None:
    assert len(BUGS) >= 120
    assert len({(mutant.place.file, mutant.line) for mutant in everything() if mutant.by_hand}) >= 60


def test_bugs_by_hand_cover_every_kind_of_mistake() -> None:
    assert {bug.category for _, bug in BUGS} >= CATEGORIES


def test_every_jit_function_and_launcher_has_mutants() -> None:
    swept = {mutant.place for mutant in everything() if not mutant.by_hand}
    there = {Place(s.file, f.name) for s in SOURCES.values() for f in s.functions if f.jit or f.launches}
    only_assembly = {Place(s.file, name) for s in SOURCES.values() for name in s.gpu_only}
    assert there - swept <= only_assembly
    assert there <= {mutant.place for mutant in everything()}


def test_every_declared_equivalent_is_in_the_catalogue() -> None:
    known = {mutant.change for mutant in everything()}
    for place, entry in EQUIVALENTS:
        assert {mutant.change for mutant in entry.mutants(place, SOURCES)} <= known, (place, entry)


def test_an_equivalent_speaks_of_nothing_but_its_mutants() -> None:
    told = arguments(everything(), SOURCES)
    explained = {mutant.name: mutant for mutant in everything() if mutant.name in told}
    sign = next(mutant for mutant in explained.values() if mutant.place.function == "e2m1")
    assert (sign.before, sign.after) == ("tl.uint32", "tl.int32")


def test_each_operator_plants_something() -> None:
    assert {mutant.category for mutant in everything() if not mutant.by_hand} == set(OPERATORS)


WRITTEN = Source(
    "toy.py",
    """
def f(x, y):
    # y is counted from 1
    a = load(x, mask=x < 1, other=0)  # a comment
    return (
        a
        + y * 2
    )


def g(x):
    a = load(x, mask=x < 2, other=0)
    asm('''
        mul t, 1;
    ''')
    return x < 3


class C:
    def h(self):
        return only_here(self)
""",
)


@pytest.mark.parametrize(
    ("function", "edit", "expected"),
    [
        ("f", Edit("a + y*2", "a"), "return (\n        a\n    )"),
        ("f", Edit("x<1", "x <= 1"), "a = load(x, mask=(x <= 1), other=0)  # a comment"),
        ("g", Edit("load(x, mask=..., other=0)", "load(x, mask=..., other=1)"), "a = load(x, mask=(x < 2), other=1)"),
        ("g", Edit("load(x, ...)", "load(x + 1, ...)"), "a = load(x + 1, mask=x < 2, other=0)"),
        ("g", Edit("x", "y", "return ..."), "return y < 3"),
        ("g", Edit("asm(...)", "pass"), "pass"),
        ("g", Edit("a = ...", "a = ...\na = -a"), "a = (load(x, mask=x < 2, other=0))\n    a = -a"),
        ("g", Edit("'mul t, 1;'", "'mul t, 2;'"), "mul t, 2;"),
        ("C.h", Edit("self", "None"), "return only_here(None)"),
        ("gone", Edit("only_here(self)", "None"), "return None"),
    ],
)
def test_code_is_found_by_its_syntax_tree(function: str, edit: Edit, expected: str) -> None:
    """Whatever its layout and comments, in its function; or where it has gone, if there is one such place."""
    mutant = locate(Place("toy.py", function), edit, {"toy.py": WRITTEN}, "toy")
    ast.parse(mutant.apply(WRITTEN.text))
    assert expected in mutant.apply(WRITTEN.text)


@pytest.mark.parametrize(
    ("place", "edit", "message"),
    [
        (Place("toy.py", "f"), Edit("no_such_code", ""), "0 times in kernels/toy.py, f; expected one place"),
        (Place("toy.py", "g"), Edit("x", "y"), "3 times in kernels/toy.py, g; expected one place"),
        (
            Place("toy.py", "gone"),
            Edit("load(...)", "0"),
            "there is no kernels/toy.py, gone, it occurs in .*, f; .*, g;",
        ),
        (Place("other.py"), Edit("no_such_code", "0"), r"there is no kernels/other\.py; expected one place"),
        (Place("toy.py", "f"), Edit("y * 2", "(y*2)"), "changes no code"),
        (Place("toy.py", "f"), Edit("y * 2", "y *"), "does not parse"),
    ],
)
def test_a_stale_mutant_is_named(place: Place, edit: Edit, message: str) -> None:
    with pytest.raises(StaleMutantError, match=f"mutant 'toy' is stale: .*{message}"):
        locate(place, edit, {"toy.py": WRITTEN}, "toy")


def test_the_same_change_is_one_mutant_however_it_is_written() -> None:
    edits = [Edit("x < 3", "x <= 3"), Edit("return x < 3", "return (x <=\n 3)"), Edit("... < 3", "... <= 3")]
    changes = {locate(Place("toy.py", "g"), edit, {"toy.py": WRITTEN}, "toy").change for edit in edits}
    assert len(changes) == 1
    commented = replace(WRITTEN, text=WRITTEN.text.replace("return x < 3", "return x < 3  # never"))
    assert locate(Place("toy.py", "g"), edits[0], {"toy.py": commented}, "toy").change in changes


TOY = Source(
    "toy.py",
    '''
@triton.jit
def kernel(x, n, stride_a, stride_b, tiling):
    """Doc − string."""
    i = tl.arange(0, 8)
    if tiling.hopper:
        fast(x)
    acc = tl.load(x + i * stride_a, mask=i < n, other=0).to(tl.int64)
    tl.store(x + i * stride_b, acc, mask=(i < n) & (i > 0))


@triton.jit
def fast(x):
    return x + 1


def helper(n):
    return n + 1
''',
)


def test_the_sweep_finds_what_a_person_would() -> None:
    edits = {mutant.edit(TOY.text)[1]: mutant for mutant in sweep(TOY)}
    expected = [
        "i = tl.arange(0, (8 + 1))",
        "acc = tl.load(x + i * stride_b, mask=i < n, other=0).to(tl.int64)",
        "acc = tl.load(x + i * stride_a, mask=((i) <= (n)), other=0).to(tl.int64)",
        "acc = tl.load(x + i * stride_a).to(tl.int64)",
        "acc = tl.load(x + i * stride_a, mask=i < n, other=0).to(tl.int32)",
        "acc = tl.load(x, mask=i < n, other=0).to(tl.int64)",
        "tl.store(x + i * stride_b, acc, mask=((i < n) | (i > 0)))",
        "tl.store(x + i * stride_b, acc)",
        "pass",
    ]
    missing = [text for text in expected if text not in edits]
    assert not missing, sorted(edits)
    assert not any(mutant.place.function == "helper" for mutant in edits.values())


def test_what_only_a_gpu_runs_is_known() -> None:
    assert TOY.gpu_only == {"fast"}
    for mutant in sweep(TOY):
        left_out = (mutant.before, mutant.after) == ("tiling.hopper", "False")
        assert mutant.gpu_only == (mutant.place.function == "fast" or "fast(" in mutant.before or left_out), mutant


def test_what_only_the_tilings_of_a_gpu_notice_is_known() -> None:
    text = """
def launcher(n, config):
    if n % 16 or n < 3:
        config = config.dense()
    launch(kernel, n + 1, config)
"""
    sides = {mutant.before: mutant.gpu_only for mutant in sweep(Source("toy.py", text))}
    for_a_gpu = {"n % 16", "n < 3", "n % 16 or n < 3", "16", "3"}
    assert for_a_gpu < sides.keys()
    assert all(gpu_only == (before in for_a_gpu) for before, gpu_only in sides.items()), sides


def test_what_only_the_loads_of_a_gpu_notice_is_known() -> None:
    text = """
class Launcher:
    def __init__(self, n, fan):
        self._boxes = fan < 7
        words = n > 5
        self._launch = PreparedLaunch(kernel, n + 1, aligned=(2,) if words else ())

@triton.jit
def kernel(n):
    words = n * 9
"""
    numbers = {m.before: m.gpu_only for m in sweep(Source("toy.py", text)) if m.before.isdigit()}
    assert numbers == {"7": True, "5": True, "2": True, "1": False, "9": False}


def test_a_stratified_sample_takes_the_functions_in_turn() -> None:
    functions = {mutant.place for mutant in everything()}
    chosen = stratified(everything(), len(functions), seed=1)
    assert {mutant.place for mutant in chosen} == functions
    assert chosen == stratified(everything(), len(functions), seed=1)
    assert chosen != stratified(everything(), len(functions), seed=2)
    assert len(stratified(everything(), 10**6, seed=0)) == len(everything())
