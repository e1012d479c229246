"""Samples of a model, with small scripts in the place of the two tools."""

import json
from pathlib import Path

import pytest

from mpo_megatron.comparison import samples
from mpo_megatron.comparison.samples import Samples, sample
from mpo_megatron.errors import UserError

TOOL = """
import json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with (pathlib.Path(__file__).parent / "calls").open("a") as file:
    file.write(json.dumps([pathlib.Path(__file__).stem, given]) + "\\n")
if given.get("--samples") == "0":
    sys.exit("generate.py: --samples 0 must be at least 1")
sampled = {"text": "Red, " + chr(0x2028) + "green", "finish_reason": "stop"}  # a line's end to str.splitlines
groups = [{"id": name, "prompt": "Name.", "responses": [{**sampled, "score": score} for score in scores]}
          for name, scores in (("a", [1.0, 2.0]), ("b", [7.0]))]
lines = "".join(json.dumps(group, ensure_ascii=False) + "\\n" for group in groups)
pathlib.Path(given["--output"]).write_text(lines, encoding="utf-8")
"""
ASKED = Samples({"prompts": "p.jsonl", "samples": 2, "top_p": 0.85}, {"scorer": "constraints"}, [1])


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("generate", "score"):
        (folder / f"{name}.py").write_text(TOOL)
    monkeypatch.setattr(samples, "ROOT", tmp_path)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").touch()
    return folder


def test_a_model_is_sampled_once(tools: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert sample(ASKED, model, folder) == {"a": 1.5, "b": 7.0}
    calls = [json.loads(line) for line in (tools / "calls").read_text().splitlines()]
    groups, scored = str(folder / "samples.jsonl"), str(folder / "samples.scored.jsonl")
    asked = {"--prompts": "p.jsonl", "--samples": "2", "--top-p": "0.85"}
    assert calls == [
        ["generate", {"--model": str(model), **asked, "--output": groups}],
        ["score", {"--input": groups, "--scorer": "constraints", "--output": scored}],
    ]
    samples.discard(model)
    assert not model.exists()
    assert sample(ASKED, model, folder) == {"a": 1.5, "b": 7.0}
    assert len((tools / "calls").read_text().splitlines()) == 2
    # Scored anew, of the same samples.
    Path(scored).unlink()
    assert sample(ASKED, model, folder) == {"a": 1.5, "b": 7.0}
    assert len((tools / "calls").read_text().splitlines()) == 3


def test_what_goes_wrong_is_one_sentence(tools: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tools/generate\.py: --samples 0 must be at least 1$"):
        sample(Samples({"prompts": "p", "samples": 0}, {}, [1]), model, tmp_path / "bad")
    with pytest.raises(
        UserError, match="none has no model to sample: it was run without `samples`; remove it"
    ):
        sample(ASKED, tmp_path / "absent", tmp_path / "none")
    sample(ASKED, model, tmp_path / "run")
    other = Samples({"prompts": "q.jsonl"}, {}, [1])
    with pytest.raises(
        UserError, match=r"has samples that were made with .*p\.jsonl.*remove samples\.json and"
    ):
        sample(other, model, tmp_path / "run")
