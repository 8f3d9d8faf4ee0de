"""BulletTrain: robust training that spends the attack steps near the decision boundary.

`btrain train` is the command line; `btrain.allocation`, `btrain.attacks` and `btrain.defenses`
are the algorithm as pure functions, for other people's training loops.
"""

__version__ = "0.1.0"
