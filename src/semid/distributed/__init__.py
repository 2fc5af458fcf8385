"""Past one machine: the same shard functions in processes, in Ray's actors and under Spark.

Nothing below knows of engines: `semid.quantization` calls a `ShardPool`, an encoder encodes a unit
of row groups. What starts processes, sends calls to them and survives their end lives here. See
``docs/scaling.md``.
"""
