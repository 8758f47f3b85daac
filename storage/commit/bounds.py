"""What a commit record may state: numbers that fit each other and the plan, checked before memory is taken for them.

Data path: record -> **bounds** -> files of the shard. Bytes that anyone may have written get this far with hashes that
are all right. FORMAT.md has the table.
"""

from __future__ import annotations

from storage.commit.records import CommitRecord
from storage.errors import UsageError
from storage.format.arrays import array_specs, is_even
from storage.format.chunks import LARGEST_METADATA
from storage.format.encode import GROUP, axis_lengths
from storage.plan import Plan
from storage.rows import Counts
from storage.values import require_whole, short

LARGEST_SEQUENCES = 2**24  # of a shard: a reader holds 8 bytes of each for every axis
LARGEST_TOKENS = 2**40  # of a shard: sums over shards stay exact


def check_record(plan: Plan, record: CommitRecord) -> None:
    """Check the counts of a record, and that its files are exactly those of its arrays, none impossibly small or large.

    Raises:
        ValueError: they do not fit the plan or each other.
    """
    check_counts(plan, record.counts)
    limits = object_limits(plan, record)
    if limits.keys() != record.objects.keys():
        name = min(limits.keys() ^ record.objects.keys())
        verb = "lists" if name in record.objects else "does not list"
        raise ValueError(f"it {verb} {short(name)}: its files are not those of the arrays of this plan")
    for name, (least, most) in limits.items():
        require_whole(f"the size of {name}", record.objects[name].size, least=least, most=most)


def require_fit(plan: Plan, sequences: int) -> None:
    """Check that shards of a plan can hold its sequences, before any is computed.

    Args:
        sequences: of all documents, counted or extrapolated.

    Raises:
        UsageError: a shard would have more than it may.
    """
    each = sequences * min(plan.documents_per_shard, plan.documents) // max(plan.documents, 1)
    if each > LARGEST_SEQUENCES:
        raise UsageError(
            f"{plan.documents_per_shard} documents would put about {each:,} sequences into a shard, which may hold "
            f"{LARGEST_SEQUENCES:,}",
            where="documents_per_shard",
            fix=f"set at most {max(1, plan.documents_per_shard * LARGEST_SEQUENCES // (2 * each))}",
        )


def check_counts(plan: Plan, counts: Counts) -> None:
    """Check that numbers of sequences, tokens, rows and entries can be those of one shard. Raises ValueError."""
    head, tail = (min(most, plan.vocab_size) for most in (plan.target.k, plan.target.draws))
    limits = {
        "sequences": (0, LARGEST_SEQUENCES),
        "tokens": (0, LARGEST_TOKENS if counts.sequences else 0),
        "rows": (0, max(0, counts.tokens - 1)),  # the last token of a sequence has none
        "head_entries": (counts.rows if head else 0, counts.rows * head),
        "tail_entries": (0 if head else counts.rows, counts.rows * tail),
    }
    for name, (least, most) in limits.items():
        require_whole(f"counts.{name}", getattr(counts, name), least=least, most=most)
    if not 0.0 <= counts.head_mass <= 1.0:
        raise ValueError(f"counts.head_mass must be a number from 0 to 1, found {counts.head_mass}")


def object_limits(plan: Plan, record: CommitRecord) -> dict[str, tuple[int, int]]:
    """Return the files of a shard, by name, with the least and the most bytes that each may have."""
    counts, lengths = record.counts, axis_lengths(record.counts)
    specs = array_specs(
        plan,
        end_bytes="token_end_byte/zarr.json" in record.objects,
        even=is_even(plan, rows=counts.rows, head=counts.head_entries),
    )
    limits = {GROUP: (1, LARGEST_METADATA)}
    for spec in specs.values():
        layout = spec.layout(lengths[spec.axis], tokens=counts.tokens, rows=counts.rows)
        limits[f"{spec.name}/zarr.json"] = (1, LARGEST_METADATA)
        if layout.length:
            limits[f"{spec.name}/{layout.key}"] = layout.object_bytes
    return limits
