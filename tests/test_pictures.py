"""Pictures from anywhere look as they are meant to look: what a folder's reader makes of every kind."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiff.data.folder import captioned_folder, read_picture

RED, HIDDEN = (255, 0, 0), (0, 255, 0)
SIDE = (8, 8)


def save(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def half_clear(mode: str) -> Image.Image:
    """Left of the middle red, right of it clear, with a hidden green."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4], pixels[:, 4:] = (*RED, 255), (*HIDDEN, 0)
    picture = Image.fromarray(pixels)
    if mode == "P":
        palette = Image.new("P", SIDE, 0)
        palette.putpalette([*RED, *HIDDEN])
        palette.paste(1, (4, 0, 8, 8))
        palette.info["transparency"] = 1
        return palette
    if mode == "RGB":  # one colour stands for clear
        plain = picture.convert("RGB")
        plain.info["transparency"] = HIDDEN
        return plain
    return picture.convert(mode)


@pytest.mark.parametrize(
    "mode,ending", [("RGBA", "png"), ("P", "png"), ("P", "gif"), ("RGB", "png"), ("PA", "tif")]
)
def test_what_is_clear_shows_white(mode, ending, tmp_path):
    picture = half_clear("RGBA" if mode == "PA" else mode)
    seen = np.asarray(read_picture(save(picture, tmp_path / f"a.{ending}")))
    assert seen.shape == (8, 8, 3)
    assert (seen[:, :4] == RED).all()
    assert (seen[:, 4:] == 255).all()


def test_what_is_half_clear_is_mixed_with_white(tmp_path):
    grey = Image.merge("LA", [Image.new("L", SIDE, 0), Image.new("L", SIDE, 51)])
    assert (np.asarray(read_picture(save(grey, tmp_path / "a.png"))) == 255 - 51).all()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(ending, tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    seen = np.asarray(read_picture(save(Image.fromarray(ramp), tmp_path / f"a.{ending}")))
    assert (seen == np.round(ramp / 257)[:, :, None]).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_kinds_show_their_colours(mode, tmp_path):
    color = (255, 255, 255) if mode in ("L", "1") else RED
    picture = Image.new("RGB", SIDE, color).convert(mode)
    seen = np.asarray(read_picture(save(picture, tmp_path / "a.tif"))).astype(int)
    assert abs(seen - np.array(color)).max() <= 2


def test_cmyk_of_a_camera_is_not_inverted(tmp_path):
    picture = Image.new("RGB", SIDE, RED).convert("CMYK")
    seen = np.asarray(read_picture(save(picture, tmp_path / "a.jpg", quality=95))).astype(int)
    assert abs(seen - np.array(RED)).max() <= 8


def test_it_is_turned_as_the_camera_says(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right shows it upright
    path = save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    seen = np.asarray(read_picture(path))
    assert seen.shape == (16, 8, 3)
    assert (seen[:8] == RED).all()
    assert (seen[8:] == 0).all()


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_of_an_animation_the_first_counts(ending, tmp_path):
    frames = [Image.new("RGB", SIDE, color) for color in (RED, HIDDEN)]
    path = tmp_path / f"a.{ending}"
    save(
        frames[0],
        path,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if ending == "webp" else {}),
    )
    assert (np.asarray(read_picture(path)) == RED).all()


@pytest.mark.parametrize("name", ["b.jpg", "kötze.png", "ko\u0308tze.png", "猫.png", "a b.png"])
def test_a_name_of_any_script_and_a_wrong_ending(name, tmp_path):
    save(Image.new("RGB", SIDE, RED), tmp_path / name, format="PNG")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},a square\n", encoding="utf-8")
    found = captioned_folder(tmp_path, 8)
    assert found.images[0, :, 0, 0].tolist() == list(RED)
    assert found.captions == ["a square"]


def test_a_caption_of_nan_is_none(tmp_path):
    """As pandas writes a cell that is empty."""
    save(Image.new("RGB", SIDE, RED), tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": NaN}\n')
    assert captioned_folder(tmp_path, 8).captions == [""]


def test_a_link_out_of_the_folder_is_named_and_left_out(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    save(Image.new("RGB", SIDE, RED), inside / "a.png")
    save(Image.new("RGB", SIDE, HIDDEN), outside)
    (inside / "b.png").symlink_to(outside)
    (inside / "c.png").symlink_to(inside / "a.png")  # does not leave
    (inside / "metadata.csv").write_text("file_name,text\na.png,a\nb.png,b\nc.png,c\n")
    found = captioned_folder(inside, 8)
    assert found.captions == ["a", "c"]
    assert found.skipped == [("b.png", "a link that leaves the folder: copy the picture into it")]
