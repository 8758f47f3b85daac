"""Our Zarr objects against zarr-python, and what they do about damage and hostile metadata."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numcodecs import zstd
from storage_cases import zarr_quietly

from storage.format.chunks import (
    DTYPES,
    PCODEC_LEVEL,
    ArrayLayout,
    decode_chunk,
    decode_index,
    decode_inner,
    encode_array,
    encode_chunk,
    poison,
)

CASES = [(0, 5), (1, 5), (5, 5), (12, 5), (3000, 700)]


def values_of(dtype, shape):
    rng = np.random.default_rng(0)
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, min(np.iinfo(dtype).max, 2**40), shape).astype(dtype)


def decode_array(data, layout):
    index = decode_index(data[-layout.index_bytes :], layout, len(data))
    parts = [decode_inner(data[int(start) : int(start + size)], layout) for start, size in index]
    joined = np.concatenate(parts, axis=int(layout.by_rank))
    return (joined.T if layout.by_rank else joined)[: layout.length]


def layout_of(name, length, chunk, **ranks):
    return ArrayLayout(axis="row", dtype=DTYPES[name], length=length, chunk=min(chunk, max(1, length)), **ranks)


LAYOUTS = {f"{name}-{case[0]}": layout_of(name, *case) for name in DTYPES for case in CASES} | {
    f"ranks-{by_rank}-{case[0]}": layout_of("uint16", *case, ranks=5, by_rank=by_rank)
    for by_rank in (False, True)
    for case in CASES
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_zarr_reads_the_same_values(layout, tmp_path):
    values = values_of(layout.dtype, (layout.length, *layout.chunk_shape[1:]))
    (tmp_path / "zarr.json").write_bytes(layout.metadata_bytes())
    if layout.length:
        target = tmp_path / layout.key
        target.parent.mkdir(parents=True)
        data = encode_array(values, layout)
        target.write_bytes(data)
        np.testing.assert_array_equal(decode_array(data, layout), values)
    with zarr_quietly() as zarr:
        array = zarr.open_array(tmp_path, mode="r")
        np.testing.assert_array_equal(array[:], values.T if layout.by_rank else values)
        assert array.dtype == layout.dtype
        np.testing.assert_array_equal(array.fill_value, poison(layout.dtype))


def test_zarr_writes_the_same_bytes():
    """For a flat array our object is what zarr-python writes with these codecs."""
    layout = ArrayLayout(axis="row", dtype=DTYPES["uint16"], length=3000, chunk=700)
    values = values_of(layout.dtype, 3000)
    with zarr_quietly() as zarr:
        from zarr.codecs import Crc32cCodec
        from zarr.codecs.numcodecs import PCodec

        store = zarr.storage.MemoryStore()
        array = zarr.create_array(
            store, shape=(3000,), chunks=(700,), shards=(3500,), dtype="uint16", serializer=PCodec(level=PCODEC_LEVEL),
            compressors=[Crc32cCodec()], fill_value=65535, config={"write_empty_chunks": True},
        )  # fmt: skip
        array[:] = values
        assert store._store_dict["c/0"].to_bytes() == encode_array(values, layout)


def test_metadata_round_trip_and_allow_list():
    layout = ArrayLayout(axis="row", dtype=DTYPES["uint16"], length=3000, chunk=700)
    read = ArrayLayout.from_metadata(layout.metadata_bytes(), axis="row", dtype=layout.dtype)
    assert read == layout


def change(metadata, *path, value):
    node = metadata
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("codecs", 0, "configuration", "codecs", 0), {"name": "numcodecs.pickle", "configuration": {}}),
        (("codecs", 0, "configuration", "codecs"), [{"name": "bytes"}]),
        (("codecs", 0, "configuration", "chunk_shape"), [2**40]),
        (("codecs", 0, "configuration", "chunk_shape"), [700.0]),
        (("codecs", 0, "configuration", "index_codecs"), [{"name": "bytes"}]),
        (("codecs", 0), {"name": "vlen-utf8"}),
        (("data_type",), "uint32"),
        (("shape",), [-1]),
        (("shape",), [2**70, 2]),
        (("shape",), []),
        (("fill_value",), 0),
        (("storage_transformers",), [{"name": "x"}]),
        (("attributes",), {"a": 1}),
        (("dimension_names",), None),
    ],
)
def test_other_metadata_is_refused(path, value):
    layout = ArrayLayout(axis="row", dtype=DTYPES["uint16"], length=3000, chunk=700)
    metadata = layout.metadata()
    change(metadata, *path, value=value)
    with pytest.raises(ValueError, match=r"^zarr\.json (has codecs or fields that|states length|is not an array of)"):
        ArrayLayout.from_metadata(json.dumps(metadata).encode(), axis="row", dtype=layout.dtype)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b'{"shape": 3}'])
def test_no_metadata_at_all(data):
    with pytest.raises(ValueError, match=r"^zarr\.json is not an array of this format"):
        ArrayLayout.from_metadata(data, axis="row", dtype=DTYPES["uint8"])


@pytest.mark.parametrize("name", ["uint8", "uint16", "float16"])
def test_every_flipped_bit_of_a_chunk_is_found(name):
    values = values_of(DTYPES[name], 40)
    data = encode_chunk(values)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="crc32c of a chunk does not agree"):
            decode_chunk(bytes(flipped), values.dtype, 40)


def test_every_flipped_bit_of_an_index_is_found():
    layout = ArrayLayout(axis="row", dtype=DTYPES["uint8"], length=30, chunk=10)
    data = encode_array(values_of(layout.dtype, 30), layout)
    tail = data[-layout.index_bytes :]
    for bit in range(len(tail) * 8):
        flipped = bytearray(tail)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="crc32c of the chunk index"):
            decode_index(bytes(flipped), layout, len(data))


@pytest.mark.parametrize("name", ["uint8", "uint16"])
@pytest.mark.parametrize("length", [39, 41, 0, 10**6])
def test_a_chunk_of_another_length_is_refused(name, length):
    with pytest.raises(ValueError, match=f"does not hold the expected {length} values"):
        decode_chunk(encode_chunk(values_of(DTYPES[name], 40)), DTYPES[name], length)


def test_a_chunk_of_another_type_is_refused():
    with pytest.raises(ValueError, match="cannot be decompressed"):
        decode_chunk(encode_chunk(values_of(DTYPES["uint32"], 40)), DTYPES["uint16"], 40)


def test_a_chunk_that_expands_enormously_is_refused_without_allocating_it():
    import google_crc32c

    bomb = zstd.compress(bytes(2**28), 9)
    data = bomb + int(google_crc32c.value(bomb)).to_bytes(4, "little")
    with pytest.raises(ValueError, match="does not hold the expected 40 values"):
        decode_chunk(data, DTYPES["uint8"], 40)
