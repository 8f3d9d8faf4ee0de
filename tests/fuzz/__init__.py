"""Damaged and hostile files, made on the spot, for every reader of files from strangers.

`python -m fuzz --inputs 20000` (from the folder `tests`) reads so many inputs with each reader in
processes of their own, where an audit hook watches for code that runs and files that are written
and the memory is limited. An input is known by its reader and its number: `--reader cifar --first
123 --inputs 1` makes the same one again.
"""
