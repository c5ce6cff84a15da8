"""The house: arrows of imports run down, readers of results do without the trainer, and rooms stay small."""

import ast
import functools
import re

import pytest

from tests.test_ensemble import ROOT

FLOORS = 6
TRAINER = {"utils.ensemble", "utils.member"}
READERS = [
    "utils.results",
    "utils.plots",
    "utils.run_plots",
    "utils.theory_plots",
    "utils.landscape",
    "utils.predictions",
    "utils.inference",
]
READERS += ["scripts.summarize", "scripts.plot", "scripts.report", "scripts.predict", "scripts.export"]
READERS += ["measure_diversity", "measure_diversity_variance", "measure_sharpness"]
FILES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("scripts/*.py")]
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


@functools.cache
def imports(name):
    """The modules of this repository that a module imports, anywhere in it.

    The networks are one room, `models`; `utils` itself holds the errors only.
    """
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    rooms = {"models" if other.startswith("models.") else other for other in found & FILES.keys()}
    return rooms - {"utils", name, name.split(".")[0] if name.startswith("models") else ""}


@functools.cache
def reaches(name):
    return imports(name).union(*(reaches(other) for other in imports(name)))


@functools.cache
def floor(name):
    """The length of the longest chain of imports that begins at a module; a circle would have none."""
    return 1 + max((floor(other) for other in imports(name)), default=0)


def test_arrows_run_down_over_six_floors():
    """A module on a floor imports from lower floors only, since no chain comes back to where it began."""
    assert {name for name in FILES if name in reaches(name)} == set()
    assert max(floor(name) for name in FILES) <= FLOORS
    assert imports("sam") == set()
    assert imports("utils.data") == imports("utils.files") == set()
    assert all(imports(name) == set() for name in FILES if name.startswith("models"))
    # What scripts share is in utils; a script may build on another one, but nothing below does.
    below = [name for name in FILES if name.startswith(("utils", "models")) or name == "sam"]
    assert all(other.startswith(("utils", "models", "sam")) for name in below for other in imports(name))


@pytest.mark.parametrize("name", READERS)
def test_readers_of_results_do_without_the_trainer(name):
    assert reaches(name) & TRAINER == set()


def test_every_module_has_a_reader():
    """A module that no script or test needs does not exist."""
    used = set().union(*(imports(name) for name in FILES))
    tests = " ".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    scripts = {name for name in FILES if "." not in name or name.startswith("scripts")}
    rooms = [name for name in FILES.keys() - used - scripts - {"utils"} if not name.startswith("models.")]
    unused = [name for name in rooms if name not in tests]
    assert unused == []


@pytest.mark.parametrize("name", FILES)
def test_rooms_are_small(name):
    """No file above 630 lines, no function above 80, none with more than 12 arguments."""
    assert len(FILES[name].read_text().splitlines()) <= 630
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
            arguments = node.args
            assert len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) <= 12, node.name


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(("models", "utils")) and name != "sam"])
def test_a_script_is_a_docstring_and_two_functions(name):
    """And importing it runs nothing."""
    tree = TREES[name]
    assert ast.get_docstring(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"parse_args", "main"} <= functions.keys()
    assert [argument.arg for argument in functions["main"].args.args] == ["args"]
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
    for node in tree.body:
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        starts = ("sys.path.insert(", "os.environ.setdefault(")
        path = isinstance(node, ast.Expr) and ast.unparse(node).startswith(starts)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, kinds) or guarded or path or docstring, ast.unparse(node)[:80]


COMPUTING = ("main", "measure_diversity", "measure_diversity_variance", "measure_sharpness", "scripts.experiment")
COMPUTING += ("scripts.plot", "scripts.predict", "scripts.export")


def test_threads_that_wait_do_not_spin_for_long():
    """Where two share a core they took fifty times as long; libgomp looks at the variable when torch is loaded."""
    lines = []
    for name in COMPUTING:
        before, line, after = FILES[name].read_text().partition('os.environ.setdefault("GOMP_SPINCOUNT"')
        assert not re.search(r"^(import|from) (torch|models|utils|numpy)", before, re.MULTILINE), name
        lines.append(line + after.partition("\n")[0])
    assert len(set(lines)) == 1
    assert lines[0].startswith('os.environ.setdefault("GOMP_SPINCOUNT", "')
