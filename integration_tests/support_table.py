"""
Writes the support table into docs/support.md, from the results of the last full run.

    python -m integration_tests.support_table

No cell is filled by hand: ``tests/test_support_table.py`` fails if the page differs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration_tests.results import read_results
from integration_tests.rows import (
    ROOT,
    Row,
    families,
    features,
    more_families,
    more_features,
    rows,
)

RESULTS = Path(__file__).with_name("results")
PAGE = ROOT / "docs" / "support.md"
BEGIN = "<!-- support table: python -m integration_tests.support_table -->"
END = "<!-- end of support table -->"
CELLS = {"passed": "yes", "unsupported": "no (vLLM)", "failed": "fails"}


def render(results: dict[str, Any]) -> str:
    """
    Return the table in markdown, with what it was measured on.

    :param results: see :func:`read_results`
    """
    lines = _table(families(), features(), results["cells"])
    ran_in_all = {
        name: title
        for name, title in more_families().items()
        if more_features().keys() <= results["cells"].get(name, {}).keys()
    }
    if ran_in_all:
        more = _table(ran_in_all, more_features(), results["cells"])
        lines += ["", "Families that fewer tests go through:", "", *more]
    not_run = [t for name, t in more_families().items() if name not in ran_in_all]
    if not_run:
        lines += ["", f"Not run in vLLM: {', '.join(not_run)}."]
    ran = results["versions"]
    return "\n".join(
        [
            *lines,
            "",
            "All of these are small models with random weights. A cell shows the last "
            "run of its tests.",
            "",
            *_reasons(results["cells"]),
            "",
            f"`make integration` on {results['date']}: {results['tests']} tests passed "
            f"and {results['failures']} failed in {results['minutes']} minutes, "
            f"{results['processes']} processes side by side; "
            f"commit {ran['commit']}, Python {ran['python']}.",
            _environments(ran),
            *_later(results),
        ]
    )


def _table(
    titles: dict[str, str], headings: dict[str, str], cells: dict[str, dict[str, str]]
) -> list[str]:
    """Return the lines of a table of families by features."""
    lines = [
        f"| family | {' | '.join(headings.values())} |",
        f"|:---|{':---:|' * len(headings)}",
    ]
    for name, title in titles.items():
        row = [CELLS[cells[name][feature]] for feature in headings]
        lines.append(f"| {title} | {' | '.join(row)} |")
    return lines


def _environments(ran: dict[str, Any]) -> str:
    """Return both environments' packages."""
    compress, serve = (
        ", ".join(f"{name} {version}" for name, version in ran[side].items())
        for side in ("compress", "serve")
    )
    return f"Compressed with {compress}; served with {serve}."


def _later(results: dict[str, Any]) -> list[str]:
    """Return the table of the runs after the full one, the first one in front."""
    if not results["later"]:
        return []
    lines = [
        "",
        "Run after it, with the same packages where no others are named. Where a cell "
        "failed, the last column says what its last run found, which is what the "
        "tables show. `-dirty`: with changes that were not committed yet.",
        "",
        "| date | commit | cells | passed | failed | failed cells: their last run |",
        "|:---|:---|:---|---:|---:|:---|",
    ]
    for run in results["later"]:
        ran, cells = run["versions"], _by_family(run["cells"])
        what = _named(cells)
        if _environments(ran) != _environments(results["versions"]):
            what += f". {_environments(ran)}"
        failed: dict[str, list[tuple[str, str]]] = {}
        for family, feature in cells:
            if run["cells"][family][feature] == "failed":
                now = CELLS[results["cells"][family][feature]]
                failed.setdefault(now, []).append((family, feature))
        said = "; ".join(f"{_named(of)}: {now}" for now, of in failed.items())
        lines.append(
            f"| {run['date']} | {ran['commit']} | {what} | {run['tests']} | "
            f"{run['failures']} | {said} |"
        )
    return lines


def _by_family(cells: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    """Return family and feature of all cells, but of families taken out since."""
    titles = families() | more_families()
    return [
        (name, feature) for name in cells if name in titles for feature in cells[name]
    ]


def _named(cells: Sequence[tuple[str, str]]) -> str:
    """Return features with the families that they are of; all of them need no names."""
    titles = families() | more_families()
    of_features: dict[str, list[str]] = {}
    for family, feature in cells:
        of_features.setdefault(features()[feature], []).append(titles[family])
    together: dict[str, list[str]] = {}
    for heading, names in of_features.items():
        where = "" if len(names) == len(families()) else f" ({', '.join(names)})"
        together.setdefault(where, []).append(heading)
    return "; ".join(f"{', '.join(of)}{where}" for where, of in together.items())


def _reasons(cells: dict[str, dict[str, str]]) -> list[str]:
    """Return a line for each thing that vLLM says where it cannot do something."""
    found: dict[tuple[str, str], list[str]] = {}
    for parameter in rows("unsupported"):
        row: Row = parameter.values[0]
        if row.cell is None or row.unsupported is None:
            continue
        family, feature = row.cell
        if cells.get(family, {}).get(feature) == "unsupported":
            reason = (features()[feature], row.unsupported)
            named = families() | more_families()
            found.setdefault(reason, []).append(named[family])
    together: dict[tuple[str, str], list[str]] = {}
    for (heading, message), titles in found.items():
        together.setdefault((", ".join(titles), message), []).append(heading)
    return [
        f"- {titles}, {', '.join(headings)}: vLLM says `{message}`, without NBL, too"
        for (titles, message), headings in together.items()
    ]


def replaced(page: str, table: str) -> str:
    """Return docs/support.md's text with the table between its two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/support.md lacks the lines {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Write the table into docs/support.md."""
    results = read_results(RESULTS)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replaced(text, render(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
