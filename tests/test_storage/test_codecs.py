"""One battery for all log-probability codecs, over the table; and golden bytes, refreshed only on demand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codecs import CODECS, DEFAULT_CODEC, logprob_codec
from storage.codecs.sqrt_delta import SqrtDelta
from storage.errors import UsageError
from storage.format.decode import scale_heads
from storage.segments import cumsum_rows, diff_rows

TESTS = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "codecs.json"

head = st.lists(st.floats(-9000, 0, width=32) | st.floats(-20, 0, width=32), min_size=0, max_size=12)
heads = st.lists(head.map(lambda values: sorted(values, reverse=True)), min_size=1, max_size=20)


def flat(rows):
    sizes = np.array([len(row) for row in rows], dtype=np.int32)
    return np.array([value for row in rows for value in row], dtype=np.float32), sizes


@pytest.mark.parametrize("name", CODECS)
class TestEveryCodec:
    @settings(max_examples=200, deadline=None)
    @given(rows=heads)
    def test_stays_within_its_bound_and_falls(self, name, rows):
        codec = CODECS[name]()
        logprob, sizes = flat(rows)
        codes = codec.encode(logprob, sizes)
        assert codes.dtype == codec.dtype
        assert codes.shape == logprob.shape
        back = codec.decode(codes, sizes)
        assert back.dtype == np.float32
        assert np.all(np.abs(back.astype(np.float64) - logprob) <= codec.error_bound(logprob))
        for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
            assert np.all(np.diff(back[start : start + size]) <= 0)

    def test_encoding_what_was_decoded_changes_nothing(self, name):
        codec = CODECS[name]()
        logprob = np.sort(np.random.default_rng(0).uniform(-30, 0, (50, 8)).astype(np.float32))[:, ::-1].reshape(-1)
        sizes = np.full(50, 8, np.int32)
        codes = codec.encode(logprob, sizes)
        np.testing.assert_array_equal(codec.encode(codec.decode(codes, sizes), sizes), codes)

    @settings(max_examples=200, deadline=None)
    @given(values=st.lists(st.floats(-60000, 60000, width=32) | st.sampled_from([np.inf, -np.inf]), max_size=30))
    def test_numbers_of_a_row_are_rounded_once(self, name, values):
        codec, given_R = CODECS[name](), np.array(values, dtype=np.float32)
        stored_R = codec.round_numbers(given_R)
        assert stored_R.dtype == codec.row_dtype
        back_R = stored_R.astype(np.float32)
        np.testing.assert_array_equal(codec.round_numbers(back_R), stored_R)
        rounding = {"rtol": 0, "atol": 0} if codec.id == "exact" else {"rtol": 2.0**-11, "atol": codec.row_step / 2}
        np.testing.assert_allclose(back_R, given_R, **rounding)  # infinities stay what they are

    def test_parameters_build_the_same_codec(self, name):
        codec = CODECS[name]()
        assert logprob_codec(codec.parameters()) == codec
        assert logprob_codec(json.loads(json.dumps(codec.parameters()))) == codec

    def test_no_rows(self, name):
        codec, nothing = CODECS[name](), np.zeros(0, np.int32)
        assert len(codec.decode(codec.encode(np.zeros(0, np.float32), nothing), nothing)) == 0

    def test_golden(self, name, golden):
        codec = CODECS[name]()
        logprob, sizes = flat([[-1e-7, -0.1, -2.5, -4.1, -7.0], [-0.693], [], [-3.0, -3.0, -12.5, -40.0, -9e3]])
        codes = codec.encode(logprob, sizes)
        golden(GOLDEN, name, {"codes": codes.tobytes().hex(), "decoded": codec.decode(codes, sizes).tobytes().hex()})


@pytest.mark.parametrize(("flags", "code"), [([], 1), (["--refresh-goldens"], 0)], ids=["compared", "refreshed"])
def test_goldens_change_with_the_flag_and_never_without(flags, code, tmp_path):
    """In a copy of these tests, whose golden bytes are wrong."""
    folder = tmp_path / "tests" / "test_storage"
    (folder / "golden").mkdir(parents=True)
    shutil.copy(TESTS / "conftest.py", tmp_path / "tests")
    test = shutil.copy(__file__, folder)
    right = json.loads(GOLDEN.read_text())
    wrong = json.dumps(right | {"exact": right["sqrt-delta"]})
    (folder / "golden" / "codecs.json").write_text(wrong)
    command = [sys.executable, "-m", "pytest", "-c", TESTS.parent / "pyproject.toml", *flags]
    done = subprocess.run(
        [*command, f"{test}::TestEveryCodec::test_golden"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert (folder / "golden" / "codecs.json").read_text() == (GOLDEN.read_text() if flags else wrong)


@settings(max_examples=200, deadline=None)
@given(rows=heads)
def test_sqrt_delta_is_within_a_quarter_step_of_the_root_and_half_a_step_of_the_logarithm(rows):
    codec = SqrtDelta()
    logprob, sizes = flat(rows)
    back = codec.decode(codec.encode(logprob, sizes), sizes).astype(np.float64)
    joint = 2 * np.log(codec.root_step / codec.log_step)
    large = logprob >= joint
    root_error = np.abs(np.exp(back / 2) - np.exp(logprob.astype(np.float64) / 2))
    assert np.all(root_error[large] <= codec.root_step / 4 + 1e-6)
    inside = ~large & (logprob > -8000)
    assert np.all(np.abs(back - logprob)[inside] <= codec.log_step / 2 + 1e-3)


@settings(max_examples=50, deadline=None)
@given(root=st.floats(0.004, 0.2), ratio=st.floats(1.5, 20), rows=heads)
def test_any_steps_keep_the_bound(root, ratio, rows):
    codec = SqrtDelta(root_step=root, log_step=min(1.0, max(0.02, root * ratio)))
    logprob, sizes = flat(rows)
    back = codec.decode(codec.encode(logprob, sizes), sizes)
    assert np.all(np.abs(back.astype(np.float64) - logprob) <= codec.error_bound(logprob))
    np.testing.assert_array_equal(codec.decode(codec.encode(back, sizes), sizes), back)


@pytest.mark.parametrize(("root", "log"), [(0.02, 0.125), (3.5e-5, 0.125), (0.01, 0.0155), (0.1, 1.0), (3.2e-5, 1.0)])
def test_what_each_code_stands_for_is_stored_as_that_code(root, log):
    """A conversion that keeps the codec relies on it."""
    codec, codes, ones = SqrtDelta(root_step=root, log_step=log), np.arange(65536), np.ones(65536, np.int32)
    np.testing.assert_array_equal(codec.encode(codec.decode(codes, ones), ones), codes)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"id": "pickle"}, "unknown log-probability codec 'pickle'; this version knows"),
        ({}, "unknown log-probability codec"),
        ({"id": "sqrt-delta", "step": 1.0}, "codec sqrt-delta has no parameter 'step'; it has"),
        ({"id": "exact", "root_step": 0.1}, "codec exact has no parameter 'root_step'; it has none"),
        ({"id": "sqrt-delta", "root_step": 0.5, "log_step": 0.1}, "must satisfy 0 < root_step < log_step <= 1"),
        ({"id": "sqrt-delta", "root_step": 0.0}, "must satisfy 0 < root_step < log_step <= 1"),
        ({"id": "sqrt-delta", "row_step": True}, "row_step must be a number, found True"),
        ({"id": "sqrt-delta", "root_step": "0.01"}, "root_step must be a number, found '0.01'"),
        ({"id": "sqrt-delta", "root_step": float("nan")}, "must satisfy 0 < root_step < log_step <= 1"),
        ({"id": "sqrt-delta", "root_step": 3e-5}, "they end at 0"),  # 2/D alone is more than 65535 codes
        ({"id": "sqrt-delta", "root_step": 1e-6}, "they end at 0"),
        ({"id": "sqrt-delta", "row_step": 0.0}, r"row_step 0\.0 must be above 0 and at most 1"),
        # The last code would lie near -980 nats.
        (
            {"id": "sqrt-delta", "root_step": 0.01, "log_step": 0.015},
            "must reach -1000 nats, and they end at -983",
        ),
    ],
)
def test_unknown_codecs_and_parameters_are_refused(parameters, told):
    with pytest.raises(UsageError, match=told):
        logprob_codec(parameters)


@pytest.mark.parametrize(("root", "log"), [(0.02, 0.125), (3.5e-5, 0.125), (0.01, 0.0155), (0.1, 1.0)])
def test_the_largest_code_is_where_the_format_says(root, log):
    lowest = 2 * np.log(root / log) - (65535 - 2 / root + 2 / log) * log
    codec, one = SqrtDelta(root_step=root, log_step=log), np.ones(1, np.int32)
    assert lowest <= -1000
    for value in (lowest, 2 * lowest):
        np.testing.assert_allclose(codec.decode(codec.encode(np.float32([value]), one), one), lowest, rtol=1e-4)


def test_default_is_in_the_table():
    assert CODECS[DEFAULT_CODEC]() == SqrtDelta()


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 60000), max_size=9).map(sorted), max_size=20))
def test_differences_and_sums_within_rows_are_inverse(rows):
    sizes = np.array([len(row) for row in rows], dtype=np.int32)
    values = np.array([value for row in rows for value in row], dtype=np.uint16)
    np.testing.assert_array_equal(cumsum_rows(diff_rows(values, sizes), sizes), values)


@pytest.mark.parametrize("sizes", [[3, 3], [1, 4, 0, 1]], ids=["even", "ragged"])
def test_heads_are_scaled_to_the_mass_that_the_tail_leaves(sizes):
    sizes = np.array(sizes, np.int32)
    logprob = np.log(np.linspace(0.3, 0.05, sizes.sum())).astype(np.float32)
    tail_logit = np.linspace(-2, 1, len(sizes)).astype(np.float32)
    scaled = scale_heads(logprob, sizes, tail_logit)
    row = np.repeat(np.arange(len(sizes)), sizes)
    mass = np.bincount(row, weights=np.exp(scaled), minlength=len(sizes))
    np.testing.assert_allclose(mass[sizes > 0], (1 / (1 + np.exp(tail_logit)))[sizes > 0], rtol=1e-6)
