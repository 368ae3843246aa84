"""Requests to the audio models. The only speech is one recorded word, "ready"; the music is made of sines."""

from __future__ import annotations

import io
import wave
from functools import cache

import numpy as np
import numpy.typing as npt

from clockwork_lab.demo import wheels
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.judgement import Judgement, Send

FRAME, CONTEXT = 512, 64  # new samples in a frame of Silero VAD, and samples of the frame before it

NOTES = ("A", "A#", "B", "C", "C#", "D", "D#", "E", "F", "F#", "G", "G#")
CHORD = (261.63, 329.63, 392.0)  # C4, E4, G4 in Hz

NOTES_RATE, NOTES_SAMPLES = 22_050, 43_844
MOS_SAMPLES, LOSS_SAMPLES, PITCH_SAMPLES = 144_000, 80_000, 16_000


def _word(files: Files) -> Floats:
    return read_wav(files.read(wheels.READY))


def voice_activity(files: Files, send: Send) -> Judgement:
    """When somebody speaks: silence, the word, silence; the state is fed back with every frame."""
    sound = np.concatenate([silence(0.5), _word(files), silence(0.5)])
    state, before = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32)
    speech = []
    for start in range(0, len(sound) - FRAME + 1, FRAME):
        new = sound[start : start + FRAME]
        inputs = {
            "input": np.concatenate([before, new])[None],
            "state": state,
            "sr": np.array(RATE, np.int64),
        }
        outputs = send(inputs)
        state, before = outputs["stateN"], new[-CONTEXT:]
        speech.append(float(outputs["output"].reshape(-1)[0]) > 0.5)
    spoken = np.flatnonzero(speech) * FRAME / RATE
    if not len(spoken):
        return Judgement("no speech heard", ok=False)
    first, last = float(spoken[0]), float(spoken[-1]) + FRAME / RATE
    good = 0.45 < first < 0.7 and 0.75 < last < 1.1 and bool(np.all(np.diff(np.flatnonzero(speech)) == 1))
    return Judgement(f"speech from {first:.2f} s to {last:.2f} s", good)


def end_of_turn(files: Files, send: Send) -> Judgement:
    """Whether the speaker has finished: after the word, and in the middle of its vowel."""
    word = _word(files)
    held = np.concatenate([word[:4800], np.tile(word[4000:4400], 40)])
    done, going = (
        float(send({"input_features": whisper_features(sound)[None]})["logits"].reshape(-1)[0])
        for sound in (word, held)
    )
    return Judgement(f'"ready": finished {done:.2f}; "rea-a-a": finished {going:.2f}', done > 0.5 > going)


def notes(_: Files, send: Send) -> Judgement:
    """The notes in a tone of 440 Hz and in a chord."""
    tones = (
        tone(440.0, NOTES_SAMPLES, NOTES_RATE),
        sum((tone(f, NOTES_SAMPLES, NOTES_RATE, 0.3) for f in CHORD), np.zeros(NOTES_SAMPLES, np.float32)),
    )
    results = []
    for sound, count in zip(tones, (1, 3), strict=True):
        outputs = send({"serving_default_input_2:0": sound[None, :, None]})
        loudness = outputs["StatefulPartitionedCall:1"][0].mean(axis=0)
        results.append(" ".join(_note(index) for index in sorted(np.argsort(-loudness)[:count])))
    return Judgement(f"440 Hz: {results[0]}; a chord: {results[1]}", results == ["A4", "C4 E4 G4"])


def _note(index: int) -> str:
    """The name of a piano key; key 0 is A0, and octaves start at C."""
    return f"{NOTES[index % 12]}{(index + 9) // 12}"


def quality(files: Files, send: Send) -> Judgement:
    """Quality scores (1 to 5) of the word, repeated for 9 s, clean and with noise."""
    clean = repeated(_word(files), MOS_SAMPLES)
    good, bad = (
        float(send({"input_1": mos_features(sound)[None]})["Identity:0"].reshape(-1)[0])
        for sound in (clean, with_noise(clean, 0.1))
    )
    return Judgement(f"clean {good:.1f}, noisy {bad:.1f} of 5", good > 3.0 and bad < 2.6)


def lost_packets(files: Files, send: Send) -> Judgement:
    """Quality scores (1 to 5) of the word, repeated for 5 s, complete and with every second 100 ms lost."""
    whole = repeated(_word(files), LOSS_SAMPLES)
    holes = np.where((np.arange(LOSS_SAMPLES) // 1600) % 2 == 1, whole, np.float32(0))
    rater = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    marks = []
    for sound in (whole, holes):
        outputs = send({"degraded_audio": loss_features(sound)[None, None], "rater_embed": rater})
        marks.append(float(outputs["plcmos"].reshape(-1)[0]))
    good, bad = marks
    return Judgement(f"whole {good:.1f}, half lost {bad:.1f} of 5", good > 3.0 and bad < 2.0)


def pitch(_: Files, send: Send) -> Judgement:
    """The pitch of two tones."""
    results = []
    for hertz in (220.0, 440.0):
        outputs = send(
            {
                "audio": tone(hertz, PITCH_SAMPLES)[None],
                "fmin": np.array(46.875, np.float32),
                "fmax": np.array(2093.75, np.float32),
            }
        )
        results.append(float(np.median(outputs["pitch"])))
    good = abs(results[0] - 220) < 2 and abs(results[1] - 440) < 2
    return Judgement(f"220 Hz: {results[0]:.1f} Hz; 440 Hz: {results[1]:.1f} Hz", good)


# ------------------------------------------------------------
# Audio processing for the demo's models, in numpy.


Floats = npt.NDArray[np.float32]
RATE = 16_000  # samples per second of all speech in the demo


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


def with_noise(sound: Floats, level: float) -> Floats:
    """``sound`` with white noise of standard deviation ``level``, clipped to -1..1."""
    noise = np.random.default_rng(0).normal(0.0, level, len(sound))
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
