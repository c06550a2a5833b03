"""Sounds: files, the lapped transform, networks for sequences, and the call that plays."""

import math

import numpy as np
import pytest
import torch
from networks import perturbed
from scipy.io import wavfile

import minidiff as md
from minidiff.denoiser.layers import fold, unfold
from minidiff.denoiser.waves import from_frames, lapped_basis, to_frames
from minidiff.pixels import from_bytes
from minidiff.sounds import RATE, from_int16, save_wav, to_int16


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_sixteen_bits_there_and_back():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0])
    assert to_int16(x).tolist() == [-32767, -32767, 0, 16384, 32767]
    assert from_bytes(to_int16(x)).tolist() == pytest.approx([-1, -1, 0, 0.5, 1], abs=1e-4)
    assert torch.equal(from_bytes(to_int16(x)), from_int16(to_int16(x)))


def test_scipy_reads_the_file(tmp_path):
    x = torch.linspace(-1, 1, 200).reshape(2, 1, 100)
    save_wav(x, tmp_path / "x.wav")
    rate, samples = wavfile.read(tmp_path / "x.wav")
    assert rate == RATE == 8000
    assert samples.dtype == np.int16
    assert samples.tolist() == to_int16(x).flatten().tolist()


@pytest.mark.parametrize("shape", [(2, 100), (3, 2, 100), (0,)])
def test_only_sounds_of_one_channel_are_written(shape, tmp_path):
    with pytest.raises(ValueError, match=r"sounds are \(\.\.\., 1, L\) or \(L,\)"):
        save_wav(torch.zeros(shape), tmp_path / "x.wav")
    assert not (tmp_path / "x.wav").exists()


# --- the lapped transform -------------------------------------------------------------------------


def test_the_lapped_basis_is_the_formula():
    basis = lapped_basis(4)
    for k in range(4):
        for n in range(8):
            window = math.sin(math.pi * (n + 0.5) / 8)
            cosine = math.cos(math.pi / 4 * (n + 0.5 + 2) * (k + 0.5))
            assert basis[k, n].item() == pytest.approx(math.sqrt(2 / 4) * window * cosine, abs=1e-6)


def test_the_lapped_transform_is_a_rotation():
    """As a matrix it is orthonormal, so white noise stays white noise; the way back is its transpose."""
    basis = lapped_basis(8).double()
    matrix = to_frames(torch.eye(64, dtype=torch.float64)[:, None], basis).flatten(1)  # (64, 64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), atol=1e-6, rtol=0)
    x = randn(3, 1, 64)
    torch.testing.assert_close(from_frames(to_frames(x, basis), basis), x, atol=1e-6, rtol=0)


def test_a_steady_tone_is_one_loud_channel():
    n, k = torch.arange(1024, dtype=torch.float64), 5
    tone = torch.cos(2 * math.pi * (k + 0.5) / (2 * 32) * n + 0.3)
    energy = to_frames(tone[None, None], lapped_basis(32).double())[0].square().sum(1)
    assert energy.argmax() == k
    assert energy[k - 1 : k + 2].sum() > 0.99 * energy.sum()


# --- networks ---------------------------------------------------------------------------------------


def test_patches_of_a_sequence_there_and_back():
    x = torch.arange(12.0).reshape(1, 2, 6)
    assert fold(x, 3).tolist() == [[[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]]
    assert torch.equal(unfold(fold(x, 3), 3), x)


def test_a_unet_of_one_dimension_sees_the_whole_sequence():
    net = perturbed(md.UNet(2, 32, (1, 1), patch=2, attention=(1,), positions=True, dims=1))
    x, t = randn(1, 2, 32), torch.tensor([0.5])
    moved = x.clone()
    moved[0, 0, 0] += 1
    assert net(x, t).shape == x.shape
    assert (net(moved, t) - net(x, t))[0, 0, -1].abs() > 1e-9


def test_a_unet_of_one_dimension_is_rebuilt_from_its_file(tmp_path):
    net = md.UNet(2, 32, (1, 1), patch=2, attention=(1,), dims=1)
    md.Diffusion(perturbed(net).float(), md.Cosine(), shape=(2, 16)).save_pretrained(tmp_path)
    x, level = randn(2, 2, 16).float(), md.Cosine()(0.5)
    again = md.Diffusion.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x, level), md.Diffusion(net, md.Cosine())(x, level))


def test_a_unet_may_have_other_channels_at_its_end():
    net = perturbed(md.UNet(2, 32, (1, 1), patch=2, attention=(1,), dims=1, out_channels=6))
    assert net(randn(1, 2, 16), torch.tensor([0.5])).shape == (1, 6, 16)
    assert net.shortcut is None


def test_other_numbers_of_dimensions_are_refused():
    with pytest.raises(ValueError, match="dims = 3: 2 is for images, 1 for sequences"):
        md.UNet(dims=3)
    with pytest.raises(ValueError, match=r"takes \(B, 2, L\) with L a multiple of 4"):
        md.UNet(2, 32, (1, 1), patch=2, attention=(), dims=1)(torch.zeros(1, 2, 6), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"takes \(B, 1, L\) with L a multiple of 32"):
        md.WaveUNet(32, (1, 1), frame=16, attention=(1,))(torch.zeros(1, 1, 24), torch.tensor([0.5]))


def test_the_gate_keeps_a_share_of_what_is_seen():
    """At first all gates are shut. With all gates open and nothing added, the wave passes."""
    net = md.WaveUNet(32, (1, 1), frame=16, attention=(1,))
    x, t = randn(2, 1, 64).float(), torch.tensor([0.2, 0.8])
    assert (net(x, t) == 0).all()
    torch.nn.init.constant_(net.net.last.bias[16:], 1.0)
    torch.testing.assert_close(net(x, t), x, atol=1e-5, rtol=0)


def test_the_wave_unet_is_a_unet_between_a_rotation_and_its_way_back():
    net = perturbed(md.WaveUNet(32, (1, 1), frame=16, attention=(1,), gate=False)).float()
    x, t = randn(2, 1, 64).float(), torch.tensor([0.2, 0.8])
    by_hand = from_frames(net.net(to_frames(x, net.basis), t), net.basis)
    torch.testing.assert_close(net(x, t), by_hand)
    assert md.WaveUNet(**net.config).config == net.config
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(x, t) - by_hand).abs().max() < 0.05 * by_hand.abs().max()


# --- the call ---------------------------------------------------------------------------------------


@pytest.fixture
def model() -> md.Diffusion:
    text = md.TextEncoder.from_captions(["a low bell"], dim=32, layers=1)
    net = md.WaveUNet(32, (1, 1), frame=16, attention=(1,), condition_dim=text.dim)
    return md.Diffusion(net, md.Cosine(), target="x0", encoder=text, shape=(1, 64)).eval()


def test_sounds_are_arrays_and_each_has_its_own_seed(model):
    pipe = md.TextToSound(model)
    played = pipe(["a bell", "low"], num_sounds=2, steps=2, seed=3)
    assert played.tensors.shape == (4, 1, 64)
    assert played.rate == 8000
    assert [sound.shape for sound in played.sounds] == [(64,)] * 4
    alone = pipe("low", steps=2, seed=6)
    np.testing.assert_allclose(alone.sounds[0], played.sounds[3], atol=1e-5)


def test_images_and_sounds_are_not_taken_for_each_other(model):
    with pytest.raises(ValueError, match="makes sounds: use TextToSound"):
        md.TextToImage(model)
    assert isinstance(md.pipeline.pipeline(model), md.TextToSound)
    model.shape = (1, 8, 8)
    with pytest.raises(ValueError, match="makes images: use TextToImage"):
        md.TextToSound(model)
    assert type(md.pipeline.pipeline(model)) is md.TextToImage
    model.shape = (1, 64)
    with pytest.raises(ValueError, match="num_sounds = 0"):
        md.TextToSound(model)("low", num_sounds=0)
