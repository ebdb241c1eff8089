"""Trained collections for serving: quantised in torchrec's idiom, sharded by its quant sharder, exported."""
