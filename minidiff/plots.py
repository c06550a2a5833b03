"""The figures that the book uses again and again.

Two sorts. Those on images take tensors (B, C, H, W) in [-1, 1], as everything here does, and show
each pixel as a square. Those on points and numbers draw into ``ax``, or into a figure of their own.

All return the :class:`~matplotlib.figure.Figure`, so the last line of a notebook cell shows it::

    plots.images(x0, titles=captions)

    figure, axes = plots.panels(1, 2)
    plots.points(x0, axes[0], title="data")
    plots.points(x_t, axes[1], title="noisy")

The figures do not belong to pyplot, which would show them a second time and keep them in memory.
Their background is white, so they can be read on a dark page too; the colours are those of Okabe
and Ito (2008), which people with any colour vision can tell apart.
"""

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from minidiff.denoiser import Denoiser
from minidiff.exact import GaussianMixture
from minidiff.forward import NoiseLevel
from minidiff.pixels import grid, pixel_array
from minidiff.sampling import State
from minidiff.schedule import Schedule

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777",
)  # fmt: skip
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
STYLE = Path(__file__).with_name("book.mplstyle")
"""The look of the book's figures, as a style sheet of matplotlib."""


@contextmanager
def style() -> Iterator[None]:
    """The look of the book's figures, for figures of your own: ``with plots.style(): ...``."""
    with plt.style.context(STYLE):
        yield


@style()
def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (3.2, 3.0)) -> tuple[Figure, Any]:
    """An empty figure with ``rows * columns`` axes of ``size`` inches each.

    Returns:
        The figure, and its axes as matplotlib's ``subplots`` gives them: one, or an array of them.
    """
    figure = _Figure(figsize=(columns * size[0], rows * size[1]))
    return figure, figure.subplots(rows, columns)


# --- images -------------------------------------------------------------------------------------


@style()
def images(
    x: Tensor,
    *,
    ncols: int = 8,
    titles: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    scale: float = 1.0,
) -> Figure:
    """A grid of images, row by row.

    Args:
        x: (B, C, H, W) in [-1, 1] with 1 or 3 channels; values outside are cut off.
        ncols: images per row.
        titles: what to write above each image, for instance captions; long ones are wrapped.
        rows: labels at the left of the rows.
        columns: labels above the columns.
        scale: width of an image in inches.

    Raises:
        ValueError: ``x`` does not hold images, or there are more labels than places.
    """
    pixels = pixel_array(x)
    ncols = min(ncols, len(pixels))
    nrows = -(-len(pixels) // ncols)
    for name, given, room in (("titles", titles, len(x)), ("rows", rows, nrows), ("columns", columns, ncols)):
        if given is not None and len(given) > room:
            raise ValueError(f"{len(given)} {name} for {room} places")
    wrapped = [textwrap.fill(title, max(8, int(14 * scale))) for title in titles or ()]
    # Every image is placed by hand, in inches: a layout engine would shrink them to fit the labels.
    lines = max((title.count("\n") + 1 for title in wrapped), default=0)
    longest = max((len(line) for label in rows or () for line in label.split("\n")), default=0)
    left, top = 0.1 + 0.095 * longest if longest else 0.0, 0.27 if columns else 0.0
    above, gap = 0.05 + 0.135 * lines if lines else 0.0, 0.05
    image_height = scale * x.shape[2] / x.shape[3]
    step = scale + gap, above + image_height + gap
    width, height = left + ncols * step[0], top + nrows * step[1]
    figure = _Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    axes = np.empty((nrows, ncols), dtype=object)
    for row, column in np.ndindex(nrows, ncols):
        corner = left + column * step[0], height - top - (row + 1) * step[1] + gap / 2
        axes[row, column] = figure.add_axes(
            (corner[0] / width, corner[1] / height, scale / width, image_height / height)
        )
    for place, ax in enumerate(axes.flat):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if place < len(pixels):
            ax.imshow(pixels[place], cmap="gray", vmin=0, vmax=255)
        if place < len(wrapped):
            ax.set_title(wrapped[place], fontsize=8, pad=2)
    for ax, label in zip(axes[:, 0], rows or (), strict=False):
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    for ax, label in zip(axes[0], columns or (), strict=False):
        ax.set_title(label, pad=3)
    return figure


@style()
def filmstrip(
    steps: Sequence[State] | Sequence[Tensor],
    *,
    titles: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    columns: int = 8,
    show: str = "x",
    scale: float = 1.0,
) -> Figure:
    """How samples change: one column per step; a row per image, or all points in one panel.

    Args:
        steps: the states of a sampler, or tensors: images (B, C, H, W), or points (B, 2).
        titles: one per step; by default the time of each state.
        rows: labels of the images.
        columns: how many steps to show at most; they are spread evenly, first and last included.
        show: "x" for the noisy samples of the states, "x0" for the clean ones they aim at.
        scale: width of a column in inches (twice that for points).

    Raises:
        ValueError: there are no steps, or ``titles`` has not one for each.
    """
    if not len(steps):
        raise ValueError("there are no steps to show: give list(sampler(...))")
    if titles is None and isinstance(steps[0], State):
        titles = [f"t = {float(state.level.t):.2f}" for state in steps if isinstance(state, State)]
    if titles is not None and len(titles) != len(steps):
        raise ValueError(f"{len(titles)} titles for {len(steps)} steps: give one per step")
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(columns, len(steps))).round().astype(int))
    tensors = [_shown(steps[i], show).detach().float().cpu() for i in chosen]
    titles = None if titles is None else [titles[i] for i in chosen]
    if tensors[0].ndim == 4:
        flat = torch.stack(tensors, 1).flatten(0, 1)  # (B * columns, C, H, W)
        return images(flat, ncols=len(tensors), columns=titles, rows=rows, scale=scale)
    figure, axes = panels(1, len(tensors), (2 * scale, 2 * scale + 0.3))
    limit = max(float(x.abs().quantile(0.995)) for x in tensors) * 1.1
    for i, (ax, x) in enumerate(zip(np.atleast_1d(axes), tensors, strict=True)):
        points(x, ax, title=titles[i] if titles else "", limit=limit, size=2)
        ax.set(xticks=[], yticks=[])
    return figure


def gif(
    frames: Iterable[Tensor | Image.Image | Figure],
    *,
    duration: float = 0.08,
    hold: float = 1.5,
    ncols: int = 8,
    scale: int = 1,
) -> bytes:
    """An animation that runs for ever; in a notebook ``Image(data=gif(frames), format="gif")``.

    Args:
        frames: image tensors (B, C, H, W), shown as :func:`~minidiff.pixels.grid` does,
            PIL images, or figures.
        duration: seconds per frame.
        hold: seconds that the last frame stays.
        ncols: images per row, for tensors.
        scale: size of a pixel, for tensors.

    Returns:
        The content of the GIF file.

    Raises:
        ValueError: there are no frames.
    """
    pictures = [_picture(frame, ncols, scale) for frame in frames]
    if not pictures:
        raise ValueError("an animation needs at least 1 frame")
    times = [round(1000 * duration)] * (len(pictures) - 1) + [round(1000 * hold)]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return file.getvalue()


# --- points and densities -----------------------------------------------------------------------


@style()
def points(
    x: Tensor,
    ax: Axes | None = None,
    *,
    title: str = "",
    color: Any = BLUE,
    size: float = 3.0,
    limit: float | None = None,
    label: str | None = None,
) -> Figure:
    """A scatter plot with equal axes.

    Args:
        x: (B, 2).
        ax: where to draw; None for a new figure.
        title: written above.
        color: one colour, or (B,) numbers to be shown as colours.
        size: area of a dot, in points².
        limit: the axes go from -limit to limit; None for what fits.
        label: name in the legend.

    Raises:
        ValueError: ``x`` is not (B, 2).
    """
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: points are (B, 2)")
    figure, ax = _axes(ax)
    x = x.detach().cpu()
    color = color.detach().cpu() if isinstance(color, Tensor) else color
    ax.scatter(x[:, 0], x[:, 1], s=size, c=color, linewidths=0, alpha=0.7, label=label, rasterized=True)
    _square(ax, limit, title)
    return figure


@style()
def density(
    oracle: GaussianMixture, level: NoiseLevel, ax: Axes | None = None, *, title: str = "", limit: float = 3.0
) -> Figure:
    """log p_t of an exact mixture in the plane, from the peak down to 6 nats below it.

    Args:
        oracle: over samples of shape (2,).
        level: a level with noise, or without if no component is a point.
        ax: where to draw; None for a new figure.
        title: written above.
        limit: the axes go from -limit to limit.
    """
    figure, ax = _axes(ax)
    across = torch.linspace(-limit, limit, 161, dtype=torch.float64)
    at = torch.cartesian_prod(across, across)  # (161 * 161, 2), x varies slowest
    values = oracle.log_density(at, level).reshape(161, 161).T
    values = (values - values.max()).clamp(min=-6)
    ax.contourf(across, across, values, levels=np.linspace(-6, 0, 13), cmap="Blues", vmax=4)
    _square(ax, limit, title)
    return figure


@style()
def score_field(
    denoise: Denoiser,
    level: NoiseLevel,
    ax: Axes | None = None,
    *,
    oracle: GaussianMixture | None = None,
    title: str = "",
    limit: float = 3.0,
    arrows: int = 17,
    color: str = VERMILION,
) -> Figure:
    """Where a denoiser sends points of the plane: arrows along the score, over the exact density.

    Arrows show ``sigma * score = -eps``, scaled so that the longest fill the gaps of their grid.

    Args:
        denoise: ``oracle.denoise``, ``model.denoise`` or a guided one, over samples of shape (2,).
        level: of shape ().
        ax: where to draw; None for a new figure.
        oracle: whose :func:`density` to show behind the arrows; None for none.
        title: written above.
        limit: the axes go from -limit to limit.
        arrows: number of arrows along each axis.
        color: of the arrows.
    """
    figure, ax = _axes(ax)
    if oracle is not None:
        density(oracle, level, ax, limit=limit)
    across = torch.linspace(-limit, limit, arrows)
    at = torch.cartesian_prod(across, across)  # (arrows², 2)
    with torch.no_grad():
        step = -denoise(at, level).eps.cpu()
    step = step * (2 * limit / arrows) / step.norm(dim=1).quantile(0.9)
    ax.quiver(
        at[:, 0], at[:, 1], step[:, 0], step[:, 1],
        color=color, angles="xy", scale_units="xy", scale=1, width=0.006, pivot="mid",
    )  # fmt: skip
    _square(ax, limit, title)
    return figure


@style()
def trajectories(
    states: Sequence[State],
    ax: Axes | None = None,
    *,
    start: State | None = None,
    title: str = "",
    count: int = 200,
    limit: float | None = None,
    color: str = BLUE,
) -> Figure:
    """The paths that samples take: in the plane for (B, 2), and over time for (B, 1).

    Args:
        states: what a sampler yielded.
        ax: where to draw; None for a new figure.
        start: ``State(x, x, levels[0])``, the noise at the start; None to begin after a step.
        title: written above.
        count: how many samples to show at most.
        limit: the axes of the plane go from -limit to limit; None for what fits.
        color: of the paths.

    Raises:
        ValueError: there are no states, or they do not hold (B, 1) or (B, 2).
    """
    states = [*([] if start is None else [start]), *states]
    if not states or states[0].x.ndim != 2 or states[0].x.shape[1] not in (1, 2):
        raise ValueError("trajectories are drawn from at least one state that holds (B, 1) or (B, 2)")
    figure, ax = _axes(ax)
    paths = torch.stack([state.x[:count] for state in states]).detach().cpu()  # (steps, B, 1 or 2)
    if paths.shape[2] == 1:
        times = [float(state.level.t) for state in states]
        ax.plot(times, paths[:, :, 0], color=color, linestyle="-", linewidth=0.7, alpha=0.5)
        ax.set(xlabel="t", ylabel="x", xlim=(max(times), 0), title=title)
        return figure
    ax.plot(paths[:, :, 0], paths[:, :, 1], color=color, linestyle="-", linewidth=0.6, alpha=0.35)
    for x, dot, name in ((paths[0], GREY, "start"), (paths[-1], VERMILION, "end")):
        ax.scatter(x[:, 0], x[:, 1], s=8, c=dot, linewidths=0, label=name, zorder=3)
    ax.legend(loc="upper right", markerscale=2, handletextpad=0.1)
    _square(ax, limit, title)
    return figure


# --- curves -------------------------------------------------------------------------------------


@style()
def schedules(named: Mapping[str, Schedule]) -> Figure:
    """alpha, sigma and log-SNR of schedules over time.

    The panels of alpha and sigma end at 1: a schedule whose noise explodes leaves at the top.

    Args:
        named: name in the legend -> schedule.
    """
    figure, axes = panels(1, 3, (2.6, 2.5))
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    for name, schedule in named.items():
        level = schedule(t)
        curves = level.alpha, level.sigma, level.log_snr
        for ax, curve in zip(axes, curves, strict=True):
            ax.plot(t, curve, label=name)
    for ax, title in zip(axes, ("alpha: data", "sigma: noise", "log SNR"), strict=True):
        ax.set(xlabel="t", title=title, xlim=(0, 1), ylim=(0, 1.04))
    axes[2].set_ylim(-15, 15)
    axes[2].legend(loc="upper right", fontsize=8)
    return figure


@style()
def losses(
    values: Sequence[float] | Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    title: str = "",
    ylabel: str = "loss",
    window: int = 50,
) -> Figure:
    """Training losses on a logarithmic scale: every step pale, a running mean in full colour.

    Args:
        values: one loss per step, or several runs by name.
        ax: where to draw; None for a new figure.
        title: written above.
        ylabel: what the values are.
        window: number of steps of the running mean.
    """
    figure, ax = _axes(ax, (5.0, 3.0))
    runs = values if isinstance(values, Mapping) else {"": values}
    for number, (name, run) in enumerate(runs.items()):
        color = PALETTE[number % len(PALETTE)]
        raw = np.asarray(run, dtype=float)
        width = max(1, min(window, len(raw) // 4))
        smooth = np.convolve(raw, np.ones(width) / width, mode="valid")
        ax.plot(raw, color=color, linestyle="-", linewidth=0.5, alpha=0.3)
        ax.plot(np.arange(len(smooth)) + width - 1, smooth, color=color, label=name or None)
    ax.set(xlabel="step", ylabel=ylabel, yscale="log", title=title)
    if "" not in runs:
        ax.legend()
    return figure


# --- helpers ------------------------------------------------------------------------------------


class _Figure(Figure):
    """A figure with a canvas of its own: notebooks show it without pyplot, sharp on any screen."""

    def __init__(self, figsize: tuple[float, float]) -> None:
        super().__init__(figsize=figsize)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        if any(ax.images for ax in self.axes):  # pixels of 64 to the inch gain nothing from more
            self.savefig(file, format="png", dpi=1.28 * self.dpi)
        else:  # 256 colours do: a third of the bytes
            self.savefig(file, format="png", dpi=2 * self.dpi)
            drawing = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            file = io.BytesIO()
            drawing.save(file, "PNG", optimize=True)
        width, height = (round(inches * self.dpi) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}


def _axes(ax: Axes | None, size: tuple[float, float] = (3.4, 3.4)) -> tuple[Figure, Axes]:
    """``ax`` and the figure it is in, or both new."""
    if ax is None:
        return panels(1, 1, size)
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax


def _square(ax: Axes, limit: float | None, title: str) -> None:
    ax.set_aspect("equal")
    ax.set_title(title)
    ax.grid(visible=False)
    if limit is not None:
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))


def _shown(step: State | Tensor, show: str) -> Tensor:
    if show not in ("x", "x0"):
        raise ValueError(f"show = {show!r}: choose 'x' or 'x0'")
    if isinstance(step, State):
        return step.x if show == "x" else step.x0
    return step


def _picture(frame: Tensor | Image.Image | Figure, ncols: int, scale: int) -> Image.Image:
    if isinstance(frame, Tensor):
        frame = grid(frame, ncols=ncols, scale=scale)
    elif isinstance(frame, Figure):
        canvas = FigureCanvasAgg(frame)
        canvas.draw()
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    return frame.convert("RGB").quantize(256)
