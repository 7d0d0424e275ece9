"""Prequential evaluation of real logs by the code that runs live.

Files:

    logs         readers of MovieLens, MovieTweetings, Online Retail, any CSV
    exports      tables of one's own log that `freshet export` writes: columns, reader
    catalogue    what a log says of its items
    prequential  rank each event's item, then learn the event
    report       the figures of it, and a plot
"""
