"""`freshet bench quality`: Freshet and what a team would pick instead, over the same events, in one process.

The references are here to be compared with and are no part of the product. Files, in the order of a run:

    events        a log as arrays: outcomes, groups ranked from one state, what is known and left out
    ranking       full-catalogue mid-ranks, decayed popularity; shared by all references
    reference     what a reference is: a name, a run, a grid
    online        decayed popularity, item-kNN, ISGD, incremental BPR
    refit         ALS, BPR and EASE, fitted anew in batches, user state live; frozen variants
    river_rating  River's BiasedMF, FunkMF and Baseline: ranks, ratings, labels
    ours          Freshet by the code of the replay; with reading or learning held back
    compare       figures, paired intervals over users, AUC, RMSE
    cache         results kept in a folder
    run           tune, run, compare
    show          the verb, its progress, its table and plot
"""
