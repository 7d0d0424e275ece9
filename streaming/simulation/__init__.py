"""A simulated world and its people; knows nothing of how slates are made.

Files:

    world      users with known, drifting tastes, and items that appear and age
    titles     titles for its items
    trend      how soon a surge of a topic shows in what is served
    people     its users acting through the public API: the demo
    trial      Freshet in this process as its recommender, under one policy: `freshet bench exploration`
    informed   a recommender that knows the items but not the people: what hardly anybody can go below
    scorecard  what its slates were worth: ours, popular, oracle, paired
"""
