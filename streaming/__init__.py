"""The stream: events, the log, the agents and the state they keep; knows nothing of HTTP and draws no slates itself.

Files in the order in which one event travels through them:

    events       event structs: one schema for HTTP, Kafka and replay
    topics       topic names and specs, partitioner, position tokens, the log writer
    consumer     Faust's consumer, in chunks; the only importer of faust
    agents       the agents, a few lines each
    worker       the process around them
    learn        the folds: events + state -> writes; pure, synchronous, no clock
    embeddings   the users' cached decayed embeddings
    state        Redis keys, reads and atomic commits; the only importer of redis
    trainer      the learner process
    dead_letters  what could not be folded, each once
    logs         readers of real logs
    replay       a real log through the very code that runs live
    rebuild      the same state again, from offset 0
    world        a world of users with known, drifting tastes
    titles       titles for its items
    simulate     its users acting through the public API: the demo
    scorecard    what its slates were worth: ours, popular, oracle, paired
"""
