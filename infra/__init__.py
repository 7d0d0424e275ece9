"""What the rest stands on: settings, the local Kafka and Redis, the supervisor, the command line, metric names.

Files, the lowest first:

    settings    one frozen table of settings
    telemetry   every Prometheus series, named in one place; logging
    process     one child process, ended by its id; free ports, folder locks
    kafka       a real Apache Kafka broker without Docker, Java or Maven on the machine
    store       a real Redis server
    stack       the supervisor of a local stack, as a library
    demo             `freshet demo` and `simulate` in the terminal
    replaying        `freshet replay` in the terminal
    replaying_live   the same log through a private stack
    access           `freshet keys` in the terminal
    recovering       `freshet rebuild`, `generation` and `snapshot` in the terminal
    inspecting       `freshet dead-letters` and `models` in the terminal
    watching/        `freshet status`, `top` and `user`: what a person looks at in a terminal
    evaluating/      `freshet evaluate`: what would another policy have earned?
    proving/         bench: what measures and proves the rest
    terminal         how the command line speaks: shared options, errors, JSON
    cli              the console command: imports everything else, lazily
"""
