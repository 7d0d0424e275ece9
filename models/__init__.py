"""The pure core: everything that is learnt and how it is scored; knows nothing of Kafka, Redis, HTTP or the clock.

Files in the order in which one event travels through them:

    examples      the entries that an event becomes: codec of the `examples` records, item hashes, kinds
    profile       the user: recent sequence, counters, dedupe window, recent slates (packed, folded in place)
    decay         one exponential and the fixed grid of half-lives
    rows          item hash -> row number, private to each process
    content       what the catalogue says of an item, as numbers
    items         the items: decayed popularity, neighbour lists, exposure, catalogue; records of `examples` into them
    bandit        posteriors of items and of the ranker's last layer, and slates drawn from them (a package)
    factors       item vectors, biases, and what they say of a sequence
    encoder       the step that trains them (torch, lazily)
    features      named features of (user, item, now)
    ranker        linear model and network over them, listwise (a package)
    values        what an outcome is worth once it happens: rating, dwell, skip, hide, low rating
    model         everything learnt that scoring needs, in one object
    window        slates that wait for what their viewers do
    learner       the fold over `examples` that moves the model
    motion        how far a step moved it, and at which rates
    retrieval     candidates of each channel
    recommend     retrieve -> rank -> draw -> explain, written once for serving and replay
    metrics       full-catalogue ranks, hit rate, NDCG, MRR
    ope           off-policy evaluation: what another policy would have earned, from a log with propensities
"""
