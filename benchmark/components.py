"""Components from the user's own files: methods, models, tasks, metrics, figures, range rules, executors.

A file registers what it holds, as the files of this repository do. :func:`include` imports it, ``--include``
does so from the command line. Its text travels with the settings of a run, so that a worker process, also on
another machine, imports the same file before it runs a cell; a record holds the file's name and digest.

Installed packages need none of this: their entry points are found by :mod:`quanttune.registry`.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType

from quanttune.errors import ConfigError, QuantTuneError
from quanttune.registry import forget_components

__path__: list[str] = []
"""Makes this module a package whose only submodules are included files, served by the finder below."""

_SPOOL = "QUANTTUNE_BENCH_INCLUDED"
"""Environment variable: a folder where child processes find the texts of included files. A process that is
handed an object of an included class imports the file by the object's module name, before anything else."""


@dataclass(frozen=True)
class Include:
    """A file of the user, as text.

    Attributes:
        path: Where it was read, absolute; what messages and tracebacks name.
        text: Its whole text.
    """

    path: str
    text: str

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.path).name

    @property
    def sha256(self) -> str:
        """Digest of the text in UTF-8, 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def module(self) -> str:
        """The module's name: no file can take the place of another one or of an installed module."""
        stem = re.sub(r"\W", "_", Path(self.path).stem)
        place = hashlib.sha256(f"{self.path}\0{self.text}".encode()).hexdigest()[:16]
        return f"{__name__}.{stem}_{place}"

    def provenance(self) -> dict[str, str]:
        """What a record says about the file."""
        return {"name": self.name, "sha256": self.sha256}


def include(*paths: str | os.PathLike[str]) -> tuple[Include, ...]:
    """Import files that register components; they take part in every later run of this process.

    A file that was changed since it was included takes the place of what it registered before.

    Args:
        paths: Python files.

    Returns:
        The files as they were read, to be given to another process.

    Raises:
        ConfigError: If a file cannot be read, is not Python, raises, or claims a name that is taken. Nothing
            that it registered stays.
    """
    files = tuple(_read(Path(path)) for path in paths)
    use(files)
    return files


def use(files: Sequence[Include]) -> None:
    """Import files that were read before, perhaps by another process; each once.

    Raises:
        ConfigError: As in :func:`include`.
    """
    for file in files:
        if file.module in sys.modules:
            continue
        for earlier in [known for known in _FILES.values() if known.path == file.path]:
            _forget(earlier)
        _FILES[file.module] = file
        try:
            importlib.import_module(file.module)
        except (Exception, SystemExit) as error:
            _forget(file)
            raise ConfigError(f"--include {file.path}: {_reason(error)}") from error
        _spool(file)


def included() -> tuple[Include, ...]:
    """The files that take part in this process, in the order in which they were included."""
    return tuple(_FILES.values())


def included_methods() -> list[str]:
    """Names of the methods that included files registered."""
    from baselines import METHODS

    return [name for name, method in METHODS.items() if method.__module__.startswith(f"{__name__}.")]


def forget(files: Iterable[Include]) -> None:
    """Take back included files with everything that they registered."""
    for file in files:
        _forget(file)


_FILES: dict[str, Include] = {}


def _read(path: Path) -> Include:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"--include {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--include {path}: not a Python file that can be read: {error}") from error
    return Include(str(path.resolve()), text)


def _forget(file: Include) -> None:
    forget_components(file.module)
    _FILES.pop(file.module, None)
    if sys.modules.pop(file.module, None) is not None:
        globals().pop(file.module.rpartition(".")[2], None)


def _reason(error: BaseException) -> str:
    """One line about what a file did, with the line of the file where it did it if there is one."""
    if isinstance(error, SyntaxError):
        return f"not valid Python, line {error.lineno}: {error.msg}"
    at, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(f"{__name__}."):
            at = f" in line {trace.tb_lineno}"
        trace = trace.tb_next
    text = str(error) if isinstance(error, QuantTuneError) else f"{type(error).__name__}: {error}"
    return " ".join(f"it failed{at}: {text}".split())


def fault_of(error: BaseException) -> str | None:
    """What an included file did wrong, in one line; ``None`` if no included file took part in the error."""
    trace, path = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(f"{__name__}."):
            path = trace.tb_frame.f_code.co_filename
        trace = trace.tb_next
    return None if path is None else f"{path}: {_reason(error)}"


def _spool(file: Include) -> None:
    """Let processes that this one starts find the file by its module's name."""
    folder = os.environ.get(_SPOOL)
    if not folder or not Path(folder).is_dir():
        folder = tempfile.mkdtemp(prefix="quanttune-bench-")  # readable by this user alone
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[_SPOOL] = folder
    path = Path(folder) / f"{file.module}.json"
    if not path.exists():
        path.write_text(json.dumps(asdict(file)), encoding="utf-8")


def _spooled(module: str) -> Include | None:
    folder = os.environ.get(_SPOOL)
    if not folder:
        return None
    try:
        file = Include(**json.loads((Path(folder) / f"{module}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return file if file.module == module else None


class _Loader(importlib.abc.InspectLoader):
    """Runs the text that was read: what is recorded is what ran, whatever became of the file since."""

    def __init__(self, file: Include) -> None:
        self._file = file

    def get_source(self, fullname: str) -> str:
        return self._file.text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._file.text, self._file.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self._file.path  # so that the file finds what lies beside it
        exec(self.get_code(module.__name__), module.__dict__)  # noqa: S102 - the user asked for it


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        file = _FILES.get(fullname) or _spooled(fullname)
        if file is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(file), origin=file.path)


sys.meta_path.append(_Finder())
