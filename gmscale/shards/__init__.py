"""gmscale shards: build webdataset shards from images, prove that they are intact, say what is in them.

Nothing here imports torch, so that a command starts at once and its processes stay small.
"""
