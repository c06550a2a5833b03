"""From recipe to .wav file: what the command does with sounds."""

import json
from inspect import signature
from random import Random

import pytest
import torch
from scipy.io import wavfile
from typer.testing import CliRunner

import minidiff as md
from minidiff import cli, tones
from minidiff.fit import fit
from minidiff.recipes import faint, get_recipe, guess_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of sounds, two steps old."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "tones"
    recipe = get_recipe("tones", images=128, width=32)
    recipe.steps, recipe.batch_size = 2, 4
    recipe.prompts.clear()
    recipe.prompts.extend(["a low bell", "a drum"])
    assert [step.index for step in fit(recipe, folder, sample_every=2, save_every=2)] == [0, 1]
    return folder


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_samples_are_written_as_sounds_one_after_another(run):
    rate, samples = wavfile.read(run / "samples" / "step_000002.wav")
    assert rate == md.sounds.RATE
    assert samples.shape == (2 * tones.SAMPLES,)


def test_a_run_is_loaded_and_its_data_are_guessed(run):
    pipe = md.TextToSound.from_pretrained(run)
    assert pipe.model.shape == (1, tones.SAMPLES)
    assert guess_data(pipe.model) == "tones"
    with pytest.raises(ValueError, match="makes sounds: use TextToSound"):
        md.TextToImage.from_pretrained(run)


def test_the_command_writes_a_wav(run, tmp_path):
    file = tmp_path / "bell.wav"
    done = command("sample", "a low bell", "--model", run, "-o", file, "--steps", 2, "--seed", 3)
    assert done.exit_code == 0, done.exception
    _, samples = wavfile.read(file)
    alone = md.TextToSound.from_pretrained(run)("a low bell", steps=2, seed=3).tensors
    assert samples.tolist() == md.sounds.to_int16(alone).flatten().tolist()


def test_files_of_the_wrong_kind_are_refused(run, tmp_path):
    done = command("sample", "a bell", "--model", run, "-o", tmp_path / "bell.png")
    assert "makes sounds: use .wav" in str(done.exception)
    done = command("sample", "a cat", "-o", tmp_path / "cat.wav")
    assert "critters makes images: use .png" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_evaluate_and_doctor_find_the_data_by_themselves(run, tmp_path):
    done = command("evaluate", run, "--prompts", 4, "--steps", 2, "-o", tmp_path / "scores.json")
    assert done.exit_code == 0, done.exception
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {"seen: pitch", "held-out: timbre", "renders: everything"} <= set(scores)
    done = command("doctor", run, "--samples", 32)
    assert done.exit_code in (0, 2), done.exception
    assert "data range" not in done.output


def test_the_shipped_model_hits_the_note():
    """In sounds of one tone; a model that does not listen hits one of three."""
    pipe = md.TextToSound.from_pretrained("tones")
    wanted = [pitch for pitch in tones.PITCHES for _ in range(6)]
    x = pipe([f"a {pitch} flute" for pitch in wanted], steps=20, guidance=2.0, seed=1).tensors
    notes = torch.tensor([tones.PITCHES[pitch] for pitch in wanted])
    assert (tones.cents(tones.pitch(x[:, 0]), notes).abs() <= 50).double().mean() >= 0.75


def test_the_shipped_model_plays_what_it_never_heard_together():
    """Held-out successions: by chance 1 in 16 would have both timbres right."""
    rng = Random(5)
    wanted = [tones.sample_sound(rng, "held_out") for _ in range(24)]
    x = md.TextToSound.from_pretrained("tones")([tones.prompt(sound) for sound in wanted]).tensors
    found = tones.shares(tones.hear(x), wanted)
    assert found["timbre"].value >= 0.75
    assert found["pitch"].value >= 0.75


def test_the_command_knows_the_usual_guidance():
    for kind in (md.TextToImage, md.TextToSound):
        assert signature(kind.__call__).parameters["guidance"].default == kind.usual_guidance


def test_faint_data_weigh_as_if_they_were_as_loud_as_pictures():
    level = md.Flow()(torch.tensor([0.001, 0.1, 0.5, 1.0], dtype=torch.float64))
    assert faint(level).tolist() == pytest.approx([50, 1 + 81 / 12, 1 + 1 / 12, 1])
