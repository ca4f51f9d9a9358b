"""The tables of accuracy.py's JSON, for the console and as one HTML page."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table as ConsoleTable

from omniad_edge import page
from omniad_edge.files import atomic_write
from omniad_edge.metrics import METRICS
from omniad_edge.report import HEADINGS

FIGURES = (*METRICS, "mad")
FIGURE_HEADINGS = HEADINGS[3:]


@dataclass(frozen=True)
class Table:
    """headings and rows of plain text; detail: too long for the console."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    detail: bool = False


def print_report(report: dict) -> None:
    console = Console()
    for name, value in header_lines(report).items():
        console.print(f"{name}: {value}", markup=False, soft_wrap=True, highlight=False)
    for table in tables(report):
        if table.detail:
            continue
        shown = ConsoleTable(title=table.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for index, heading in enumerate(table.headings):
            shown.add_column(heading.replace(" ", "\n"), justify="right" if index else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(escape_markup, row))
        console.print(shown)
        console.print(table.note, markup=False, highlight=False)


def write_html(path: Path, report: dict) -> None:
    """The same and each product's table, atomically."""
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="replace") as file:
        file.write(page.head("Detection quality") + page.pairs(header_lines(report)))
        for table in tables(report):
            rows = (page.row(map(escape, row)) for row in table.rows)
            file.write(f"<h2>{escape(table.title)}</h2>\n{page.table(map(escape, table.headings), rows)}")
            file.write(f'<p class="muted">{escape(table.note)}</p>\n' if table.note else "")
        file.write("</body></html>\n")


def header_lines(report: dict) -> dict[str, str]:
    header = report["header"]
    lines = {
        "data": header["data"],
        "measured": f"{header['date']}, commit {header['commit']}",
        "machine": f"{header['cpu']}, {header['cores']} cores, {header['threads']} threads used",
        "load average": f"{header['load_before']} before, {header['load_after']} after",
        "versions": ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
    }
    for run in report["runs"]:
        facts = dict(run["facts"])
        model = ", ".join(f"{name} {value}" for name, value in facts.pop("model").items())
        lines[run["run"]] = f"{model}; " + ", ".join(f"{name} {shown(value)}" for name, value in facts.items())
        lines |= {f"not here: {name}": reason for name, reason in run["left_out"].items()}
        if run["peers"]:
            versions = run["peers"]["versions"].items()
            lines["peers"] = ", ".join(f"{name} {version}" for name, version in versions)
    return lines


def shown(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def tables(report: dict) -> Iterator[Table]:
    runs = report["runs"]
    if report["paper"]:
        yield paper_table(report["paper"], runs)
    yield detection_table(runs)
    if len(runs) > 1:
        yield seeds_table(runs)
    for run in runs:
        if any("changes" in method for method in run["methods"]):
            yield engines_table(run)
    if runs[0]["one_image"]:
        yield cost_table(runs[0])
    yield from product_tables(runs[0])


def paper_table(paper: dict, runs: list[dict]) -> Table:
    ours = [("ours, seed {seed}".format(**run["facts"]), run["published"]) for run in runs]
    rows = [figure_row(name, figures) for name, figures in [("the paper", paper["figures"]), *ours]]
    for name, figures in ours:
        rows.append((f"{name}: difference", *differences(figures, paper["figures"])))
    note = (
        f"Percent; pixel F1-max and AUPRO of both as the published evaluator takes them. The paper: "
        f"{paper['epochs']} epochs; of ours see above."
    )
    return Table(f"{paper['data']}: Table I of the paper", ("", *FIGURE_HEADINGS), rows, note)


def differences(figures: dict, reference: dict) -> list[str]:
    return [
        "n/a" if figures[name] is None else f"{100 * (figures[name] - reference[name]):+.1f}" for name in FIGURES
    ]


def detection_table(runs: list[dict]) -> Table:
    rows = []
    for run in runs:
        seed = f", seed {run['facts'].get('seed')}" if len(runs) > 1 else ""
        for method in run["methods"]:
            models = f", {method['models']} models" if method["models"] > 1 else ""
            rows.append(figure_row(method["name"] + models + seed, method["mean"]))
    products = len(runs[0]["methods"][0]["products"])
    note = (
        f"Percent, mean over the {products} products; exact forms of all metrics. Ours is one model of all; "
        "PaDiM and PatchCore are a model for each, of the same backbone weights and images."
    )
    return Table("Detection", ("Method", *FIGURE_HEADINGS), rows, note)


def seeds_table(runs: list[dict]) -> Table:
    rows = []
    means = [run["methods"][0]["mean"] for run in runs]
    for title, function in (("mean", np.mean), ("deviation", lambda values: np.std(values, ddof=1))):
        values = [[mean[name] for mean in means] for name in FIGURES]
        cells = ("n/a" if None in of_name else f"{100 * function(of_name):.2f}" for of_name in values)
        rows.append((title, *cells))
    return Table(f"{len(runs)} runs, torch fp32", ("", *FIGURE_HEADINGS), rows, "Percent; sample deviation.")


def engines_table(run: dict) -> Table:
    rows = []
    for method in run["methods"]:
        if moved := method.get("changes"):
            images = sum(one["n_good"] + one["n_defective"] for one in method["products"])
            flips = "n/a" if moved["verdict_flips"] is None else f"{moved['verdict_flips']} of {images}"
            aurocs = (percent(moved[name], 3) for name in ("image_auroc", "pixel_auroc"))
            rows.append((method["name"], flips, *aurocs, f"{moved['map']:.1e}"))
    headings = ("Engine", "Verdict flips", "Image AUROC, points", "Pixel AUROC, points", "Map value")
    note = (
        "Largest differences of a product, or of a map's value, from the trained network in torch. A verdict "
        "flips where an image is above the highest good score of its product on one side only."
    )
    return Table(f"Engines of {run['run']} against torch in fp32", headings, rows, note)


def cost_table(run: dict) -> Table:
    rows = [
        (
            row["name"],
            f"{row['p50_ms']:.1f}",
            f"{row['p90_ms']:.1f}",
            "n/a" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{row['stored_bytes'] / 1e6:.1f}",
        )
        for row in run["one_image"]
    ]
    peers = run["peers"]
    note = "Pixels to anomaly map, batch 1. Peak: memory of a process that does nothing else, libraries included. "
    if peers:
        seconds = ", ".join(f"{method} {took:g} s" for method, took in peers["fit_s"].items())
        note += (
            f"Stored: for all products. Peers: with the models of {peers['timed_product']}, which has the median "
            f"number of training images; fitting the last product took {seconds} on {peers['device']}."
        )
    headings = ("Method", "p50 ms", "p90 ms", "Peak MiB", "Stored MB")
    return Table("One image", headings, rows, note)


def product_tables(run: dict) -> Iterator[Table]:
    for index, product in enumerate(run["methods"][0]["products"]):
        rows = [figure_row(method["name"], method["products"][index]) for method in run["methods"]]
        title = f"{product['product']}: {product['n_good']} good, {product['n_defective']} defective"
        yield Table(title, ("Method", *FIGURE_HEADINGS), rows, detail=True)


def figure_row(name: str, figures: dict) -> tuple[str, ...]:
    return (name, *(percent(figures[figure]) for figure in FIGURES))


def percent(fraction: float | None, digits: int = 1) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.{digits}f}"
