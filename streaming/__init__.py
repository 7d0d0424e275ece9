"""The stream: events, the log, the agents and the state they keep; knows nothing of HTTP and draws no slates itself.

Files in the order in which one event travels through them:

    events     event structs: one schema for HTTP, Kafka and replay
    topics     topic names and specs, partitioner, position tokens, the log writer
    agents     Faust agents, a few lines each; the only importer of faust
    learn      the folds: events + state -> writes; pure, synchronous, no clock
    state      Redis keys, reads and atomic commits; the only importer of redis
    trainer    the learner process
    replay     a real log through the very code that runs live
    simulate   a world of users with known tastes
    rebuild    the same state again, from offset 0
"""
