"""What a person looks at in a terminal: `freshet status`, `top` and `user`; reads, and changes nothing.

Files, the lowest first:

    asking     JSON routes, series and the stream of live figures of a running API, asked for from outside
    screen     one picture again and again until q, keys, plain lines where there is no terminal
    status     what runs, how far behind, how big; once or watched
    top        hottest and rising items, arms, topics, slowest stages
    user       one user: sequence with decaying weights, counters, the next slate
    verbs      the verbs of the command line
"""
