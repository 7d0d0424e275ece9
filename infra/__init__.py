"""What the rest stands on: settings, the local Kafka and Redis, the supervisor, the command line, metric names.

Files, the lowest first:

    settings    one frozen table of settings
    telemetry   every Prometheus series, named in one place
    kafka       a real Apache Kafka broker without Docker, Java or Maven on the machine
    stack       Redis, the supervisor, `freshet up`
    cli         the console command: imports everything else, lazily
"""
