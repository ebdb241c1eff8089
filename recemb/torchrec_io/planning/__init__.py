"""torchrec's planner with recemb's costs and search; :func:`recemb.torchrec_io.planner` makes one."""
