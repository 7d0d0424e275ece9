"""Alarms on prequential losses: where they rise, not where they fall or only vary; the same after any restart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.examples import CodecError
from models.factors import pack_named, unpack_named
from models.ranker.drift import MEAN_OF, MOST, Watch, read_state


def alarms(losses: np.ndarray) -> list[int]:
    watch = Watch()
    return [i for i, loss in enumerate(losses.tolist()) if watch.learn(loss)]


def test_a_rise_is_an_alarm_soon_and_what_only_varies_or_falls_is_none() -> None:
    rng, steady, late = np.random.default_rng(0), 0, []
    for _ in range(10):
        noise = rng.gamma(4.0, 0.75, 12_000)  # mean 3, sd 1.5
        steady += len(alarms(noise))
        assert not alarms(noise + np.linspace(2.0, 0.0, len(noise)))
        noise[6000:] += 0.8
        found = alarms(noise)
        assert found
        late.append(found[0] - 6000)
    assert steady <= 1
    assert np.median(late) < 1500
    assert min(late) > 0


def test_after_an_alarm_the_new_level_is_what_is_usual() -> None:
    losses = np.concatenate([np.full(3000, 1.0), np.full(6000, 3.0), np.full(3000, 5.0)])
    found = alarms(losses)
    assert len(found) == 2
    assert 3000 < found[0] < 4500
    assert 9000 < found[1] < 10_500


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 9000))
def test_a_restart_goes_on_bit_for_bit(seed: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.gamma(4.0, 0.75, 9000) + np.repeat(rng.integers(0, 3, 6), 1500)
    one, other = Watch(), Watch()
    for loss in losses[:cut].tolist():
        one.learn(loss, 3)
    for loss in losses[:cut].tolist():
        other.learn(loss, 3)
    again = Watch()
    stored = read_state(unpack_named(pack_named({"watch": other.state()})), "watch")
    assert stored is not None
    again.set_state(stored)
    assert [one.learn(loss, 3) for loss in losses[cut:].tolist()] == [
        again.learn(loss, 3) for loss in losses[cut:].tolist()
    ]
    np.testing.assert_array_equal(one.state(), again.state())


def test_what_is_stored_is_bounded_and_checked() -> None:
    watch = Watch()
    for _ in range(2 * MOST + 5):
        watch.learn(MEAN_OF * 1.0, MEAN_OF)
        assert len(watch.inputs) <= MOST
    assert read_state({}, "watch") is None
    for broken in (watch.state()[:-1], np.array([np.nan] * 4), np.zeros((4, 1)), -watch.state(), "text"):
        with pytest.raises(CodecError):
            read_state({"watch": broken}, "watch")
