"""The thin read path: HTTP in, slates out; knows nothing of agents and folds, and writes no state.

    app        builds the application and owns its resources
    api        the routes
    snapshot   item and model arrays of this process, kept live by the feeds
    live       the page at / and its event stream
"""
