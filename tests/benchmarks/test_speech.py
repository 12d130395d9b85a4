"""The benchmark of speech, on noise of a known process in the place of recordings."""

import math
import wave

import numpy as np
import pytest
import torch

from benchmarks.speech import running

SD = 500.0 / 32768.0  # of what is not predicted


@pytest.fixture
def folder(tmp_path):
    """Twenty recordings of a second and less, by an AR(2) process."""
    generator = np.random.default_rng(0)
    for number in range(20):
        noise, found = 500.0 * generator.standard_normal(6000 + 80 * number), [0.0, 0.0]
        for value in noise:
            found.append(1.2 * found[-1] - 0.5 * found[-2] + value)
        with wave.open(str(tmp_path / f"{number:02}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(np.round(found[2:]).astype("<i2").tobytes())
    return str(tmp_path)


def test_linear_prediction_reaches_the_entropy(folder, monkeypatch):
    monkeypatch.setattr(running, "log_mel", lambda sound: np.zeros((len(sound) // running.HOP, 2), np.float32))
    speech = running.Speech(folder)
    assert (len(speech.train), speech.validation, speech.test) == (17, ["04"], ["09", "19"])
    found = running.linear_predictions(speech)
    best = -0.5 * math.log(2.0 * math.pi * math.e * SD**2)
    assert found["AR(16)"] == pytest.approx(best, abs=0.02)
    assert found["Gaussian"] < best - 0.3
    assert found["AR(16), the variance of each frame known"] > best


def test_what_is_decoded_is_nearer_to_the_mean_log_spectrum_than_the_draws(monkeypatch):
    monkeypatch.setattr(running, "ITERATIONS", 50)
    generator = np.random.default_rng(0)
    sounds = np.float32(0.05) * generator.standard_normal((4, 4000)).astype(np.float32)
    mean = running.decibels(torch.from_numpy(sounds)).mean(0)

    def apart(sound):
        return float((running.decibels(torch.from_numpy(sound)) - mean).square().mean().sqrt())

    assert apart(running.decoded(sounds)) < 0.6 * min(map(apart, sounds))
    assert np.array_equal(running.decoded(sounds[:1]), sounds[0])  # one draw has its own spectrum


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # librosa's own
def test_a_flow_is_trained_and_judged(folder, tmp_path):
    pytest.importorskip("librosa", reason="needs librosa: pip install 'pyro-flows[speech]'")
    page = tmp_path / "page.md"
    page.write_text("<!-- speech: begin -->\n<!-- speech: end -->\n")
    places = ["--csv", str(tmp_path / "speech.csv"), "--page", str(page), "--out", str(tmp_path / "out")]
    threads = torch.get_num_threads()
    try:
        running.main(["--seconds", "20", "--sounds", folder, *places])
    finally:
        torch.set_num_threads(threads)
    rows = {row["method"]: row for row in running.records.read(tmp_path / "speech.csv")}
    assert float(rows["WaveGlow, temperature 1.0"]["nats"]) > float(rows["Gaussian"]["nats"])
    assert float(rows["Griffin-Lim"]["log_mel"]) > 0.0
    best = rows[f"WaveGlow, temperature 0.7, mean log spectrum of {running.DRAWS}"]
    assert float(best["log_spectrum"]) < float(rows["WaveGlow, temperature 0.7, bands corrected"]["log_spectrum"])
    assert "| English, WaveGlow, temperature 0.7 |" in page.read_text()
