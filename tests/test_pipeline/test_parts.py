"""A part is one file and one line: a package of new ones is listed in the tables and used from configurations."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config.extract import ExtractConfig, SourceConfig, TargetConfig, TeacherConfig
from pipeline.config.loading import load_extract, load_train
from pipeline.config.schema import json_schema
from pipeline.config.train import TrainConfig, spelled_out
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.extraction.planning import estimate
from pipeline.train import train
from pipeline.training.events import Finished, StepDone
from stages.corpus import SOURCES, SourceKind
from stages.losses.divergences import DIVERGENCES, make_divergence, parameters
from stages.targets import KINDS, Kind
from stages.teacher import BACKENDS, Backend
from storage import target
from storage.codecs import CODECS
from storage.errors import UsageError
from storage.reader import StoreReader
from storage.tools.status import status
from storage.tools.verify import verify

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "sources": '''
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Lines:
    """One document per line of a text file."""
    path: str
    recorded = {}
    def texts(self): return Path(self.path).read_text().splitlines()
    @property
    def identity(self): return {"kind": "lines", "texts": self.texts()}
    def __len__(self): return len(self.texts())
    def read(self, first, end): return self.texts()[first:end]

def open_lines(spec): return Lines(spec.path)
''',
    "kinds": '''
from stages.targets.rows import mass_rows

def nucleus_rows(logits_NV, at, target):
    """A head that reaches p, and samples of what is outside."""
    return mass_rows(logits_NV, at, target)
''',
    "backends": '''
from stages.targets.positions import wanted_mask, wanted_positions
from stages.targets.rows import fixed_rows
from stages.teacher.batching import pad
from stages.teacher.hf import HFTeacher

def load(files, **how):
    return HFTeacher.load(files, **how)

class Engine:
    """Keeps its logits to itself."""
    def __init__(self, model): self.model = model
    def rows(self, sequences, target):
        hidden_ND = self.model.hidden(pad(sequences, self.model.device))[wanted_mask(sequences)]
        return fixed_rows(self.model.logits(hidden_ND), wanted_positions(sequences), target)

def load_engine(files, **how):
    return Engine(HFTeacher.load(files, **how))
''',
    "codecs": """
from dataclasses import dataclass
import numpy as np

@dataclass(frozen=True)
class Halves:
    id = "halves"
    about = "numbers as float16"
    dtype = row_dtype = np.dtype("<f2")
    renormalises = True
    def encode(self, logprob_H, head_size_R): return logprob_H.astype("<f2")
    def decode(self, codes_H, head_size_R): return codes_H.astype(np.float32)
    def decode_ranks(self, codes_KR): return codes_KR.astype(np.float32)
    def round_numbers(self, values): return values.astype("<f2")
    def error_bound(self, logprob_H): return np.abs(logprob_H) * 2.0**-11 + 1e-7
    def parameters(self): return {"id": self.id}
""",
    "divergences": '''
from dataclasses import dataclass
from stages.losses.divergences import Divergence, SkewForwardKL, SkewReverseKL

@dataclass(frozen=True)
class SkewMix(Divergence):
    """weight KL(P, aP + (1-a)Q) + (1-weight) KL(Q, (1-a)P + aQ)."""
    alpha: float = 0.1
    weight: float = 0.5
    def terms(self, log_p, log_q, p, q):
        (d, h), (e, g) = (kind(self.alpha).terms(log_p, log_q, p, q) for kind in (SkewForwardKL, SkewReverseKL))
        return d * self.weight + e * (1 - self.weight), h * self.weight + g * (1 - self.weight)
''',
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A part of each sort in a package of its own, each listed by one line in its table."""
    package = tmp_path / "added_parts"
    package.mkdir()
    for name, text in PARTS.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    from added_parts.codecs import Halves  # type: ignore[import-not-found]
    from added_parts.divergences import SkewMix  # type: ignore[import-not-found]

    with monkeypatch.context() as patch:
        for table, name, line in (
            (SOURCES, "lines", SourceKind(about="per line", opener="added_parts.sources:open_lines", fields=False)),
            (KINDS, "nucleus", Kind(about="both", rows="added_parts.kinds:nucleus_rows", draws=3)),
            (BACKENDS, "other", Backend(about="other", loader="added_parts.backends:load", hidden_states=True)),
            (BACKENDS, "engine", Backend(about="one", loader="added_parts.backends:load_engine", hidden_states=False)),
            (CODECS, "halves", Halves),
            (DIVERGENCES, "skew_mix", SkewMix),
        ):
            patch.setitem(table, name, line)  # type: ignore[arg-type]
        _read_tables()
        yield
    _read_tables()
    for name in [name for name in sys.modules if name.split(".")[0] == "added_parts"]:
        del sys.modules[name]


def _read_tables() -> None:
    """What an import of the configuration does: models read the tables once."""
    for model in (TeacherConfig, SourceConfig, TargetConfig, ExtractConfig, TrainConfig):
        model.model_rebuild(force=True)


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values, default=str))))
    return path


@pytest.fixture
def training(tmp_path: Path, tiny_teacher_dir: Path) -> dict[str, Any]:
    return {
        "store": tmp_path / "store",
        "run": tmp_path / "run",
        "student": {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 2},
        "loss": {"divergence": "skew_mix", "alpha": 0.2, "weight": 0.75},
        "kd_ratio": 1.0,
        "steps": 8,
        "tokens_per_step": 256,
        "optimizer": {"lr": 2e-3},
        "dtype": "float32",
        "device": "cpu",
    }


@pytest.mark.usefixtures("parts")
def test_a_part_of_each_sort_from_a_configuration_to_a_student(
    tmp_path: Path, tiny_extraction: dict[str, Any], training: dict[str, Any], topic_texts: list[str]
) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(text[:300].replace("\n", " ") for text in topic_texts[:20]))
    values = {
        **tiny_extraction,
        "store": tmp_path / "store",
        "teacher": {**tiny_extraction["teacher"], "backend": "other"},
        "corpus": [{"source": "lines", "path": tmp_path / "corpus.txt"}],
        "target": {"kind": "nucleus", "k": 16, "p": 0.2},
        "codec": "halves",
    }
    config = load_extract(written(tmp_path / "extract.yaml", values))
    expected = estimate(config)
    assert "exact entries up to mass 0.2, at most 16, 3 tail draws" in expected.contents
    list(extract(config))

    reader = StoreReader(tmp_path / "store")
    plan, batch = reader.plan, reader.read(range(len(reader)))
    assert (plan.teacher["backend"], plan.target.kind, plan.codecs["logprob"]) == ("other", "nucleus", {"id": "halves"})
    assert plan.corpus[0]["kind"] == "lines"
    assert len(np.unique(batch.head_size)) > 1
    assert batch.tail_size.max() <= batch.draws == 3
    assert verify(tmp_path / "store").problems == []
    facts = status(tmp_path / "store")
    assert facts.kind == "nucleus"
    assert expected.at_most
    assert facts.shard_bytes_per_row is not None
    assert facts.shard_bytes_per_row < expected.bytes_per_row

    events = list(train(load_train(written(tmp_path / "train.yaml", training))))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert isinstance(events[-1], Finished)
    assert losses[-1] < losses[0]
    assert evaluate(tmp_path / "store", {"student": tmp_path / "run"}, device="cpu").students["student"].kl is not None


@pytest.mark.usefixtures("parts")
def test_the_schemas_name_them() -> None:
    extraction, learning = json_schema("extract"), json.loads(json_schema("train"))
    for name in ("lines", "nucleus", "other", "halves"):
        assert f'"{name}"' in extraction, name
    loss = learning["properties"]["loss"]["properties"]
    assert "skew_mix" in loss["divergence"]["anyOf"][0]["enum"]
    assert loss["alpha"]["description"] == "Of skew_forward_kl, skew_reverse_kl, skew_mix."


@pytest.mark.usefixtures("parts")
def test_two_parameters_are_spelled_behind_the_name_or_as_keys(tmp_path: Path, training: dict[str, Any]) -> None:
    keys = load_train(written(tmp_path / "keys.yaml", training))
    behind = load_train(written(tmp_path / "behind.yaml", {**training, "loss": {"divergence": "skew_mix(0.2, 0.75)"}}))
    assert keys.loss != behind.loss
    stored = [spelled_out(config.model_dump(mode="json"))["loss"] for config in (keys, behind)]
    assert stored[0] == stored[1]
    assert stored[0]["divergence"] == "skew_mix(0.2, 0.75)"
    assert vars(make_divergence("skew_mix(0.2)")) == {"alpha": 0.2, "weight": 0.5}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("loss", "key", "what", "fix"),
    [
        ({"divergence": "skew_mix", "beta": 0.5}, "beta", "unknown key 'beta' in loss", "alpha, weight"),
        ({"divergence": "skew_mix", "wieght": 0.5}, "wieght", "unknown key 'wieght' in loss", "did you mean 'weight'?"),
        ({"divergence": "skew_mix", "alpha": "hot"}, "alpha", "alpha must be a number, found 'hot'", "default, 0.1"),
        (
            {"divergence": "skew_mix(0.2)", "weight": 0.5},
            "weight",
            "weight is given beside skew_mix(0.2)",
            "parentheses",
        ),
        ({"divergence": "skew_mix(1, 2, 3)"}, "divergence", "skew_mix takes alpha, weight", "forward_kl"),
        ({"divergence": "jsd", "beta": 2}, "beta", "beta is 2.0, allowed is 0 < beta < 1", "default, 0.5"),
        ({"beta": 0.5}, "beta", "unknown key 'beta' in loss", "keys here"),
        ({"name": "KDLoss", "tail": "name"}, "tail", "tail", "default, null"),
        ({"name": "KDLoss", "divergence": "name"}, "divergence", "divergence 'name' is unknown", "default"),
        ({"divergence": "jds", "beta": 0.5}, "divergence", "divergence 'jds' is unknown, did you mean 'jsd'?", ""),
    ],
)
def test_other_parameters_are_refused_by_name(
    loss: dict[str, Any], key: str, what: str, fix: str, tmp_path: Path, training: dict[str, Any]
) -> None:
    path = written(tmp_path / "train.yaml", {**training, "loss": loss})
    with pytest.raises(UsageError, match=re.escape(what)) as caught:
        load_train(path)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"  {key}:"))
    assert caught.value.where == f"{path}:{line}"
    assert fix in str(caught.value.fix)


@pytest.mark.usefixtures("parts")
def test_finished_candidates_make_the_rows_that_logits_make(tmp_path: Path, tiny_extraction: dict[str, Any]) -> None:
    rows = []
    for backend in ("hf", "engine"):
        teacher, store = {**tiny_extraction["teacher"], "backend": backend}, tmp_path / backend
        values = {**tiny_extraction, "store": store, "teacher": teacher, "target": {"kind": "topk", "k": 8}}
        list(extract(ExtractConfig.model_validate(values)))
        assert verify(store).problems == []
        reader = StoreReader(store)
        assert reader.plan.teacher["backend"] == backend
        rows.append(reader.read(range(len(reader))))
    np.testing.assert_array_equal(rows[0].head_ids, rows[1].head_ids)
    np.testing.assert_array_equal(rows[0].logprob, rows[1].logprob)
    with pytest.raises(UsageError, match="'engine' gives finished candidates alone; evaluation needs hidden") as caught:
        evaluate(tmp_path / "engine", {}, device="cpu")
    assert caught.value.where == "plan.json: teacher.backend"
    del BACKENDS["engine"]  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="unknown teacher backend 'engine'"):
        evaluate(tmp_path / "engine", {}, device="cpu")


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.from_candidates])
@pytest.mark.parametrize("phase", [estimate, lambda config: list(extract(config))], ids=["plan", "extract"])
def test_a_plan_that_asks_for_more_than_candidates_is_refused(
    phase: Any, kind: str, tmp_path: Path, tiny_extraction: dict[str, Any]
) -> None:
    """Before a weight, or even a corpus, is looked at."""
    absent = {"path": str(tmp_path / "absent"), "backend": "engine"}
    values = {**tiny_extraction, "store": tmp_path / "store", "teacher": absent, "target": {"kind": kind}}
    with pytest.raises(UsageError) as caught:
        phase(ExtractConfig.model_validate(values))
    assert caught.value.what == (
        f"teacher backend 'engine' gives finished candidates alone; target.kind: {kind} needs hidden states and a head"
    )
    assert caught.value.where == "teacher.backend"
    assert caught.value.fix == "use a backend that gives them: hf, other, or target.kind: topk or topp"
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("parts")
def test_a_live_teacher_needs_more_than_candidates(
    tmp_path: Path, training: dict[str, Any], tiny_extraction: dict[str, Any]
) -> None:
    del training["store"], training["loss"]
    teacher = {"path": str(tmp_path / "absent"), "backend": "engine"}
    config = TrainConfig.model_validate({**training, "teacher_model": teacher, "corpus": tiny_extraction["corpus"]})
    with pytest.raises(UsageError, match="'engine' gives finished candidates alone; a live teacher needs") as caught:
        list(train(config))
    assert caught.value.where == "teacher_model.backend"
    assert caught.value.fix == "use a backend that gives them: hf, other"


def test_every_line_names_something_that_loads() -> None:
    for line in (*KINDS.values(), *BACKENDS.values()):
        assert callable(line.load())
    for source in SOURCES.values():
        assert callable(resolve_name(source.opener))


def rows_of_table(path: str, first: str) -> dict[str, list[str]]:
    """The cells of each row of the one Markdown table that begins with `| first`, by the name in the first cell."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = cells[1:]
    return rows


def names(text: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", text)


def test_the_guide_to_parts_names_what_there_is() -> None:
    tables = {
        "corpus source": SOURCES,
        "teacher backend": BACKENDS,
        "target kind": KINDS,
        "codec": CODECS,
        "divergence": DIVERGENCES,
    }
    found = rows_of_table("CONTRIBUTING.md", "part")
    assert found.keys() == tables.keys()
    for part, table in tables.items():
        assert names(found[part][-1]) == list(table), part


def test_the_tables_of_kinds_are_those_of_the_code() -> None:
    assert [names(cell)[0] for cell in rows_of_table("README.md", "kind")] == list(KINDS)
    described = rows_of_table("storage/FORMAT.md", "kind")
    assert {names(cell)[0] for cell in described} == target.NAMED_KINDS.keys() <= KINDS.keys()
    for name, holds in target.NAMED_KINDS.items():
        _, k, p, draws = described[f"`{name}`"]
        assert (k != "0", p != "null", draws != "0") == (holds.head, holds.mass, holds.draws), name


def test_the_guide_to_divergences_names_parameters_and_defaults() -> None:
    guide = " ".join((ROOT / "docs/losses.md").read_text(encoding="utf-8").split())
    for name in DIVERGENCES:
        taken = ", ".join(f"{key}={value:g}" for key, value in parameters(name).items())
        assert (f"`{name}({taken})`" if taken else f"`{name}`") in guide, name


def test_the_format_describes_every_codec() -> None:
    text = (ROOT / "storage/FORMAT.md").read_text(encoding="utf-8")
    assert [name for name in CODECS if f"* `{name}`" not in text] == []
