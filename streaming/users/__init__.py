"""What is held of users beside their folds; the folds are in models/profile, what moves them in streaming/learn.py.

Files:

    memory      what is read and written of users, the store in this process
    embeddings  a live copy of the item vectors, the users' cached decayed embeddings
"""
