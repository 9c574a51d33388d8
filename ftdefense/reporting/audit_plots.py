"""PNG plots of an audit: effort, frontier, horizon, and the plane of two attacks."""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  After the backend is chosen.

from ftdefense.reporting import plots  # noqa: E402
from ftdefense.reporting import rows as result_rows  # noqa: E402

Row = result_rows.Row
PALETTE, STYLE = plots.PALETTE, plots.STYLE
_LABELS = {"none": "undefended", "never": "never knew"}


def effort(curves: Mapping[str, Sequence[Row]], path: pathlib.Path) -> pathlib.Path:
    """Best useful harmful score so far against trials, steps and operations spent."""
    spent = (
        ("trials", "trials"),
        ("steps", "optimizer steps"),
        ("flops", "floating-point operations"),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), sharey=True)
        for axis, (column, label) in zip(axes, spent, strict=True):
            for j, (name, points) in enumerate(curves.items()):
                axis.step(
                    [0, *(p[column] for p in points)],
                    [0, *(p["best_harmful_score"] for p in points)],
                    where="post",
                    color=PALETTE[j % len(PALETTE)],
                    label=_LABELS.get(name, name),
                    linewidth=1.8,
                )
            axis.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
            axis.set_xlabel(label)
            axis.set_ylim(-0.03, 1.03)
        axes[0].set_ylabel("best harmful score, useful model")
        plots.legend_above(figure, axes[0], 3)
        figure.tight_layout()
        return plots.save(figure, path)


def frontier(
    trials: Sequence[Row], reference: float, epsilon: float, path: pathlib.Path
) -> pathlib.Path:
    """Harmful score against capability of every trial; the useful part is shaded."""
    families = list(dict.fromkeys(row["family"] for row in trials))
    colors = plt.get_cmap("tab20").colors
    markers = "osD^vP*X"
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.5, 4.6))
        axis.axvspan((1 - epsilon) * reference, 1.05, color="#009E73", alpha=0.08)
        axis.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
        for j, family in enumerate(families):
            mine = [r for r in trials if r["family"] == family and not r["diverged"]]
            axis.scatter(
                [r["capability"] for r in mine],
                [r["harmful_score"] for r in mine],
                color=colors[j % len(colors)],
                marker=markers[j // len(colors) % len(markers)],
                s=26,
                alpha=0.85,
                label=family,
            )
        axis.set_xlim(-0.03, 1.05)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("capability (shaded: useful)")
        axis.set_ylabel("harmful score")
        axis.legend(
            frameon=False,
            fontsize=8,
            bbox_to_anchor=(1.01, 1),
            loc="upper left",
            ncols=1 + (len(families) > len(colors)),
        )
        return plots.save(figure, path)


def horizon(runs: Mapping[str, Sequence[Row]], path: pathlib.Path) -> pathlib.Path:
    """Harmful score and capability along a long fine-tuning."""
    panels = (("harmful_score", "harmful score"), ("capability", "capability"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True)
        for axis, (column, label) in zip(axes, panels, strict=True):
            for j, (name, rows) in enumerate(runs.items()):
                along = [row for row in rows if row["stage"] == "during"]
                axis.plot(
                    [row["step"] for row in along],
                    [row[column] for row in along],
                    color=PALETTE[j % len(PALETTE)],
                    label=_LABELS.get(name, name),
                    linewidth=1.8,
                    marker="o",
                    markersize=3,
                )
            axis.set_xscale("log", base=2)
            axis.set_ylim(-0.03, 1.03)
            axis.set_xlabel("attack steps")
            axis.set_ylabel(label)
        axes[0].axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
        plots.legend_above(figure, axes[1], 3)
        figure.tight_layout()
        return plots.save(figure, path)


def plane(grid: Mapping[str, Sequence], path: pathlib.Path) -> pathlib.Path:
    """Harmful, benign and joint loss on the plane of two attacks.

    `grid` has `x`, `y` (offsets along the axes), `harmful` and `benign` [y][x], and
    `marks`: {name: (x, y)}. Points are evaluated, none is interpolated; colours stop at
    the ninth decile, or one wild corner would fill the scale.
    """
    harmful, benign = grid["harmful"], grid["benign"]
    joint = [
        [h + c for h, c in zip(row, other, strict=True)]
        for row, other in zip(harmful, benign, strict=True)
    ]
    panels = (("L(harmful)", harmful), ("L(benign)", benign), ("sum", joint))
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.4), sharey=True)
        for axis, (title, values) in zip(axes, panels, strict=True):
            flat = sorted(v for row in values for v in row)
            image = axis.pcolormesh(
                grid["x"],
                grid["y"],
                values,
                shading="nearest",
                cmap="viridis",
                vmax=flat[int(0.9 * (len(flat) - 1))],
            )
            figure.colorbar(image, ax=axis, label="nats per token")
            for j, (name, (x, y)) in enumerate(grid["marks"].items()):
                axis.plot(
                    x,
                    y,
                    "*oDs"[j % 4],
                    color="white",
                    markeredgecolor="black",
                    label=name,
                )
            axis.set_title(title)
            axis.set_xlabel("along the first attack")
        axes[0].set_ylabel("away from it, towards the second")
        axes[0].legend(frameon=True, fontsize=7, loc="best")
        figure.tight_layout()
        return plots.save(figure, path)
