"""One file with the cells of one method, to be handed on: a zip archive that is checked before it is used.

Members::

    manifest.json       schema, suite, method and where it came from, and the sha256 of each other member
    cells/<cell id>.json  a record, as a store keeps it
    cells/<cell id>.safetensors  its per-item arrays
    methods/<name>.py   the text of the method's file, to be read by a person: nothing imports it

The same cells give the same bytes. Nothing is unpacked under a name of the archive's choosing: members that
the manifest does not name, names that are no cell's, links, encrypted and oversized members are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmark.keep.atomic import write_atomically
from benchmark.keep.record import Record
from benchmark.keep.store import Store
from quanttune.digests import json_digest
from quanttune.errors import StoreError
from quanttune.fields import fitting

SCHEMA = 1
MANIFEST = "manifest.json"
LARGEST, LARGEST_MEMBER, MOST_MEMBERS = 256 * 2**20, 64 * 2**20, 20_000
"""Bytes of an archive, packed and unpacked, and of a member unpacked; and the number of members."""

_CELL = re.compile(r"cells/([0-9a-f]{64})\.(json|safetensors)")
_METHOD = re.compile(r"methods/[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}\.py")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class About:
    """What an archive says of itself.

    Attributes:
        suite: Name of the suite whose grid the method was measured on.
        method: The method's name.
        version: Its version, as in the cells.
        source: ``file`` and ``sha256`` of the user's own file, or ``package`` and ``version``.
        versions: Versions of the packages that all cells were measured with.
        schema: Version of the archive's form.
        files: sha256 of each member, by name; filled when it is written.
    """

    suite: str
    method: str
    version: str
    source: Mapping[str, str]
    versions: Mapping[str, str]
    schema: int = SCHEMA
    files: Mapping[str, str] = field(default_factory=dict)


def pack(path: Path, about: About, store: Store, records: Iterable[Record], texts: Mapping[str, str]) -> int:
    """Write an archive, whole or not at all.

    Args:
        path: The file.
        about: What it says of itself; the digests are added here.
        store: Where the records' files are.
        records: What goes into it.
        texts: Text of the method's files, by file name.

    Returns:
        Its size in bytes.

    Raises:
        StoreError: If it would be too large to be taken anywhere, or cannot be written.
    """
    members = {f"methods/{name}": text.encode() for name, text in texts.items()}
    for record in records:
        for file in store.files_of(record):
            if _CELL.fullmatch(f"cells/{file.name}"):
                members[f"cells/{file.name}"] = file.read_bytes()
    for name, content in members.items():
        if not (_CELL.fullmatch(name) or _METHOD.fullmatch(name)):
            raise StoreError(
                f"{name} cannot be a member of an archive; rename the file to letters and digits"
            )
        if len(content) > LARGEST_MEMBER:
            raise StoreError(f"{name} has {_mib(len(content))}, more than {_mib(LARGEST_MEMBER)}")
    if sum(map(len, members.values())) > LARGEST or len(members) >= MOST_MEMBERS:
        raise StoreError(f"the cells have more than the {_mib(LARGEST)} that an archive may have")
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    body = asdict(about) | {"files": digests}
    seal = json.dumps(body | {"digest": json_digest(body)}, indent=1, sort_keys=True).encode()

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, content in [(MANIFEST, seal), *sorted(members.items())]:
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED, 9)

    write_atomically(path, write)
    return path.stat().st_size


def unpack(path: Path, folder: Path) -> tuple[About, Store]:
    """Check an archive and make a results folder of its cells.

    Args:
        path: The archive, from anywhere.
        folder: An empty folder; it holds nothing but cells afterwards.

    Returns:
        What the archive says of itself, and the store of its cells.

    Raises:
        StoreError: If it is no archive of ours, too large, damaged, edited, or holds what does not belong;
            one line that names the file and the member.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise StoreError(f"{path} has {_mib(size)}, more than {_mib(LARGEST)} that an archive may have")
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            about = _about(path, archive, members)
            store = Store(folder)
            store.prepare()
            (folder / "cells").mkdir()
            for name, content in _contents(path, archive, members, about):
                found = _CELL.fullmatch(name)
                if found is not None:
                    store.path_of(found[1], f".{found[2]}").write_bytes(content)
    except (OSError, RuntimeError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        # zipfile knows all of these of a file that is none; EOFError is among what it lets through
        raise StoreError(f"{path} is no archive that can be read: {_line(error)}; get it again") from error
    except EOFError as error:
        raise StoreError(f"{path} ends too early; get it again") from error
    _require_whole(path, about, store)
    return about, store


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in archive.infolist():
        name = info.filename
        shown = ascii(name[:80])
        kind = stat.S_IFMT(info.external_attr >> 16)
        if name != MANIFEST and not (_CELL.fullmatch(name) or _METHOD.fullmatch(name)):
            raise StoreError(f"{path} holds {shown}, which is no cell and no method; nothing was taken")
        if name in members:
            raise StoreError(f"{path} holds {shown} twice; nothing was taken")
        if kind not in (0, stat.S_IFREG) or info.flag_bits & _ENCRYPTED:
            raise StoreError(f"{path}: {shown} is a link or encrypted; nothing was taken")
        if info.file_size > LARGEST_MEMBER:
            raise StoreError(f"{path}: {shown} is larger than {_mib(LARGEST_MEMBER)}; nothing was taken")
        members[name] = info
        total += info.file_size
    if total > LARGEST or len(members) > MOST_MEMBERS:
        raise StoreError(f"{path} unpacks to more than {_mib(LARGEST)}; nothing was taken")
    return members


def _about(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> About:
    if MANIFEST not in members:
        raise StoreError(f"{path} has no {MANIFEST}: it is no archive of `submit`")
    try:
        manifest = json.loads(_read(archive, members[MANIFEST]))
    except RecursionError as error:
        raise ValueError("the manifest is nested too deeply") from error
    if not isinstance(manifest, dict):
        raise StoreError(f"{path}: {MANIFEST} is no JSON object; get it again")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise StoreError(f"{path} has schema {schema}, this version reads up to {SCHEMA}; upgrade")
    body = {name: value for name, value in manifest.items() if name != "digest"}
    if manifest.get("digest") != json_digest(body):
        raise StoreError(f"{path}: {MANIFEST} is damaged or was edited; get it again")
    about = About(**fitting(About, body))
    if set(about.files) != set(members) - {MANIFEST}:
        raise StoreError(f"{path}: its members are not those that {MANIFEST} names; get it again")
    return about


def _contents(
    path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], about: About
) -> Iterator[tuple[str, bytes]]:
    for name, digest in sorted(about.files.items()):
        content = _read(archive, members[name])
        if not _DIGEST.fullmatch(digest) or hashlib.sha256(content).hexdigest() != digest:
            raise StoreError(f"{path}: {name} is not what {MANIFEST} names; get it again")
        yield name, content


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # never more than was declared, whatever the packed bytes unpack to
    with archive.open(info) as stream:
        content = stream.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise ValueError(f"{info.filename[:80]!a} has another size than declared")
    return content


def _require_whole(path: Path, about: About, store: Store) -> None:
    """Refuse what is well packed and still no submission.

    Raises:
        StoreError: If a record is damaged or of another method or limited, or an array file is none.
    """
    from safetensors import SafetensorError

    claimed = {found[1] for name in about.files if (found := _CELL.fullmatch(name))}
    known = {record.cell.cell_id: record for record in store.records()}
    for cell_id in sorted(claimed):
        record = known.get(cell_id)
        if record is None:
            raise StoreError(f"{path}: the record of cell {cell_id[:12]} is damaged; get it again")
        if record.cell.method != about.method or record.cell.limit is not None:
            what = "has a limit" if record.cell.limit is not None else f"is of method {record.cell.method}"
            raise StoreError(f"{path}: cell {cell_id[:12]} {what}; pack it again with `submit`")
        if record.items_sha256 is None:
            continue
        try:
            arrays = store.items(cell_id)
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{path}: the items of cell {cell_id[:12]} cannot be read: {error}") from error
        if record.result is None or len(arrays.get("scores", ())) != record.result.n:
            raise StoreError(f"{path}: the items of cell {cell_id[:12]} are not those of its record")
    if not claimed:
        raise StoreError(f"{path} holds no cell")


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
