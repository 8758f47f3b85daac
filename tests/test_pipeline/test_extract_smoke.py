def test_store(tiny_store):
    import numpy as np
    from storage.reader import StoreReader
    r=StoreReader(tiny_store); print(len(r)); b=r.read(list(range(len(r))))
    print(b.rows, len(b.tokens), b.entropy.mean(), b.next_logprob.mean(), np.exp(b.logprob.reshape(-1,8)).sum(1).mean())
