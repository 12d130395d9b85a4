# %% [markdown]
# # Speech from its spectrogram
#
# For anyone who works with sound. A conditional flow draws a signal of thousands of samples, given its mel spectrogram.
# You can listen to what it draws. The flow is `pf.waveglow`.
#
# The recordings are a Debian package: `apt-get install asterisk-core-sounds-en-wav`. They are 558 prompts of one
# speaker (Allison Smith, CC-BY-SA-3.0), at 8000 samples a second. Spectrograms need `pip install "pyro-flows[speech]"`,
# which is librosa. Without the recordings, the notebook makes sounds of its own, and says so.

# %%
import time

import librosa
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Audio, Markdown, display
from torch.utils.data import DataLoader

import pyro_flows as pf
from pyro_flows import datasets

plt.style.use("pyro_flows.style")
torch.set_num_threads(1)
RATE, WINDOW, HOP, BANDS = 8000, 256, 80, 40  # samples a second, of a window, of a frame (10 ms); bands
LENGTH, BEYOND = 50 * HOP, (WINDOW - HOP) // 2  # samples of a crop; of a window on either side of its frame
FRAMED = {"n_fft": WINDOW, "hop_length": HOP, "center": False}


def made_up(count=100, seconds=2.0):
    """Return sounds by name: harmonics of a pitch that glides, two resonances that move, and noise."""
    generator, found = np.random.default_rng(0), {}
    at, knots = np.arange(int(RATE * seconds)) / RATE, np.linspace(0.0, seconds, 7)
    for number in range(count):
        ranges = ((150, 250), (300, 800), (1000, 2500), (0, 1))
        pitch, *resonances, voiced = (np.interp(at, knots, generator.uniform(*one, 7)) for one in ranges)
        phase, sound = 2.0 * np.pi * np.cumsum(pitch) / RATE, 0.03 * (1.0 - voiced) * generator.standard_normal(len(at))
        for k in range(1, 15):
            loud = sum(1.0 / (1.0 + ((k * pitch - center) / 100.0) ** 2) for center in resonances)
            sound += 0.1 * voiced**2 * loud * np.sin(k * phase)
        found[f"sound {number}"] = torch.from_numpy((32767 * sound.clip(-1.0, 1.0)).astype("int16"))
    return found


def listen(sounds):
    """Show a player for each sound between -1 and 1."""
    for name, sound in sounds.items():
        display(Markdown(f"**{name}**"), Audio(np.asarray(sound), rate=RATE, normalize=False))


# %% [markdown]
# ## Recordings
#
# Every tenth recording is held out whole. A frame has 80 samples, so a recording is cut to whole frames.

# %%
try:
    recordings = datasets.prompts()
    print("recorded prompts of asterisk-core-sounds-en-wav")
except FileNotFoundError as missing:
    recordings = made_up()
    print(f"{missing}\nSo these are synthetic sounds, and no speech.")
recordings = {name: levels[: len(levels) // HOP * HOP] for name, levels in recordings.items()}
held = list(recordings)[9::10]
minutes = sum(map(len, recordings.values())) / RATE / 60
print(f"{len(recordings)} recordings, {minutes:.1f} minutes; {len(held)} are held out")
chosen = min(held, key=lambda name: abs(len(recordings[name]) - 2 * RATE))  # of about two seconds
recorded = recordings[chosen].numpy().astype("float32") / 32768
listen({f"recorded, held out: {chosen}": recorded})

# %% [markdown]
# ## What the flow is given
#
# A mel spectrogram has the energy of 40 bands in each frame of 10 ms. It keeps loudness, pitch and formants. It loses
# the phases, and what differs within a band: 40 numbers describe 80 samples. So there are many signals for one
# spectrogram, and the flow describes their distribution.


# %%
def log_mel(sound):
    """Return the log mel spectrogram, (frames, bands); each window lies around its frame."""
    padded = np.pad(sound, BEYOND, mode="reflect")
    found = librosa.feature.melspectrogram(y=padded, sr=RATE, n_mels=BANDS, power=1.0, **FRAMED)
    return torch.from_numpy(np.log(np.maximum(found, 1e-5)).T)


def show(sounds):
    """Show spectrograms, one below the other."""
    _, axes = plt.subplots(len(sounds), figsize=(6.0, 0.6 + 1.1 * len(sounds)), sharex=True, layout="constrained")
    for axis, (name, sound) in zip(axes, sounds.items(), strict=True):
        look = {"cmap": "magma", "vmin": -120, "vmax": -30}
        axis.specgram(np.asarray(sound) + 1e-6, NFFT=WINDOW, Fs=RATE, noverlap=WINDOW - HOP, **look)
        axis.set(title=name, ylabel="Hz")
    axes[-1].set_xlabel("seconds")
    plt.show()


mels = {name: log_mel(levels.numpy().astype("float32") / 32768) for name, levels in recordings.items()}
figure, axes = plt.subplots(2, figsize=(7.4, 3.6), sharex=True, layout="constrained")
axes[0].plot(np.arange(len(recorded)) / RATE, recorded, linewidth=0.4)
axes[0].set(ylabel="amplitude")
axes[1].imshow(mels[chosen].T, origin="lower", aspect="auto", cmap="magma", extent=(0, len(recorded) / RATE, 0, BANDS))
axes[1].set(xlabel="seconds", ylabel="band")
plt.show()

# %% [markdown]
# ## Training
#
# `datasets.Crops` gives random crops of half a second with their frames. The context of `pf.waveglow` is one vector:
# the bands of the first frame, then of the second, and so on. `start_from` standardizes what the layers see.
#
# The training has 90 seconds of the processor. That is short: the benchmark's takes five times as long. The curve shows
# the log density of crops, in nats. The training loss is minus that.

# %%
sd, mean = torch.std_mean(torch.cat([mels[name] for name in recordings if name not in held]), 0)
frames = {name: (mel - mean) / sd for name, mel in mels.items()}


def crops(names, count):
    return datasets.Crops([(recordings[name], frames[name]) for name in names], length=LENGTH, count=count)


torch.manual_seed(0)
train = crops([name for name in recordings if name not in held], 800)
validation = tuple(next(iter(DataLoader(crops(held, 32), 32))))
flow = pf.waveglow((1, LENGTH), frames=LENGTH // HOP, context_dim=LENGTH // HOP * BANDS)
flow.bijection.start_from(*next(iter(DataLoader(train, 64))))
budget = {"max_seconds": 90.0, "clock": "cpu", "learning_rate": 2e-3, "progress": False}
fitted = pf.fit_density(flow, DataLoader(train, 2), validation=validation, **budget)
print(f"{fitted.validation / LENGTH:.2f} nats a sample of recordings that were held out")
fitted.plot_losses()

# %% [markdown]
# Amplitudes are between -1 and 1, with noise of one level of 16 bits. For the prompts, a Gaussian has 0.78 nats a
# sample, and linear prediction from the 16 samples before has 1.94.
#
# ## From frames to sound
#
# The weights do not depend on the length. `at_length` gives the density of a signal as long as the recording. All
# samples are drawn at once, since each coupling is inverted in one step.
#
# A lower temperature draws nearer to the mode of the base: less noise, and less variety.

# %%
longer = fitted.at_length(len(recorded))
began = time.process_time()
made = {"recorded": recorded}
for heat in (1.0, 0.5):
    drawn = longer.sample(1, frames[chosen].flatten(), temperature=heat, seed=0)
    made[f"temperature {heat}"] = drawn.flatten().clamp(-1.0, 1.0).numpy()
spent = (time.process_time() - began) / 2 / (len(recorded) / RATE)
print(f"a second of sound takes {spent:.3f} seconds of one core")
show(made)

# %%
listen({name: sound for name, sound in made.items() if name != "recorded"})

# %% [markdown]
# ## Nearer to the spectrogram
#
# The draws follow loudness and formants. They fill quiet places and the gaps between harmonics with noise. A draw has
# about the spectrogram that it was given, so what is left is a gain for each band and frame. `corrected` applies it in
# some rounds, since windows overlap.
#
# Griffin and Lim's method uses no density. It takes magnitudes from the bands by least squares, and then finds phases
# that fit.


# %%
def corrected(sound, mel, rounds=32):
    """Return the sound with the energy of each band and frame moved to a log mel spectrogram."""
    basis = librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=BANDS)
    share, padded = (basis / np.maximum(basis.sum(0), 1e-12)).T, np.pad(sound, BEYOND, mode="reflect")
    for _ in range(rounds):
        spectrum = librosa.stft(padded, **FRAMED)
        wanted = mel.numpy().T - np.log(np.maximum(basis @ np.abs(spectrum), 1e-5))
        padded = librosa.istft(spectrum * np.exp(share @ wanted), length=len(padded), **FRAMED)
    return padded[BEYOND:-BEYOND].clip(-1.0, 1.0)


def griffin_lim(mel):
    """Return a sound with about this log mel spectrogram."""
    magnitudes = librosa.feature.inverse.mel_to_stft(mel.exp().numpy().T, sr=RATE, n_fft=WINDOW, power=1.0)
    padded = librosa.griffinlim(magnitudes, n_iter=60, random_state=0, **FRAMED)
    return padded[BEYOND : BEYOND + len(mel) * HOP].clip(-1.0, 1.0)


made["temperature 0.5, corrected"] = corrected(made["temperature 0.5"], mels[chosen])
made["Griffin-Lim"] = griffin_lim(mels[chosen])
for name, sound in made.items():
    print(f"{name}: log mel spectrogram off by {(log_mel(sound) - mels[chosen]).abs().mean():.2f}")
show({name: made[name] for name in ("recorded", "temperature 0.5, corrected", "Griffin-Lim")})

# %%
listen({name: made[name] for name in ("temperature 0.5, corrected", "Griffin-Lim")})

# %% [markdown]
# The corrected draw is nearer to the mel spectrogram than Griffin-Lim's sound. By the full spectrum, Griffin-Lim's is
# nearer. No band tells the highest frequencies, and there a draw is too loud. `benchmarks/speech` corrects these by a
# gain for each frequency, from recordings. Then a draw is nearer than this sound, which gains by the same too.
#
# ## Other frames
#
# Frames may be changed before sound is made of them. Here they are stretched in time by 1.4, and so the sound is
# slower. Its pitch stays, since the bands hold it.

# %%
stretched = torch.nn.functional.interpolate(mels[chosen].T[None], scale_factor=1.4, mode="linear")[0].T
slower = fitted.at_length(len(stretched) * HOP)
drawn = slower.sample(1, ((stretched - mean) / sd).flatten(), temperature=0.5, seed=0).flatten().clamp(-1.0, 1.0)
listen({"slower": corrected(drawn.numpy(), stretched)})

# %% [markdown]
# ## When it goes wrong
#
# - **Hissing.** Lower the temperature, or correct the bands. A longer training helps most: pass `max_seconds=600` and
#   `checkpoint="speech"`, and the same call goes on from where it was broken off.
# - **The validation loss rises.** The recordings are too few. Add some, or use fewer `hidden` channels.
# - **`prompts` refuses a file.** Its rate, width or number of channels is another. Convert it, for example by
#   `librosa.load(path, sr=8000)`.
# - **A length is refused.** A signal has whole frames, and a frame has whole groups of 16 samples. Cut or pad it.
# - **Another speaker sounds strange.** The flow knows one voice and one microphone. Train it on several.
