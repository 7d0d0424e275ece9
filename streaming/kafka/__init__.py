"""What Freshet itself has to know of Kafka's protocol and clients; nothing of what records mean.

Files:

    address   addresses with TLS and SASL -> options of every client
    metadata  the request that answers with topic ids
    ground    whether the log is still the one that state was folded from
    reading   reads one partition, and notices when its records do not come
"""
