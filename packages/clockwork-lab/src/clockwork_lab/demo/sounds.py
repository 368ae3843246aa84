"""Requests to the audio models. The only speech is one recorded word, "ready"; the music is made of sines."""

from __future__ import annotations

import numpy as np

from clockwork_lab.demo import wheels
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.judgement import Judgement, Send
from clockwork_lab.demo.signals import (
    RATE,
    Floats,
    loss_features,
    mos_features,
    read_wav,
    repeated,
    silence,
    tone,
    whisper_features,
    with_noise,
)

FRAME, CONTEXT = 512, 64
"""New samples in a frame of Silero VAD, and samples of the frame before it."""

NOTES = ("A", "A#", "B", "C", "C#", "D", "D#", "E", "F", "F#", "G", "G#")
CHORD = (261.63, 329.63, 392.0)
"""C4, E4, G4 in Hz."""

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
