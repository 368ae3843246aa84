"""Sound features against their definitions, computed here in a slower way."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest

from clockwork_lab.demo import sounds


def wav(samples, rate=sounds.RATE, channels=1):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return stream.getvalue()


def test_a_wav_file_is_read_as_numbers_below_one():
    np.testing.assert_array_equal(sounds.read_wav(wav([0, 16384, -32768])), [0.0, 0.5, -1.0])


def test_another_rate_is_refused():
    with pytest.raises(ValueError, match=r"found \(1, 2, 8000\)"):
        sounds.read_wav(wav([0], rate=8000))


def test_the_power_of_a_tone_is_in_its_bin():
    sound = sounds.tone(1000.0, 16_000)
    power = sounds.power_spectrum(sound, np.hanning(401)[:-1], 160, "reflect")
    assert power.shape == (101, 201)
    assert set(power[5:-5].argmax(axis=1)) == {25}


def test_power_equals_a_sum_over_samples():
    sound = np.random.default_rng(0).standard_normal(900)
    window = np.hanning(201)[:-1]
    power = sounds.power_spectrum(sound, window, 100, "constant")
    padded = np.concatenate([np.zeros(100), sound, np.zeros(100)])
    frame = padded[300:500] * window
    turns = np.exp(-2j * np.pi * 7 * np.arange(200) / 200)
    assert power[3, 7] == pytest.approx(abs((frame * turns).sum()) ** 2)


def test_mel_triangles_have_one_area_and_rising_peaks():
    filters = sounds.mel_filters(2001, 40, 8000 / 2000)
    assert filters.shape == (2001, 40)
    assert np.all(np.diff(filters.argmax(axis=0)) > 0)
    np.testing.assert_allclose(filters.sum(axis=0) * 4, 1.0, rtol=0.02)


def test_features_have_the_shapes_their_models_want():
    word = sounds.tone(300.0, 5000)
    assert sounds.whisper_features(word).shape == (80, 800)
    assert sounds.mos_features(sounds.repeated(word, 144_000)).shape == (900, 120)
    assert sounds.loss_features(sounds.repeated(word, 80_000)).shape == (314, 257)


def test_whisper_features_put_the_sound_last():
    features = sounds.whisper_features(sounds.tone(300.0, 16_000))
    assert features[:, :690].max() < features[:, 710:790].max()


def test_features_of_silence_are_finite():
    silence = sounds.silence(9.0)
    for features in (sounds.whisper_features, sounds.mos_features, sounds.loss_features):
        assert np.all(np.isfinite(features(silence)))


def test_noise_is_the_same_every_time_and_stays_in_range():
    sound = sounds.tone(300.0, 1000, level=1.0)
    noisy = sounds.with_noise(sound, 0.5)
    np.testing.assert_array_equal(noisy, sounds.with_noise(sound, 0.5))
    assert np.abs(noisy).max() <= 1.0
    assert not np.array_equal(noisy, sound)
