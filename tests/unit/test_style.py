"""The code style that a machine can hold: sizes, words, docstrings, names."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
FILE_LINES = 800
FUNCTION_LINES = 70
LINE_COLUMNS = 100
FOLDERS = ("dualblade", "csrc", "tests", "tools", "bench")
SUFFIXES = {".py", ".pyx", ".pxi", ".pxd", ".pyi", ".c", ".h"}
BANNED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]) + r")\b")


def sources() -> list[Path]:
    """The files that people write, in any language."""
    found = [ROOT / "setup.py", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))]
    return sorted(path for path in found if path.is_file() and is_source(path))


def is_source(path: Path) -> bool:
    if path.suffix:
        return path.suffix in SUFFIXES
    with path.open("rb") as file:
        return file.read(2) == b"#!"  # the commands in tools/


SOURCES = sources()
PYTHON = [
    path for path in SOURCES if path.suffix == ".py" or "python" in path.read_text().split("\n")[0]
]
C = [path for path in SOURCES if path.suffix in {".c", ".h"}]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")


def where(wrong: Callable[[str], object]) -> list[str]:
    """Every line of every source that is wrong, as file:line."""
    return [
        f"{name_of(path)}:{number}"
        for path in SOURCES
        for number, line in enumerate(lines_of(path), 1)
        if wrong(line)
    ]


def test_files_are_short_and_end_with_a_newline():
    assert SOURCES
    assert [name_of(path) for path in SOURCES if len(lines_of(path)) > FILE_LINES + 1] == []
    assert [name_of(path) for path in SOURCES if lines_of(path)[-1]] == []


def test_lines_are_short():
    assert where(lambda line: len(line) > LINE_COLUMNS) == []


def test_no_line_ends_with_space():
    assert where(lambda line: line != line.rstrip()) == []


def test_nothing_is_put_off():
    assert where(BANNED.search) == []


def says_what_it_is(path: Path) -> bool:
    if path in PYTHON:
        return bool(ast.get_docstring(parse(path)))
    lines = [line for line in lines_of(path) if not line.startswith(("#!", "# cython:"))]
    return lines[0].startswith(("/*", "#", '"""'))


def test_the_beginning_says_what_the_file_is():
    assert [name_of(path) for path in SOURCES if not says_what_it_is(path)] == []


# ---- functions -----------------------------------------------------------------------------------


def python_functions(path: Path) -> list[tuple[str, int]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(parse(path))
        if isinstance(node, kinds)
    ]


def cython_functions(path: Path) -> list[tuple[str, int]]:
    """A function ends before the next line that is not indented deeper than its first."""
    found = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        start = re.match(r"( *)(?:def|cdef|cpdef)\s[^=]*?(\w+)\(", line)
        if start is None:
            continue
        last = number
        for after in range(number + 1, len(lines)):
            text = lines[after].strip()
            indent = len(lines[after]) - len(lines[after].lstrip())
            if text and indent <= len(start[1]) and text[0] != ")":  # ") -> int:" ends the head
                break
            last = after if text else last
        found.append((start[2], last - number + 1))
    return found


def c_functions(text: str) -> list[tuple[str, int]]:
    """Name and lines of each function, from the line of its name to its closing brace."""
    blanked = re.sub(
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'',
        lambda match: re.sub(r"[^\n]", " ", match[0]),
        text,
        flags=re.DOTALL,
    )
    found = []
    depth, head, name, start = 0, 0, "", 0
    for position, character in enumerate(blanked):
        if character == "{":
            before = blanked[head:position].rstrip()
            call = re.search(r"(\w+)\s*\([^{}]*\)$", before, re.DOTALL)
            if depth == 0 and call and "=" not in before:
                name, start = call[1], head + call.start()
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0 and name:
                found.append((name, blanked.count("\n", start, position) + 1))
                name = ""
        if depth == 0 and character in "};":
            head = position + 1
    return found


def functions(path: Path) -> list[tuple[str, int]]:
    if path in PYTHON:
        return python_functions(path)
    if path in C:
        return c_functions(path.read_text(encoding="utf-8"))
    return cython_functions(path)


MEASURED = [p for p in SOURCES if p in PYTHON or p in C or p.suffix in {".pyx", ".pxi"}]


def test_functions_are_short():
    long = [
        f"{name_of(path)}: {name} has {lines} lines"
        for path in MEASURED
        for name, lines in functions(path)
        if lines > FUNCTION_LINES
    ]
    assert long == []


def test_the_c_scanner_sees_functions_and_nothing_else():
    text = (
        "struct point {\n  int x;\n};\n"
        "static const int table[] = {\n  1, /* } */\n};\n"
        'static int\nfirst(int a,\n      int b)\n{\n  if (a) {\n    puts("}");\n  }\n}\n'
        "void second(void) { }\n"
    )
    assert c_functions(text) == [("first", 7), ("second", 1)]
    assert [name for path in C if path.suffix == ".c" for name, _ in functions(path)]


# ---- names and macros ----------------------------------------------------------------------------


TESTS = [path for path in PYTHON if path.name.startswith("test_")]


def test_no_test_hides_another_of_its_name():
    hidden = []
    for path in TESTS:
        tree = parse(path)
        for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
            names = Counter(node.name for node in scope.body if isinstance(node, ast.FunctionDef))
            hidden += [f"{name_of(path)}: {name}" for name, count in names.items() if count > 1]
    assert hidden == []


def test_assertions_stay_in():
    assert where(re.compile(r"#\s*define\s+NDEBUG").search) == []
