"""What the shop front and the dashboard ask for: their files, their stream of figures, and the JSON of each page.

Knows nothing of how slates are made. Files, from the door inwards:

    files       `/`, `/dashboard`, `/beacon.js` and `/static/...`
    live        the event stream at `/-/live`: one frame of figures a second
    here        what this process counts itself, for a frame
    stages      how long lookups and their stages took
    freshness   from an accepted event to the first answer that knows it
    news        what broke last
    recent      the slates and slots that this process served last
    served      `/-/slates`, `/-/quality`, `/-/items/...`
    quality     coverage, Gini, entropy, exposure
    arms        `/-/bandits`: the items as arms of a bandit
    atlas       `/-/map`: items and users as points
    letters     `/-/dead-letters`: read and replay
    controls    `/-/models/...`: pin, unpin, roll back, save
    crowd       `/-/crowd`: how many simulated people, and what is to surge
    search      `/-/search`: find items and users
"""
