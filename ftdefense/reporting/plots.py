"""PNG plots: changes per defense and attack, and curves along the attack."""

from collections.abc import Sequence
import math
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  After the backend is chosen.

from ftdefense.reporting import rows as result_rows  # noqa: E402

Row = result_rows.Row

# Okabe and Ito's colour-blind-safe palette.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_BAND = 13  # Defenses side by side.
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.dpi": 130,
}


def _names(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))


def _common(rows: Sequence[Row]) -> list[str]:
    """Attacks that several defenses meet; all, where none is.

    The undefended model meets every naive recipe of a run: a table's business.
    """
    met: dict[str, set[str]] = {}
    for row in rows:
        met.setdefault(row["attack"], set()).add(row["defense"])
    return [name for name, by in met.items() if len(by) > 1] or list(met)


def save(figure: plt.Figure, path: pathlib.Path) -> pathlib.Path:
    """Writes a figure that appears whole or not at all, and closes it."""
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, bbox_inches="tight")
    plt.close(figure)
    partial.replace(path)
    return path


def bars(rows: Sequence[Row], path: pathlib.Path) -> pathlib.Path:
    """Change against the defended model: capability above, harmful score below.

    In the shape of arXiv 2605.14605, Figure 3: groups are defenses, bars attacks; error
    bars are the 95 % interval over prompts, or with several seeds their deviation.
    """
    after = [row for row in rows if row["stage"] == "after"]
    defenses, attacks = _names(after, "defense"), _common(after)
    bands = [defenses[i : i + _BAND] for i in range(0, len(defenses), _BAND)]
    most = max(map(len, bands))
    panels = (("capability", "Δ capability"), ("harmful_score", "Δ harmful score"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * len(bands),
            1,
            squeeze=False,
            figsize=(max(6.5, 1.1 * most + 3), 5.5 * len(bands)),
        )
        for i, band in enumerate(bands):
            for line, (name, label) in enumerate(panels):
                axis = axes[2 * i + line][0]
                _draw_bars(axis, after, band, attacks, name)
                axis.set_ylabel(label)
                axis.set_xlim(-0.6, most - 0.4)
                axis.set_xticks(range(len(band)), band if line else [""] * len(band))
                if most > 6:
                    axis.tick_params(axis="x", rotation=25)
        axes[0][0].legend(
            ncols=len(attacks), frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0)
        )
        figure.tight_layout()
        return save(figure, path)


def _draw_bars(axis, after, defenses, attacks, name) -> None:
    for j, attack in enumerate(attacks):
        width = 0.8 / len(attacks)
        offset = (j - (len(attacks) - 1) / 2) * width
        heights, spans = [], []
        for defense in defenses:
            group = [
                row
                for row in after
                if row["defense"] == defense and row["attack"] == attack
            ]
            height, span = _change(group, name)
            heights.append(height)
            spans.append(span)
        axis.bar(
            [i + offset for i in range(len(defenses))],
            heights,
            width * 0.92,
            yerr=list(zip(*spans, strict=True)),
            color=PALETTE[j % len(PALETTE)],
            error_kw={"elinewidth": 1, "ecolor": "#444444", "capsize": 2},
            label=attack,
        )
    axis.axhline(0, color="#222222", linewidth=0.8)
    axis.grid(axis="x", visible=False)
    # A change of a hundredth must not fill the panel.
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, -0.12), max(high, 0.12))


def _change(group: Sequence[Row], name: str) -> tuple[float, tuple[float, float]]:
    """Mean change, and how far the error bar reaches below and above it."""
    changes = [row[f"delta_{name}"] for row in group if f"delta_{name}" in row]
    if not changes:
        return math.nan, (0.0, 0.0)
    if len(changes) > 1:
        spread = statistics.stdev(changes)
        return statistics.fmean(changes), (spread, spread)
    row = group[0]
    below = max(0.0, row[name] - row[f"{name}_low"])
    return changes[0], (below, max(0.0, row[f"{name}_high"] - row[name]))


def curves(rows: Sequence[Row], path: pathlib.Path) -> pathlib.Path:
    """Harmful score and capability along the attack; one column per defense.

    At least one row has to be of the stage `during`.
    """
    along = [row for row in rows if row["stage"] in ("before", "during")]
    during = [row for row in along if row["stage"] == "during"]
    # What edits after the attack has no curve along it.
    defenses, attacks = _names(during, "defense"), _common(during)
    columns = min(len(defenses), 6)
    bands = -(-len(defenses) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * bands,
            columns,
            squeeze=False,
            sharey=True,
            figsize=(2.5 * columns + 1, 4.2 * bands),
        )
        for axis in axes.flat:
            axis.set_visible(False)
        for i, defense in enumerate(defenses):
            band, column = divmod(i, columns)
            for line, (name, label) in enumerate(
                (("harmful_score", "harmful score"), ("capability", "capability"))
            ):
                axis = axes[2 * band + line][column]
                axis.set_visible(True)
                _draw_curves(axis, along, defense, attacks, name)
                axis.set_ylim(-0.03, 1.03)
                if line == 0:
                    axis.set_title(defense)
                    axis.tick_params(labelbottom=False)
                else:
                    axis.set_xlabel("attack step")
                if column == 0:
                    axis.set_ylabel(label)
        legend_above(figure, axes[0][0], 2 * columns)
        figure.tight_layout()
        return save(figure, path)


def legend_above(figure, axis, columns: int) -> None:
    """One legend for all panels, of the lines of one, where it hides none."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        ncols=min(len(labels), columns),
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )


def _draw_curves(axis, along, defense, attacks, name) -> None:
    seeds = _names([{"seed": str(r["seed"])} for r in along], "seed")
    for j, attack in enumerate(attacks):
        for seed in seeds:
            points = [
                row
                for row in along
                if row["defense"] == defense
                and str(row["seed"]) == seed
                and (row["stage"] == "before" or row["attack"] == attack)
                and row.get(name) is not None
            ]
            points.sort(key=lambda row: row["step"])
            steps = [row["step"] for row in points]
            color = PALETTE[j % len(PALETTE)]
            axis.plot(
                steps,
                [row[name] for row in points],
                color=color,
                linewidth=1.6,
                label=attack if seed == seeds[0] else None,
            )
            if len(seeds) == 1:
                axis.fill_between(
                    steps,
                    [row[f"{name}_low"] for row in points],
                    [row[f"{name}_high"] for row in points],
                    color=color,
                    alpha=0.13,
                    linewidth=0,
                )
    if name == "harmful_score":
        axis.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")


def sweep(
    rows: Sequence[Row], field: str, before: Row, path: pathlib.Path
) -> pathlib.Path:
    """Harmful score and capability against one swept field; dots are seeds."""
    values = list(dict.fromkeys(row[field] for row in rows))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.6))
        for color, name, label in (
            (PALETTE[1], "harmful_score", "harmful score"),
            (PALETTE[0], "capability", "capability"),
        ):
            groups = [
                [r[name] for r in rows if r[field] == value and name in r]
                for value in values
            ]
            means = [statistics.fmean(g) if g else math.nan for g in groups]
            axis.plot(range(len(values)), means, color=color, label=label)
            for i, group in enumerate(groups):
                axis.plot([i] * len(group), group, "o", color=color, alpha=0.5, ms=4)
            axis.axhline(before[name], color=color, linewidth=0.9, linestyle=":")
        axis.set_xticks(range(len(values)), values)
        axis.set_xlabel(field)
        axis.set_ylim(-0.03, 1.03)
        axis.legend(frameon=False, title="dotted: before the attack")
        return save(figure, path)
