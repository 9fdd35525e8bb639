"""How student and teacher tokens meet: heads, losses, and the score that the curriculum judges by.

Nothing here knows where tokens come from or which block is the target.
"""
