"""The bytes of a shard: arrays, their chunks, encoding, decoding, and what a batch must hold."""
