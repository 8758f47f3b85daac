"""The store: the contract between the phases. numpy, zarr's format, numcodecs, pcodec and pyarrow; never torch.

Import what you need from its modules: `storage.writer.StoreWriter`, `storage.reader.StoreReader`, `storage.plan.Plan`,
`storage.rows.SequenceBatch`, `storage.exchange.arrow`, ... This file imports nothing, so that `pipeline --help` pays
for none. FORMAT.md specifies the bytes.
"""
