"""What the catalogue says of an item, as numbers; knows nothing of events.

Files:

    tokens   hashed categories, tags, provider, year and words of an entry, and what a viewer's tokens say of it
"""
