"""What would another policy have earned? Answers from logs with propensities; the estimators are in models/ope.py.

Files, in the order of a request:

    open_bandit  the reader of Open Bandit logs
    compare      one policy's log, judged by another's probabilities, beside what that one earned itself
    labels       outcomes of one's own log, joined to the slates that showed them, each once
    export       `freshet export`: the log as tables of slates, events and items
    candidate    settings in a TOML file: which ones a replay can see
    own_log      an export judged under changed settings
    redrawing    another epsilon's draws from the scores that the log was served with
    paired       `freshet compare`: one log through two configurations
    own_verbs    the verbs about one's own log: what they ask and show
    verb         `freshet evaluate`: what it asks and what it shows
"""
