"""WaveGlow on recorded prompts, given their mel spectrograms: nats a sample, and reconstruction against Griffin-Lim.

    python -m benchmarks.speech --voice Russian --seconds 2400 --out speech

The recordings are Debian's packages asterisk-core-sounds-en-wav and festvox-ru, at 8 kHz, and the spectrograms
librosa's (pip install 'pyro-flows[speech]'). Every tenth utterance is held out whole for the test, and a few of the
others to stop by. A training that was broken off goes on from its checkpoint. A row of the CSV file is what one method
makes of a test: nats a sample of amplitudes between -1 and 1, with noise of one level of 16 bits; the mean difference
of log mel spectrograms, in nats; the log spectral distance, in decibels; seconds of the processor for a second of
sound.
"""

from __future__ import annotations

import argparse
import math
import time
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

import pyro_flows as pf
from benchmarks import fingerprints, records, tables
from benchmarks.density.gallery import save
from benchmarks.markdown import about, number, table
from pyro_flows import datasets
from pyro_flows._figures import panels, styled
from pyro_flows._seeding import seeded

RATE, WINDOW, HOP, BANDS = 8000, 256, 80, 40  # samples a second, of a window, of a frame (10 ms); bands
BEYOND = (WINDOW - HOP) // 2  # samples of a window on either side of its frame
LENGTH, BATCH = 50 * HOP, 2  # of a crop; crops a step
FLOOR, DIM = 1e-5, 1e-3  # of mel magnitudes and of magnitudes, under the logarithm
TEMPERATURES = (1.0, 0.7)
ROUNDS = 32  # of the correction of bands
ORDER = 16  # of linear prediction
RUSSIAN = "/usr/share/festival/voices/russian/msu_ru_nsh_clunits/wav"
VOICES = {"English": (datasets.PROMPTS, RATE), "Russian": (RUSSIAN, 2 * RATE)}  # folder, and samples a second
FIELDS = (
    "voice",
    "recordings",
    "held_out",
    "method",
    "seconds",
    "steps",
    "nats",
    "log_mel",
    "log_spectrum",
    "real_time",
    "version",
    "machine",
    "software",
)
OUT = records.RESULTS / "speech.csv"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "densities.md"


# data -----------------------------------------------------------------------------------------------------------------


def log_mel(sound: np.ndarray) -> np.ndarray:
    """Return the log mel spectrogram (frames, bands) of a sound of whole frames, each window around its frame."""
    import librosa

    padded = np.pad(sound, BEYOND, mode="reflect")
    options = {"sr": RATE, "n_fft": WINDOW, "hop_length": HOP, "n_mels": BANDS, "center": False, "power": 1.0}
    return np.log(np.maximum(librosa.feature.melspectrogram(y=padded, **options), FLOOR)).T


def resampled(levels: Tensor, rate: int) -> Tensor:
    """Return levels recorded at another rate as they would be at ours."""
    if rate == RATE:
        return levels
    import librosa

    sound = librosa.resample(levels.numpy().astype(np.float32), orig_sr=rate, target_sr=RATE)
    return torch.from_numpy(np.round(sound).clip(-32768, 32767).astype(np.int16))


def amplitudes(levels: Tensor) -> np.ndarray:
    """Return waves between -1 and 1, in the middle of their levels."""
    return (levels.numpy().astype(np.float32) + 0.5) / 32768.0


class Speech:
    """Utterances of whole frames with log mel spectrograms, and which of them serve for what."""

    def __init__(self, folder: str, rate: int = RATE) -> None:
        found = {name: resampled(k, rate) for name, k in datasets.prompts(folder, rate=rate).items()}
        self.recordings = {name: k[: len(k) // HOP * HOP] for name, k in found.items()}
        names = list(self.recordings)
        self.test, self.validation = names[9::10], names[4::20]
        self.train = [name for name in names if name not in {*self.test, *self.validation}]
        self.mels = {name: torch.from_numpy(log_mel(amplitudes(k))) for name, k in self.recordings.items()}
        seen = torch.cat([self.mels[name] for name in self.train])
        mean, sd = seen.mean(0), seen.std(0)
        self.frames = {name: ((values - mean) / sd).float() for name, values in self.mels.items()}

    def crops(self, names: Sequence[str], count: int) -> datasets.Crops:
        """Return random crops of some utterances."""
        pairs = [(self.recordings[name], self.frames[name]) for name in names]
        return datasets.Crops(pairs, length=LENGTH, count=count)

    def dequantized(self, name: str) -> Tensor:
        """Return an utterance (1, T) with noise."""
        return datasets.dequantized(self.recordings[name])[None]


# the flow -------------------------------------------------------------------------------------------------------------


def train(speech: Speech, out: Path, seconds: float, **options: object) -> pf.DensityFit:
    """Train by random crops, or go on from the checkpoint; write the density."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    flow = pf.waveglow((1, LENGTH), frames=LENGTH // HOP, context_dim=LENGTH // HOP * BANDS, **options)
    flow.bijection.start_from(*next(iter(DataLoader(speech.crops(speech.train, 64), 64))))
    held_out = tuple(next(iter(DataLoader(speech.crops(speech.validation, 64), 64))))
    more = {"batch": BATCH, "learning_rate": 2e-3, "weight_decay": 0.0, "max_seconds": seconds, "clock": "cpu"}
    loader = DataLoader(speech.crops(speech.train, 400 * BATCH), BATCH)
    fit = pf.fit_density(flow, loader, validation=held_out, checkpoint=out / "checkpoint", **more)
    fit.save(out / "density")
    return fit


@torch.no_grad()
def nats(fit: pf.DensityFit, speech: Speech, names: Sequence[str]) -> float:
    """Return the mean log density of whole utterances, in nats a sample."""
    total, count = 0.0, 0
    with seeded(0):
        for name in names:
            y, context = speech.dequantized(name), speech.frames[name].flatten()
            total += float(fit.at_length(y.shape[-1]).flow.log_prob(y, context))
            count += y.numel()
    return total / count


def synthesized(fit: pf.DensityFit, frames: Tensor, temperature: float) -> np.ndarray:
    """Return a wave of the flow for standardized frames."""
    drawn = fit.at_length(len(frames) * HOP).sample(1, frames.reshape(1, -1), temperature=temperature, seed=0)
    return drawn.flatten().clamp(-1.0, 1.0).numpy()


def corrected(sound: np.ndarray, mels: Tensor) -> np.ndarray:
    """Return the sound with the energy of each band and frame moved to its log mel spectrogram, in some rounds.

    A flow's draw has about the spectrogram that it was given. What is left is a gain for each band, by Fourier
    transforms of overlapping windows, which is why one round is not enough.
    """
    import librosa

    basis = librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=BANDS)
    share = (basis / np.maximum(basis.sum(0), 1e-12)).T
    padded = np.pad(sound, BEYOND, mode="reflect")
    for _ in range(ROUNDS):
        spectrum = librosa.stft(padded, n_fft=WINDOW, hop_length=HOP, center=False)
        wanted = mels.numpy().T - np.log(np.maximum(basis @ np.abs(spectrum), FLOOR))
        options = {"n_fft": WINDOW, "hop_length": HOP, "center": False, "length": len(padded)}
        padded = librosa.istft(spectrum * np.exp(share @ wanted), **options)
    return np.clip(padded[BEYOND : BEYOND + len(sound)], -1.0, 1.0)


# what others make of it -----------------------------------------------------------------------------------------------


def linear_predictions(speech: Speech) -> dict[str, float]:
    """Return nats a sample of the test: a Gaussian, linear prediction, and that with each frame's variance known."""
    with seeded(0):
        waves = {name: speech.dequantized(name)[0].double() for name in speech.recordings}
    train = [waves[name] for name in speech.train]
    before = torch.cat([_before(sound) for sound in train])
    weights = torch.linalg.lstsq(before, torch.cat(train)[:, None]).solution[:, 0]
    variance, left = torch.cat(train).square().mean(), (torch.cat(train) - before @ weights).square().mean()
    test = torch.cat([waves[name] for name in speech.test])
    residual = test - torch.cat([_before(waves[name]) for name in speech.test]) @ weights
    by_frame = residual.reshape(-1, HOP).square().mean(1, keepdim=True).expand(-1, HOP).flatten()
    given = {"Gaussian": (test, variance), f"AR({ORDER})": (residual, left)}
    given[f"AR({ORDER}), the variance of each frame known"] = residual, by_frame
    return {
        name: float(-0.5 * (values.square() / spread + torch.log(2.0 * math.pi * spread)).mean())
        for name, (values, spread) in given.items()
    }


def _before(sound: Tensor) -> Tensor:
    """Return the samples before each one (T, order), zeros before the first."""
    return torch.nn.functional.pad(sound, (ORDER, -1)).unfold(0, ORDER, 1)


def griffin_lim(mels: Tensor) -> np.ndarray:
    """Return a wave for a log mel spectrogram by librosa: least squares for magnitudes, then phases by 60 rounds."""
    import librosa

    magnitudes = librosa.feature.inverse.mel_to_stft(mels.exp().numpy().T, sr=RATE, n_fft=WINDOW, power=1.0)
    length = len(mels) * HOP
    options = {"n_iter": 60, "hop_length": HOP, "n_fft": WINDOW, "center": False, "random_state": 0}
    padded = librosa.griffinlim(magnitudes, length=length + 2 * BEYOND, **options)
    return np.clip(padded[BEYOND : BEYOND + length], -1.0, 1.0)


def distances(sound: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the mean difference of log mel spectrograms, in nats, and the log spectral distance, in decibels."""
    import librosa

    levels = [20.0 * np.log10(np.abs(librosa.stft(one, n_fft=WINDOW, hop_length=HOP)) + DIM) for one in (sound, other)]
    apart = np.sqrt(np.square(levels[0] - levels[1]).mean(0)).mean()
    return float(np.abs(log_mel(sound) - log_mel(other)).mean()), float(apart)


# rows -----------------------------------------------------------------------------------------------------------------


def reconstructed(speech: Speech, make: Callable[[str], np.ndarray]) -> dict[str, float]:
    """Return how far every third utterance of the test is from what is made of its spectrogram, and the time taken."""
    make(speech.test[0])  # what is compiled or loaded at the first call
    spent, found, length = 0.0, [], 0
    for name in speech.test[::3]:
        began = time.process_time()
        sound = make(name)
        spent += time.process_time() - began
        found.append([len(sound) * value for value in distances(amplitudes(speech.recordings[name]), sound)])
        length += len(sound)
    mel, spectrum = (float(value) for value in np.sum(found, 0) / length)
    return {"log_mel": mel, "log_spectrum": spectrum, "real_time": spent / (length / RATE)}


def judge(speech: Speech, fit: pf.DensityFit) -> list[dict[str, object]]:
    """Return a row for each method."""
    rows: list[dict[str, object]] = [
        {"method": name, "nats": value} for name, value in linear_predictions(speech).items()
    ]
    trained = {"seconds": fit.settings["seconds"], "steps": fit.settings["steps"]}
    trained["nats"] = nats(fit, speech, speech.test)
    makers: dict[str, Callable[[str], np.ndarray]] = {"Griffin-Lim": lambda name: griffin_lim(speech.mels[name])}
    for heat in TEMPERATURES:
        makers[f"WaveGlow, temperature {heat}"] = lambda name, heat=heat: synthesized(fit, speech.frames[name], heat)
    for label, make in makers.items():
        ways = {"": make, ", bands corrected": lambda name, make=make: corrected(make(name), speech.mels[name])}
        for more, way in ways.items():
            known = trained if label.startswith("WaveGlow") else {}
            rows.append({"method": label + more, **known, **reconstructed(speech, way)})
    said = {"version": records.code_version(), "machine": records.machine(), "software": records.software()}
    said |= {"recordings": len(speech.recordings), "held_out": len(speech.test)}
    return [
        {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in {**row, **said}.items()}
        for row in rows
    ]


def listen(speech: Speech, fit: pf.DensityFit, out: Path, chosen: str) -> None:
    """Write what is made of one spectrogram as sound files and a picture."""
    frames, mels = speech.frames[chosen], speech.mels[chosen]
    drawn = synthesized(fit, frames, 1.0)
    sounds = {"recorded": amplitudes(speech.recordings[chosen]), "WaveGlow": drawn}
    sounds |= {"WaveGlow, bands corrected": corrected(drawn, mels), "Griffin-Lim": griffin_lim(mels)}
    for name, sound in sounds.items():
        with wave.open(str(out / f"{name.replace(', ', '-').replace(' ', '-')}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((sound * 32767.0).astype("<i2").tobytes())
    save(_spectrograms(sounds), out / "speech-spectrograms.png")


@styled
def _spectrograms(sounds: Mapping[str, np.ndarray]) -> Figure:
    figure, axes = panels(len(sounds), columns=1, size=(6.4, 1.3 * len(sounds)))
    for axis, (name, sound) in zip(axes, sounds.items(), strict=True):
        about = {"NFFT": WINDOW, "Fs": RATE, "noverlap": WINDOW - HOP, "vmin": -120, "vmax": -30}
        axis.specgram(sound + 1e-6, cmap="magma", **about)
        axis.set_title(name)
        axis.set_ylabel("Hz")
    axes[-1].set_xlabel("seconds")
    return figure


def section(rows: Sequence[records.Row]) -> str:
    """Return the text and the table."""
    header = ("voice, method", "nats a sample", "log mel", "log spectrum, dB", "CPU s for a second")
    digits = {"nats": 2, "log_mel": 3, "log_spectrum": 2, "real_time": 3}
    body = [
        [f"{row['voice']}, {row['method']}", *(number(float(row[key] or math.nan), n) for key, n in digits.items())]
        for row in rows
    ]
    trained = [row for row in rows if row["seconds"]]
    held_out = {row["voice"]: f"{row['held_out']} of {row['recordings']} {row['voice']} ones" for row in trained}
    seconds = {row["voice"]: f"{float(row['seconds']):.0f}" for row in trained}
    versions = dict.fromkeys(f"pyro_flows {row['version']}" for row in rows)
    text = (
        f"Of the recordings, {' and '.join(held_out.values())} were held out whole. The flow was trained for "
        f"{' and '.join(seconds.values())} CPU seconds, given mel spectrograms of {BANDS} bands, with frames of "
        f"{1000 * HOP // RATE} ms. Nats are those of amplitudes between -1 and 1, with noise of one level of 16 bits. "
        "Distances are those of reconstructions to recordings, by mel spectrograms and by spectra, of every third "
        f"recording that was held out. {about(list(rows))} {' and '.join(versions)}."
    )
    return f"{fingerprints.stated(text, 'density')}\n\n{table(header, body)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speech", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2400.0, help="of training, of the processor")
    parser.add_argument("--out", type=Path, default=Path("speech"), help="folder of checkpoint and density")
    parser.add_argument("--voice", choices=VOICES, default="English", help="whose rows of the CSV file are written")
    parser.add_argument("--sounds", help="another folder of recordings, of the same rate")
    parser.add_argument("--csv", type=Path, default=OUT, help="the CSV file")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder, rate = VOICES[options.voice]
    speech = Speech(options.sounds or folder, rate)
    fit = train(speech, options.out, options.seconds)
    print(fit.summary())
    others = [row for row in records.read(options.csv) if row["voice"] != options.voice]
    rows = judge(speech, fit)
    records.write(options.csv, FIELDS, others)
    for row in rows:
        records.append(options.csv, FIELDS, {"voice": options.voice, **row})
    listen(speech, fit, options.out, min(speech.test, key=lambda name: abs(len(speech.recordings[name]) - 2 * RATE)))
    page = tables.replace(options.page.read_text(encoding="utf-8"), "speech", section(records.read(options.csv)))
    options.page.write_text(page, encoding="utf-8")
