"""WaveGlow on recorded prompts, given their mel spectrograms: nats a sample, and reconstruction against Griffin-Lim.

    python -m benchmarks.speech --voice Russian --seconds 2400 --out speech

The recordings are Debian's packages asterisk-core-sounds-en-wav and festvox-ru, at 8 kHz, and the spectrograms
librosa's (pip install 'pyro-flows[speech]'). Every tenth utterance is held out whole for the test, and a few of the
others to stop by. A training that was broken off goes on from its checkpoint. A row of the CSV file is what one method
makes of a test: nats a sample of amplitudes between -1 and 1, with noise of one level of 16 bits; the mean difference
of log mel spectrograms, in nats; the log spectral distance, in decibels; the spectral convergence, which is the norm
of the difference of magnitudes over that of the recording's; seconds of the processor for a second of sound.
"""

from __future__ import annotations

import argparse
import math
import time
import wave
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from pyro_flows.support.figures import panels, styled
from pyro_flows.support.process.seeding import seeded

RATE, WINDOW, HOP, BANDS = 8000, 256, 80, 40  # samples a second, of a window, of a frame (10 ms); bands
BEYOND = (WINDOW - HOP) // 2  # samples of a window on either side of its frame
LENGTH, BATCH = 50 * HOP, 2  # of a crop; crops a step
FLOOR, DIM = 1e-5, 1e-3  # of mel magnitudes and of magnitudes, under the logarithm
TEMPERATURES = (1.0, 0.7)
ROUNDS = 32  # of the correction of bands
DRAWS, ITERATIONS = 8, 200  # whose log spectra have a mean; of the sound that fits it
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
    "convergence",
    "real_time",
    "version",
    "machine",
    "software",
)
OUT = records.RESULTS / "speech.csv"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "densities.md"
Make = Callable[[str, int], Sequence[np.ndarray]]  # some sounds for an utterance's spectrogram


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


def synthesized(fit: pf.DensityFit, frames: Tensor, temperature: float, count: int = 1) -> np.ndarray:
    """Return waves of the flow for standardized frames, (count, T)."""
    drawn = fit.at_length(len(frames) * HOP).sample(count, frames.reshape(1, -1), temperature=temperature, seed=0)
    return drawn.flatten(1).clamp(-1.0, 1.0).numpy()


def missing(speech: Speech, make: Make) -> np.ndarray:
    """Return the gain of each frequency that made sounds with corrected bands lack, by power of training recordings.

    No band tells the lowest and the highest frequencies, and the highest band has a steep slope.
    """
    power = np.zeros((2, WINDOW // 2 + 1))
    for name in speech.train[::40]:
        sounds = amplitudes(speech.recordings[name]), corrected(make(name, 1)[0], speech.mels[name])
        power += [np.square(_magnitudes(sound)).sum(1) for sound in sounds]
    return np.sqrt(power[0] / np.maximum(power[1], 1e-12))


def corrected(sound: np.ndarray, mels: Tensor, gains: np.ndarray | None = None) -> np.ndarray:
    """Return the sound with the energy of each band and frame moved to its log mel spectrogram, in some rounds.

    Gains of the frequencies are applied first.

    A flow's draw has about the spectrogram that it was given. What is left is a gain for each band, by Fourier
    transforms of overlapping windows, which is why one round is not enough.
    """
    import librosa

    basis = librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=BANDS)
    share = (basis / np.maximum(basis.sum(0), 1e-12)).T
    padded = np.pad(sound, BEYOND, mode="reflect")
    options = {"n_fft": WINDOW, "hop_length": HOP, "center": False}
    if gains is not None:
        padded = librosa.istft(librosa.stft(padded, **options) * gains[:, None], length=len(padded), **options)
    for _ in range(ROUNDS):
        spectrum = librosa.stft(padded, **options)
        wanted = mels.numpy().T - np.log(np.maximum(basis @ np.abs(spectrum), FLOOR))
        padded = librosa.istft(spectrum * np.exp(share @ wanted), length=len(padded), **options)
    return np.clip(padded[BEYOND : BEYOND + len(sound)], -1.0, 1.0)


def decibels(sounds: Tensor) -> Tensor:
    """Return the log spectra of sounds (..., T), two windows a frame, in decibels: (..., frequencies, times)."""
    options = {"window": torch.hann_window(WINDOW), "pad_mode": "constant", "return_complex": True}
    spectrum = torch.stft(sounds, WINDOW, HOP // 2, **options)
    return 20.0 * torch.log10((spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt() + DIM)


def decoded(sounds: Sequence[np.ndarray]) -> np.ndarray:
    r"""Return the sound x nearest to the mean log spectrum of draws y_k, by L-BFGS from the first one.

    .. math:: \operatorname{argmin}_x \lVert L(x) - \tfrac{1}{K} \sum_k L(y_k) \rVert^2

    If the y_k are draws of the posterior, this has the least expected squared distance of log spectra L.
    """
    given = torch.from_numpy(np.stack(sounds).astype(np.float32))
    target, sound = decibels(given).mean(0), given[0].clone().requires_grad_()
    options = {"max_iter": ITERATIONS, "history_size": 10, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([sound], line_search_fn="strong_wolfe", **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (decibels(sound) - target).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    return np.clip(sound.detach().numpy(), -1.0, 1.0)


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


def griffin_lim(mels: Tensor, count: int = 1) -> list[np.ndarray]:
    """Return waves for a log mel spectrogram by librosa: least squares for magnitudes, 60 rounds for random phases."""
    import librosa

    magnitudes = librosa.feature.inverse.mel_to_stft(mels.exp().numpy().T, sr=RATE, n_fft=WINDOW, power=1.0)
    length = len(mels) * HOP
    options = {"n_iter": 60, "hop_length": HOP, "n_fft": WINDOW, "center": False, "length": length + 2 * BEYOND}
    padded = [librosa.griffinlim(magnitudes, random_state=seed, **options) for seed in range(count)]
    return [np.clip(one[BEYOND : BEYOND + length], -1.0, 1.0) for one in padded]


def _magnitudes(sound: np.ndarray) -> np.ndarray:
    import librosa

    return np.abs(librosa.stft(sound, n_fft=WINDOW, hop_length=HOP))


def distances(sound: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return how far another sound is by log mel spectrograms, by log spectra, and by magnitudes."""
    first, second = _magnitudes(sound), _magnitudes(other)
    apart = 20.0 * (np.log10(first + DIM) - np.log10(second + DIM))
    return {
        "log_mel": float(np.abs(log_mel(sound) - log_mel(other)).mean()),
        "log_spectrum": float(np.sqrt(np.square(apart).mean(0)).mean()),
        "convergence": float(np.linalg.norm(first - second) / np.linalg.norm(first)),
    }


# rows -----------------------------------------------------------------------------------------------------------------


def reconstructed(speech: Speech, way: Callable[[str], np.ndarray]) -> dict[str, float]:
    """Return how far every third utterance of the test is from what is made of its spectrogram, and the time taken."""
    way(speech.test[0])  # what is compiled or loaded at the first call
    spent, length, found = 0.0, 0, {}
    for name in speech.test[::3]:
        began = time.process_time()
        sound = way(name)
        spent += time.process_time() - began
        length += len(sound)
        for key, value in distances(amplitudes(speech.recordings[name]), sound).items():
            found[key] = found.get(key, 0.0) + len(sound) * value
    return {key: value / length for key, value in found.items()} | {"real_time": spent / (length / RATE)}


def makers(speech: Speech, fit: pf.DensityFit) -> dict[str, Make]:
    """Return what makes sounds of spectrograms, by name."""

    def drawn(heat: float, name: str, count: int) -> np.ndarray:
        return synthesized(fit, speech.frames[name], heat, count)

    others: dict[str, Make] = {"Griffin-Lim": lambda name, count: griffin_lim(speech.mels[name], count)}
    return others | {f"WaveGlow, temperature {heat}": partial(drawn, heat) for heat in TEMPERATURES}


def ways(speech: Speech, make: Make) -> dict[str, Callable[[str], np.ndarray]]:
    """Return what becomes of made sounds: nothing, corrections, and the sound nearest to their mean log spectrum."""
    gains, mels = missing(speech, make), speech.mels
    return {
        "": lambda name: make(name, 1)[0],
        ", bands corrected": lambda name: corrected(make(name, 1)[0], mels[name]),
        ", frequencies and bands corrected": lambda name: corrected(make(name, 1)[0], mels[name], gains),
        f", mean log spectrum of {DRAWS}": lambda name: decoded(
            [corrected(sound, mels[name], gains) for sound in make(name, DRAWS)]
        ),
    }


def judge(speech: Speech, fit: pf.DensityFit) -> list[dict[str, object]]:
    """Return a row for each method."""
    rows: list[dict[str, object]] = [
        {"method": name, "nats": value} for name, value in linear_predictions(speech).items()
    ]
    trained = {"seconds": fit.settings["seconds"], "steps": fit.settings["steps"]}
    trained["nats"] = nats(fit, speech, speech.test)
    for label, make in makers(speech, fit).items():
        known = trained if label.startswith("WaveGlow") else {}
        for more, way in ways(speech, make).items():
            rows.append({"method": label + more, **known, **reconstructed(speech, way)})
    said = {"version": records.code_version(), "machine": records.machine(), "software": records.software()}
    said |= {"recordings": len(speech.recordings), "held_out": len(speech.test)}
    return [
        {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in {**row, **said}.items()}
        for row in rows
    ]


def listen(speech: Speech, fit: pf.DensityFit, out: Path, chosen: str) -> None:
    """Write what is made of one spectrogram as sound files and a picture."""
    sounds = {"recorded": amplitudes(speech.recordings[chosen])}
    flow = ways(speech, makers(speech, fit)[f"WaveGlow, temperature {TEMPERATURES[0]}"])
    sounds |= {f"WaveGlow{more}": way(chosen) for more, way in flow.items() if more != ", bands corrected"}
    sounds["Griffin-Lim"] = griffin_lim(speech.mels[chosen])[0]
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
    header = ("voice, method", "nats a sample", "log mel", "log spectrum, dB", "convergence", "CPU s for a second")
    digits = {"nats": 2, "log_mel": 3, "log_spectrum": 2, "convergence": 2, "real_time": 3}
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
