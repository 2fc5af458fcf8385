"""What codes are worth: overlap, flips, geometry, reconstruction, retrieval, matching.

Functions on numpy arrays or torch tensors, in one file per metric, that return frozen dataclasses
with `to_dict`; blocked, and the same result for any number of threads. Drawing them is the work of
`semid.report`.
"""
