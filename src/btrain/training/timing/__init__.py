"""The work that is timed, in training and by the bench."""
