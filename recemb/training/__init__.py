"""Training a click model from a prepared log: configuration, loop, metrics, run directory, reports.

Nothing here knows how a table is compressed: tables arrive as :class:`recemb.spec.TableSpec` and are
measured through ``EmbeddingBagCollection.memory()``.
"""
