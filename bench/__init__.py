"""Speed of recemb against its peers, as ratios of one run: ``bench.ops`` one look-up, ``bench.train`` a step.

``python -m bench.ops`` from the root of a checkout, or ``recemb bench ops``. See ``bench/README.md``.
"""

import logging

# torchrec 1.8 calls a name that torch 2.13 has deprecated, once per process.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
