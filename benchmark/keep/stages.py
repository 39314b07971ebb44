"""Stages: expensive intermediate results (reference weights, statistics, tuned weights) shared by many cells.

Kept as safetensors with a JSON beside them, the sidecar. A file is used only if its sha256 is the one that
the sidecar records, and the sidecar only under the name that its own stage, scope and key make: a pair copied
over another's counts as absent. Two processes that need the same stage at once compute it once.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.keep.atomic import file_lock, unreadable, write_atomically, write_text_atomically
from benchmark.keep.meter import Cost, Meter
from benchmark.keep.record import READABLE, SCHEMA
from quanttune.digests import json_digest, sha256_file
from quanttune.errors import ConfigError, StoreError, TuningDivergedError
from quanttune.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9_]{1,40}")
_REMEMBERED = frozenset({"tuning"})
"""Stages whose last result stays in memory: whole state dicts, asked for by every width, profile and
calibrator of one training. They are read and checked once, and as one object they need be hashed but once."""


class Stages:
    """A cache of named tensors on disk; implements ``baselines.method.StageCache``.

    Args:
        folder: Where the files are, usually ``results/stages``.
        scope: What else decides every stage asked of this object; merged into each key.
        meter: Is told of every stage what making it took, now or before.
    """

    def __init__(
        self, folder: Path, scope: Mapping[str, Any] | None = None, meter: Meter | None = None
    ) -> None:
        self.folder = folder
        self.scope = dict(scope or {})
        self.meter = meter or Meter()
        self._refused: dict[str, TuningDivergedError] = {}
        self._latest: dict[str, tuple[str, _Stage]] = {}

    def scoped(self, **scope: Any) -> Stages:
        """The same folder with more in every key."""
        scoped = Stages(self.folder, {**self.scope, **scope}, self.meter)
        scoped._refused, scoped._latest = self._refused, self._latest
        return scoped

    def tensors(
        self, stage: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors kept under ``stage`` and ``key``, computing them with ``make`` if need be.

        Args:
            stage: Lower-case name of the kind of result, e.g. ``"tuned"``.
            key: Everything that decides the tensors, as JSON.
            make: Computes them; called by one process at a time.

        Returns:
            The tensors, not to be changed: tuned weights are handed out more than once.

        Raises:
            StoreError: If the disk is full or cannot be written.
            TuningDivergedError: If ``make`` raised it, now or earlier in this process: the same training
                would diverge again for each cell that shares it. A new process may try again.
        """
        full_key, digest = self._identify(stage, key)
        started = time.monotonic()
        latest, found = self._latest.get(stage, ("", None))
        if found is None or latest != digest:
            found = self._find_or_make(stage, full_key, digest, make)
            if stage in _REMEMBERED:
                self._latest[stage] = digest, found
        self.meter.used(stage, digest, found.cost, time.monotonic() - started)
        return found.tensors

    def _find_or_make(
        self, stage: str, full_key: dict[str, Any], digest: str, make: Callable[[], dict[str, Tensor]]
    ) -> _Stage:
        path = self.folder / stage / f"{digest}.safetensors"
        found = _load(path)
        if found is not None:
            return found
        with file_lock(self.folder.parent / "locks" / f"stage-{digest}.lock"):
            found = _load(path)  # another process may have made it while this one waited
            if found is not None:
                return found
            if digest in self._refused:
                raise self._refused[digest].with_traceback(None)
            unfinished = self.folder / "unfinished" / f"{stage}-{digest}.json"
            try:
                with self.meter.work() as work:
                    made = make()
                    tensors = {
                        name: tensor.detach().cpu().contiguous().clone() for name, tensor in made.items()
                    }
            except TuningDivergedError as error:
                self._refused[digest] = error
                raise
            except BaseException:
                # a training goes on from its checkpoint, and has taken what it took until now
                if unfinished.with_suffix(".safetensors").exists():
                    _note_seconds(unfinished, work.elapsed)
                raise
            cost = work.cost()
            seconds = (cost.seconds or 0.0) + _noted_seconds(unfinished)
            cost = Cost(round(seconds, 3), cost.peak_bytes)
            about = {"stage": stage, **full_key, "seconds": cost.seconds, "peak_bytes": cost.peak_bytes}
            _save(path, tensors, about)
            unfinished.unlink(missing_ok=True)
        return _Stage(tensors, cost)

    def reference(self, stage: str, key: Mapping[str, Any]) -> str:
        """A name of what is kept under ``stage`` and ``key``, with which :meth:`open` finds it again."""
        return f"{stage}/{self._identify(stage, key)[1]}"

    def open(self, reference: str) -> dict[str, Tensor] | None:
        """The tensors that :meth:`reference` named; ``None`` if they are not kept, or not intact."""
        stage, _, digest = reference.partition("/")
        if not (_NAME.fullmatch(stage) and _DIGEST.fullmatch(digest)):
            raise ConfigError(f"{reference!r} names no stage; it should read like tuning/<sha256>")
        found = _load(self.folder / stage / f"{digest}.safetensors")
        return None if found is None else found.tensors

    def hand_over(self, reference: str, other: Stages) -> None:
        """Give another folder the stage that :meth:`reference` named, unless it has it or there is none here.

        Raises:
            StoreError: If the other folder cannot be written.
        """
        stage, _, digest = reference.partition("/")
        path, to = (each.folder / stage / f"{digest}.safetensors" for each in (self, other))
        if self.open(reference) is None or other.open(reference) is not None:
            return
        # the sidecar goes last, as when a stage is made
        for ending in (".safetensors", ".json"):
            content = path.with_suffix(ending).read_bytes()
            write_atomically(to.with_suffix(ending), partial(_fill, content))
        course = self._course(stage, digest)
        if course.is_file():
            write_atomically(other._course(stage, digest), partial(_fill, course.read_bytes()))

    def checkpoint(self, stage: str, key: Mapping[str, Any]) -> Path:
        """Where unfinished work on a stage is saved, so that an interrupted run goes on where it was."""
        _, digest = self._identify(stage, key)
        return self.folder / "unfinished" / f"{stage}-{digest}.safetensors"

    def keep_course(self, stage: str, key: Mapping[str, Any], course: Sequence[Mapping[str, float]]) -> None:
        """Keep how the work on a stage went, a row a step; views show it, and nothing depends on it."""
        _, digest = self._identify(stage, key)
        columns = {name: [row.get(name) for row in course] for name in (course[0] if course else ())}
        text = json.dumps({"schema": SCHEMA, "stage": stage, "columns": columns}) + "\n"
        with contextlib.suppress(StoreError):
            write_text_atomically(self._course(stage, digest), text)

    def course(self, reference: str) -> dict[str, list[float]]:
        """Columns of what :meth:`keep_course` kept of a :meth:`reference`; empty if there is none."""
        stage, _, digest = reference.partition("/")
        if not (_NAME.fullmatch(stage) and _DIGEST.fullmatch(digest)):
            return {}
        columns = _read(self._course(stage, digest)).get("columns")
        if not isinstance(columns, dict) or not isinstance(columns.get("step"), list):
            return {}
        length = len(columns["step"])
        found = {
            name: [_number(value) for value in values]
            for name, values in columns.items()
            if isinstance(values, list) and len(values) == length
        }
        return {name: numbers for name, values in found.items() if (numbers := _finite(values)) is not None}

    def _course(self, stage: str, digest: str) -> Path:
        return self.folder / "courses" / f"{stage}-{digest}.json"

    def kept(self, stage: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Every intact result of a stage in this scope: its key, and its tensors.

        For what a record names by its content, and not by the key under which it was made.
        """
        for sidecar in sorted((self.folder / stage).glob("*.json")):
            about = _read(sidecar)
            if about.get("scope") == self.scope:
                found = _load(sidecar.with_suffix(".safetensors"))
                if found is not None:
                    yield dict(about.get("key", {})), found.tensors

    def _identify(self, stage: str, key: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        if not _NAME.fullmatch(stage):
            raise ConfigError(f"stage name {stage!r} must be lower-case letters, digits and underscores")
        full_key = {"scope": self.scope, "key": dict(key)}
        return full_key, _digest(stage, full_key)


def _digest(stage: str, full_key: Mapping[str, Any]) -> str:
    return json_digest({"stage": stage, "scope": full_key["scope"], "key": full_key["key"]})


@dataclass(frozen=True)
class _Stage:
    """What a stage holds and what making it took."""

    tensors: dict[str, Tensor]
    cost: Cost


def _note_seconds(path: Path, seconds: float) -> None:
    """Keep what an interrupted stage has taken, with what it had taken before."""
    with contextlib.suppress(StoreError):  # why it was interrupted matters more
        write_text_atomically(path, json.dumps({"seconds": round(_noted_seconds(path) + seconds, 3)}) + "\n")


def _noted_seconds(path: Path) -> float:
    return _number(_read(path).get("seconds")) or 0.0


def _number(value: Any) -> float | None:
    """A number of a sidecar; ``None`` for what is none."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _finite(values: Sequence[float | None]) -> list[float] | None:
    """The numbers; ``None`` if one of them is none."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return numbers if len(numbers) == len(values) else None


def _load(path: Path) -> _Stage | None:
    """What a stage file holds, ``None`` if it is absent, damaged, or another stage's under this name."""
    sidecar = _read(path.with_suffix(".json"))
    try:
        if sidecar.get("schema") not in READABLE or _digest(path.parent.name, sidecar) != path.stem:
            return None
        if sidecar.get("sha256") != sha256_file(path):
            return None
    # a file that is not there, or a sidecar without a key or with one that holds NaN
    except (FileNotFoundError, KeyError, ValueError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = dict(load_file(path))
    except SafetensorError:
        # What was sealed was no such file.
        return None
    seconds, peak = (_number(sidecar.get(name)) for name in ("seconds", "peak_bytes"))
    return _Stage(tensors, Cost(seconds, None if peak is None else int(peak)))


def _read(sidecar: Path) -> dict[str, Any]:
    """What a sidecar says; nothing if it is absent or damaged."""
    try:
        about = read_json(sidecar)
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise unreadable(sidecar, error) from error
    return about if isinstance(about, dict) else {}


def _fill(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    body = {"schema": SCHEMA, "sha256": sha256_file(path), **about}
    # the sidecar goes last: a crash between the two leaves a file that counts as absent
    write_text_atomically(path.with_suffix(".json"), json.dumps(body, indent=1, sort_keys=True) + "\n")
