"""Speed of recemb against its peers, as ratios of one run: ``bench.ops`` one look-up, ``bench.train`` a step.

``python -m bench.ops`` from the root of a checkout, or ``recemb bench ops``. See ``bench/README.md``.
"""
