"""What is timed, in training and by the bench."""
