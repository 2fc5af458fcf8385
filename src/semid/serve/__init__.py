"""A service over a published bundle: ids, neighbors, new items and the explorer over HTTP.

`semid.serve.app` has the endpoints, `versions` what they answer from, `batching` the queue in front
of the engine, `bodies` the formats, `guard` and `observe` what surrounds every request.
"""
