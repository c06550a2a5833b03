"""Figures show what they are given: pixels, places and numbers are read back."""

import io

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from minidiff import plots
from minidiff.data.points import ring_of_gaussians
from minidiff.exact import GaussianMixture
from minidiff.sampling import State, ddim, noise
from minidiff.schedule import Cosine, Karras


def picture(figure: plots.Figure) -> np.ndarray:
    """What the figure looks like, (H, W, 3) uint8; drawing it must not fail."""
    file = io.BytesIO()
    figure.savefig(file)
    return np.asarray(Image.open(file).convert("RGB"))


def test_gif_has_all_frames() -> None:
    frames = [torch.full((2, 3, 8, 8), value) for value in (-1.0, 0.0, 1.0)]
    content = plots.gif(frames, duration=0.1, hold=2)
    film = Image.open(io.BytesIO(content))
    assert (film.n_frames, film.info["loop"]) == (3, 0)
    times = []
    for i, value in enumerate((0, 128, 255)):
        film.seek(i)
        times.append(film.info["duration"])
        assert film.convert("RGB").getpixel((1, 1)) == (value,) * 3
    assert times == [100, 100, 2000]
    figures = [plots.points(torch.randn(9, 2), limit=3) for _ in range(2)]
    assert Image.open(io.BytesIO(plots.gif(figures))).n_frames == 2
    with pytest.raises(ValueError, match="at least 1 frame"):
        plots.gif([])


def test_images_shows_every_image_and_label() -> None:
    x = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    titles = ["a cat in a top hat", "b", "c", "d", "e"]
    figure = plots.images(x, ncols=3, rows=["first", "second"], titles=titles)
    assert len(figure.axes) == 6
    shown = [ax.get_images()[0].get_array() for ax in figure.axes[:5]]
    assert [int(np.asarray(pixels)[0, 0, 0]) for pixels in shown] == [0, 64, 128, 191, 255]
    assert not figure.axes[5].get_images()
    assert [ax.get_title().replace("\n", " ") for ax in figure.axes[:5]] == titles
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["first", "second"]
    assert (picture(figure)[0] == 255).all(), "white background"
    with pytest.raises(ValueError, match="6 titles for 5 places"):
        plots.images(x, titles=["x"] * 6)
    with pytest.raises(ValueError, match=r"\(5, 4, 4\)"):
        plots.images(x[:, 0])


def test_filmstrip_has_steps_as_columns() -> None:
    steps = [torch.full((2, 1, 4, 4), -1.0 + 0.1 * i) for i in range(11)]
    for step in steps:
        step[1] += 0.5
    figure = plots.filmstrip(steps, columns=3, titles=[str(i) for i in range(11)])
    shown = [int(np.asarray(ax.get_images()[0].get_array())[0, 0]) for ax in figure.axes]
    assert shown == [0, 64, 128, 64, 128, 191]
    assert [ax.get_title() for ax in figure.axes] == ["0", "5", "10", "", "", ""]
    with pytest.raises(ValueError, match="2 titles for 11 steps"):
        plots.filmstrip(steps, titles=["a", "b"])
    with pytest.raises(ValueError, match="no steps"):
        plots.filmstrip([])


def test_states_in_the_plane_and_on_the_line() -> None:
    levels = Cosine().levels(6)
    for dim, oracle in ((2, ring_of_gaussians()), (1, GaussianMixture(torch.tensor([[-1.0], [1.0]])))):
        x = noise((30, dim), levels[0])
        states = list(ddim(oracle.denoise, x, levels))
        figure = plots.trajectories(states, start=State(x, x, levels[0]), count=20)
        lines = figure.axes[0].get_lines()
        assert len(lines) == 20
        place = np.asarray(lines[3].get_xydata())
        if dim == 2:
            np.testing.assert_allclose(place[[0, -1]], torch.stack([x[3], states[-1].x[3]]))
        else:
            np.testing.assert_allclose(place[:, 0], [float(level.t) for level in levels])
            assert place[-1, 1] == states[-1].x[3, 0]
        picture(figure)
    with pytest.raises(ValueError, match=r"\(B, 1\) or \(B, 2\)"):
        plots.trajectories([])
    picture(plots.filmstrip([state.x.expand(-1, 2) for state in states], columns=4))


def test_score_field_points_along_the_score() -> None:
    oracle, level = ring_of_gaussians(), Cosine()(0.3)
    figure = plots.score_field(oracle.denoise, level, oracle=oracle, arrows=9, limit=2.5)
    (quiver,) = (part for part in figure.axes[0].collections if hasattr(part, "U"))
    at = torch.tensor(quiver.XY)
    arrows = torch.tensor(np.stack([quiver.U, quiver.V], 1))
    cosine = torch.cosine_similarity(arrows, oracle.score(at, level), dim=1)
    assert cosine.min() > 0.999
    picture(figure)


def test_density_has_its_peak_where_the_data_is() -> None:
    oracle = GaussianMixture(torch.tensor([[1.5, -0.5]]), 0.3)
    seen = picture(plots.density(oracle, Cosine()(0.0), limit=2)).astype(int)
    blue = (seen[:, :, 2] - seen[:, :, 0]).clip(min=0) > 60
    rows, columns = np.nonzero(blue)
    assert columns.mean() > 0.65 * seen.shape[1], "x = 1.5 is on the right"
    assert rows.mean() > 0.5 * seen.shape[0], "y = -0.5 is below the middle"


def test_curves_hold_their_values() -> None:
    figure = plots.schedules({"cosine": Cosine(), "karras": Karras()})
    alpha, sigma, log_snr = figure.axes
    t, curve = alpha.get_lines()[0].get_data()
    np.testing.assert_allclose(curve, Cosine()(torch.as_tensor(t)).alpha)
    assert sigma.get_lines()[1].get_ydata()[-1] == pytest.approx(80)
    assert [text.get_text() for text in log_snr.get_legend().get_texts()] == ["cosine", "karras"]
    picture(figure)

    figure = plots.losses({"eps": [4.0] * 100, "v": [2.0] * 100}, window=10)
    smooth = figure.axes[0].get_lines()[1]
    np.testing.assert_allclose(smooth.get_ydata(), 4.0)
    assert smooth.get_xdata()[-1] == 99
    picture(figure)
    picture(plots.losses([1.0]))


def test_notebooks_show_a_figure_once() -> None:
    """The figure is no pyplot figure, which would be shown a second time, and brings its own PNG."""
    figure, axes = plots.panels(1, 2)
    assert plots.points(torch.randn(5, 2), axes[0]) is figure
    content, size = figure._repr_png_()
    png = Image.open(io.BytesIO(content))
    assert png.size == (2 * size["width"], 2 * size["height"])
    assert pyplot.get_fignums() == []


def test_the_style_stays_inside() -> None:
    before = dict(pyplot.rcParams)
    plots.points(torch.randn(5, 2))
    with plots.style():
        assert pyplot.rcParams["image.interpolation"] == "nearest"
    assert dict(pyplot.rcParams) == before
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        plots.points(torch.zeros(5, 3))
