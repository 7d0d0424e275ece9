"""What measures and proves the rest, each on a private stack in a folder of its own; composition only.

Files:

    bench  what `freshet bench` measures, beside a floor of the same run
    load   its load, from a process of its own
    overload  `freshet bench overload`: three times too many events beside lookups
    soak   `freshet bench soak`: is memory flat while users and items come and go?
    chaos  `freshet chaos`: break everything at random times, compare counts and bytes afterwards
    faults  what it inflicts, and how each is undone
    publisher  the known stream, and clients that publish it
    proxy  a TCP proxy that cuts, stalls and half-closes the connections it carries
    quality/  `freshet bench quality`: Freshet beside the references, over a log
    coverage  `freshet bench ope`: do intervals of off-policy evaluation hold a known truth?
    exploration  `freshet bench exploration`: what does finding out cost and bring, in worlds whose truth is known?
    exploration_show  its progress, tables and plot
    dashboard  `freshet bench dashboard`: what the pages cost, and how soon a click shows
    browser  the real Chromium that it and the tests of the pages look through
    verbs  what `bench` and `chaos` ask, and what chaos shows
"""
