"""Which teacher block is the target now, when the next one is, and how all ranks come to one decision.

Numbers in, numbers out: no tensor of a model is seen here, and nothing is trained.
"""
