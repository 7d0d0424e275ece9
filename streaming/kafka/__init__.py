"""What Freshet itself has to know of Kafka's protocol and clients; nothing of topics or of what records mean.

Files:

    metadata  the request that answers with topic ids
"""
