"""Which of a test's names are the program's, and which must not be.

A name that the test reads and does not define is the program's. But a program may define anything, so names by
which a test judges (`math.isclose`, `np.allclose`, `Counter`) are the real ones even where the test forgot to
import them: it could count on an import in the program, and a program could put its own there.
"""

import ast
import builtins
import sys
import types
from dataclasses import dataclass
from importlib import import_module
from typing import Any

PROGRAM = "solution"  # the module name under which some tests import the program

_MODULES = {"np": "numpy", "numpy": "numpy", "pd": "pandas", "pandas": "pandas", "pytest": "pytest"}
_HELPERS = {
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "math": "isclose",
    "typing": "Any Callable Dict Iterable Iterator List Optional Sequence Set Tuple Union",
}
_HELPER = {name: module for module, names in _HELPERS.items() for name in names.split()}


@dataclass(frozen=True)
class Names:
    """asked: names that the program is asked for; own: names and their values that the test gets from here;
    imports_program: the test has an `import solution` of some form."""

    asked: list[str]
    own: dict[str, Any]
    imports_program: bool


def sort_out(tree: ast.Module) -> Names:
    """Raises ImportError if a module that the test uses is not here."""
    read, bound = _read(tree), _bound(tree)
    imported, imports_program = _imported_from_program(tree)
    free = {name for name in read - bound if not hasattr(builtins, name)} | imported
    modules = {name: _MODULES.get(name, name) for name in _used_as_modules(tree) & free}
    helpers = {name for name in free & _HELPER.keys() if name not in imported}
    if free - helpers - modules.keys():
        free -= helpers
    else:
        helpers = set()  # then they are what the test is about
    own = {name: import_module(module) for name, module in modules.items()}
    own.update({name: getattr(import_module(_HELPER[name]), name) for name in helpers})
    # A name that the test also defines, perhaps too late, is the program's until then.
    asked = (free | {name for name in read & bound if not hasattr(builtins, name)}) - own.keys()
    return Names(sorted(asked | (set() if free - own.keys() else _as_builtin(tree, bound))), own, imports_program)


def uses_program(tree: ast.Module, names: Names) -> bool:
    """False for a test that every program passes or fails alike."""
    return names.imports_program or bool(set(names.asked) - _bound(tree))


def program_module(given: dict[str, Any]) -> types.ModuleType:
    """The module that `import solution` finds."""
    module = types.ModuleType(PROGRAM)
    module.__dict__.update(given)
    return module


def _as_builtin(tree: ast.Module, bound: set[str]) -> set[str]:
    """The built-in name that the program redefines, for tests like `assert sum(10, 15) == 6`.

    Only where it is the one name that the test can be about: otherwise a program could define the `abs` or `sorted`
    that its own results pass through.
    """
    used = {name for name in _read(tree) - bound if isinstance(getattr(builtins, name, None), _CALLABLE)}
    used = {name for name in used if not _is_exception(name)}
    passed: set[str] = set()
    for statement in tree.body:  # check(sum)
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in bound:
            passed |= {arg.id for arg in call.args if isinstance(arg, ast.Name)} & used
    for names in (passed, used):
        if len(names) == 1:
            return names
    return set()


_CALLABLE = (types.BuiltinFunctionType, type)


def _is_exception(name: str) -> bool:
    kind = getattr(builtins, name)
    return isinstance(kind, type) and issubclass(kind, BaseException)


def _read(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
    """Every name that the test gives a value anywhere, except by importing it from the program."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != PROGRAM):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            found.add(node.name)
    return found


def _used_as_modules(tree: ast.AST) -> set[str]:
    """Names of known modules that only appear as `name.attribute`. Used in another way they are the program's."""
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    plain = {node.id for node in names if id(node) not in owners}
    return {node.id for node in names} & {*sys.stdlib_module_names, *_MODULES} - plain


def _imported_from_program(tree: ast.AST) -> tuple[set[str], bool]:
    found: set[str] = set()
    modules: set[str] = set()
    star = False
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == PROGRAM:
            star = True
            found |= {alias.name for alias in node.names if alias.name != "*"}
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == PROGRAM}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add(node.attr)
    return found, star or bool(modules)
