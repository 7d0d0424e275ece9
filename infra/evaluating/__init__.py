"""What would another policy have earned? Answers from a log with propensities; the estimators are in models/ope.py.

Files, in the order of a request:

    open_bandit  the reader of Open Bandit logs
    compare      one policy's log, judged by another's probabilities, beside what that one earned itself
    verb         `freshet evaluate`: what it asks and what it shows
"""
