"""The user profile: its packed layout, and the fold of one partition's events into profiles, event by event.

Knows nothing about Kafka, Redis, event structs or item state. Everything decided here (dedupe, windows, voice, joins,
endings) depends on the profile and the event alone, so any cut of a stream into micro-batches ends in the same bytes
(DESIGN section 3, rule 2).

    packed     the layout by version, unpacking into arrays and packing again
    folding    the compiled fold of interactions and impressions
    identity   erasure, alias and merge between them: `fold` of a whole micro-batch
"""

from models.examples import CodecError as CodecError
from models.profile.folding import COUNTERS as COUNTERS
from models.profile.folding import DUPLICATE as DUPLICATE
from models.profile.folding import ENTRIES as ENTRIES
from models.profile.folding import ERASED as ERASED
from models.profile.folding import OVERFLOW as OVERFLOW
from models.profile.folding import QUIET as QUIET
from models.profile.identity import ALIAS as ALIAS
from models.profile.identity import ERASE as ERASE
from models.profile.identity import MERGE as MERGE
from models.profile.identity import fold as fold
from models.profile.packed import AWAY as AWAY
from models.profile.packed import DEDUPE as DEDUPE
from models.profile.packed import EVENT as EVENT
from models.profile.packed import SEEN as SEEN
from models.profile.packed import SEQUENCE as SEQUENCE
from models.profile.packed import SLATE_ITEMS as SLATE_ITEMS
from models.profile.packed import VERSION as VERSION
from models.profile.packed import Events as Events
from models.profile.packed import Folded as Folded
from models.profile.packed import FutureCodecError as FutureCodecError
from models.profile.packed import Moved as Moved
from models.profile.packed import Profiles as Profiles
from models.profile.packed import ProfileView as ProfileView
from models.profile.packed import Room as Room
from models.profile.packed import canonical as canonical
from models.profile.packed import unpack as unpack
