"""The compiled fold of events into unpacked profiles, one event at a time: the only place where a sequence grows.

Dedupe, joins with slates, voice, seen items and the sequence itself; everything depends on the profile and the event
alone, so that any cut of a stream ends in the same bytes. `p` is one record of models.profile.packed.PROFILE, `e` one
of EVENT. Knows nothing about how profiles are packed.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from models.examples import ACTION, CLICK, DWELL, ENTERS, HIDDEN, IMPRESSION, LOW, RATING, SHOWN, SKIPPED, VIEW, VOICE

COUNTERS = ("click", "dwell", "rating", "action", "view", "impression", "negative", "duplicate")
_NEGATIVE, _DUPLICATE = 6, 7
ENTRIES, SLOTS, AWAYS, QUIET, DUPLICATE, ERASED, OVERFLOW = range(7)
"""What is counted while events are folded. ENTRIES, SLOTS, AWAYS: of `examples`, their history slots and averse items;
QUIET: events that were applied, but no entry comes of them; ERASED: events at or before what ended the profile;
OVERFLOW: event ids that left the dedupe window because a user had more than 256 of them in it."""
_MOST = np.float32(65_504.0)
"""The greatest float16: entries hold no greater weight."""


@njit(cache=True)
def _drop_first(row, n):  # type: ignore[no-untyped-def]  # fmt: skip
    for j in range(n - 1):
        row[j] = row[j + 1]


@njit(cache=True)
def remember_event(profiles, u, event, record_s):  # type: ignore[no-untyped-def]  # fmt: skip
    """Enter an event id in user u's dedupe window; 0 = entered, 1 = known, 2 = entered and the oldest left early."""
    p = profiles[u]
    events, times = p.event, p.event_time
    expired = 0
    while expired < p.d and times[expired] + 86400 < record_s:
        expired += 1
    if expired:
        for j in range(expired, p.d):
            events[j - expired] = events[j]
            times[j - expired] = times[j]
        p.d -= expired
    for j in range(p.d):
        if events[j] == event:
            return 1
    full = p.d == 256
    if full:
        _drop_first(events, 256)
        _drop_first(times, 256)
        p.d -= 1
    events[p.d] = event
    times[p.d] = record_s
    p.d += 1
    return 2 if full else 0


@njit(cache=True)
def _remember_slate(p, slate, record_s, shown):  # type: ignore[no-untyped-def]  # fmt: skip
    """Enter a slate as the newest; the oldest leaves when there are four."""
    slates, times, sizes, items = p.slate, p.slate_time, p.slate_size, p.slate_items
    if p.s == 4:
        for j in range(3):
            slates[j], times[j], sizes[j] = slates[j + 1], times[j + 1], sizes[j + 1]
            items[j] = items[j + 1]
        p.s = 3
    j = p.s
    slates[j], times[j] = slate, record_s
    size = min(len(shown), 24)
    sizes[j] = size
    for q in range(size):
        items[j, q] = np.uint32(shown[q] & np.uint64(0xFFFFFFFF))
    p.s += 1


@njit(cache=True)
def _shows(p, j, low):  # type: ignore[no-untyped-def]  # fmt: skip
    items = p.slate_items
    for q in range(p.slate_size[j]):  # noqa: SIM110 - numba has no any()
        if items[j, q] == low:
            return True
    return False


@njit(cache=True)
def _join(p, explicit, low, record_s, out):  # type: ignore[no-untyped-def]  # fmt: skip
    """List the slates this outcome may belong to: the named or newest showing one first. True if it showed it."""
    slates, times = p.slate, p.slate_time
    first, shown = -1, False
    for j in range(p.s - 1, -1, -1):
        if times[j] + 86400 < record_s:
            break
        if explicit != 0:
            if slates[j] == explicit:
                first, shown = j, _shows(p, j, low)
                break
        elif _shows(p, j, low):
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
        out[0] = slates[first]
        k = 1
    for j in range(p.s - 1, -1, -1):
        if k == 4 or times[j] + 86400 < record_s:
            break
        if j != first and slates[j] != explicit:
            out[k] = slates[j]
            k += 1
    return shown


@njit(cache=True)
def _voice(p, item, t):  # type: ignore[no-untyped-def]  # fmt: skip
    """True unless the sequence remembers a voice of this user for this item within an hour of event time."""
    items, times, kinds = p.item, p.time, p.kind
    for j in range(p.n):  # noqa: SIM110 - numba has no all()
        if items[j] == item and kinds[j] & 0x80 and abs(times[j] - t) < 3600.0:
            return False
    return True


@njit(cache=True)
def _remember_seen(p, low):  # type: ignore[no-untyped-def]  # fmt: skip
    seen = p.seen
    for j in range(p.seen_n):
        if seen[j] == low:
            return
    if p.seen_n == 4096:
        _drop_first(seen, 4096)
        p.seen_n -= 1
    seen[p.seen_n] = low
    p.seen_n += 1
    p.seen_changed = True


@njit(cache=True)
def _tell(tally, kind, value, of_newest):  # type: ignore[no-untyped-def]  # fmt: skip
    """Count one outcome in the user's tally (models.examples.TALLY); a dwell with the newest item is no new one."""
    one = np.float32(1.0)
    if kind == RATING:
        tally[0] += one
        tally[1] += np.float32(value)
        if value < LOW:
            tally[6] += one
    elif kind == DWELL:
        tally[2] += one
        tally[3] += np.float32(math.log1p(value))
    elif kind == ACTION and value == SKIPPED:
        tally[4] += one
    elif kind == ACTION and value == HIDDEN:
        tally[5] += one
    if not (kind == DWELL and of_newest):
        tally[7] += one


@njit(cache=True)
def _push_away(p, item, t, weight, kind):  # type: ignore[no-untyped-def]  # fmt: skip
    """Keep the item's last word: a dwell or action of negative weight enters it as the newest, a positive one ends it.

    Ratings do not enter: their weights lie in the sequence.
    """
    away = weight < 0.0 and kind in (DWELL, ACTION)
    if not (away or weight > 0.0):
        return
    averse, times = p.averse, p.averse_time
    k = 0
    for j in range(p.averse_n):
        if averse[j] != item:
            averse[k], times[k] = averse[j], times[j]
            k += 1
    if away:
        if k == 16:
            _drop_first(averse, 16)
            _drop_first(times, 16)
            k = 15
        averse[k], times[k] = item, t
        k += 1
    p.averse_n = k


@njit(cache=True)
def _remember(p, e, of_newest):  # type: ignore[no-untyped-def]  # fmt: skip
    """Let an outcome update the newest entry of the sequence or become one; return its flags."""
    items, times, weights, kinds = p.item, p.time, p.weight, p.kind
    if e.kind != CLICK and of_newest:
        last = p.n - 1
        weights[last] += np.float32(e.weight)
        kinds[last] = e.kind | (kinds[last] & 0x80)
        return 0
    if (e.kind == DWELL or e.kind == ACTION) and not e.weight > 0.0:
        return 0
    voice = _voice(p, e.item, e.time)
    if p.n == 50:
        _drop_first(items, 50)
        _drop_first(times, 50)
        _drop_first(weights, 50)
        _drop_first(kinds, 50)
        p.n -= 1
    items[p.n], times[p.n], weights[p.n] = e.item, e.time, np.float32(e.weight)
    kinds[p.n] = e.kind | (0x80 if voice else 0)
    p.n += 1
    return ENTERS | VOICE if voice else ENTERS


@njit(cache=True)
def fold_events(first, last, events, shown, profiles, counts, source, partition, offset, time, kind, flags, target, weight, value, slates, history_start, history_item, history_time, history_kind, history_weight, tally, averse_start, averse):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Fold events in order, one at a time, and append the entry of each; the only place where a profile changes."""
    for i in range(first, last):
        e = events[i]
        p = profiles[e.user]
        if p.ended > 0.0 and e.time <= p.ended:
            counts[ERASED] += 1
            continue
        if e.kind != IMPRESSION or p.exists:  # an impression creates no profile
            p.changed_by = i
        if e.kind != IMPRESSION and e.event != 0:
            found = remember_event(profiles, e.user, e.event, e.record_s)
            if found == 1:
                p.counters[_DUPLICATE] += 1
                counts[DUPLICATE] += 1
                continue
            counts[OVERFLOW] += found == 2
        at, slot, away = counts[ENTRIES], counts[SLOTS], counts[AWAYS]
        counts[ENTRIES] += 1
        source[at], partition[at], offset[at], time[at], kind[at] = i, e.partition, e.offset, e.time, e.kind
        target[at], weight[at], value[at], flags[at] = e.item, e.weight, e.value, 0
        slates[at] = 0
        tally[at] = 0.0
        history_start[at + 1], averse_start[at + 1] = slot, away
        if e.kind == IMPRESSION:
            slates[at, 0] = e.slate
            if p.exists:
                _remember_slate(p, e.slate, e.record_s, shown[e.shown_start : e.shown_start + e.shown_n])
                p.counters[e.kind - 1] += 1
            continue
        p.counters[e.kind - 1] += 1
        if not p.exists:
            p.exists = True
            p.times[0], p.times[1] = e.time, e.time
        p.times[0], p.times[1] = min(p.times[0], e.time), max(p.times[1], e.time)
        low = np.uint32(e.item & np.uint64(0xFFFFFFFF))
        if _join(p, e.slate, low, e.record_s, slates[at]):
            flags[at] = SHOWN
        if e.kind == VIEW:
            continue
        if e.weight < 0.0:
            p.counters[_NEGATIVE] += 1
        newest = p.n - 1
        for j in range(newest, max(p.n - 20, 0) - 1, -1):
            history_item[slot], history_time[slot], history_kind[slot] = p.item[j], p.time[j], p.kind[j] & 0x7F
            history_weight[slot] = p.weight[j]
            if abs(p.weight[j]) > _MOST:
                history_weight[slot] = math.copysign(_MOST, p.weight[j])
            slot += 1
        for j in range(p.averse_n - 1, max(p.averse_n - 8, 0) - 1, -1):
            averse[away] = p.averse[j]
            away += 1
        counts[SLOTS] = history_start[at + 1] = slot
        counts[AWAYS] = averse_start[at + 1] = away
        tally[at] = p.tally
        of_newest = newest >= 0 and p.item[newest] == e.item
        _tell(p.tally, e.kind, e.value, of_newest)
        _push_away(p, e.item, e.time, e.weight, e.kind)
        _remember_seen(p, low)
        flags[at] |= _remember(p, e, of_newest)
