"""The items: what was done with each, what follows it, what the catalogue says; rows, their layout, and their fold.

Knows nothing about Kafka, Redis, users or learnt weights.

    transitions   the three neighbour lists, and the arrays that kernels read
    contexts      names of the contexts under which items are chosen
    packed        the layout of a row by version, reading and writing many
    state         all items as one struct of arrays; entries of `examples` and catalogue records change it
    folding       records of `examples`, one after another, and which items leave
"""

from models.items.contexts import context_keys as context_keys
from models.items.folding import Folded as Folded
from models.items.folding import ItemFold as ItemFold
from models.items.folding import PoisonError as PoisonError
from models.items.packed import sound as sound
from models.items.state import CatalogueItem as CatalogueItem
from models.items.state import Items as Items
from models.items.transitions import ItemArrays as ItemArrays
from models.items.transitions import cosine as cosine
