"""Bytes and numbers in [-1, 1], there and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from minidiff import pixels


def test_every_byte_comes_back():
    every = torch.arange(256).to(torch.uint8)
    x = pixels.from_bytes(every)
    assert (x.dtype, x[0], x[255]) == (torch.float32, -1, 1)
    assert torch.equal(pixels.to_bytes(x), every)
    assert pixels.to_bytes(every) is not None
    assert torch.equal(pixels.to_bytes(every), every)
    assert pixels.to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("n,ncols,scale", [(1, 8, 1), (7, 3, 2), (8, 4, 1), (3, 8, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_that_of_torchvision_without_its_margin(n, ncols, scale, channels):
    x = torch.randint(256, (n, channels, 4, 6), dtype=torch.uint8)
    large = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    padding = 2 if n > 1 else 0
    theirs = make_grid(large, nrow=ncols, padding=padding, pad_value=255)
    theirs = theirs[:, padding : theirs.shape[1] - padding, padding : theirs.shape[2] - padding]
    ours = np.asarray(pixels.grid(x, ncols=ncols, scale=scale))
    assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels,mode", [(1, "L"), (3, "RGB")])
def test_one_picture(channels, mode):
    x = torch.rand(channels, 5, 7) * 2 - 1
    picture = pixels.to_pil(x)
    assert (picture.mode, picture.size) == (mode, (7, 5))
    back = torch.from_numpy(np.array(picture)).reshape(5, 7, channels).permute(2, 0, 1)
    assert torch.equal(back, pixels.to_bytes(x))


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 2, 4, 4), (0, 3, 4, 4)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match="images are"):
        pixels.grid(torch.zeros(shape))


def test_grid_is_pixel_for_pixel():
    x = torch.tensor([-1.0, 0.0, 1.0, 7.0]).reshape(4, 1, 1, 1).expand(4, 3, 2, 5)
    seen = np.asarray(pixels.grid(x, ncols=2, padding=1))
    assert seen.shape == (2 * 2 + 1, 2 * 5 + 1, 3)
    assert [seen[0, 0, 0], seen[0, 6, 0], seen[3, 0, 0], seen[3, 6, 0]] == [0, 128, 255, 255]
    assert (seen[2] == 255).all()
    assert (seen[:, 5] == 255).all()
    one = pixels.grid(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), scale=3)
    assert one.size == (12, 12)
    assert one.getpixel((11, 11)) == (0, 0, 0)


def test_save_grid_leaves_one_file(tmp_path: Path):
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    pixels.save_grid(x, tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    saved = np.asarray(Image.open(tmp_path / "a.png"))
    assert (saved == np.asarray(pixels.grid(x))).all()
