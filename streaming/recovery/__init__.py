"""State made again: generations of keys, cuts of the log, folds in memory, lineage of the weights, snapshots.

Files:

    generations  which generations there are, which one is served; switch, drop, follow
    cuts         where the logs begin, end and stood at a time
    lineage      the learner's logged steps as a chain; weights learnt again along it
    user_half    profiles folded in memory, written to Redis in bulk
    item_half    the same for item rows and catalogue
    apart        a half in a process of its own
    folding      both halves to one cut of the logs
    compare      what is stored or derived against what the log folds to
    files        records in checksummed files
    snapshots    state, offsets and weights in a folder
    retention    deletes what a snapshot covers
"""
