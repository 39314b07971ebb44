"""The lock file of a results folder: what released weights and external data were at first use.

``results/lock.json`` is filled when a model is first used and checked at every later use, so that nothing is
measured on other weights, another tokenizer or other data than before without a word. Committed, it pins them
for everybody. It holds, for each model::

    repo, revision, commit          where the checkpoint came from; the commit where it is known
    weights, tokenizer              digests of the tensors and of the tokenizer's behaviour
    data_config                     the resolved preprocessing
    calibration                     digest of the calibration ids, by number of items and seed
    data                            fingerprint of the task's data, by split
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.keep.atomic import file_lock, write_text_atomically
from quanttune.digests import canonical_json
from quanttune.errors import QuantTuneError, StoreError
from quanttune.files import read_json

FILE = "lock.json"
SCHEMA = 1
_ADVISORY = ("commit",)  # the same tensors from another commit, or from a folder, are the same weights


class LockError(QuantTuneError):
    """Weights or data that are not the pinned ones."""


class Lock:
    """The lock file of a results folder.

    Args:
        results: The folder.
    """

    def __init__(self, results: Path) -> None:
        self.path = results / FILE
        self._guard = results / "locks" / f"{FILE}.lock"

    def read(self) -> dict[str, dict[str, Any]]:
        """What is pinned, by model.

        Raises:
            StoreError: If the file is damaged; it is never taken for empty, which would pin anew.
        """
        try:
            content = read_json(self.path)
            canonical_json(content)  # NaN is nothing that was pinned
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {self.path}: {error}; restore it or delete it") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise StoreError(f"{self.path} is no lock file of schema {SCHEMA}; restore it or delete it")
        models: dict[str, dict[str, Any]] = content.get("models", {})
        for model, facts in models.items() if isinstance(models, dict) else [("models", models)]:
            if not isinstance(facts, dict):
                raise self._misshapen(model, facts)
        return models

    def check(self, model: str, facts: Mapping[str, Any]) -> None:
        """Pin what is new about a model, and refuse what differs from what is pinned.

        Args:
            model: Its name.
            facts: Plain JSON values; the entries of a mapping are pinned one by one. None is unknown.

        Raises:
            LockError: If a fact differs; the message names both values and the remedy. Nothing is pinned.
            StoreError: If the file is damaged or cannot be written.
        """
        with file_lock(self._guard):
            models = self.read()
            pinned = models.setdefault(model, {})
            before = canonical_json(pinned)
            for name, value in facts.items():
                if isinstance(value, Mapping):
                    known = pinned.setdefault(name, {})
                    if not isinstance(known, dict):
                        raise self._misshapen(f"{name} of {model}", known)
                    for key, item in value.items():
                        self._pin(model, known, str(key), item, f"{name} {key}")
                else:
                    self._pin(model, pinned, name, value, name)
            if canonical_json(pinned) != before:
                text = json.dumps({"schema": SCHEMA, "models": models}, indent=1, sort_keys=True)
                write_text_atomically(self.path, text + "\n")

    def _misshapen(self, what: str, value: Any) -> StoreError:
        return StoreError(
            f"{what} in {self.path} is {value!r}, not values by name; restore the file or delete it"
        )

    def _pin(self, model: str, pinned: dict[str, Any], name: str, value: Any, what: str) -> None:
        if value is None:
            return
        if pinned.get(name) is None:
            pinned[name] = value
        elif pinned[name] != value and name not in _ADVISORY:
            raise LockError(
                f"{what} of model {model} is {value}, pinned in {self.path} is {pinned[name]}: not what "
                "earlier cells were measured with. Bring back the pinned one; or, to accept this one, "
                f"delete entry {model!r} from that file and run with --overwrite always"
            )
