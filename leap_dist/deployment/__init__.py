"""What becomes of a student: loaded in a line, exported for other runtimes, run over folders of images.

Nothing here is imported with the package; each format's own library is asked for when that format is.
"""

from leap_dist.deployment.loaded import Distilled, Outputs, load_distilled

__all__ = ["Distilled", "Outputs", "load_distilled"]
