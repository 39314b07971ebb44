"""The pages of a site, made from the finished cells of one or more suites."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.keep.reference_store import ReferenceStore
from benchmark.keep.store import Store
from benchmark.report.analyses import ModelAnalysis
from benchmark.report.claims import Claim, claims
from benchmark.report.comparison import Comparison
from benchmark.report.costs import seconds_text
from benchmark.report.gallery import analyse_command
from benchmark.report.html import make_report, summary_of
from benchmark.report.roles import OURS
from benchmark.report.rows import SuiteRows
from benchmark.report.significance import LEVEL
from benchmark.report.site.advice import advice_of
from benchmark.report.site.board import EVERY, Group, Line, board_of
from benchmark.report.site.cells import CellPage, cell_context
from benchmark.report.site.folder import LaterPage
from benchmark.report.site.links import cell_page, page_of
from benchmark.report.site.site_errors import ErrorsBySite
from benchmark.subject.lookup import get_model, get_task
from benchmark.subject.metrics.display import in_points, loss_name, number
from quanttune.errors import QuantTuneError

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

    from benchmark.grid.cells import Cell
    from benchmark.keep.record import Record

STATIC = ("site.css", "site.js")


@dataclass(frozen=True)
class SuiteView:
    """What a site shows of a suite.

    Attributes:
        rows: Its finished cells.
        analyses: One per model; they only read.
        frames: Data of every figure, by name.
        absent: The models that a figure lacks, by its name.
    """

    rows: SuiteRows
    analyses: Sequence[ModelAnalysis]
    frames: Mapping[str, pd.DataFrame]
    absent: Mapping[str, Sequence[str]]

    @property
    def name(self) -> str:
        """The suite's name."""
        return self.rows.suite.name

    @cached_property
    def groups(self) -> list[Group]:
        """The leaderboard."""
        return board_of(self.rows)

    @cached_property
    def claims(self) -> list[Claim]:
        """The paper's claims; none where its method was not measured."""
        if not any(cell.method == OURS for cell in self.rows.cells):
            return []
        return claims(self.rows, Comparison(self.rows), self.frames)


class Site:
    """A folder of pages.

    Args:
        views: The suites, the one to begin with first.
        store: Where their cells are.
        results: The store's folder as commands name it.
    """

    def __init__(self, views: Sequence[SuiteView], store: Store, results: Path) -> None:
        self._views = views
        self._store = store
        self._results = results
        self._paths = _cell_pages(views)
        self._places: dict[str, list[tuple[Group, Line]]] = {}
        self._summaries: dict[tuple[str, ...], dict[str, str]] = {}
        for view in views:
            for group in view.groups:
                for line in group.lines if group.setting.model != EVERY else ():
                    for cell in line.cells:
                        path = self._page_of_cell(view.name, cell.cell_id)
                        self._places.setdefault(path, []).append((group, line))

    def pages(self) -> Iterator[tuple[str, str | LaterPage]]:
        """Each file's path within the site and its text, which a cell's page makes when it is asked for."""
        folder = resources.files("benchmark.report.site") / "static"
        for name in STATIC:
            yield name, (folder / name).read_text(encoding="utf-8")
        yield "index.html", self._index()
        yield "claims.html", self._render("claims.html.j2", "", "claims", views=self._views)
        yield "models.html", self._render("models.html.j2", "", "models", models=self._models())
        yield "methods.html", self._render("methods.html.j2", "", "methods", methods=self._methods())
        for model in self._models():
            groups = self._groups(lambda group, name=model["name"]: group.setting.model == name)
            text = self._render("model.html.j2", "../", "models", model=model, groups=groups)
            yield page_of("models", model["name"]), text
        for method in self._methods():
            found = self._lines(lambda line, name=method["label"]: line.method == name)
            text = self._render("method.html.j2", "../", "methods", method=method, lines=found)
            yield page_of("methods", method["label"]), text
        for view in self._views:
            path = page_of("suites", view.name)
            yield (
                path,
                make_report(view.rows, view.frames, found=view.claims, home="../index.html"),
            )
        yield from self._cells()

    def _index(self) -> str:
        suites = [
            {
                "name": view.name,
                "description": view.rows.suite.description,
                "finished": view.rows.finished,
                "total": len(view.rows.cells),
                "advice": advice_of(view.groups),
                "absent": view.absent,
                "analyse": analyse_command(view.rows.suite.origin, self._results),
                "split": view.rows.suite.split,
                "seeds": view.rows.suite.seeds,
            }
            for view in self._views
        ]
        groups = [group for view in self._views for group in view.groups]
        return self._render(
            "index.html.j2",
            "",
            "board",
            suites=suites,
            groups=groups,
            first=_first(self._views[0].groups),
            options={
                "model": list(dict.fromkeys(group.setting.model for group in groups)),
                "width": list(dict.fromkeys(group.setting.width for group in groups)),
                "profile": list(dict.fromkeys(group.setting.profile for group in groups)),
            },
        )

    def _models(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for view in self._views:
            for record in _records(view.rows):
                cell = record.cell
                about = found.setdefault(
                    cell.model, {"name": cell.model, "suites": {}, "cells": 0, "references": {}}
                )
                about["suites"][view.name] = page_of("suites", view.name)
                about["cells"] += 1
                about["task_name"], about["data"] = cell.task, cell.task_fingerprint
                if record.result is None:
                    continue
                # suites of several machines have references of their own
                reference = about["references"].setdefault(
                    record.reference_digest or "",
                    {
                        "fp32": record.result.fp32,
                        "n": record.result.n,
                        "metric": record.result.metric,
                        "suites": [],
                        "page": None,
                    },
                )
                if view.name not in reference["suites"]:
                    reference["suites"].append(view.name)
                if cell.is_reference and reference["page"] is None:
                    reference["page"] = self._page_of_cell(view.name, cell.cell_id)
        for name, about in found.items():
            about["page"] = page_of("models", name)
            try:
                entry = get_model(name)
                about |= {"title": entry.title, "source": entry.source, "family": entry.family}
                about |= {"task": get_task(about["task_name"]).title}
            except QuantTuneError:  # a model of a file that is not included here
                about |= {"title": "", "source": "", "family": "", "task": about["task_name"]}
        return list(found.values())

    def _methods(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for view in self._views:
            for cell in view.rows.cells:
                if cell.cell_id in view.rows.records and not cell.is_reference:
                    found.setdefault(cell.label, {**summary_of(cell), "page": page_of("methods", cell.label)})
        return list(found.values())

    def _groups(self, wanted: Any) -> list[Group]:
        return [group for view in self._views for group in view.groups if wanted(group)]

    def _lines(self, wanted: Any) -> list[tuple[Group, Line]]:
        found = self._groups(lambda group: True)
        return [(group, line) for group in found for line in group.lines if wanted(line)]

    def _cells(self) -> Iterator[tuple[str, LaterPage]]:
        published = isinstance(self._store, ReferenceStore)
        told: set[str] = set()
        for view in self._views:
            errors = ErrorsBySite(view.analyses)
            for record in _records(view.rows):
                path = self._page_of_cell(view.name, record.cell.cell_id)
                if path in told:
                    continue
                told.add(path)
                about = self._about(record.cell)
                page = CellPage(
                    path, record, view.rows.suite, self._results, published, errors.of(record), about
                )
                digest = view.rows.store.digest_of(record.cell.cell_id)
                yield path, LaterPage(self._made_from(page, digest), partial(self._cell, page))

    def _about(self, cell: Cell) -> Mapping[str, str]:
        """What the cell's method is, made once for all cells that share it."""
        if cell.is_reference:
            return {}
        key = (cell.label, cell.variant, cell.method_version)
        if key not in self._summaries:
            self._summaries[key] = summary_of(cell)
        return self._summaries[key]

    def _page_of_cell(self, suite: str, cell_id: str) -> str:
        return self._paths[suite, cell_id]

    def _cell(self, page: CellPage) -> str:
        places = self._places.get(page.path, [])
        return self._render("cell.html.j2", "../", "", places=places, **cell_context(page))

    def _made_from(self, page: CellPage, digest: str) -> str:
        """Digest of all that a cell's page shows: its record, its places among others, and this code."""
        places = [
            (
                group.setting.suite,
                group.items,
                group.smallest,
                len(group.lines),
                line.rank,
                line.rival,
                line.p,
            )
            for group, line in self._places.get(page.path, [])
        ]
        suite = (page.suite.name, page.suite.origin, str(page.results), page.published)
        outcome = (digest, page.record.finished_at, page.record.result)
        shown = (self._code, self._names, outcome, suite, page.errors, page.about, places)
        return sha256(repr(shown).encode()).hexdigest()

    @cached_property
    def _code(self) -> str:
        # All of the suite: what a page says is formatted by metrics and by the engine as well.
        files = sorted(path for path in Path(__file__).parents[2].rglob("*") if path.suffix in (".py", ".j2"))
        return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    @cached_property
    def _names(self) -> list[str]:
        return [view.name for view in self._views]

    def _render(self, template: str, root: str, current: str, **context: Any) -> str:
        return self._environment.get_template(template).render(
            root=root, current=current, suites_of_site=self._names, **context
        )

    @cached_property
    def _environment(self) -> Environment:
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("benchmark.report.site"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.globals |= {
            "page_of": page_of,
            "cell_page": self._page_of_cell,
            "EVERY": EVERY,
            "LEVEL": LEVEL,
            "number": number,
            "in_points": in_points,
            "loss_name": loss_name,
        }
        environment.filters |= {"seconds": seconds_text, "p_value": p_text, "json": _json}
        return environment


def _first(groups: Sequence[Group]) -> Group:
    """What is shown at first: the mean over models at the last precision, which tells methods apart."""
    kind, profile = groups[0].setting.model, groups[0].setting.profile
    return [group for group in groups if (group.setting.model, group.setting.profile) == (kind, profile)][-1]


def _cell_pages(views: Sequence[SuiteView]) -> dict[tuple[str, str], str]:
    """The page of a cell, by suite and cell id: suites whose numbers of it differ have a page each."""
    paths: dict[tuple[str, str], str] = {}
    # by digest, the first one first; suites that have the same number share its page
    made: dict[str, dict[str, str]] = {}
    for view in views:
        for record in _records(view.rows):
            cell_id = record.cell.cell_id
            pages = made.setdefault(cell_id, {})
            page = cell_page(cell_id, view.name if pages else "")
            paths[view.name, cell_id] = pages.setdefault(view.rows.store.digest_of(cell_id), page)
    return paths


def _records(rows: SuiteRows) -> list[Record]:
    return [rows.records[cell.cell_id] for cell in rows.cells if cell.cell_id in rows.records]


def p_text(value: float) -> str:
    """A p-value with two digits, small ones as a bound."""
    if value < 0.0001:
        return "p < 0.0001"
    return f"p = {value:.2g}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
