"""What a run itself shows to be wrong."""


class TrainingFault(ValueError):
    """A run cannot go on, for a reason that the message tells in full: the command line shows no traceback."""
