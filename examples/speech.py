"""Speech from its spectrogram: a conditional flow of recorded prompts, WaveGlow, trained on random crops.

The prompts are Debian's package asterisk-core-sounds-en-wav, the mel spectrograms librosa's. Every tenth utterance is
held out. One of them is made again from its spectrogram, as sound files and a picture. A training that was broken off
goes on from its checkpoint.
"""

import argparse
import wave
from pathlib import Path

import librosa
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import DataLoader

import pyro_flows as pf
from pyro_flows import datasets

WINDOW, HOP, BANDS, LENGTH = 256, 80, 40, 4000  # samples of a window and of a frame; bands; samples of a crop


def log_mel(sound):
    """Return the log mel spectrogram, (frames, bands); each window lies around its frame."""
    options = {"sr": 8000, "n_fft": WINDOW, "hop_length": HOP, "n_mels": BANDS, "center": False, "power": 1.0}
    found = librosa.feature.melspectrogram(y=np.pad(sound, (WINDOW - HOP) // 2, mode="reflect"), **options)
    return torch.from_numpy(np.log(np.maximum(found, 1e-5)).T)


def write(path, sound):
    """Write a sound between -1 and 1 as a file of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((sound * 32767).clip(-32767, 32767).astype("<i2").tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="train for ten seconds")
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, of the processor")
    parser.add_argument("--out", type=Path, default=Path("speech"), help="folder of what is written")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    levels = [k[: len(k) // HOP * HOP] for k in datasets.prompts().values()]
    mels = [log_mel(k.numpy().astype("float32") / 32768) for k in levels]
    sd, mean = torch.std_mean(torch.cat(mels), 0)
    pairs = [(k, (mel - mean) / sd) for k, mel in zip(levels, mels, strict=True)]
    held = pairs[9::10]
    train = datasets.Crops([pair for n, pair in enumerate(pairs) if n % 10 != 9], length=LENGTH, count=800)
    validation = tuple(next(iter(DataLoader(datasets.Crops(held, length=LENGTH, count=64), 64))))
    flow = pf.waveglow((1, LENGTH), frames=LENGTH // HOP, context_dim=LENGTH // HOP * BANDS)
    flow.bijection.start_from(*next(iter(DataLoader(train, 64))))
    about = {"validation": validation, "checkpoint": options.out / "state"}
    about |= {"max_seconds": 10.0 if options.smoke else options.seconds, "clock": "cpu", "learning_rate": 2e-3}
    fit = pf.fit_density(flow, DataLoader(train, 8), **about)
    fit.save(options.out / "density")
    fit.plot_losses().savefig(options.out / "losses.png")
    print(f"{fit.validation / LENGTH:.2f} nats a sample of utterances that were held out")

    chosen, frames = min(held, key=lambda pair: abs(len(pair[0]) - 24000))  # of about three seconds
    longer = fit.at_length(len(chosen))
    drawn = {heat: longer.sample(1, frames.flatten(), temperature=heat, seed=0).flatten() for heat in (1.0, 0.7)}
    made = {"recorded": chosen / 32768, **{f"temperature {heat}": sound for heat, sound in drawn.items()}}
    figure, axes = plt.subplots(len(made), sharex=True, figsize=(8, 6), layout="constrained")
    for axis, (name, sound) in zip(axes, made.items(), strict=True):
        write(options.out / f"{name.replace(' ', '-')}.wav", sound.numpy())
        axis.specgram(sound + 1e-6, NFFT=WINDOW, Fs=8000, noverlap=WINDOW - HOP, cmap="magma", vmin=-130, vmax=-30)
        axis.set(title=name, ylabel="Hz")
    figure.savefig(options.out / "spectrograms.png")


if __name__ == "__main__":
    main()
