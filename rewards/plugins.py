"""Loading a user's function from "file.py:function" or "package.module:function"."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

from .errors import RewardError, did_you_mean


def load_path(path: str, base_dir: Path) -> tuple[str, object]:
    """The name and the object that `path` points to. Raises RewardError, quoting the user's own exception."""
    source, colon, function = path.rpartition(":")
    if not (source and colon and function):
        raise RewardError(f"reward path {path!r} must be 'file.py:function' or 'package.module:function'")
    if source.endswith(".py") or "/" in source or "\\" in source:
        module = _import_file(base_dir / Path(source).expanduser())
    else:
        module = _import_dotted(source)
    if not hasattr(module, function):
        names = _function_names(module)
        raise RewardError(
            f"{source} has no function {function!r}{did_you_mean(function, names)}; "
            f"functions there: {', '.join(names) or 'none'}"
        )
    return function, getattr(module, function)


def _import_file(file: Path) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        raise RewardError(f"reward file {file} does not exist")
    # One module per file, however many of its functions are used; in sys.modules, as dataclasses expect.
    name = f"r1forge_reward_{file.stem}_{abs(hash(str(file))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"{file} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RewardError(f"importing {file} failed: {_where(error, str(file))}") from error
    return module


def _import_dotted(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise RewardError(f"no module named {error.name!r} (from reward path {name!r})") from None
        raise RewardError(f"importing {name} failed: {_where(error)}") from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"importing {name} failed: {_where(error)}") from error


def _where(error: BaseException, file: str | None = None) -> str:
    """`file:line: Type: message`, at the innermost line of the user's file where it is known."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in extract_tb(error.__traceback__) if file is None or frame.filename == file]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {text}" if frames else text


def _function_names(module: ModuleType) -> list[str]:
    """Public callables defined in the module itself, not imported into it."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    )
