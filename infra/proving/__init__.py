"""What measures and proves the rest, each on a private stack in a folder of its own; composition only.

Files:

    bench  what `freshet bench` measures, beside a floor of the same run
    load   its load, from a process of its own
    proxy  a TCP proxy that cuts, stalls and half-closes the connections it carries
"""
