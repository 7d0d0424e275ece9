"""Plausible titles, categories, tags and providers for the simulated catalogue.

Pure text: it knows nothing about users, tastes, time or the log. The words live here as data, so that `world.py`
holds only the behaviour.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Topic(NamedTuple):
    """A category: its tags and the subjects that its titles speak of."""

    name: str
    tags: tuple[str, ...]
    subjects: tuple[str, ...]


TOPICS: tuple[Topic, ...] = (
    Topic(
        "Football",
        ("tactics", "transfers", "women's game", "history", "goalkeepers", "youth"),
        (
            "the back three",
            "a late winner",
            "the long throw",
            "a derby in the rain",
            "the false nine",
            "penalty nerves",
        ),
    ),
    Topic(
        "Cooking",
        ("bread", "vegetarian", "fermenting", "one pot", "spice", "baking"),
        ("sourdough", "a weeknight dal", "slow tomatoes", "the perfect omelette", "pickled plums", "burnt butter"),
    ),
    Topic(
        "Film",
        ("noir", "animation", "documentary", "directors", "scores", "silent era"),
        (
            "the last reel",
            "a single long take",
            "colour on screen",
            "the quiet villain",
            "matte painting",
            "the final cut",
        ),
    ),
    Topic(
        "Travel",
        ("trains", "islands", "city breaks", "walking", "night sky", "markets"),
        (
            "the night train north",
            "a ferry to nowhere",
            "the old salt road",
            "Lisbon before breakfast",
            "high passes",
            "border towns",
        ),
    ),
    Topic(
        "Science",
        ("physics", "biology", "chemistry", "statistics", "experiments", "ocean"),
        (
            "a stubborn neutrino",
            "the colour of leaves",
            "deep-sea light",
            "the replication puzzle",
            "cold atoms",
            "a protein's fold",
        ),
    ),
    Topic(
        "Music",
        ("jazz", "vinyl", "live", "synths", "folk", "classical"),
        (
            "a borrowed chord",
            "the B-side",
            "a basement session",
            "the modular rack",
            "brushed drums",
            "an unfinished symphony",
        ),
    ),
    Topic(
        "Technology",
        ("databases", "compilers", "networks", "open source", "chips", "security"),
        (
            "a log that never lies",
            "the slow query",
            "a packet's journey",
            "the forgotten flag",
            "cache lines",
            "the Friday deploy",
        ),
    ),
    Topic(
        "Money",
        ("saving", "markets", "housing", "pensions", "small business", "tax"),
        ("the rainy-day jar", "index funds", "a first mortgage", "the corner shop", "compound interest", "a fair wage"),
    ),
    Topic(
        "Gardens",
        ("roses", "vegetables", "wild gardens", "trees", "balcony", "soil"),
        (
            "an unmown corner",
            "winter roses",
            "the tomato bench",
            "a pear on the wall",
            "good compost",
            "the north-facing bed",
        ),
    ),
    Topic(
        "History",
        ("ancient", "medieval", "maps", "industry", "letters", "navigation"),
        (
            "a lost harbour",
            "the map-maker's error",
            "a letter from 1812",
            "the canal age",
            "Roman concrete",
            "the wool road",
        ),
    ),
    Topic(
        "Health",
        ("sleep", "running", "strength", "mind", "food", "ageing"),
        (
            "the eight-hour myth",
            "a slow first mile",
            "the missing squat",
            "a quiet mind",
            "morning light",
            "the second wind",
        ),
    ),
    Topic(
        "Space",
        ("rockets", "telescopes", "Mars", "moons", "cosmology", "satellites"),
        (
            "an ocean under ice",
            "the dimming star",
            "a rover's last metre",
            "the far side",
            "dark-matter maps",
            "a reusable booster",
        ),
    ),
    Topic(
        "Cycling",
        ("climbs", "repair", "commuting", "racing", "touring", "gravel"),
        (
            "the last hairpin",
            "a squeaking bracket",
            "cobbles in April",
            "the tailwind home",
            "a steel frame",
            "the breakaway",
        ),
    ),
    Topic(
        "Architecture",
        ("concrete", "timber", "cities", "interiors", "bridges", "restoration"),
        (
            "a house with no corridor",
            "the timber tower",
            "a bridge by hand",
            "the honest facade",
            "light wells",
            "a brutalist library",
        ),
    ),
    Topic(
        "Wildlife",
        ("birds", "sea life", "insects", "forests", "big cats", "tracking"),
        (
            "the swifts' return",
            "a fox at dusk",
            "kelp forests",
            "the beetle census",
            "a lynx in the valley",
            "whale song",
        ),
    ),
    Topic(
        "Games",
        ("chess", "board games", "puzzles", "retro", "strategy", "indie"),
        (
            "the Berlin wall",
            "a perfect puzzle",
            "the eight-bit sea",
            "a kitchen-table epic",
            "the quiet sacrifice",
            "one more turn",
        ),
    ),
)

FRAMES: tuple[str, ...] = (
    "{Subject}, explained",
    "What {subject} taught us",
    "In praise of {subject}",
    "{Subject}: a short guide",
    "Why {subject} still matters",
    "The secret life of {subject}",
    "Ten minutes with {subject}",
    "{Subject} and the {tag} question",
    "How we got {subject} wrong",
    "Notes on {subject}",
    "{Subject}, seen from {place}",
    "A beginner's {subject}",
    "The trouble with {subject}",
    "{Subject} at the end of summer",
    "{Place}'s answer to {subject}",
    "Rethinking {subject}",
    "{Subject}: the {tag} edition",
    "Letters about {subject}",
    "{Subject} in {place}",
    "Nobody warns you about {subject}",
    "The people behind {subject}",
    "{Subject} after dark",
    "Measuring {subject}",
    "A year of {subject}",
)
PLACES: tuple[str, ...] = (
    "Turin", "Bergen", "Kyoto", "Porto", "Leeds", "Quito", "Tallinn", "Accra", "Hobart", "Lyon", "Busan", "Cork",
)  # fmt: skip
PROVIDERS: tuple[str, ...] = (
    "Meridian", "The Slow Post", "Field Notes", "Harbour Radio", "Northlight", "Paper Kite", "Tidewater", "Open Window",
)  # fmt: skip


class Text(NamedTuple):
    """The words of one item."""

    title: str
    text: str
    tags: tuple[str, ...]
    provider: str


def write(topic: Topic, tags: tuple[int, ...], rng: np.random.Generator) -> Text:
    """Words for one item of `topic` with the given tag numbers; the same generator state gives the same words."""
    subject = topic.subjects[int(rng.integers(len(topic.subjects)))]
    place = PLACES[int(rng.integers(len(PLACES)))]
    names = tuple(topic.tags[tag] for tag in tags)
    frame = FRAMES[int(rng.integers(len(FRAMES)))]
    bare = subject.removeprefix("a ").removeprefix("an ").removeprefix("the ") if "beginner" in frame else subject
    title = frame.format(subject=bare, Subject=_capital(bare), place=place, Place=place, tag=names[0])
    provider = PROVIDERS[int(rng.integers(len(PROVIDERS)))]
    return Text(title, f"{topic.name}: {', '.join(names)}. By {provider}, {place}.", names, provider)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
