"""One job over many GPUs or nodes, on Ray.

`driver.py` is the way in; nothing is imported here, because `keeper.py` runs as a program of its
own beside every job and needs none of it.
"""
