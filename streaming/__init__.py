"""The stream: events, the log, the agents and the state they keep; knows nothing of HTTP and draws no slates itself.

Files in the order in which one event travels through them:

    events       event structs: one schema for HTTP, Kafka and replay
    kafka/       Kafka's protocol and clients, where aiokafka's own do not do
    topics       topic names and specs, partitioner, position tokens, the log writer
    consumer     Faust's consumer, in chunks; the only importer of faust
    agents       the agents of inlets and log, a few lines each
    item_agent   the agent of item rows
    worker       the process around them
    supervision  how a worker is watched, how it ends
    learn        the folds: events + state -> writes; pure, synchronous, no clock
    users/       what is read and written of users, the store in memory, cached embeddings
    state        Redis keys, reads and atomic commits; the only importer of redis
    sizes        how much Redis holds, by kind
    feeds        what changed, told to those who hold rows in memory
    trainer      the learner between `examples` and its state: steps, going back, controls
    training/    what it needs: the process, logged steps, versions, control records, the guard
    dead_letters  what could not be folded, each once
    replay/      a real log through the very code that runs live
    rebuild      the same state again, beside the served one
    recovery/    what that needs: generations, cuts, halves, lineage, snapshots, retention
    simulation/  a simulated world, its people, and the score
"""
