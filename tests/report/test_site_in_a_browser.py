"""The pages as Chromium shows them: filters, both themes, a phone, the keyboard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.grid.suite import load_suite
from benchmark.keep.reference_store import ReferenceStore, reference_folder
from benchmark.keep.store import Store
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.site.folder import write_site
from benchmark.report.site.links import cell_page, page_of
from benchmark.report.site.pages import Site
from tests.chromium import FOUND, tab
from tests.report.made_rows import ACCURACY, view_of

VISIBLE = "[...document.querySelectorAll('#board tbody tr')].filter(row => !row.hidden)"
COLOURS = """(() => {
  const light = text => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parts.slice(0, 3).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  let worst = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    const said = [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
    if (!said || !node.getClientRects().length) continue;
    const svg = node.closest('svg');
    const ink = svg ? getComputedStyle(node).fill : getComputedStyle(node).color;
    const pair = [light(ink), light(behind(node))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < worst[0]) worst = [contrast, node.outerHTML.slice(0, 100)];
  }
  return JSON.stringify(worst);
})()"""


@pytest.mark.slow
@pytest.mark.skipif(FOUND is None, reason="no Chromium is installed")
def test_a_browser_filters_sorts_and_draws(rows: SuiteRows, store: Store, tmp_path: Path) -> None:
    index = write_site(tmp_path / "site", Site([view_of(rows)], store, store.root).pages())
    with tab(tmp_path / "profile") as page:
        page.look(1280, 900)
        page.open(index)
        assert page.run(f"{VISIBLE}.length") == 5
        page.run("document.querySelector('[name=trained]').focus()")
        page.press("ArrowDown", 40)  # the keyboard alone: "without"
        page.wait_for(f"{VISIBLE}.length === 2")
        shown = page.run(f"{VISIBLE}.map(row => [row.dataset.method, row.cells[0].textContent].join())")
        assert shown == ["minmax,1", "mse,2"]
        assert "trained=no" in page.run("location.hash")
        assert page.run("document.querySelector('#count').textContent").startswith("2 methods: all models")
        page.open(index, "#model=tiny_bert&width=W8A8")
        methods = page.run(f"{VISIBLE}.map(row => row.dataset.method)")
        assert methods == sorted(ACCURACY, key=lambda name: -ACCURACY[name]["W8A8"])
        page.run("document.querySelector('th[data-key=recovery] button').click()")
        assert page.run(f"{VISIBLE}.map(row => row.dataset.method)") == methods[::-1]
        assert page.run("document.querySelector('[data-key=recovery]').ariaSort") == "ascending"
        page.run("document.querySelector('button[type=reset]').click()")
        page.wait_for("location.hash === ''")
        page.wait_for("document.querySelector('[name=trained]').value === ''")
        assert page.complaints == []


@pytest.mark.slow
@pytest.mark.skipif(FOUND is None, reason="no Chromium is installed")
def test_pages_fit_a_phone_and_can_be_read_in_both_themes(tmp_path: Path) -> None:
    kept = reference_folder()
    assert kept is not None
    store = ReferenceStore(kept)
    rows = collect_rows(store, load_suite("laptop"))
    index = write_site(tmp_path / "site", Site([view_of(rows)], store, Path("reference")).pages())
    names = ["index.html", "models.html", "methods.html", "claims.html"]
    names += [page_of("models", "minilm_l6"), page_of("methods", "quanttune")]
    names += [cell_page(next(cell.cell_id for cell in rows.cells if cell.label == "mse"))]
    names += [page_of("suites", "laptop")]
    with tab(tmp_path / "profile") as page:
        for width, theme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
            page.look(width, 900, theme)
            for name in names:
                page.open(index.parent / name)
                wide = page.run("document.documentElement.scrollWidth")
                assert wide <= width, (name, width, wide)
                contrast, where = json.loads(page.run(COLOURS))
                assert contrast >= 4.5, (name, theme, where)
            page.open(index)
            # a link for every ranked method with a known cost, each of which the keyboard reaches
            points = page.run("document.querySelectorAll('#pareto svg a[href]').length")
            assert points == 9
            first = page.run("document.querySelector('#pareto svg a').getAttribute('href')")
            assert (index.parent / first).is_file()
            page.run("document.querySelector('#pareto svg a').focus()")
            assert page.run("document.activeElement.getAttribute('aria-label')")
        page.open(index)
        page.press("Tab", 9)
        assert page.run("document.activeElement.className") == "skip"
        assert page.complaints == []
        assert all(url.startswith(("file:", "data:", "about:")) for url in page.requests)
