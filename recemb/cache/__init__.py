"""Hot rows kept uncompressed over a compressed table (:class:`recemb.HotRows`).

One table's part is :class:`recemb.cache.hot_rows.HotRowCache`: the cached rows, which ids they are, and how
hot each id has been. It is a table of C plain rows beside the compressed parameters, not a wrapper of them.
:mod:`recemb.cache.streams` splits a batch into look-ups of cached and of compressed rows, and adds them up;
:mod:`recemb.cache.refresh` exchanges rows between two training steps.
"""
