"""Audio processing for the demo's models, in numpy."""

from __future__ import annotations

import io
import wave
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
RATE = 16_000
"""Samples per second of all speech in the demo."""


def read_wav(content: bytes) -> Floats:
    """A 16-bit mono wav file at ``RATE`` as samples in -1..1, shape [samples]. ValueError for other files."""
    with wave.open(io.BytesIO(content)) as file:
        kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if kind != (1, 2, RATE):
            raise ValueError(f"wav file: expected (1 channel, 2 bytes, {RATE} Hz), found {kind}")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    level: Floats = samples.astype(np.float32) / np.float32(2**15)
    return level


def tone(hertz: float, samples: int, rate: int = RATE, level: float = 0.5) -> Floats:
    """A sine, shape [samples]."""
    wave_form: Floats = np.sin(2 * np.pi * hertz / rate * np.arange(samples)).astype(np.float32)
    return wave_form * np.float32(level)


def silence(seconds: float) -> Floats:
    """Zeros at ``RATE``."""
    return np.zeros(round(seconds * RATE), np.float32)


def repeated(sound: Floats, samples: int) -> Floats:
    """``sound`` repeated to the length of ``samples``."""
    return np.tile(sound, -(-samples // len(sound)))[:samples]


def with_noise(sound: Floats, level: float, seed: int = 0) -> Floats:
    """``sound`` with white noise of standard deviation ``level``, clipped to -1..1."""
    noise = np.random.default_rng(seed).normal(0.0, level, len(sound))
    return np.clip(sound + noise, -1.0, 1.0).astype(np.float32)


def power_spectrum(
    sound: npt.NDArray[np.floating], window: npt.NDArray[np.float64], hop: int, mode: str
) -> npt.NDArray[np.float64]:
    """Power of windowed, centred frames of a sound, shape [frames, len(window) // 2 + 1].

    ``mode`` is how numpy pads half a window on both sides: ``reflect`` or ``constant``.
    """
    half = len(window) // 2
    padded = np.pad(np.asarray(sound, np.float64), half, mode=mode)  # type: ignore[call-overload]
    frames = np.lib.stride_tricks.sliding_window_view(padded, len(window))[::hop]
    return np.asarray(np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2)


@cache
def mel_filters(bins: int, bands: int, bin_hertz: float) -> npt.NDArray[np.float64]:
    """Triangles of equal area on the Slaney mel scale up to half of ``RATE``, shape [bins, bands].

    The scale is linear up to 1 kHz (15 mel) and logarithmic above, 27 mel for a factor of 6.4.
    """
    step = np.log(6.4) / 27.0
    top = 15.0 + np.log(RATE / 2 / 1000.0) / step
    mels = np.linspace(0.0, top, bands + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp(step * (mels - 15.0)))
    hertz = np.arange(bins)[:, None] * bin_hertz
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hertz - low) / (mid - low), (high - hertz) / (high - mid)
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low)))


def whisper_features(sound: Floats) -> Floats:
    """Log-mel bands of the last 8 s, zeros before them, as Whisper computes them: shape [80, 800]."""
    padded = np.zeros(8 * RATE, np.float32)
    tail = sound[-len(padded) :]
    padded[len(padded) - len(tail) :] = tail
    level = (padded - padded.mean()) / np.sqrt(padded.var() + np.float32(1e-7))
    window = np.hanning(401)[:-1]
    mel = power_spectrum(level, window, 160, "reflect") @ mel_filters(201, 80, RATE / 400)
    logs = np.log10(np.maximum(mel, 1e-10))[:-1]
    return np.asarray((np.maximum(logs, logs.max() - 8.0) + 4.0).T / 4.0, np.float32)


def mos_features(sound: Floats) -> Floats:
    """Mel bands in dB below the loudest, floor 80 dB, scaled for DNSMOS P.808: 9 s give [900, 120]."""
    window = np.hanning(322)[:-1]
    mel = power_spectrum(sound, window, 160, "constant") @ mel_filters(161, 120, RATE / 321)
    decibels = 10.0 * np.log10(np.maximum(mel, 1e-10) / max(float(mel.max()), 1e-10))
    return ((np.maximum(decibels, -80.0) + 40.0) / 40.0).astype(np.float32)


def loss_features(sound: Floats) -> Floats:
    """Log power of 512-point frames, hop 256, for PLCMOS: 5 s give [313, 257]."""
    window = np.hamming(513)[:-1]
    count = -(-(len(sound) + 256) // 256)
    padded = np.zeros((count - 1) * 256 + 512)
    padded[256 : 256 + len(sound)] = sound
    frames = np.lib.stride_tricks.sliding_window_view(padded, 512)[::256]
    power = np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2
    least = power[power > 0].min() if np.any(power > 0) else 1.0
    return (np.log(np.where(power > 0, power, least * 1e-12)) / 20.0).astype(np.float32)
