"""What the learner process is made of beside its trainer: steps as they are logged, versions, control records, guard.

Files:

    steps     one record of topic `steps`
    controls  what a person tells the learner, in `examples`
    guard     what is refused: values that are not finite, losses beyond a bound
    versions  checkpoints in files, the list of them, the copy that is served while one is pinned
    process   the process around the trainer: reads, steps, publishes
"""
