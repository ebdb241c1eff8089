"""Compressed tables under torchrec's ``DistributedModelParallel``.

A collection's compressed tables ride inside torchrec's own sharded collection as one more compute kernel
(``CUSTOMIZED_KERNEL``): they share its exchanges of ids and of pooled rows with the uncompressed tables,
which keep every stock sharding and kernel. On each rank the engine looks up, in one call each, the compressed
tables that lie there whole and those that are replicated.
"""
