"""The compiled fold of events into unpacked profiles, one event at a time: the only place where a sequence grows.

Dedupe, joins with slates, voice, seen items and the sequence itself; everything depends on the profile and the event
alone, so that any cut of a stream ends in the same bytes. Knows nothing about how profiles are packed.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from models.examples import ACTION, CLICK, DWELL, ENTERS, HIDDEN, IMPRESSION, LOW, RATING, SHOWN, SKIPPED, VIEW, VOICE

COUNTERS = ("click", "dwell", "rating", "action", "view", "impression", "negative", "duplicate")
_NEGATIVE, _DUPLICATE = 6, 7
APPLIED, DUPLICATE, ERASED, QUIET = 1, 2, 3, 4
"""Status of a folded event; 0 where it was not folded. ERASED: it lies at or before what ended the profile; QUIET:
applied, but no entry comes of it."""


@njit(cache=True)
def _drop_first(row, n):  # type: ignore[no-untyped-def]  # fmt: skip
    for j in range(n - 1):
        row[j] = row[j + 1]


@njit(cache=True)
def remember_event(u, event, record_s, d, events, event_time):  # type: ignore[no-untyped-def]  # fmt: skip
    """Enter an event id in the dedupe window; 0 = entered, 1 = known, 2 = entered and the oldest left early."""
    expired = 0
    while expired < d[u] and event_time[u, expired] + 86400 < record_s:
        expired += 1
    if expired:
        for j in range(expired, d[u]):
            events[u, j - expired] = events[u, j]
            event_time[u, j - expired] = event_time[u, j]
        d[u] -= expired
    for j in range(d[u]):
        if events[u, j] == event:
            return 1
    full = d[u] == 256
    if full:
        _drop_first(events[u], 256)
        _drop_first(event_time[u], 256)
        d[u] -= 1
    events[u, d[u]] = event
    event_time[u, d[u]] = record_s
    d[u] += 1
    return 2 if full else 0


@njit(cache=True)
def _remember_slate(u, slate, record_s, shown, s, slates, slate_time, slate_size, slate_items):  # type: ignore[no-untyped-def]  # fmt: skip
    """Enter a slate as the newest; the oldest leaves when there are four."""
    if s[u] == 4:
        for j in range(3):
            slates[u, j] = slates[u, j + 1]
            slate_time[u, j] = slate_time[u, j + 1]
            slate_size[u, j] = slate_size[u, j + 1]
            slate_items[u, j] = slate_items[u, j + 1]
        s[u] = 3
    j = s[u]
    slates[u, j], slate_time[u, j] = slate, record_s
    size = min(len(shown), 24)
    slate_size[u, j] = size
    slate_items[u, j, :size] = shown[:size]
    s[u] += 1


@njit(cache=True)
def _shows(u, j, low, slate_size, slate_items):  # type: ignore[no-untyped-def]  # fmt: skip
    for q in range(slate_size[u, j]):  # noqa: SIM110 - numba has no any()
        if slate_items[u, j, q] == low:
            return True
    return False


@njit(cache=True)
def _join(u, explicit, low, record_s, s, slates, slate_time, slate_size, slate_items, out):  # type: ignore[no-untyped-def]  # fmt: skip
    """List the slates this outcome may belong to: the named or newest showing one first. True if it showed it."""
    first, shown = -1, False
    for j in range(s[u] - 1, -1, -1):
        if slate_time[u, j] + 86400 < record_s:
            break
        if explicit != 0:
            if slates[u, j] == explicit:
                first, shown = j, _shows(u, j, low, slate_size, slate_items)
                break
        elif _shows(u, j, low, slate_size, slate_items):
            first, shown = j, True
            break
    k = 0
    if explicit != 0:
        out[0] = explicit
        k = 1
        if first < 0:
            # A slate the profile no longer knows: the client says it was shown there.
            shown = True
    elif first >= 0:
        out[0] = slates[u, first]
        k = 1
    for j in range(s[u] - 1, -1, -1):
        if k == 4 or slate_time[u, j] + 86400 < record_s:
            break
        if j != first and slates[u, j] != explicit:
            out[k] = slates[u, j]
            k += 1
    return shown


@njit(cache=True)
def _voice(u, item, t, n, items, times, kinds):  # type: ignore[no-untyped-def]  # fmt: skip
    """True unless the sequence remembers a voice of this user for this item within an hour of event time."""
    for j in range(n[u]):  # noqa: SIM110 - numba has no all()
        if items[u, j] == item and kinds[u, j] & 0x80 and abs(times[u, j] - t) < 3600.0:
            return False
    return True


@njit(cache=True)
def _remember_seen(u, low, seen_n, seen):  # type: ignore[no-untyped-def]  # fmt: skip
    for j in range(seen_n[u]):
        if seen[u, j] == low:
            return False
    if seen_n[u] == 4096:
        _drop_first(seen[u], 4096)
        seen_n[u] -= 1
    seen[u, seen_n[u]] = low
    seen_n[u] += 1
    return True


@njit(cache=True)
def _tell(u, kind, value, of_newest, tally):  # type: ignore[no-untyped-def]  # fmt: skip
    """Count one outcome in the user's tally (models.examples.TALLY); a dwell with the newest item is no new one."""
    one = np.float32(1.0)
    if kind == RATING:
        tally[u, 0] += one
        tally[u, 1] += np.float32(value)
        if value < LOW:
            tally[u, 6] += one
    elif kind == DWELL:
        tally[u, 2] += one
        tally[u, 3] += np.float32(math.log1p(value))
    elif kind == ACTION and value == SKIPPED:
        tally[u, 4] += one
    elif kind == ACTION and value == HIDDEN:
        tally[u, 5] += one
    if not (kind == DWELL and of_newest):
        tally[u, 7] += one


@njit(cache=True)
def _push_away(u, item, t, weight, kind, averse_n, averse, averse_time):  # type: ignore[no-untyped-def]  # fmt: skip
    """Keep the item's last word: a dwell or action of negative weight enters it as the newest, a positive one ends it.

    Ratings do not enter: their weights lie in the sequence.
    """
    away = weight < 0.0 and kind in (DWELL, ACTION)
    if not (away or weight > 0.0):
        return
    k = 0
    for j in range(averse_n[u]):
        if averse[u, j] != item:
            averse[u, k], averse_time[u, k] = averse[u, j], averse_time[u, j]
            k += 1
    if away:
        if k == 16:
            _drop_first(averse[u], 16)
            _drop_first(averse_time[u], 16)
            k = 15
        averse[u, k], averse_time[u, k] = item, t
        k += 1
    averse_n[u] = k


@njit(cache=True)
def fold_events(start, stop, user, kind, item, time, record_s, event, weight, value, slate, shown_start, shown, exists, counters, times, ended, n, items, seq_time, seq_weight, seq_kind, d, events, event_time, s, slates, slate_time, slate_size, slate_items, seen_n, seen, averse_n, averse, averse_time, tally, changed_by, seen_changed, status, flags, out_slates, history_length, history_item, history_time, history_kind, history_weight, out_tally, out_averse_n, out_averse):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Fold events in order, one at a time; the only place where a profile changes."""
    overflow = 0
    for i in range(start, stop):
        u, t, low = user[i], time[i], np.uint32(item[i] & np.uint64(0xFFFFFFFF))
        if ended[u, 0] > 0.0 and t <= ended[u, 0]:
            status[i] = ERASED
            continue
        if kind[i] == IMPRESSION:
            status[i] = 1
            out_slates[i, 0] = slate[i]
            if exists[u]:  # an impression creates no profile
                _remember_slate(u, slate[i], record_s[i], shown[shown_start[i] : shown_start[i + 1]], s, slates, slate_time, slate_size, slate_items)  # noqa: E501  # fmt: skip
                counters[u, kind[i] - 1] += 1
                changed_by[u] = i
            continue
        changed_by[u] = i
        if event[i] != 0:
            found = remember_event(u, event[i], record_s[i], d, events, event_time)
            if found == 1:
                counters[u, _DUPLICATE] += 1
                status[i] = 2
                continue
            overflow += found == 2
        status[i] = 1
        counters[u, kind[i] - 1] += 1
        if not exists[u]:
            exists[u] = True
            times[u, 0], times[u, 1] = t, t
        times[u, 0], times[u, 1] = min(times[u, 0], t), max(times[u, 1], t)
        if _join(u, slate[i], low, record_s[i], s, slates, slate_time, slate_size, slate_items, out_slates[i]):
            flags[i] |= SHOWN
        if kind[i] == VIEW:
            continue
        if weight[i] < 0.0:
            counters[u, _NEGATIVE] += 1
        last = n[u] - 1
        k = min(n[u], 20)
        history_length[i] = k
        for j in range(k):
            history_item[i, j] = items[u, last - j]
            history_time[i, j] = seq_time[u, last - j]
            history_kind[i, j] = seq_kind[u, last - j] & 0x7F
            history_weight[i, j] = seq_weight[u, last - j]
        of_newest = last >= 0 and items[u, last] == item[i]
        out_tally[i] = tally[u]
        out_averse_n[i] = min(averse_n[u], 8)
        for j in range(out_averse_n[i]):
            out_averse[i, j] = averse[u, averse_n[u] - 1 - j]
        _tell(u, kind[i], value[i], of_newest, tally)
        _push_away(u, item[i], t, weight[i], kind[i], averse_n, averse, averse_time)
        if _remember_seen(u, low, seen_n, seen):
            seen_changed[u] = True
        if kind[i] != CLICK and of_newest:
            seq_weight[u, last] += np.float32(weight[i])
            seq_kind[u, last] = kind[i] | (seq_kind[u, last] & 0x80)
            continue
        if (kind[i] == DWELL or kind[i] == ACTION) and not weight[i] > 0.0:
            continue
        flags[i] |= ENTERS
        voice = _voice(u, item[i], t, n, items, seq_time, seq_kind)
        if voice:
            flags[i] |= VOICE
        if n[u] == 50:
            _drop_first(items[u], 50)
            _drop_first(seq_time[u], 50)
            _drop_first(seq_weight[u], 50)
            _drop_first(seq_kind[u], 50)
            n[u] -= 1
        items[u, n[u]], seq_time[u, n[u]], seq_weight[u, n[u]] = item[i], t, np.float32(weight[i])
        seq_kind[u, n[u]] = kind[i] | (0x80 if voice else 0)
        n[u] += 1
    return overflow
